"""The zoo: every classification model of torchvision, pruned at sparsity 0.5, checked, saved, loaded and exported.

    python tests/bench/zoo.py [NAMES...] [--out docs/results/zoo.md] [--lines zoo.jsonl] [--limit 1800]

Each model runs in two processes of its own. The first prunes it, compares it with the slow oracle (float64; float32
above 100 million parameters), trains a step, and saves structure and weights; the second rebuilds it from these, compares
its answers bit by bit, and exports it with MC dropout. A model's results are one line of the JSON lines file, written
when it is done; models that have a line are not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

import compress_uq as cuq
from compress_uq.errors import CompressUQError, UncertaintyError
from compress_uq.models import versioned
from compress_uq.structure import describe_structure, rebuild

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from oracle import masked, randomise, relative_difference  # noqa: E402

SPARSITY = 0.5
FIXED_SIZES = {"vit": 224, "maxvit": 224, "inception": 299}
SMALLEST = 64
DOUBLE_UP_TO = 100_000_000
MC_DROPOUT = cuq.uq.MCDropout(p=0.1, samples=4, sampling_budget=2.0)
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}


def image_side(name: str) -> int:
    """The smallest side that an architecture allows and that leaves something to pool."""
    return next((size for prefix, size in FIXED_SIZES.items() if name.startswith(prefix)), SMALLEST)


def build(name: str) -> nn.Module:
    """A dense model, random."""
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return cuq.build_model(f"torchvision:{name}", num_classes=1000, options=options)


def prune(name: str, folder: Path) -> dict[str, Any]:
    """The first process."""
    torch.manual_seed(0)
    model = randomise(build(name))
    parameters = sum(p.numel() for p in model.parameters())
    dtype = torch.float64 if parameters <= DOUBLE_UP_TO else torch.float32
    side = image_side(name)
    images = torch.randn(2, 3, side, side, dtype=dtype)
    model = model.to(dtype)
    start = time.process_time()
    result = cuq.prune(model, images, sparsity=SPARSITY)
    seconds = time.process_time() - start
    layers = {n: m.weight.shape for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    row = {
        "side": side, "dtype": str(dtype).removeprefix("torch."), "seconds": round(seconds, 2),
        "parameters": [parameters, result.after.parameters], "macs": result.after.macs / result.before.macs,
        "layers": len(layers),
        "whole": [n for n, shape in layers.items() if result.model.get_submodule(n).weight.shape == shape],
    }  # fmt: skip
    with torch.no_grad():
        got = result.model(images)
        row["moved"] = relative_difference(got, model(images))
        model = masked(model, images, {layer.name: layer.removed for layer in result.layers})
        row["oracle"] = relative_difference(got, model(images))
    row["oracle_holds"] = row["oracle"] <= TOLERANCE[row["dtype"]] and row["moved"] > 100 * TOLERANCE[row["dtype"]]
    del model

    pruned, images = result.model.float(), images.float()
    outputs = pruned.train()(images)
    several = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(output.square().mean() for output in several).backward()
    row["trains"] = all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in pruned.parameters())
    pruned.zero_grad()
    pruned.eval()
    (folder / "structure.json").write_text(json.dumps(describe_structure(build(name), pruned)))
    with torch.no_grad():
        answers = pruned(images)
    save_file({f"model.{k}": v.contiguous() for k, v in pruned.state_dict().items()}, folder / "model.safetensors")
    save_file({"images": images, "answers": answers}, folder / "answers.safetensors")
    return row


def export(name: str, folder: Path) -> dict[str, Any]:
    """The second process."""
    model = rebuild(build(name), json.loads((folder / "structure.json").read_text()))
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict(versioned(model, {k.removeprefix("model."): v for k, v in weights.items()}))
    kept = load_file(folder / "answers.safetensors")
    with torch.no_grad():
        row: dict[str, Any] = {"loads": torch.equal(model.eval()(kept["images"]), kept["answers"])}
    try:
        row |= exported(model, kept["images"][:1], folder / "model.onnx")
    except CompressUQError as error:
        row["onnx_refused"] = str(error)
    return row


def exported(model: nn.Module, example: torch.Tensor, path: Path) -> dict[str, Any]:
    """MC dropout of a few members where there is a place for it; otherwise one pass."""
    note = None
    try:
        uncertain = cuq.fit_uncertainty(model, method=MC_DROPOUT, example_inputs=example)
    except UncertaintyError as error:
        note = str(error)
        uncertain = cuq.fit_uncertainty(model, method="msp", example_inputs=example)
    written = cuq.export_onnx(uncertain, path, layout=uncertain.members.layouts[0])
    return {
        "method": uncertain.method.name, "samples": uncertain.members.count, "bytes": written.size_bytes,
        "parity": written.gates["parity"], "no_dropout": note,
    }  # fmt: skip


STEPS: dict[str, Callable[[str, Path], dict[str, Any]]] = {"prune": prune, "export": export}


def child(step: str, name: str, folder: Path) -> None:
    """One step in this process; its row is the last line of stdout."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            row = STEPS[step](name, folder)
        except CompressUQError as error:
            row = {f"{step}_refused": str(error)}
    print(json.dumps(row))  # noqa: T201


def run(name: str, limit: int) -> dict[str, Any]:
    """Both steps of one model, each in a process of its own."""
    row: dict[str, Any] = {"name": name}
    with tempfile.TemporaryDirectory() as folder:
        for step in STEPS:
            command = [sys.executable, __file__, "--step", step, "--folder", folder, name]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=True)
                row |= json.loads(done.stdout.splitlines()[-1])
            except subprocess.TimeoutExpired:
                row[f"{step}_failed"] = f"not done after {limit} s"
            except subprocess.CalledProcessError as error:
                last = error.stderr.strip().splitlines()
                row[f"{step}_failed"] = last[-1][:300] if last else f"ended with {error.returncode}"
            if f"{step}_failed" in row or f"{step}_refused" in row:
                break
    return row


def mark(row: dict[str, Any], key: str) -> str:
    """A cell of a step that either holds or does not."""
    return {True: "yes", False: "**no**", None: "-"}[row.get(key)]


def table_row(row: dict[str, Any]) -> str:
    """One line of the page."""
    trouble = next((row[k] for k in row if k.endswith(("_refused", "_failed"))), None)
    if "parameters" not in row:
        return f"| {row['name']} | {trouble} |" + " |" * 9
    dense, pruned = (f"{count / 1e6:.2f}" for count in row["parameters"])
    onnx = trouble or "-"
    if "method" in row:
        onnx = f"{row['method']}, {row['samples']}: {row['parity'].replace('largest difference ', '')}"
    oracle = f"{row['oracle']:.0e}" + ("" if row["oracle_holds"] else " **fails**")
    return (
        f"| {row['name']} | {row['side']} | {dense} | {pruned} | {row['macs']:.3f} | "
        f"{row['layers'] - len(row['whole'])}/{row['layers']} | {row['seconds']:.1f} | "
        f"{oracle} ({row['dtype']}) | {mark(row, 'trains')} | {mark(row, 'loads')} | {onnx} |"
    )


def page(rows: list[dict[str, Any]], wanted: int) -> str:
    """The results as Markdown."""
    pruned = sum("parameters" in r and r["oracle_holds"] for r in rows)
    shipped = sum("method" in r for r in rows)
    notes = [
        f"- {r['name']}: no dropout, exported with {r['method']}: {r['no_dropout']}"
        for r in rows
        if r.get("no_dropout")
    ]
    head = f"""# The zoo: torchvision's classification models at sparsity 0.5

Command: `python tests/bench/zoo.py`. torch {torch.__version__}, torchvision {torchvision.__version__}, CPU, one thread,
1000 classes, random weights (seed 0) with randomised norms, criterion L1, `round_to=8`. Models run so far: {len(rows)} of
{wanted}. Pruned, and equal to the oracle: {pruned}. Loaded, exported with MC dropout and through every gate: {shipped}.

- **layers**: convolutions and linear layers that lost channels, of all; the classifier loses inputs, its outputs stay.
- **CPU s**: processor seconds of `prune`, with the copy and both cost counts.
- **oracle**: largest difference to a dense copy in which all that reads a removed channel reads zeros, as a share of the
  largest logit. Layer norm takes its statistics over kept channels there, and queries, keys and values of removed places
  are zero. It must be within 1e-9 in float64, 1e-4 in float32 (models above 100 million parameters).
- **trains**: forward and backward in training mode, every parameter with a finite gradient, auxiliary heads included.
- **loads**: rebuilt from structure and weights in a fresh process; answers equal bit by bit.
- **ONNX**: method, members (MC dropout: 4 that cost two dense passes at most), and the largest difference of any output to torch with the same masks.

| model | side | M params | pruned | MACs | layers | CPU s | oracle | trains | loads | ONNX |
|---|---|---|---|---|---|---|---|---|---|---|
"""
    return head + "\n".join([*map(table_row, rows), "", *notes]).rstrip() + "\n"


def main() -> None:
    """Run what has no result yet, and write the page after each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "zoo.md")
    parser.add_argument("--lines", type=Path, default=Path("zoo.jsonl"))
    parser.add_argument("--limit", type=int, default=1800, help="seconds for each process")
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        child(given.step, given.names[0], given.folder)
        return
    known = torchvision.models.list_models(module=torchvision.models)
    lines = given.lines.read_text().splitlines() if given.lines.exists() else []
    rows = {row["name"]: row for row in map(json.loads, lines)}
    for name in given.names or known:
        if name in rows:
            continue
        rows[name] = run(name, given.limit)
        with given.lines.open("a") as file:
            file.write(json.dumps(rows[name]) + "\n")
        given.out.write_text(page([rows[n] for n in known if n in rows], len(known)))
        sys.stdout.write(table_row(rows[name]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
