"""The bet: calibrated uncertainty from 20 samples for no more than one pass of the old model.

    make bench            prints the table and rewrites docs/results/bench.md

ResNet-18 (small-image layout) at sparsity 0.6, dropout where `auto` puts it, T = 20, against one pass of the dense
model in ONNX Runtime and against the loop that people write: 20 eager passes of the dense model with dropout on. One
thread, alternatives in turns in one process, medians; a ratio's spread is the 10th to 90th percentile over rounds.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

import compress_uq as cuq
from compress_uq.runtime import session

SAMPLES, SPARSITY, SHAPE = 20, 0.6, (3, 32, 32)
ROUNDS = {1: 60, 32: 12}
PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "bench.md"


class EagerLoop:
    """Dropout switched on in a dense network, and T forward passes in a Python loop."""

    def __init__(self, dense: nn.Module) -> None:
        self.network = nn.Sequential(dense.conv1, dense.bn1, nn.ReLU()).eval()
        stages = [dense.layer1, dense.layer2, dense.layer3, dense.layer4]
        self.stages = [nn.Sequential(stage, nn.Dropout2d(0.1)).eval() for stage in stages]
        for stage in self.stages:
            stage[1].train()
        self.head = dense.linear

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        members = []
        for _ in range(SAMPLES):
            x = self.network(images)
            for stage in self.stages:
                x = stage(x)
            members.append(self.head(x.mean((2, 3))).softmax(1))
        return torch.stack(members).mean(0)


def build(folder: Path) -> tuple[nn.Module, float]:
    """Export the dense model and the compressed one; the latter's cost in dense passes by MACs."""
    torch.manual_seed(0)
    dense = cuq.build_model("compress-uq:resnet18", num_classes=10, input_shape=SHAPE).eval()
    dense.linear.weight.data *= 300  # random weights with opinions, so that members differ
    example = torch.randn(1, *SHAPE)
    cuq.export_onnx(cuq.fit_uncertainty(dense, method="msp", example_inputs=example), folder / "dense.onnx")
    pruned = cuq.prune(dense, example, sparsity=SPARSITY)
    method = cuq.uq.MCDropout(p=0.1, samples=SAMPLES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cuq.export_onnx(cuq.fit_uncertainty(pruned, method=method), folder / "compressed.onnx")
    return dense, method.plan(pruned.model, pruned.origin).ratio


def interleave(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """Milliseconds of every round of every alternative."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: np.array(values) for name, values in times.items()}


def row(batch: int, name: str, times: dict[str, np.ndarray]) -> str:
    """One line of the table."""
    ratio = times[name] / times["one dense pass"]
    low, middle, high = np.percentile(ratio, [10, 50, 90])
    return f"| {batch} | {name} | {np.median(times[name]):.2f} | {middle:.2f} | {low:.2f} to {high:.2f} |"


def main() -> None:
    """Measure, print, and rewrite the page."""
    torch.set_num_threads(1)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        dense, macs = build(Path(folder))
        sessions = {name: session(f"{folder}/{name}.onnx", threads=1) for name in ("dense", "compressed")}
        eager = EagerLoop(dense)
        for batch, rounds in ROUNDS.items():
            images = np.random.default_rng(batch).normal(size=(batch, *SHAPE)).astype(np.float32)
            tensor = torch.from_numpy(images)
            feed = {"images": images}
            times = interleave(
                {
                    "one dense pass": lambda feed=feed: sessions["dense"].run(None, feed),
                    f"compressed, T = {SAMPLES}": lambda feed=feed: sessions["compressed"].run(None, feed),
                },
                rounds,
            )
            slow = interleave(
                {
                    "one dense pass": lambda feed=feed: sessions["dense"].run(None, feed),
                    f"eager loop on the dense model, T = {SAMPLES}": lambda tensor=tensor: eager(tensor),
                },
                max(5, rounds // 10),
            )
            lines += [row(batch, name, times) for name in times]
            lines += [row(batch, name, slow) for name in list(slow)[1:]]
    versions = f"torch {torch.__version__}, onnxruntime {__import__('onnxruntime').__version__}"
    page = [
        "# Latency of 20 samples against one dense pass",
        "",
        "Command: `make bench`. ResNet-18 (small-image layout), sparsity 0.6, dropout from the first block of the last",
        "stage that fits the default budget, random weights (seed 0), float32, CPU, one thread, spinning off.",
        f"{versions}. Cost by MACs: {macs:.2f} of one dense pass.",
        "",
        "| batch | what | median ms | ratio to one dense pass | 10th to 90th percentile |",
        "|---|---|---|---|---|",
        *lines,
        "",
        "The eager loop drops after each of the four stages and was timed in fewer rounds, beside its own dense passes.",
        "",
    ]
    PAGE.write_text("\n".join(page))
    sys.stdout.write("\n".join(page))


if __name__ == "__main__":
    main()
