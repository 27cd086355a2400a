"""How well T fixed masks stand for many: the masks that `mc-dropout` chooses beside draws that nobody chose.

    python tests/bench/fidelity.py BUNDLE DATA [--data-root DIR] [--samples 10,20] [--draws 8]

Prints Markdown. The bundle's network and its rate of dropout; masks are chosen on the fifth of the test split that
calibrates. The reference is 200 masks of another seed; Spearman correlation with its mutual information and mean
absolute difference from its mean probabilities are of the other images. Nothing is calibrated.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import compress_uq as cuq
from compress_uq.metrics import spearman
from compress_uq.predict import collect_predictions
from compress_uq.types import Prediction
from compress_uq.uq import MCDropout

REFERENCE, REFERENCE_SEED = 200, 12_345


def main() -> None:
    """Measure and print, row by row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("data")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--samples", default="10,20")
    parser.add_argument("--draws", type=int, default=8)
    given = parser.parse_args()
    torch.set_num_threads(1)
    bundle = cuq.Bundle.load(given.bundle)
    splits = cuq.load_splits(given.data, root=given.data_root, mean=bundle.origin.mean, std=bundle.origin.std)
    (network,), sites = bundle.model.members.networks, bundle.model.members.sites
    method = MCDropout(p=sites[0].p, at=tuple(site.module for site in sites), sampling_budget=math.inf)

    def answers(method: MCDropout) -> Prediction:
        model = cuq.fit_uncertainty(copy.deepcopy(network), splits, method=method)
        return collect_predictions(model, splits.require("test", "measuring"))[0]

    wanted = answers(replace(method, samples=REFERENCE, seed=REFERENCE_SEED, candidates=1))
    sys.stdout.write("| masks | Spearman, chosen | drawn: median, lowest | difference of p, chosen | drawn: median |\n")
    sys.stdout.write("|---:|---:|---:|---:|---:|\n")
    for count in map(int, given.samples.split(",")):
        drawn = [replace(method, samples=count, seed=n, candidates=1) for n in range(1, given.draws + 1)]
        found = [answers(replace(method, samples=count)), *map(answers, drawn)]
        ranks = [spearman(each.mutual_information, wanted.mutual_information) for each in found]
        far = [float(np.abs(each.probabilities - wanted.probabilities).mean()) for each in found]
        sys.stdout.write(
            f"| {count} | {ranks[0]:.4f} | {np.median(ranks[1:]):.4f}, {min(ranks[1:]):.4f} "
            f"| {far[0]:.5f} | {np.median(far[1:]):.5f} |\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
