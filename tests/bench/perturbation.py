"""Members of one dense model, pruned alike or under noise on the scores: what the noise is worth.

    python tests/bench/perturbation.py digits                      prints the table in Markdown; minutes
    python tests/bench/perturbation.py fashion-mnist DATA_ROOT     half an hour of one core

A small CNN, pruned by 0.6 with l1 and fine-tuned with the dense model as its teacher; means over seeds 0, 1 and 2.
Temperature scaling on Fashion-MNIST, with MNIST out of distribution, and none on digits.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import Subset

import compress_uq as cuq


@dataclass(frozen=True)
class Setting:
    """How networks are trained on a data set."""

    arch: cuq.Architecture
    dense_epochs: int
    epochs: tuple[int, ...]
    """Of the fine-tuning, by seed."""
    members: int
    noises: tuple[float, ...]
    calibration: str


SETTINGS = {
    "digits": Setting(
        cuq.Architecture("compress-uq:cnn", 10, (1, 8, 8)), 12, (15, 15, 15), 5, (0.0, 0.3, 1.0, 3.0), "none"
    ),
    "fashion-mnist": Setting(
        cuq.Architecture("compress-uq:cnn", 10, (1, 28, 28), {"widths": [12, 24], "hidden": [48]}),
        8, (10, 8, 8), 4, (0.0, 1.0), "temperature",
    ),
}  # fmt: skip


def data(name: str, root: str) -> cuq.Splits:
    """Splits, of Fashion-MNIST the first images of each."""
    splits = cuq.load_splits(name, root=root, reserve=False, ood=["mnist"] if name == "fashion-mnist" else ())
    splits = cuq.hold_out(splits)
    if name == "digits":
        return splits

    def first(part: str, count: int) -> Subset:
        return Subset(splits.require(part, "the comparison"), range(count))

    return replace(
        splits, train=first("train", 4000), calibration=first("calibration", 1500), test=first("test", 5000),
        ood={name: Subset(dataset, range(2500)) for name, dataset in splits.ood.items()},
    )  # fmt: skip


def figures(tuned: list[object], splits: cuq.Splits, setting: Setting) -> list[float]:
    """Accuracy, NLL, AUSE and OOD AUROC of one network or of an ensemble."""
    model = cuq.fit_uncertainty(
        tuned if len(tuned) > 1 else tuned[0], splits, method="ensemble" if len(tuned) > 1 else "msp"
    )
    found = cuq.evaluate(cuq.calibrate(model, splits, method=setting.calibration), splits).metrics
    return [found[name].value for name in ("accuracy", "nll", "ause", "ood_auroc")]


def main() -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=SETTINGS)
    parser.add_argument("data_root", nargs="?", default="data")
    given = parser.parse_args()
    torch.set_num_threads(1)
    setting, splits = SETTINGS[given.name], data(given.name, given.data_root)
    rows: dict[str, list[list[float]]] = {}
    for seed, epochs in enumerate(setting.epochs):
        how = {"lr": 0.05, "device": "cpu"}
        dense = cuq.finetune(setting.arch.build(seed), splits, epochs=setting.dense_epochs, seed=seed, **how).model
        for noise in setting.noises:
            tuned = []
            for number in range(setting.members):
                pruned = cuq.prune(
                    dense, splits.example(), sparsity=0.6, round_to=1, splits=splits, seed=seed + number,
                    perturbation=noise if number else 0.0,
                )  # fmt: skip
                tuned.append(
                    cuq.finetune(pruned, splits, teacher=dense, method="msp", epochs=epochs, seed=seed + number, **how)
                )
            if noise == 0:
                rows.setdefault("one network", []).append(figures(tuned[:1], splits, setting))
            rows.setdefault(f"`perturbation` {noise}", []).append(figures(tuned, splits, setting))
    lines = [f"| {setting.members} members of one model | accuracy | NLL | AUSE | OOD AUROC |", "|---|---|---|---|---|"]
    for name, values in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{v:.4f}" for v in np.mean(values, axis=0)) + " |")
    sys.stdout.write("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
