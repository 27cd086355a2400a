"""Decision rules on the probabilities of public networks: what they promise, and what is measured.

    python tests/bench/decision_rules.py PREDICTIONS.npz …        prints the table in Markdown

Each file holds `predictions` (N, K), probabilities, and `ground_truth` (N,). A temperature and the rules are fitted on a
class-balanced half and measured on the other, for the halves that seeds 0 to 19 choose: means.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

import compress_uq as cuq
from compress_uq.calibration import CALIBRATORS, calibrated
from compress_uq.decisions import ACCEPTANCE_RULES, SET_RULES

RISK, COVERAGE, DELTA, SPLITS = 0.05, 0.9, 0.05, 20


def measured(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    """The column's head, and the mean figures of each rule."""
    with np.load(path) as file:
        logits, labels = np.log(np.maximum(file["predictions"], 1e-12))[None], file["ground_truth"]
    found: dict[str, list[list[float]]] = {"sgr": [], **{name: [] for name in SET_RULES.names}}
    for seed in range(SPLITS):
        first, second = cuq.data.take_class_balanced(torch.from_numpy(labels), 0.5, seed=seed)
        p = calibrated(CALIBRATORS["temperature"].fit(logits[:, first], labels[first]), logits)
        uncertainty, wrong = 1 - p.max(1), p.argmax(1) != labels
        rule = ACCEPTANCE_RULES["sgr"].fit(uncertainty[first], wrong[first], risk=RISK, delta=DELTA)
        accepted = rule(torch.from_numpy(uncertainty[second])).numpy()
        found["sgr"].append([accepted.mean(), wrong[second][accepted].mean()])
        for name in SET_RULES.names:
            sets = SET_RULES[name].fit(p[first], labels[first], coverage=COVERAGE)(torch.from_numpy(p[second])).numpy()
            covered = cuq.metrics.set_coverage(sets, labels[second])
            found[name].append([covered, cuq.metrics.mean_set_size(sets), float((sets.sum(1) == 1).mean())])
    head = f"{path.stem}, accuracy {(logits[0].argmax(1) == labels).mean():.3f}"
    return head, {name: np.mean(values, axis=0) for name, values in found.items()}


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    columns = [measured(Path(name)) for name in sys.argv[1:]]
    rows = {f"`sgr`, risk {RISK}: share accepted, risk of the accepted": ("sgr", (".3f", ".3f"))}
    for name in SET_RULES.names:
        rows[f"`{name}`, coverage {COVERAGE}: coverage, mean size, singletons"] = (name, (".3f", ".2f", ".2f"))
    lines = ["| | " + " | ".join(head for head, _ in columns) + " |", "|---|" + "---|" * len(columns)]
    for text, (name, formats) in rows.items():
        cells = (", ".join(format(v, f) for v, f in zip(means[name], formats, strict=True)) for _, means in columns)
        lines.append(f"| {text} | " + " | ".join(cells) + " |")
    sys.stdout.write("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
