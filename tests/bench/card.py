"""The report card's figures on 50,000 x 1000 probabilities, against torch-uncertainty and netcal.

    make bench            prints the aims and the table in Markdown; --images, --classes, --rounds for a smaller run

torch-uncertainty (with the torchmetrics it is built on) gives each figure of the card that it has, netcal the ECE; they
agree with ours, or nothing is timed. The project's own environment has no torch-uncertainty: without it the comparison
is not measured, and the output says so. CPU time of one thread, alternatives in turns in one process, medians.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch

from compress_uq import metrics as m

SIZE, BATCH = (50_000, 1000), 5000
OTHERS = {"torch_uncertainty": "torch-uncertainty", "netcal": "netcal"}
"""Modules and the distributions that they come in."""
Runs = dict[str, Callable[[], float]]


def answers(images: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities float32 and labels, about three quarters of them right."""
    random = np.random.default_rng(0)
    p, y = np.empty((images, classes), np.float32), random.integers(0, classes, images)
    for start in range(0, images, BATCH):
        count = min(BATCH, images - start)
        logits = random.normal(scale=1.5, size=(count, classes)).astype(np.float32)
        logits[np.arange(count), y[start : start + count]] += random.normal(7, 3, count).astype(np.float32)
        p[start : start + count] = torch.softmax(torch.from_numpy(logits), 1).numpy()
    return p, y


def elsewhere(p: np.ndarray, y: np.ndarray) -> Runs:
    """What torch-uncertainty and netcal have of the card's figures."""
    import torch_uncertainty.metrics as tu
    from netcal.metrics import ECE
    from torch_uncertainty.metrics.sparsification import AUSE
    from torchmetrics import Accuracy
    from torchmetrics.classification import BinaryAUROC, MulticlassF1Score

    classes = p.shape[1]
    probabilities, labels = torch.from_numpy(p), torch.from_numpy(y)

    def of(metric: Callable[[], tu.Metric]) -> Callable[[], float]:
        def run() -> float:
            made = metric()
            made.update(probabilities, labels)
            return float(made.compute())

        return run

    def of_errors(metric: Callable[[], tu.Metric]) -> Callable[[], float]:
        def run() -> float:
            made, top = metric(), probabilities.max(1)
            made.update(1 - top.values, (top.indices != labels).long())
            return float(made.compute())

        return run

    return {
        "accuracy": of(lambda: Accuracy(task="multiclass", num_classes=classes)),
        "nll": of(tu.CategoricalNLL),
        "brier": of(lambda: tu.BrierScore(num_classes=classes)),
        "ece": lambda: float(ECE(15).measure(p, y)),
        "ause": of_errors(AUSE),
        "aurc": of(tu.AURC),
        "error_auroc": of_errors(BinaryAUROC),
        "accuracy_at_50": of(lambda: tu.RiskAtxCov(0.5)),
        "f1_macro": of(lambda: MulticlassF1Score(classes)),
    }


def milliseconds(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU time of each alternative, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if turn:
                times[name].append(1000 * (time.process_time() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def aims(points: float, intervals: float, others: float | None) -> list[str]:
    """A line for each aim: what was asked for, what was measured."""
    checks = [
        ("point figures: of torch-uncertainty and netcal", None if others is None else points / others, 0.1),
        (f"intervals of {m.bootstrap.RESAMPLES:,} resamples: of the point figures", intervals / points, 30.0),
    ]
    return [
        f"| {what} | - | {limit:.3f} | not measured |"
        if value is None
        else f"| {what} | {value:.3f} | {limit:.3f} | {'met' if value <= limit else 'missed'} |"
        for what, value, limit in checks
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=SIZE[0])
    parser.add_argument("--classes", type=int, default=SIZE[1])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    p, y = answers(given.images, given.classes)
    ours: dict[str, Callable[[], object]] = {
        "points": lambda: m.classification_metrics(p, y),
        "intervals": lambda: m.classification_figures(p, y),
    }
    missing = [package for module, package in OTHERS.items() if importlib.util.find_spec(module) is None]
    theirs = {} if missing else elsewhere(p, y)
    values = m.classification_metrics(p, y)
    for name in set(theirs) - {"ause"}:  # another quantity there
        other = theirs[name]()
        other = 1 - other if name == "accuracy_at_50" else other
        assert abs(other - values[name]) < 1e-3 * max(1.0, values[name]), (name, other, values[name])
    took = milliseconds({**ours, **theirs}, given.rounds)
    points, intervals = took["points"], took["intervals"]
    total = sum(took[name] for name in theirs) if theirs else None
    lines = [
        f"| aim, for {SIZE[0]:,} x {SIZE[1]} | measured | at most | |",
        "|---|---|---|---|",
        *aims(points, intervals, total),
        "",
        f"| {given.images:,} x {given.classes} probabilities, accuracy {values['accuracy']:.2f} | ms | times the card's |",
        "|---|---|---|",
        f"| the card's point figures | {points:.0f} | 1 |",
        f"| the same with intervals, {m.bootstrap.RESAMPLES:,} resamples | {intervals:.0f} | {intervals / points:.1f} |",
    ]
    if total:
        lines.append(f"| torch-uncertainty and netcal, all of those below | {total:.0f} | {total / points:.1f} |")
        lines += [f"| of it `{name}` | {took[name]:.0f} | {took[name] / points:.1f} |" for name in theirs]
    if (given.images, given.classes) != SIZE:
        lines = [f"The aims are for another size than {given.images:,} x {given.classes}.", "", *lines]
    if missing:
        lines = [f"The comparison was not measured: pip install {' '.join(missing)} and repeat.", "", *lines]
    sys.stdout.write("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
