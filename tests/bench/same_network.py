"""What sampling adds: a bundle's method beside one plain pass (`msp`) of the same network with the same weights.

    python tests/bench/same_network.py BUNDLE DATA [DATA_ROOT]

Both are calibrated by a temperature on the bundle's calibration images and measured on its test images. The bundle has
one network, such as `mc-dropout` leaves.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch

import compress_uq as cuq

MEASURES = ("accuracy", "nll", "ece", "ause", "error_auroc")


def main(bundle: str, data: str, root: str = "data") -> None:
    torch.set_num_threads(1)
    loaded = cuq.Bundle.load(bundle)
    splits = cuq.load_new_data(loaded, data, root=Path(root))
    (network,) = loaded.model.members.networks
    plain = cuq.fit_uncertainty(copy.deepcopy(network), splits, method="msp")
    models = {loaded.model.method.name: loaded.model, "msp": plain}
    lines = ["| | " + " | ".join(MEASURES) + " |", "|" + "---|" * (len(MEASURES) + 1)]
    for name, model in models.items():
        metrics = cuq.evaluate(cuq.calibrate(model, splits), splits).metrics
        figures = (metrics[measure] for measure in MEASURES)
        lines.append(f"| {name} | " + " | ".join(f"{f.value:.4f} [{f.low:.4f}, {f.high:.4f}]" for f in figures) + " |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
