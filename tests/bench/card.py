"""The report card's figures on 50,000 x 1000 probabilities, against torch-uncertainty and netcal.

    python tests/bench/card.py        prints the table in Markdown

torch-uncertainty (with the torchmetrics it is built on) gives each figure of the card that it has, netcal the ECE; they
agree with ours, or nothing is timed. Without torch-uncertainty only the intervals are set against the point figures. CPU
time of one thread, alternatives in turns in one process, medians.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from netcal.metrics import ECE

from compress_uq import metrics as m

IMAGES, CLASSES, ROUNDS, BATCH = 50_000, 1000, 5, 5000
Runs = dict[str, Callable[[], float]]


def answers() -> tuple[np.ndarray, np.ndarray]:
    """Probabilities float32 and labels, about three quarters of them right."""
    random = np.random.default_rng(0)
    p, y = np.empty((IMAGES, CLASSES), np.float32), random.integers(0, CLASSES, IMAGES)
    for start in range(0, IMAGES, BATCH):
        logits = random.normal(scale=1.5, size=(BATCH, CLASSES)).astype(np.float32)
        logits[np.arange(BATCH), y[start : start + BATCH]] += random.normal(7, 3, BATCH).astype(np.float32)
        p[start : start + BATCH] = torch.softmax(torch.from_numpy(logits), 1).numpy()
    return p, y


def elsewhere(p: np.ndarray, y: np.ndarray) -> Runs:
    """What torch-uncertainty and netcal have of the card's figures."""
    import torch_uncertainty.metrics as tu
    from torch_uncertainty.metrics.sparsification import AUSE
    from torchmetrics import Accuracy
    from torchmetrics.classification import BinaryAUROC, MulticlassF1Score

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
        "accuracy": of(lambda: Accuracy(task="multiclass", num_classes=CLASSES)),
        "nll": of(tu.CategoricalNLL),
        "brier": of(lambda: tu.BrierScore(num_classes=CLASSES)),
        "ece": lambda: float(ECE(15).measure(p, y)),
        "ause": of_errors(AUSE),
        "aurc": of(tu.AURC),
        "error_auroc": of_errors(BinaryAUROC),
        "accuracy_at_50": of(lambda: tu.RiskAtxCov(0.5)),
        "f1_macro": of(lambda: MulticlassF1Score(CLASSES)),
    }


def milliseconds(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median CPU time of each alternative, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(ROUNDS + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if turn:
                times[name].append(1000 * (time.process_time() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Measure and print."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    p, y = answers()
    ours: dict[str, Callable[[], object]] = {
        "points": lambda: m.classification_metrics(p, y),
        "intervals": lambda: m.classification_figures(p, y),
    }
    theirs = elsewhere(p, y) if importlib.util.find_spec("torch_uncertainty") else {}
    values = m.classification_metrics(p, y)
    for name in set(theirs) - {"ause"}:  # another quantity there
        other = theirs[name]()
        other = 1 - other if name == "accuracy_at_50" else other
        assert abs(other - values[name]) < 1e-3 * max(1.0, values[name]), (name, other, values[name])
    took = milliseconds({**ours, **theirs})
    points, intervals = took["points"], took["intervals"]
    lines = [
        f"| {IMAGES:,} x {CLASSES} probabilities, accuracy {values['accuracy']:.2f} | ms | times the card's |",
        "|---|---|---|",
        f"| the card's point figures | {points:.0f} | 1 |",
        f"| the same with intervals, {m.bootstrap.RESAMPLES:,} resamples | {intervals:.0f} | {intervals / points:.1f} |",
    ]
    if theirs:
        total = sum(took[name] for name in theirs)
        lines.append(f"| torch-uncertainty and netcal, all of those below | {total:.0f} | {total / points:.1f} |")
        lines += [f"| of it `{name}` | {took[name]:.0f} | {took[name] / points:.1f} |" for name in theirs]
    sys.stdout.write("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
