"""The bet: calibrated uncertainty from 20 samples for no more than one pass of the old model.

    make bench            prints the figures and rewrites their part of docs/results/bench.md

ResNet-18 (small-image layout) at sparsity 0.6, dropout where `auto` puts it, T = 20, in float32 and int8 and in both
layouts, beside one pass of the dense model in ONNX Runtime, the loop that people write (20 eager passes of the dense
model with dropout on), and the floor: the pruned trunk once and its tail 20 times, as plain graphs. One thread,
alternatives in turns in one process; ratios are medians over rounds with their 10th to 90th percentile. On a machine
that other programs share pass --clock cpu.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

import compress_uq as cuq

SAMPLES, SPARSITY, SHAPE = 20, 0.6, (3, 32, 32)
PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "bench.md"
TITLE = "# Latency of 20 samples against one dense pass"
DENSE, EAGER = "dense, one pass", "dense, eager loop"


def measure(rounds: int, clock: str) -> tuple[cuq.Benchmark, float]:
    """The rows, and the cost by MACs in dense passes."""
    torch.manual_seed(0)
    dense = cuq.build_model("compress-uq:resnet18", num_classes=10, input_shape=SHAPE).eval()
    dense.linear.weight.data *= 300  # random weights with opinions, so that members differ
    pruned = cuq.prune(dense, torch.randn(1, *SHAPE), sparsity=SPARSITY)
    method = cuq.uq.MCDropout(p=0.1, samples=SAMPLES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = cuq.fit_uncertainty(pruned, method=method)
    splits = cuq.Splits(calibration=TensorDataset(torch.randn(128, *SHAPE), torch.arange(128) % 10))
    result = cuq.benchmark(
        model, dense=dense, precisions=("fp32", "int8"), splits=splits, rounds=rounds, clock=clock
    )  # fmt: skip
    return result, method.plan(pruned.model, pruned.origin).ratio


def aims(result: cuq.Benchmark) -> list[str]:
    """A line for each aim: what was asked for, what was measured."""
    rows = [row for row in result.rows if row.name.startswith("compressed")]

    def best(precision: str, batch: int) -> cuq.measuring.Timing:
        found = [row for row in rows if row.precision == precision and row.batch == batch]
        return min(found, key=lambda row: row.to_dense.median)

    checks = [
        (f"{precision}, batch {batch}: of one dense pass", best(precision, batch).to_dense.median, limit)
        for precision, limit in (("fp32", 0.8), ("int8", 0.45))
        for batch in (1, 32)
    ]
    one = best("fp32", 1)
    checks.append(("fp32, batch 1: of the eager loop", one.p50_ms / result.find(EAGER, 1).p50_ms, 1 / 50))
    checks.append(("fp32, batch 32: of the floor", best("fp32", 32).to_floor.median, 1.1))
    most = max(row.peak_bytes for row in rows)
    checks.append(("peak memory of a process, GB", most / 1e9, 0.9))
    return [
        f"| {what} | {value:.3f} | {limit:.3f} | {'met' if value <= limit else 'missed'} |"
        for what, value, limit in checks
    ]


def main() -> None:
    """Measure, print, and rewrite this part of the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--clock", default="wall")
    given = parser.parse_args()
    result, macs = measure(given.rounds, given.clock)
    part = [
        TITLE,
        "",
        "Command: `make bench`. ResNet-18 (small-image layout), sparsity 0.6, dropout from the first block of the last",
        "stage that fits the default budget, random weights (seed 0), CPU, one thread, spinning off.",
        f"Cost by MACs: {macs:.2f} of one dense pass. Each ratio is a median over rounds with its 10th to 90th percentile.",
        "With the clock `cpu` milliseconds are those that the one thread worked; see [Benchmark](../benchmark.md).",
        "",
        "| aim, of the cheaper layout | measured | at most | |",
        "|---|---|---|---|",
        *aims(result),
        "",
        result.to_markdown(),
    ]
    before, _, after = PAGE.read_text().partition(TITLE)
    rest = after.partition("\n# ")
    PAGE.write_text(before + "\n".join(part) + rest[1] + rest[2])
    sys.stdout.write("\n".join(part))


if __name__ == "__main__":
    main()
