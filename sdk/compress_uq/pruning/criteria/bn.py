"""Scale factors of batch norm, made sparse by training where that is wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from compress_uq.errors import InputError, PruningError
from compress_uq.pruning.criteria.criterion import Evidence, PerLayer
from compress_uq.pruning.graph.groups import CoupledLayer, Group

__all__ = ["BatchNormScale"]


@dataclass(frozen=True)
class BatchNormScale(PerLayer):
    """The size of a channel's scale factors in batch norm (Liu et al. 2017, section 3)."""

    name: ClassVar[str] = "bn"
    sparsity_training: float = 0.0
    """Lambda of an L1 penalty on these factors in a training before the choice (equation 1); 1e-4 in the source."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sparsity_training) and self.sparsity_training >= 0):
            raise InputError(f"sparsity_training={self.sparsity_training}: expected 0 or more, such as 1e-4")

    @property
    def trains(self) -> bool:
        """With a penalty only."""
        return self.sparsity_training > 0

    def layer_scores(self, layer: CoupledLayer, evidence: Evidence) -> Tensor | None:
        """(channels,) float64 of a batch norm with factors."""
        scale = _scale(layer.module)
        return None if scale is None else scale.detach().double().abs()

    def scores(self, groups: Sequence[Group], evidence: Evidence) -> list[Tensor]:
        """Importance (channels,) float64 of each group's channels.

        Raises:
            PruningError: a group without batch norm, or with factors that are all equal.
        """
        for group in groups:
            if not any(layer.side == "out" and _scale(layer.module) is not None for layer in group.layers):
                raise PruningError(
                    f"criterion {self.name!r} cannot rank {group.name}: no batch norm follows it; keep this layer, or "
                    "take another criterion"
                )
        found = super().scores(groups, evidence)
        for group, score in zip(groups, found, strict=True):
            if group.channels > 1 and bool((score == score[0]).all()):
                raise PruningError(
                    f"criterion {self.name!r} cannot rank {group.name}: its {group.channels} scale factors are all "
                    "equal, as before any training; pass sparsity_training=1e-4, or take another criterion"
                )
        return found

    def choose(self, groups: Sequence[Group], evidence: Evidence, counts: Sequence[int] | None) -> list[list[int]]:
        """As every criterion, after training with the penalty if there is one."""
        if self.trains and counts is not None:
            scales = {
                scale for group in groups for layer in group.layers if (scale := _scale(layer.module)) is not None
            }
            if not scales:
                raise PruningError(f"criterion {self.name!r} finds no batch norm to train; take another criterion")

            def add_subgradient(_step: int, _steps: int) -> None:
                for scale in scales:
                    if scale.grad is not None:
                        scale.grad.add_(scale.detach().sign(), alpha=self.sparsity_training)

            evidence.train(self.name, add_subgradient)
        return super().choose(groups, evidence, counts)


def _scale(module: nn.Module) -> nn.Parameter | None:
    return module.weight if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine else None
