"""Methods and scores that need no training, on the network of a bundle: what each adds to the same weights.

    python tests/bench/one_network.py BUNDLE DATA [--data-root DIR] [--ood SET]... [--methods M,M] [--scores S,S]

Prints Markdown. The last column is the AUSE of a row less that of the first, on the same 1,000 resamples of the images:
its interval holds 0 where the two rank errors alike. The bundle has one network; members that it samples stand as they were fitted, dropout of another
method is not trained in. All are calibrated by a temperature on the fifth of the test split that calibrates, and
measured on the rest.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import numpy as np
import torch

import compress_uq as cuq
from compress_uq.report import Evaluation

MEASURES = ("accuracy", "nll", "ece", "ause", "error_auroc")


def difference_of_ause(one: Evaluation, other: Evaluation) -> str:
    """AUSE of the other less that of the one, with its 95 % percentile interval over resampled images."""
    random, count = np.random.default_rng(0), len(one.labels)
    rows = [np.arange(count), *(random.integers(0, count, count) for _ in range(1000))]
    drawn = [
        cuq.metrics.ause(of.prediction.probabilities[chosen], of.labels[chosen], of.prediction.uncertainty[chosen])
        for of in (other, one)
        for chosen in rows
    ]
    value, *resampled = np.subtract(drawn[: len(rows)], drawn[len(rows) :])
    low, high = np.percentile(resampled, [2.5, 97.5])
    return f"{value:+.5f} [{low:+.5f}, {high:+.5f}]"


def main() -> None:
    """Measure and print, row by row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("data")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--ood", action="append", default=[])
    parser.add_argument("--methods", default="msp,mc-dropout")
    parser.add_argument("--scores", default="entropy", help="of OOD, each with the first method")
    given = parser.parse_args()
    torch.set_num_threads(1)
    bundle = cuq.Bundle.load(given.bundle)
    origin, (network,) = bundle.origin, bundle.model.members.networks
    splits = cuq.load_splits(given.data, root=given.data_root, mean=origin.mean, std=origin.std, ood=given.ood)
    (first, *others), (plain, *scores) = given.methods.split(","), given.scores.split(",")
    columns = ("method", "OOD score", *MEASURES, *(Path(s).name for s in given.ood), "AUSE less the first")
    sys.stdout.write(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n")
    begin = None
    for method, score in [(first, plain), *((first, score) for score in scores), *((name, plain) for name in others)]:
        if method == bundle.model.method.name and bundle.model.members.count > 1:
            model = bundle.model
        else:
            model = cuq.fit_uncertainty(copy.deepcopy(network), splits, method=method)
        model = cuq.choose_scores(cuq.calibrate(model, splits), splits, ood_score=score)
        found = cuq.evaluate(model, splits)
        figures = [found.metrics[measure] for measure in MEASURES] + [ood["auroc"] for ood in found.ood.values()]
        cells = [f"`{method}`", f"`{score}`", *(f"{f.value:.4f} [{f.low:.4f}, {f.high:.4f}]" for f in figures)]
        begin = begin or found
        cells.append("" if found is begin else difference_of_ause(begin, found))
        sys.stdout.write(f"| {' | '.join(cells)} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
