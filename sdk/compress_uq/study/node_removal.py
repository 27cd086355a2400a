"""Runs that take nodes or channels out of one layer of a trained network, without training after it.

With the defaults, the experiments of Charpentier 2020, chapter 3: a network with one hidden layer of 128 nodes, Adam
at 0.001, batches of 32, 5 epochs on the whole training set; pixels in 0..1 and Glorot's initial weights, which are
what TensorFlow's own examples and layers have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from compress_uq.config import TrainingConfig
from compress_uq.data import ImageDataset, Splits, batches, load_splits
from compress_uq.errors import InputError, PruningError, UnknownNameError
from compress_uq.models import Architecture, load_model, save_model
from compress_uq.pruning.criteria.criterion import Evidence
from compress_uq.pruning.criteria.leave_one_out import Ablation
from compress_uq.pruning.criteria.loss import Loss, importance_classes
from compress_uq.pruning.graph.groups import Group, dependency_groups
from compress_uq.steps import finetune
from compress_uq.study.kind import Context, Kind, Outcome
from compress_uq.study.values import conform, plain_hints

__all__ = ["NodeRemovalKind", "NodeRemovalSettings"]

_THESIS = TrainingConfig(
    epochs=5, lr=1e-3, batch_size=32, optimizer="adam", weight_decay=0.0, lr_schedule="constant", augment="none"
)


@dataclass(frozen=True)
class NodeRemovalSettings:
    """All that one run is made from."""

    data: str
    data_root: str = "data"
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    arch: str = "compress-uq:mlp"
    arch_option: Mapping[str, Any] = field(default_factory=lambda: {"widths": [128]})
    initial: str = "glorot"
    """Weights before training: `glorot` (uniform, biases 0), or `own`, the architecture's."""
    layer: str | None = None
    """The layer that loses channels; needed where there are several."""
    algorithm: str = "draw"
    """`draw` (her Algorithm 1: `nodes` at random), or a mode of the criterion `loss` that stops by itself: `random`
    (her Algorithm 2 in steps of `nodes`), `precomputed`, `exhaustive` or `greedy`."""
    nodes: int = 1
    removals: int = 20
    """How often nodes are drawn, or Algorithm 2 is run, on one network."""
    images: int = 10000
    """Training images, drawn anew for each search, that its losses are measured on; figures are on the test split."""
    tolerance: float = 0.0
    """As for the criterion `loss`."""
    training: TrainingConfig = _THESIS


_OWN = {name: hint for name, hint in get_type_hints(NodeRemovalSettings).items() if name != "training"}
_TRAINING = plain_hints(get_type_hints(TrainingConfig))
_SUMMARY = ("", "_sd", "_min", "_25", "_50", "_75", "_max")
_SUMMARISED = ("accuracy", "loss", "removed")
_NO_BEARING = frozenset({"data_root", "device", "workers"})


class NodeRemovalKind(Kind[NodeRemovalSettings]):
    """Train a network, take nodes out of a layer, measure; a measure alone is the mean over a network's removals."""

    shown = ("base_accuracy", "accuracy", "accuracy_sd", "accuracy_drop", "loss", "loss_sd")
    axis = "nodes"
    settings = frozenset({*_OWN, *_TRAINING})
    measures = frozenset(
        {f"{name}{part}" for name in _SUMMARISED for part in _SUMMARY}
        | {"base_accuracy", "base_loss", "accuracy_drop", "loss_rise", "important", "zero", "worse"}
    )
    without_bearing = _NO_BEARING

    def read(self, values: Mapping[str, Any]) -> NodeRemovalSettings:
        """The settings; the training's are those of the thesis where they are not given."""
        if "data" not in values:
            raise InputError("a run needs data, such as mnist")
        hints = {**_OWN, **_TRAINING}
        given = {name: conform(name.replace("_", "-"), value, hints[name]) for name, value in values.items()}
        training = dataclasses.replace(_THESIS, **{k: v for k, v in given.items() if k in _TRAINING})
        settings = NodeRemovalSettings(**{k: v for k, v in given.items() if k in _OWN}, training=training)
        if settings.algorithm not in _ALGORITHMS:
            raise UnknownNameError("algorithm", settings.algorithm, _ALGORITHMS)
        if settings.initial not in _INITIAL:
            raise UnknownNameError("initial", settings.initial, _INITIAL)
        for name in ("nodes", "removals", "images"):
            if getattr(settings, name) < 1:
                raise InputError(f"{name} = {getattr(settings, name)}: expected 1 or more")
        return settings

    def identity(self, settings: NodeRemovalSettings) -> Mapping[str, Any]:
        """All settings that the result depends on."""
        return _plain(settings)

    def run(self, settings: NodeRemovalSettings, context: Context) -> Outcome:
        """Train, or take the network that another run trained; remove; measure on the whole test split."""
        trained = context.shared.remembered(_of_network(settings), lambda: _train(settings, context))
        base = trained.test.base([[]])
        removed, importance = _ALGORITHMS[settings.algorithm](settings, trained, context)
        accuracy, loss = trained.figures(removed)
        return Outcome({
            "base_accuracy": float(base.accuracy),
            "base_loss": float(base.loss),
            **_summary("accuracy", accuracy),
            **_summary("loss", loss),
            **_summary("removed", torch.tensor([len(channels) for channels in removed], dtype=torch.float64)),
            "accuracy_drop": float(base.accuracy - accuracy.mean()),
            "loss_rise": float(loss.mean() - base.loss),
            **importance,
        })  # fmt: skip

    def higher_is_better(self, measure: str) -> bool:
        """Accuracies and the numbers of nodes that can go."""
        return measure.startswith(("accuracy", "base_accuracy", "removed")) and measure != "accuracy_drop"


@dataclass(frozen=True)
class _Trained:
    """A network, one layer of it, and the test images."""

    model: nn.Module
    group: Group
    splits: Splits
    test: Ablation

    def figures(self, removed: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Accuracy and loss (K,) on test images without each choice of the layer's channels."""
        if len({len(channels) for channels in removed}) == 1 and removed[0]:
            answers = self.test.without(0, torch.tensor(removed), [[]])
            return answers.accuracy, answers.loss
        each = [self.test.base([channels]) for channels in removed]
        return torch.cat([a.accuracy for a in each]), torch.cat([a.loss for a in each])


def _train(settings: NodeRemovalSettings, context: Context) -> _Trained:
    splits = load_splits(settings.data, root=settings.data_root, mean=settings.mean, std=settings.std, reserve=False)
    shape = tuple(splits.example().shape[1:])
    labels = splits.info.labels or ()
    architecture = Architecture(settings.arch, len(labels), shape, settings.arch_option)

    def train(out: Path, state: Path) -> None:
        done = finetune(
            _INITIAL[settings.initial](architecture.build(settings.training.seed)), splits, training=settings.training,
            progress=context.progress, stage="training", checkpoint=state,
        )  # fmt: skip
        save_model(done.model, out, arch=architecture, labels=labels, mean=settings.mean, std=settings.std)

    model = load_model(context.shared.file("dense.pt", _of_network(settings), train)).eval()
    group = _layer(dependency_groups(model, splits.example()), settings.layer)
    test = Ablation(model, [group], *_tensors(splits.require("test", "node removal")))
    return _Trained(model, group, splits, test)


def _glorot(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


_INITIAL: dict[str, Callable[[nn.Module], nn.Module]] = {"glorot": _glorot, "own": lambda model: model}


def _layer(groups: list[Group], name: str | None) -> Group:
    names = [group.name for group in groups]
    if name is None and len(groups) == 1:
        return groups[0]
    if name is None:
        raise PruningError(f"the network has several layers that can lose channels: give layer, one of {names}")
    if name not in names:
        raise UnknownNameError("layer", name, names)
    return groups[names.index(name)]


def _tensors(dataset: ImageDataset) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches(dataset, 1000), strict=True)
    return torch.cat(images), torch.cat(labels)


_Found = tuple[list[list[int]], dict[str, float]]
"""Each choice of channels that go, and how many of the layer's channels are important, zero and worse."""


def _drawn(settings: NodeRemovalSettings, trained: _Trained, _context: Context) -> _Found:
    """Her Algorithm 1."""
    width = trained.group.channels
    if settings.nodes >= width:
        raise PruningError(f"nodes = {settings.nodes}: {trained.group.name} has {width}, and one has to stay")
    generator = torch.Generator().manual_seed(settings.training.seed)
    draws = [torch.randperm(width, generator=generator)[: settings.nodes] for _ in range(settings.removals)]
    return [draw.tolist() for draw in draws], {}


def _searched(settings: NodeRemovalSettings, trained: _Trained, context: Context) -> _Found:
    """Her Algorithm 2 and sections 3.2 to 3.5, which stop by themselves."""
    rule = Loss(mode=settings.algorithm, images=settings.images, tolerance=settings.tolerance, step=settings.nodes)
    evidence = Evidence(
        trained.model, trained.splits.example(), trained.splits, settings.training, progress=context.progress
    )
    groups, repeats = [trained.group], settings.removals if settings.algorithm == "random" else 1
    first = settings.training.seed * settings.removals
    each = [dataclasses.replace(evidence, seed=first + i) for i in range(repeats)]
    removed = [rule.choose(groups, one, None)[0] for one in each]
    images, labels = zip(*each[0].images(rule.name, settings.images), strict=True)
    seen = Ablation(trained.model, groups, torch.cat(images), torch.cat(labels))
    alone = seen.without(0, torch.arange(trained.group.channels).unsqueeze(1), [[]]).loss
    base = seen.base([[]]).loss
    classes = importance_classes(alone - base, settings.tolerance * float(base))
    return removed, {name: float(count) for name, count in classes.items()}


_ALGORITHMS: dict[str, Callable[[NodeRemovalSettings, _Trained, Context], _Found]] = {
    "draw": _drawn,
    "random": _searched,
    "precomputed": _searched,
    "exhaustive": _searched,
    "greedy": _searched,
}


def _summary(name: str, values: Tensor) -> dict[str, float | None]:
    """Mean, standard deviation (n - 1), extremes and quartiles, as the thesis prints them."""
    quartiles = values.quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)).tolist()
    deviation = float(values.std()) if len(values) > 1 else None
    return {
        f"{name}{part}": value
        for part, value in zip(_SUMMARY, [float(values.mean()), deviation, *quartiles], strict=True)
    }


def _of_network(settings: NodeRemovalSettings) -> dict[str, Any]:
    """What tells one trained network and its layer from another."""
    kept = ("data", "mean", "std", "arch", "arch_option", "initial", "layer", "training")
    return {name: value for name, value in _plain(settings).items() if name in kept}


def _plain(settings: NodeRemovalSettings) -> dict[str, Any]:
    values = dataclasses.asdict(settings)
    values["training"] = {k: v for k, v in values["training"].items() if k not in _NO_BEARING}
    return {k: v for k, v in values.items() if k not in _NO_BEARING}
