"""Setting what is left of a network back to earlier weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compress_uq.errors import PruningError
from compress_uq.pruning.criteria.criterion import Evidence
from compress_uq.pruning.graph.groups import dependency_groups

__all__ = ["Rewinder"]


@dataclass(frozen=True)
class Rewinder:
    """The dense network at the point that a ticket is set back to; None draws weights anew."""

    dense: nn.Module | None
    evidence: Evidence

    @classmethod
    def to(cls, rewind: str, early: int, trained: nn.Module, initial: nn.Module | None, evidence: Evidence) -> Rewinder:
        """`initial`, `early` (after so many epochs from initial), or `random`.

        Raises:
            PruningError: the initial weights are needed and not known, or are those of another network.
        """
        if rewind == "random":
            return cls(None, evidence)
        if initial is None:
            raise PruningError(
                f"the lottery schedule rewinds to {rewind} weights, which are not known: give initial=, the model "
                "before its training, or rewind to random ones"
            )
        wanted = {name: value.shape for name, value in trained.state_dict().items()}
        if {name: value.shape for name, value in initial.state_dict().items()} != wanted:
            raise PruningError("the initial model is not the trained one's: its weights have other names or shapes")
        dense = copy.deepcopy(initial).to(evidence.example.device)
        if rewind == "early":
            path = evidence.checkpoint
            config = replace(evidence.training, epochs=early)
            checkpoint = None if path is None else path.with_name("pruning-early.pt")
            replace(evidence, model=dense, training=config, checkpoint=checkpoint).train("the lottery ticket")
        return cls(dense.eval(), evidence)

    def rewind(self, pruned: nn.Module, removed: Mapping[str, Sequence[int]]) -> None:
        """Give the pruned network the dense one's weights at the channels that are left."""
        if self.dense is None:
            _draw_anew(pruned, self.evidence.seed)
            return
        ticket = copy.deepcopy(self.dense).requires_grad_(True)  # flags are the pruned network's, and it has its own
        for group in dependency_groups(ticket, self.evidence.example):
            if removed.get(group.name):
                group.remove(list(removed[group.name]))
        pruned.load_state_dict(ticket.state_dict())

    def weights(self, like: nn.Module) -> dict[str, Tensor]:
        """The whole state that a network of the same structure is set back to."""
        dense = self.dense
        if dense is None:
            dense = copy.deepcopy(like)
            _draw_anew(dense, self.evidence.seed)
        return dict(dense.state_dict())


def _draw_anew(model: nn.Module, seed: int) -> None:
    own = {name for name, module in model.named_modules() if hasattr(module, "reset_parameters")}
    missed = [name for name, _ in model.named_parameters() if name.rpartition(".")[0] not in own]
    if missed:
        raise PruningError(f"{missed[0]} cannot be drawn anew: its module has no reset_parameters; rewind to initial")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name in sorted(own):
            model.get_submodule(name).reset_parameters()  # type: ignore[operator]
