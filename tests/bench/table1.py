"""Parameter counts of Table 1 of Holzbock et al. beside ours, in millions.

    python tests/bench/table1.py        prints the page in Markdown

Its uniform rows are a test (tests/test_pruning.py). Its ResRep row follows another rule; this says how near the sizes
come that our ResRep reaches with the same share of every layer, with and without the residual streams.
"""

from __future__ import annotations

import sys

import torch

import compress_uq as cuq
from compress_uq.cost import measure_cost
from compress_uq.pruning.amounts import sparsity_counts
from compress_uq.pruning.graph.groups import Group, dependency_groups, filters
from compress_uq.pruning.ledger import Ledger

SPARSITIES = (0.2, 0.4, 0.6, 0.8)
RESREP = {"resnet18": (8.05, 5.44, 3.29, 1.71), "vgg19": (12.41, 7.35, 3.78, 3.36)}
UNIFORM = {"resnet18": (7.18, 4.05, 1.80, 0.46), "vgg19": (12.86, 7.26, 3.22, 0.82)}


def inner(group: Group) -> bool:
    """Whether one layer alone makes the channels."""
    return sum(layer.side == "out" and filters(layer.module) is not None for layer in group.layers) == 1


def counts(name: str) -> dict[str, list[float]]:
    """Millions of parameters at each sparsity, for all groups and for the inner ones."""
    model = cuq.build_model(f"compress-uq:{name}", num_classes=10, input_shape=(3, 32, 32)).eval()
    example = torch.zeros(1, 3, 32, 32)
    groups = dependency_groups(model, example)
    cost = measure_cost(model, (3, 32, 32))
    ledger = Ledger(model, example, groups, cost.macs, cost.parameters)
    rows: dict[str, list[float]] = {"every layer": [], "inner layers": []}
    for sparsity in SPARSITIES:
        removed = sparsity_counts(groups, sparsity, 1)
        rows["every layer"].append(ledger.parameters(removed) / 1e6)
        some = [count if inner(group) else 0 for group, count in zip(groups, removed, strict=True)]
        rows["inner layers"].append(ledger.parameters(some) / 1e6)
    return rows


def line(*cells: object) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def say(text: str) -> None:
    """A line of the page."""
    sys.stdout.write(f"{text}\n")


def main() -> None:
    """Print the page's tables."""
    for name in RESREP:
        rows = counts(name)
        say(line(name, *SPARSITIES))
        say(line(*["---"] * 5))
        say(line("printed, random, L1, BN and HRank", *(f"{value:.2f}" for value in UNIFORM[name])))
        say(line("ours, every layer", *(f"{value:.2f}" for value in rows["every layer"])))
        say(line("printed, ResRep", *(f"{value:.2f}" for value in RESREP[name])))
        say(line("ours, ResRep inside the blocks", *(f"{value:.2f}" for value in rows["inner layers"])))
        say("")


if __name__ == "__main__":
    main()
