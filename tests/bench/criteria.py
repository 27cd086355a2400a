"""HRank's ranks against the loop over maps, and pruning against a bare torch-pruning call.

    python tests/bench/criteria.py [WEIGHTS DATA_ROOT]        prints the tables in Markdown

WEIGHTS are a CIFAR-10 ResNet-20's, DATA_ROOT is where CIFAR-10 lies; without them the maps are those of random weights
on smooth noise. One thread, alternatives in turns in one process, medians.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn import functional as F

import compress_uq as cuq
from compress_uq.cost import measure_cost
from compress_uq.pruning.criteria.hrank import _FeatureMaps
from compress_uq.pruning.criteria.ranks import matrix_ranks

IMAGES, LOOPED, ROUNDS = 128, 2, 9


def smooth_noise(count: int) -> Tensor:
    """Images (N, 3, 32, 32) with most of their energy at low frequencies."""
    noise = torch.randn(count, 3, 8, 8)
    return F.interpolate(noise, 32, mode="bilinear") + 0.1 * torch.randn(count, 3, 32, 32)


def feature_maps(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Each convolution's maps (N, C, H, W), where HRank takes them."""
    found: list[Tensor] = []
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    with torch.no_grad(), _FeatureMaps(layers, lambda _name, maps: found.append(maps.clone())):
        model.eval()(images)
    return found


def loop(maps: list[Tensor]) -> list[Tensor]:
    """Ranks (N, C) of every layer's maps, as the authors' code computes them."""
    return [
        torch.tensor(
            [torch.linalg.matrix_rank(m[i, j]).item() for i in range(m.shape[0]) for j in range(m.shape[1])]
        ).view(m.shape[:2])
        for m in maps
    ]


def batched(maps: list[Tensor]) -> list[Tensor]:
    """The same, by what HRank runs."""
    return [matrix_ranks(m.flatten(0, 1)).view(m.shape[:2]) for m in maps]


def in_turns(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every round of every alternative."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - start))
    return times


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> tuple[float, float, float]:
    """Median times, and the median of the rounds' ratios."""
    pairs = zip(times[slow], times[fast], strict=True)
    return statistics.median(times[slow]), statistics.median(times[fast]), statistics.median(a / b for a, b in pairs)


def ranks_table(weights: str | None, root: str | None) -> list[str]:
    """Per image: all layers' ranks by the loop, over a few images, and by batches of 128; they agree on every map."""
    torch.manual_seed(0)
    images = smooth_noise(IMAGES)
    if weights is None or root is None:
        resnet = cuq.build_model("compress-uq:resnet20", num_classes=10, input_shape=(3, 32, 32))
    else:
        resnet = cuq.load_model(weights, arch="compress-uq:resnet20")
        train = cuq.load_splits("cifar10", root=root, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)).require(
            "train", "feature maps"
        )
        images = torch.stack([train[i][0] for i in range(IMAGES)])
    vgg = cuq.build_model("compress-uq:vgg19", num_classes=10, input_shape=(3, 32, 32))
    lines = [
        "| maps of | maps per image | loop, ms per image | HRank, ms per image | times faster |",
        "|---|---|---|---|---|",
    ]
    for what, model in (("ResNet-20", resnet), ("VGG-19, random weights", vgg)):
        maps = feature_maps(model, images)
        by_size: dict[str, list[Tensor]] = {"all": maps}
        for layer in maps:
            by_size.setdefault("x".join(map(str, layer.shape[2:])), []).append(layer)
        for size, chosen in by_size.items():
            few = [layer[:LOOPED] for layer in chosen]
            for fast, slow in zip(batched(chosen), loop(few), strict=True):
                assert torch.equal(fast[:LOOPED], slow)
            times = in_turns(
                {"loop": lambda few=few: loop(few), "batched": lambda chosen=chosen: batched(chosen)}, ROUNDS
            )
            slow_ms, fast_ms, times_faster = ratio(times, "loop", "batched")
            count = sum(layer.shape[1] for layer in chosen)
            lines.append(
                f"| {what}, {size} | {count} | {slow_ms / LOOPED:.2f} | {fast_ms / IMAGES:.3f} | "
                f"{times_faster * IMAGES / LOOPED:.1f} |"
            )
    return lines


def pruning_table() -> list[str]:
    """Torchvision's ResNet-50 at sparsity 0.5 by L1, against torch-pruning, a copy and two cost counts."""
    torch.manual_seed(0)
    model = cuq.build_model("torchvision:resnet50", num_classes=1000).eval()
    example = torch.randn(1, 3, 224, 224)

    def bare() -> None:
        pruned = copy.deepcopy(model)
        measure_cost(pruned, example.shape[1:])
        importance = torch_pruning.importance.MagnitudeImportance(p=1)
        torch_pruning.pruner.BasePruner(
            pruned, example, importance=importance, pruning_ratio=0.5, ignored_layers=[pruned.fc]
        ).step()
        measure_cost(pruned, example.shape[1:])

    times = in_turns({"ours": lambda: cuq.prune(model, example, sparsity=0.5, criterion="l1"), "bare": bare}, ROUNDS)
    ours_ms, bare_ms, times_slower = ratio(times, "ours", "bare")
    return [
        "| ResNet-50, sparsity 0.5, L1 | ms |",
        "|---|---|",
        f"| torch-pruning, a copy and two cost counts | {bare_ms:.0f} |",
        f"| cuq.prune | {ours_ms:.0f} ({times_slower:.2f} times) |",
    ]


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    given = sys.argv[1:] + [None, None]
    sys.stdout.write("\n".join([*ranks_table(given[0], given[1]), "", *pruning_table(), ""]))


if __name__ == "__main__":
    main()
