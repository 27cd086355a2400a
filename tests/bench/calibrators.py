"""Every calibrator, and `auto`, on the logits of public CIFAR-10 networks.

    python tests/bench/calibrators.py LOGITS DATA_ROOT [CHOICES]        prints the tables in Markdown

LOGITS is an .npz with an array (10000, 10) for each network, in the order of the test split of the CIFAR-10 at DATA_ROOT.
Fitted on a class-balanced fifth of the images and measured on the rest, for the fifths that seeds 0, 1, … choose: means.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter

import numpy as np
import torch

import compress_uq as cuq
from compress_uq.calibration import AUTO, CALIBRATORS, calibrated, choose

NETWORKS = {"vgg_15_BN_64": "VGG-15", "resnet_basic_110": "ResNet-110", "densenet_BC_100_12": "DenseNet-BC-100"}
PARTS = 5

Figures = dict[str, list[tuple[float, float]]]


def measured(logits: np.ndarray, labels: np.ndarray, choices: int) -> tuple[Figures, Counter[str]]:
    """NLL and ECE of every calibrator for every choice of the fifth, and how often `auto` took which."""
    found: Figures = {entry.name: [] for entry in CALIBRATORS}
    found[AUTO] = []
    taken: Counter[str] = Counter()
    for seed in range(choices):
        fitted_on, *others = cuq.data.divide(labels, PARTS, seed=seed)
        rest = sorted(index for part in others for index in part)
        for entry in CALIBRATORS:
            p = calibrated(entry.value.fit(logits[:, fitted_on], labels[fitted_on]), logits[:, rest])
            found[entry.name].append((cuq.metrics.nll(p, labels[rest]), cuq.metrics.ece(p, labels[rest])))
        name = choose(logits[:, fitted_on], labels[fitted_on]).name
        taken[name] += 1
        found[AUTO].append(found[name][-1])
    return found, taken


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("logits")
    parser.add_argument("data_root")
    parser.add_argument("choices", nargs="?", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)
    test = cuq.load_splits("cifar10", root=given.data_root, reserve=False).require("test", "the labels")
    labels = cuq.data.labels_of(test).numpy()
    columns, taken = [], Counter[str]()
    with np.load(given.logits) as file:
        for key in NETWORKS:
            found, took = measured(file[key][None], labels, given.choices)
            columns.append({name: np.mean(values, axis=0) for name, values in found.items()})
            taken += took
    lines = [
        "| | " + " | ".join(f"{name}: NLL | ECE" for name in NETWORKS.values()) + " |",
        "|---|" + "---|---|" * len(NETWORKS),
        *(
            f"| `{name}` | " + " | ".join(f"{column[name][0]:.4f} | {column[name][1]:.4f}" for column in columns) + " |"
            for name in columns[0]
        ),
        "",
        f"`auto` took {', '.join(f'`{name}` {count} times' for name, count in taken.most_common())}.",
    ]
    sys.stdout.write("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
