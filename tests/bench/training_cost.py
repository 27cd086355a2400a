"""What a method's part in training costs: processor seconds of an epoch with it, over those of one without.

    python tests/bench/training_cost.py [--rounds 5]

784-200-200-200-10 with batch norm and dropout, as in the TRADI slides, batches of 128 noise images, in turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch
from torch.utils.data import TensorDataset

import compress_uq as cuq

METHODS = {
    "msp": cuq.uq.MSP(),
    "mc-dropout": cuq.uq.MCDropout(sampling_budget=100.0),
    "swag": cuq.uq.SWAG(),
    "tradi": cuq.uq.TRADI(),
}
IMAGES = 12_800


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    shape = (1, 28, 28)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, *shape, generator=generator)
    labels = torch.randint(0, 10, (IMAGES,), generator=generator)
    info = cuq.DataInfo(name="noise", labels=tuple("0123456789"), mean=(0.0,), std=(1.0,))
    splits = cuq.Splits(train=TensorDataset(images, labels), info=info)
    options = {"widths": [200, 200, 200], "batch_norm": True, "dropout": 0.1}
    network = cuq.Architecture("compress-uq:mlp", 10, shape, options).build(0)
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    for round_number in range(rounds + 1):
        for name, method in METHODS.items():
            pruned = cuq.prune(network, images[:1], sparsity=0.01, round_to=1)
            start = time.process_time()
            cuq.finetune(pruned, splits, method=method, epochs=1, batch_size=128, optimizer="adam-l2", augment="none")
            if round_number:  # the first warms up
                seconds[name].append(time.process_time() - start)
    sys.stdout.write("| method | processor s an epoch | over `msp` |\n|---|---:|---:|\n")
    for name, taken in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(taken, seconds["msp"], strict=True))
        sys.stdout.write(f"| `{name}` | {statistics.median(taken):.2f} | {ratio:.2f} |\n")


if __name__ == "__main__":
    main()
