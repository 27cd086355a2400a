"""Loss-based importance: all channels of a layer in a few passes, against the loop that removes one at a time.

    python tests/bench/importance.py        prints the table in Markdown

The loop is what people write: zero what reads a channel, run the whole model on the images, put the weights back. One
thread, alternatives in turns in one process, medians. Random weights and images: nothing here depends on their values.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import compress_uq as cuq
from compress_uq.cost import interleaved_milliseconds
from compress_uq.pruning.criteria.leave_one_out import Ablation
from compress_uq.pruning.graph.groups import Group, dependency_groups

BATCH, ROUNDS = 256, 9
# what -> (architecture, its options, shape, the layer, images)
CASES = {
    "MLP 784-128-10, its 128 nodes": ("mlp", {"widths": (128,)}, (1, 28, 28), "1", 4096),
    "MLP 784-128-128-128-10, last hidden layer": ("mlp", {"widths": (128, 128, 128)}, (1, 28, 28), "5", 1024),
    "MLP 784-128-128-128-10, first hidden layer": ("mlp", {"widths": (128, 128, 128)}, (1, 28, 28), "1", 1024),
    "CNN, 28x28, first of four convolutions, 32 channels": ("cnn", {"widths": (32,) * 4}, (1, 28, 28), "0", 128),
    "CNN, 28x28, last of four convolutions, 32 channels": ("cnn", {"widths": (32,) * 4}, (1, 28, 28), "12", 128),
    "ResNet-20, inside its last block, 64 channels": ("resnet20", {}, (3, 32, 32), "layer3.2.conv1", 32),
    "ResNet-18 (small-image layout), first residual stream, 64 channels": ("resnet18", {}, (3, 32, 32), "conv1", 8),
}


@torch.no_grad()
def loop(model: nn.Module, group: Group, images: Tensor, labels: Tensor) -> list[float]:
    """The loss without each channel, one at a time."""
    readers = [layer for layer in group.layers if layer.side == "in"]
    losses = []
    for channel in range(group.channels):
        kept = [layer.module.weight.clone() for layer in readers]
        for layer in readers:
            layer.module.weight[:, layer.indices[layer.channels == channel]] = 0
        total = 0.0
        for start in range(0, len(images), BATCH):
            stop = start + BATCH
            total += F.cross_entropy(model(images[start:stop]), labels[start:stop], reduction="sum").item()
        for layer, weight in zip(readers, kept, strict=True):
            layer.module.weight.copy_(weight)
        losses.append(total / len(images))
    return losses


def row(what: str, arch: str, options: dict[str, object], shape: tuple[int, ...], name: str, count: int) -> str:
    """One line of the table; the alternatives agree, or nothing is timed."""
    torch.manual_seed(0)
    model = cuq.build_model(f"compress-uq:{arch}", num_classes=10, input_shape=shape, options=options).eval()
    images, labels = torch.randn(count, *shape), torch.randint(0, 10, (count,))
    groups = dependency_groups(model, images[:1])
    place = next(i for i, group in enumerate(groups) if group.name == name)
    choices = torch.arange(groups[place].channels).unsqueeze(1)

    def together() -> Tensor:
        return Ablation(model, groups, images, labels).without(place, choices, [[]] * len(groups)).loss

    def apart() -> list[float]:
        return loop(model, groups[place], images, labels)

    error = (together() - torch.tensor(apart(), dtype=torch.float64)).abs().max().item()
    if error > 1e-5:
        raise AssertionError(f"{what}: losses differ by {error}")
    times = interleaved_milliseconds({"loop": apart, "together": together}, rounds=ROUNDS, seconds=60)
    ratio = times["loop"] / times["together"]
    return f"| {what} | {count} | {times['loop']:.0f} | {times['together']:.0f} | {ratio:.1f} |"


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    lines = [
        "## Leave-one-out over a layer",
        "",
        "| layer | images | loop, ms | vectorised, ms | times faster |",
        "|---|---|---|---|---|",
        *(row(what, *case) for what, case in CASES.items()),
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
