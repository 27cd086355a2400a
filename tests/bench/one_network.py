"""Methods and scores that need no training, on the network of a bundle: what each adds to the same weights.

    python tests/bench/one_network.py BUNDLE DATA [--data-root DIR] [--ood SET]... [--methods M,M] [--scores S,S]

Prints Markdown. The bundle has one network; members that it samples stand as they were fitted, dropout of another
method is not trained in. All are calibrated by a temperature on the fifth of the test split that calibrates, and
measured on the rest.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch

import compress_uq as cuq

MEASURES = ("accuracy", "nll", "ece", "ause", "error_auroc")


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
    sys.stdout.write("| method | OOD score | " + " | ".join((*MEASURES, *(Path(s).name for s in given.ood))) + " |\n")
    sys.stdout.write("|" + "---|" * (2 + len(MEASURES) + len(given.ood)) + "\n")
    for method, score in [(first, plain), *((first, score) for score in scores), *((name, plain) for name in others)]:
        if method == bundle.model.method.name and bundle.model.members.count > 1:
            model = bundle.model
        else:
            model = cuq.fit_uncertainty(copy.deepcopy(network), splits, method=method)
        model = cuq.choose_scores(cuq.calibrate(model, splits), splits, ood_score=score)
        found = cuq.evaluate(model, splits)
        figures = [found.metrics[measure] for measure in MEASURES] + [ood["auroc"] for ood in found.ood.values()]
        cells = [f"`{method}`", f"`{score}`", *(f"{f.value:.4f} [{f.low:.4f}, {f.high:.4f}]" for f in figures)]
        sys.stdout.write(f"| {' | '.join(cells)} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
