"""A real tritonserver with the exported file behind it; `make serve-test` runs this, `make test` does not collect it.

The server is the one inside nvidia-pytriton, with its Python backend and no GPU; it lives in an environment of its own,
whose interpreter COMPRESS_UQ_SERVER names. The ONNX Runtime backend is not part of that package: its configuration is
read by Triton's own protobuf message, and served under the Python backend otherwise unchanged.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import compress_uq as cuq
from small_models import decided_model

ROOT = Path(__file__).resolve().parents[2]
SHAPE, LABELS = (1, 8, 8), ("left", "right", "straight on", "stop")
REQUESTS, CLIENTS, LARGEST = 300, 16, 16


def in_the_server(code: str) -> str:
    """Run a line in the environment of the server."""
    python = os.environ.get("COMPRESS_UQ_SERVER")
    if not python:
        pytest.skip("COMPRESS_UQ_SERVER names no Python with nvidia-pytriton: run `make serve-test`")
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run([python, "-c", code], env=clean, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """One model with decision rules, exported in two modes."""
    folder = tmp_path_factory.mktemp("files")
    model = decided_model(SHAPE, LABELS)
    for sampling in ("fixed", "seeded"):
        cuq.export_onnx(model, folder / f"{sampling}.onnx", sampling=sampling)
    return folder


@pytest.fixture(scope="module")
def repository(files, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    for name in ("fixed", "seeded"):
        options = cuq.TritonOptions(
            name=name, backend="python", max_batch_size=LARGEST, preferred_batch_sizes=(8, LARGEST), queue_delay=20_000
        )
        cuq.export_triton(files / f"{name}.onnx", folder, options=options)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(repository: Path, folder: Path):
    """A tritonserver; its address, or an AssertionError with the end of its log."""
    home = Path(in_the_server("import pytriton; print(list(pytriton.__path__)[0])")) / "tritonserver"
    version = in_the_server("import sys; print('%d.%d' % sys.version_info[:2])")
    backends = folder / "backends"
    shutil.copytree(home / "backends", backends)
    stub = home / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy2(stub, backends / "python")
    port, log = free_port(), folder / "server.log"
    arguments = (
        f"--http-address 127.0.0.1 --http-port {port} --allow-grpc false --allow-metrics false --exit-timeout-secs 5"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["PATH"] = f"{Path(os.environ['COMPRESS_UQ_SERVER']).parent}{os.pathsep}{environment['PATH']}"
    libraries = in_the_server("import sysconfig; print(sysconfig.get_config_var('LIBDIR'))")
    found = [environment.get("LD_LIBRARY_PATH"), str(home.parents[1] / "nvidia_pytriton.libs"), libraries]
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, found))
    with log.open("w") as stream:
        server = subprocess.Popen(
            [home / "bin" / "tritonserver", "--model-repository", repository, "--backend-directory", backends, *arguments.split()],
            stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=folder,
        )  # fmt: skip
    try:
        address = f"127.0.0.1:{port}"
        for _ in range(240):
            assert server.poll() is None, log.read_text()[-6000:]
            with contextlib.suppress(OSError):
                if call(address, "/v2/health/ready")[0] == 200:
                    break
            time.sleep(0.25)
        else:
            raise AssertionError("not ready within a minute: " + log.read_text()[-6000:])
        yield address
        assert server.poll() is None, log.read_text()[-6000:]
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@pytest.fixture(scope="module")
def server(repository, tmp_path_factory):
    with running(repository, tmp_path_factory.mktemp("server")) as address:
        yield address


def call(address: str, path: str, content: object = None) -> tuple[int, dict]:
    """Status and JSON of a GET, or of a POST of JSON."""
    return post(address, path, None if content is None else json.dumps(content).encode())


def post(address: str, path: str, body: bytes | None, headers: dict[str, str] | None = None) -> tuple[int, dict]:
    """Status and JSON of any request."""
    request = urllib.request.Request(f"http://{address}{path}", body, headers or {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            text, status = answer.read(), answer.status
    except urllib.error.HTTPError as error:
        text, status = error.read(), error.code
        error.close()
    return status, json.loads(text) if text else {}


def tensor(name: str, value: np.ndarray, kind: str) -> dict:
    return {"name": name, "shape": list(value.shape), "datatype": kind, "data": value.ravel().tolist()}


def question(images: np.ndarray, seed: np.ndarray | None = None) -> dict:
    seeds = [] if seed is None else [tensor("seed", seed[:, None], "INT64")]
    return {"inputs": [tensor("images", images, "FP32"), *seeds]}


def answers(content: dict) -> dict[str, np.ndarray]:
    return {o["name"]: np.array(o["data"]).reshape(o["shape"]) for o in content["outputs"]}


def pictures(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, *SHAPE)).astype(np.float32)


def counts(address: str, model: str) -> tuple[int, int, int, dict[int, int]]:
    """Requests, images and executions so far, and how many executions had each batch size."""
    found = call(address, f"/v2/models/{model}/stats")[1]["model_stats"][0]
    sizes = {b["batch_size"]: b["compute_infer"]["count"] for b in found["batch_stats"]}
    requests = found["inference_stats"]["success"]["count"]
    return requests, found["inference_count"], found["execution_count"], sizes


@pytest.mark.parametrize("model", ["fixed", "seeded"])
def test_concurrent_clients_get_the_answers_of_onnxruntime(files, server, model):
    predictor = cuq.OnnxPredictor(files / f"{model}.onnx", threads=1)
    before = counts(server, model)
    batches = [pictures(1 + i % 3, i) for i in range(REQUESTS)]
    seeds = [np.arange(len(b)) * 2**40 - i if model == "seeded" else None for i, b in enumerate(batches)]

    def ask(batch, seed):
        return call(server, f"/v2/models/{model}/infer", question(batch, seed))

    with ThreadPoolExecutor(CLIENTS) as pool:
        replies = list(pool.map(ask, batches, seeds))
    worst = doubt = 0.0
    for batch, seed, (status, content) in zip(batches, seeds, replies, strict=True):
        assert status == 200, content
        got, wanted = answers(content), predictor(batch, seed)
        assert set(got) == set(wanted._fields)
        doubt = max(doubt, float(wanted.mutual_information.max()))
        for name, value in wanted._asdict().items():
            served = got[name].reshape(value.shape)
            if value.dtype == np.float32:
                worst = max(worst, float(np.abs(served - value).max()))
            else:
                assert np.array_equal(served, value), name
    assert worst <= 1e-6
    assert doubt > 1e-3, "members that agree would hide a wrong order of images"
    *now, sizes = counts(server, model)
    requests, images, executions = (a - b for a, b in zip(now, before, strict=False))
    assert requests == REQUESTS
    assert images == sum(map(len, batches))
    assert executions < requests, "the dynamic batcher put nothing together"
    assert 3 < max(sizes) <= LARGEST
    summary = f"{model}: {requests} requests, {images} images, {executions} executions, largest batch {max(sizes)}"
    sys.stderr.write(f"\n{summary}, furthest from onnxruntime {worst:.1e}\n")


def test_the_server_knows_the_signature_and_the_names_of_classes(server):
    status, told = call(server, "/v2/models/seeded")
    assert status == 200
    assert [(i["name"], i["datatype"], i["shape"]) for i in told["inputs"]] == [
        ("images", "FP32", [-1, *SHAPE]), ("seed", "INT64", [-1, 1])
    ]  # fmt: skip
    assert {o["name"]: o["datatype"] for o in told["outputs"]} == {
        "probabilities": "FP32", "label": "INT64", "confidence": "FP32", "uncertainty": "FP32", "entropy": "FP32",
        "mutual_information": "FP32", "variance": "FP32", "ood_score": "FP32", "accepted": "BOOL", "prediction_set": "BOOL",
    }  # fmt: skip
    wanted = {"outputs": [{"name": "probabilities", "parameters": {"classification": 1}}, {"name": "label"}]}
    status, content = call(server, "/v2/models/fixed/infer", question(pictures(5, 0)) | wanted)
    assert status == 200, content
    named = {o["name"]: o["data"] for o in content["outputs"]}
    assert [text.split(":", 2)[-1] for text in named["probabilities"]] == [LABELS[i] for i in named["label"]]


def test_warm_up_ran_before_the_model_was_ready(server):
    status, told = call(server, "/v2/models/fixed/config")
    assert status == 200
    assert [w["batch_size"] for w in told["model_warmup"]] == [1, LARGEST]
    assert counts(server, "fixed")[3].keys() >= {1, LARGEST}


BAD = {
    "an image of another size": question(np.zeros((1, 1, 8, 9), np.float32)),
    "no batch axis": question(np.zeros(SHAPE, np.float32)),
    "more images than max_batch_size": question(np.zeros((LARGEST + 1, *SHAPE), np.float32)),
    "another type": {"inputs": [tensor("images", np.zeros((1, *SHAPE), np.int64), "INT64")]},
    "an unknown input": {"inputs": [*question(pictures(1, 0))["inputs"], tensor("mask", np.zeros((1, 1), np.int64), "INT64")]},
    "no input": {"inputs": []},
    "an unknown output": question(pictures(1, 0)) | {"outputs": [{"name": "logits"}]},
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_requests_are_refused_and_the_server_lives(files, server, what):
    status, content = call(server, "/v2/models/fixed/infer", BAD[what])
    assert 400 <= status < 500, content
    assert content["error"]
    alive(files, server)


def test_bad_seeds_models_and_text_are_refused(files, server):
    images = pictures(2, 0)
    for wrong in (
        question(images),
        {"inputs": [*question(images)["inputs"], tensor("seed", np.zeros(2, np.int64), "INT64")]},
        {"inputs": [*question(images)["inputs"], tensor("seed", np.zeros((3, 1), np.int64), "INT64")]},
        {"inputs": [*question(images)["inputs"], tensor("seed", np.zeros((2, 1), np.float32), "FP32")]},
    ):
        status, content = call(server, "/v2/models/seeded/infer", wrong)
        assert 400 <= status < 500, content
    assert 400 <= call(server, "/v2/models/nobody/infer", question(images))[0] < 500
    alive(files, server)


UNREADABLE = {
    "not JSON": b"{not json",
    "no inputs": b"{}",
    "numbers missing": json.dumps(
        {"inputs": [{"name": "images", "shape": [1, *SHAPE], "datatype": "FP32", "data": [0.0] * 63}]}
    ).encode(),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_what_triton_cannot_read_is_answered_and_the_server_lives(files, server, what):
    """Triton says 500 where its JSON reader fails, before any model is asked."""
    status, content = post(server, "/v2/models/fixed/infer", UNREADABLE[what])
    assert status in (400, 500)
    assert len(content["error"].splitlines()) == 1
    alive(files, server)


def test_one_bad_image_does_not_spoil_its_batch(files, server):
    batches = [pictures(1, i) for i in range(12)]
    batches[5][0, 0, 3, 3] = np.nan

    def ask(batch):
        data = batch.tobytes()
        described = {"name": "images", "shape": list(batch.shape), "datatype": "FP32"}
        head = json.dumps({"inputs": [described | {"parameters": {"binary_data_size": len(data)}}]}).encode()
        return post(server, "/v2/models/fixed/infer", head + data, {"Inference-Header-Content-Length": str(len(head))})

    with ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(ask, batches))
    status, content = replies.pop(5)
    assert 400 <= status < 500
    assert "NaN" in content["error"]
    assert {status for status, _ in replies} == {200}
    alive(files, server)


def alive(files: Path, server: str) -> None:
    status, content = call(server, "/v2/models/fixed/infer", question(pictures(2, 9)))
    assert status == 200
    wanted = cuq.OnnxPredictor(files / "fixed.onnx")(pictures(2, 9)).probabilities
    assert np.abs(answers(content)["probabilities"] - wanted).max() <= 1e-6


@pytest.mark.parametrize("model", ["fixed", "seeded"])
def test_the_example_client_runs(server, tmp_path, model):
    np.save(tmp_path / "images.npy", pictures(3, 1))
    command = [
        os.environ["COMPRESS_UQ_SERVER"],
        ROOT / "examples" / "triton_client.py",
        "--url",
        server,
        "--model",
        model,
    ]
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([*command, tmp_path / "images.npy"], env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.strip().splitlines()
    assert float(first.rsplit(" ", 1)[1]) <= 1e-6
    assert len(rest) == 3
    assert all(any(line.startswith(label + ": confidence") for label in LABELS) for line in rest)


def test_every_configuration_is_read_by_triton_itself(files, tmp_path):
    """ModelConfig of Triton's own protobuf files, by tritonclient."""
    for name, options in {
        "plain": cuq.TritonOptions(name="plain"),
        "all": cuq.TritonOptions(
            name="all", max_batch_size=64, preferred_batch_sizes=(8, 64), queue_delay=0, instances=2, instance_kind="gpu",
            tensorrt=True, tensorrt_cache='/var/"cache"',
        ),
        "python": cuq.TritonOptions(name="python", backend="python", instance_kind="cpu", warm_up=False),
    }.items():  # fmt: skip
        cuq.export_triton(files / "seeded.onnx", tmp_path, options=options)
        read = json.loads(in_the_server(
            "import json\n"
            "from google.protobuf import json_format, text_format\n"
            "from tritonclient.grpc.model_config_pb2 import ModelConfig\n"
            f"config = text_format.Parse(open({str(tmp_path / name / 'config.pbtxt')!r}).read(), ModelConfig())\n"
            "print(json_format.MessageToJson(config, preserving_proto_field_name=True))"
        ))  # fmt: skip
        assert (read["name"], read["backend"], read["max_batch_size"]) == (
            name,
            options.backend,
            options.max_batch_size,
        )
        assert read["input"][1] == {"name": "seed", "data_type": "TYPE_INT64", "dims": ["1"], "reshape": {}}
        assert len(read["output"]) == 10
        assert len(read.get("model_warmup", [])) == 2 * options.warm_up
        if options.tensorrt:
            (gpu,) = read["optimization"]["execution_accelerators"]["gpu_execution_accelerator"]
            assert gpu["parameters"]["trt_profile_max_shapes"] == "images:64x1x8x8,seed:64"
            assert gpu["parameters"]["trt_engine_cache_path"] == '/var/"cache"'


def test_triton_refuses_what_the_configuration_avoids(repository, tmp_path):
    """`dims: []` without a reshape: why (N,) is asked for as (N, 1)."""
    shutil.copytree(repository / "seeded", tmp_path / "repository" / "seeded")
    config = tmp_path / "repository" / "seeded" / "config.pbtxt"
    text = config.read_text()
    config.write_text(text.replace("  dims: [1]\n  reshape {\n    shape: []\n  }\n", "  dims: []\n", 1))
    assert config.read_text() != text
    with pytest.raises(AssertionError, match="must specify 'dims'"), running(tmp_path / "repository", tmp_path):
        pass


def test_a_hidden_folder_in_the_repository_keeps_the_server_from_starting(repository, tmp_path):
    """Why a model is put together outside the repository."""
    shutil.copytree(repository / "fixed", tmp_path / "repository" / "fixed")
    (tmp_path / "repository" / ".fixed.half" / "1").mkdir(parents=True)
    with pytest.raises(AssertionError, match="failed to load all models"), running(tmp_path / "repository", tmp_path):
        pass
