"""Unstructured pruning, for studies: single weights are masked. Nothing gets smaller or faster by it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress_uq.config import TrainingConfig
from compress_uq.cost import Cost, measure_cost
from compress_uq.data import Augmentation, Splits
from compress_uq.errors import PruningError, UnknownNameError
from compress_uq.progress import ProgressCallback, silent
from compress_uq.pruning.criteria.criterion import Evidence
from compress_uq.pruning.graph.groups import filters
from compress_uq.pruning.graph.refusals import refuse_unprunable
from compress_uq.pruning.rewind import Rewinder
from compress_uq.pruning.schedules import SCHEDULES, Schedule
from compress_uq.stages import ModelOrResult, Origin, unpack
from compress_uq.training import Epoch, resolve_device

__all__ = ["MaskResult", "MaskedLayer", "mask_weights", "remove_masks"]

RULES = ("magnitude", "random")


@dataclass(frozen=True)
class MaskedLayer:
    """One layer's weights."""

    name: str
    weights: int
    masked: int


@dataclass(frozen=True)
class MaskResult:
    """A copy with masks on its weights. Its cost is the dense model's: zeros are stored and multiplied as before."""

    model: nn.Module
    cost: Cost
    layers: tuple[MaskedLayer, ...]
    origin: Origin
    history: tuple[Epoch, ...] = ()

    @property
    def sparsity(self) -> float:
        """Share of the maskable weights that are zero."""
        return sum(layer.masked for layer in self.layers) / sum(layer.weights for layer in self.layers)


class _Mask(nn.Module):
    """A fixed pattern of zeros over a weight."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Masked weights keep their values beneath, so that a mask can be taken off."""
        return weight


def mask_weights(
    model: ModelOrResult,
    example_inputs: Tensor | None = None,
    *,
    sparsity: float,
    rule: str = "magnitude",
    scope: str = "layer",
    keep: Sequence[str] = (),
    schedule: str | Schedule = "one-shot",
    initial: nn.Module | None = None,
    splits: Splits | None = None,
    training: TrainingConfig | None = None,
    augment: str | Augmentation = "auto",
    teacher: nn.Module | None = None,
    seed: int = 0,
    progress: ProgressCallback = silent,
    work_dir: Path | None = None,
) -> MaskResult:
    """Mask the smallest weights of convolutions and linear layers (Han et al. 2015, section 3); biases stay.

    The masks hold through any later training. The three networks of Aguettaz (2020) are a trained model with
    `Iterative(n)`, an untrained one with `Iterative(n, first="random")`, and a trained one with `one-shot`.

    Args:
        model: a classifier, trained or not, or a stage's result.
        example_inputs: images (N, C, H, W), where a bare module does not tell their shape.
        sparsity: share of the weights that are masked, above 0 and below 1.
        rule: `magnitude`, or `random` as a control.
        scope: `layer` masks the same share of each layer; `global` the smallest of all layers.
        keep: names or patterns of layers that are not masked.
        schedule: `one-shot`, `iterative`, `lottery`, or a configured schedule; what is masked stays masked.
        initial: the model before its training, for a schedule that rewinds.
        splits: needs `train` where the schedule trains.
        training: how to train between steps; all its epochs are spent here.

    Raises:
        PruningError: a sparsity that cannot be, weights masked or parametrised already, or nothing to mask.
    """
    if not 0 < sparsity < 1:
        raise PruningError(f"sparsity={sparsity}: expected a share above 0 and below 1, such as 0.6")
    for kind, value, known in (("rule", rule, RULES), ("scope", scope, ("layer", "global"))):
        if value not in known:
            raise UnknownNameError(kind, value, known)
    given, origin = unpack(model, example_inputs)
    example = origin.example(given, "mask_weights")
    masked = copy.deepcopy(given)
    refuse_unprunable(masked)
    home = example.device
    device = home if training is None else resolve_device(training.device)
    masked.to(device)
    layers = _maskable(masked, keep)
    for layer in layers.values():
        parametrize.register_parametrization(layer, "weight", _Mask(torch.ones_like(_weight(layer))), unsafe=True)
    modes = {name: module.training for name, module in given.named_modules()}
    evidence = Evidence(
        masked, example.to(device), splits, training or TrainingConfig(), augment, teacher, seed, progress,
        None if work_dir is None else work_dir / "masking-0.pt",
    )  # fmt: skip
    plan = SCHEDULES[schedule]() if isinstance(schedule, str) else schedule
    source = None
    if plan.rewinds_to is not None:
        source = Rewinder.to(plan.rewinds_to, plan.early_epochs, given, initial, evidence)
    for number, step in enumerate(plan.steps(evidence.training.epochs if plan.share else 0)):
        _mask(layers, sparsity * step.fraction, step.criterion or rule, scope, seed + number)
        if source is not None and step.rewind:
            _set_back(masked, source.weights(given))
        if step.epochs:
            checkpoint = None if work_dir is None else work_dir / f"masking-{number + 1}.pt"
            config = replace(evidence.training, epochs=step.epochs)
            replace(evidence, training=config, checkpoint=checkpoint).train("weight pruning")
    found = tuple(
        MaskedLayer(name, _weight(layer).numel(), int((_mask_of(layer) == 0).sum())) for name, layer in layers.items()
    )
    if not any(layer.masked for layer in found):
        raise PruningError(f"nothing was masked: sparsity {sparsity} is less than one weight of every layer")
    cost = measure_cost(given, example.shape[1:])
    for name, module in masked.named_modules():
        module.training = modes.get(name, modes[""])
    return MaskResult(masked.to(home), cost, found, origin, tuple(evidence.history))


def remove_masks(model: nn.Module, *, permanent: bool = True) -> nn.Module:
    """A copy without masks: with zeros in their place, or, not `permanent`, with the weights from beneath.

    Raises:
        PruningError: the model has no masks.
    """
    plain = copy.deepcopy(model)
    layers = [m for m in plain.modules() if _is_masked(m)]
    if not layers:
        raise PruningError("the model has no masks to remove: expected one that mask_weights returned")
    for layer in layers:
        _uncover(layer, permanent)
    return plain


def _uncover(layer: nn.Module, permanent: bool) -> None:
    # remove_parametrizations would take the property off a class that a deep copy shares with its original.
    beneath: nn.Parameter = layer.parametrizations.weight.original  # type: ignore[union-attr, assignment]
    value = _weight(layer) if permanent else beneath
    layer.__class__ = type(layer).__bases__[0]
    del layer.parametrizations
    layer.weight = nn.Parameter(value.detach().clone(), requires_grad=beneath.requires_grad)


def _maskable(model: nn.Module, keep: Sequence[str]) -> dict[str, nn.Module]:
    named = {name: module for name, module in model.named_modules() if filters(module) is not None}
    for pattern in keep:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise PruningError(f"keep {pattern!r}: no layer with weights matches; they are {', '.join(named)}")
    left = {n: m for n, m in named.items() if not any(fnmatchcase(n, p) for p in keep)}
    if not left:
        raise PruningError("nothing can be masked: no convolution or linear layer is left to mask")
    return left


def _mask(layers: dict[str, nn.Module], sparsity: float, rule: str, scope: str, seed: int) -> None:
    """Raise the share of zeros; weights that are zero already go first."""
    generator = torch.Generator().manual_seed(seed)
    scores = {name: _scores(layer, rule, generator) for name, layer in layers.items()}
    if scope == "global":
        joined = torch.cat(list(scores.values()))
        gone = _lowest(joined, sparsity).split([len(score) for score in scores.values()])
    else:
        gone = tuple(_lowest(score, sparsity) for score in scores.values())
    for layer, lost in zip(layers.values(), gone, strict=True):
        mask = _mask_of(layer)
        mask.copy_((~lost).view_as(mask))


def _scores(layer: nn.Module, rule: str, generator: torch.Generator) -> Tensor:
    """(weights,) float64; masked ones below all others."""
    weight = _weight(layer).detach().double().cpu().flatten()
    score = weight.abs() if rule == "magnitude" else torch.rand(weight.shape, generator=generator, dtype=torch.float64)
    return torch.where(_mask_of(layer).cpu().flatten() == 0, -1.0, score)


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _lowest(scores: Tensor, share: float) -> Tensor:
    gone = torch.zeros(len(scores), dtype=torch.bool)
    gone[scores.argsort(stable=True)[: int(len(scores) * share + 1e-9)]] = True
    return gone


def _mask_of(layer: nn.Module) -> Tensor:
    return layer.parametrizations.weight[0].mask  # type: ignore[no-any-return, union-attr, index]


def _is_masked(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module, "weight") and isinstance(module.parametrizations.weight[0], _Mask)  # type: ignore[union-attr, index]


def _set_back(masked: nn.Module, weights: dict[str, Tensor]) -> None:
    """Other weights beneath the same masks."""
    state = masked.state_dict()
    for name, value in weights.items():
        beneath = f"{name.removesuffix('weight')}parametrizations.weight.original"
        state[beneath if beneath in state else name] = value
    masked.load_state_dict(state)
