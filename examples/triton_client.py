"""Ask a model that `compress-uq export BUNDLE --to triton` made, on a running server, in two ways.

    python triton_client.py --url localhost:8000 --model classifier image.npy

`image.npy` holds images as the model takes them: (N, C, H, W) float32, normalised; without a file random ones are sent.
The first way is plain JSON of the Open Inference Protocol (version 2), which KServe and MLServer speak too; it needs
nothing but Python and numpy. The second is tritonclient (`pip install "tritonclient[http]"`), which sends tensors as
bytes; it is skipped where it is not installed.
"""

from __future__ import annotations

import argparse
import json
import urllib.error
import urllib.request
from typing import Any

import numpy as np

try:
    import tritonclient.http as triton
except ImportError:
    triton = None

TYPES = {"FP32": np.float32, "INT64": np.int64, "UINT8": np.uint8, "BOOL": np.bool_}


def describe(url: str, model: str) -> dict[str, Any]:
    """The model's inputs and outputs, from the server."""
    with urllib.request.urlopen(f"http://{url}/v2/models/{model}", timeout=30) as answer:
        return json.load(answer)


def ask_with_json(url: str, model: str, inputs: dict[str, np.ndarray], types: dict[str, str]) -> dict[str, np.ndarray]:
    """One request of the Open Inference Protocol in plain JSON; outputs by name."""
    tensors = [
        {"name": name, "shape": value.shape, "datatype": types[name], "data": value.ravel().tolist()}
        for name, value in inputs.items()
    ]
    body = json.dumps({"inputs": tensors}).encode()
    request = urllib.request.Request(
        f"http://{url}/v2/models/{model}/infer", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            outputs = json.load(answer)["outputs"]
    except urllib.error.HTTPError as error:
        raise SystemExit(f"the server refuses: {error.code} {error.read().decode()}") from error
    return {o["name"]: np.array(o["data"], TYPES[o["datatype"]]).reshape(o["shape"]) for o in outputs}


def ask_with_tritonclient(
    url: str, model: str, inputs: dict[str, np.ndarray], types: dict[str, str]
) -> dict[str, np.ndarray]:
    """The same request, tensors as bytes."""
    with triton.InferenceServerClient(url) as client:
        tensors = []
        for name, value in inputs.items():
            tensors.append(triton.InferInput(name, list(value.shape), types[name]))
            tensors[-1].set_data_from_numpy(value)
        answer = client.infer(model, tensors)
        return {output["name"]: answer.as_numpy(output["name"]) for output in answer.get_response()["outputs"]}


def class_names(url: str, model: str, images: np.ndarray, seeds: np.ndarray | None, types: dict[str, str]) -> list[str]:
    """The most probable class of each image by name, from the server's own label file."""
    with triton.InferenceServerClient(url) as client:
        tensors = [triton.InferInput("images", list(images.shape), types["images"])]
        tensors[0].set_data_from_numpy(images)
        if seeds is not None:
            tensors.append(triton.InferInput("seed", list(seeds.shape), "INT64"))
            tensors[-1].set_data_from_numpy(seeds)
        wanted = [triton.InferRequestedOutput("probabilities", class_count=1)]
        found = client.infer(model, tensors, outputs=wanted).as_numpy("probabilities")
    return [row.decode().split(":", 2)[-1] for row in found.reshape(-1)]  # probability:index:name


def main() -> None:
    """Send a batch both ways and print what comes back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="?", help="a .npy file; random images without it")
    parser.add_argument("--url", default="localhost:8000")
    parser.add_argument("--model", default="classifier")
    parser.add_argument("--seed", type=int, default=0, help="of the first image, for a model with seeds")
    given = parser.parse_args()

    described = describe(given.url, given.model)
    types = {tensor["name"]: tensor["datatype"] for tensor in described["inputs"]}
    shape = described["inputs"][0]["shape"][1:]
    if given.images:
        images = np.load(given.images)
    else:
        images = np.random.default_rng(0).normal(size=(4, *shape))
    inputs = {"images": np.ascontiguousarray(images, dtype=TYPES[types["images"]])}
    if "seed" in types:
        # A number per image, as (N, 1): a server that batches wants an axis behind the batch.
        inputs["seed"] = np.arange(given.seed, given.seed + len(images), dtype=np.int64)[:, None]

    answers = ask_with_json(given.url, given.model, inputs, types)
    names = None
    if triton is not None:
        again = ask_with_tritonclient(given.url, given.model, inputs, types)
        furthest = max(float(np.abs(again[name] - answers[name]).max()) for name in ("probabilities", "uncertainty"))
        print(f"JSON and bytes differ by at most {furthest:.1e}")
        names = class_names(given.url, given.model, inputs["images"], inputs.get("seed"), types)
    for row, label in enumerate(answers["label"][:, 0]):
        confidence, uncertainty = answers["confidence"][row, 0], answers["uncertainty"][row, 0]
        verdict = "" if "accepted" not in answers else ", accepted" if answers["accepted"][row, 0] else ", not accepted"
        print(f"{names[row] if names else label}: confidence {confidence:.3f}, uncertainty {uncertainty:.3f}{verdict}")


if __name__ == "__main__":
    main()
