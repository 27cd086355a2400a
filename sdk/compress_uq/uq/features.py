"""What enters a network's classifier, taken while the network runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from compress_uq.uq.hooks import Hook

__all__ = ["head_inputs", "tap_head"]

_TAPPED: ContextVar[list[Tensor] | None] = ContextVar("tapped", default=None)


class _Tap(Hook):
    """Before the classifier: keep what enters it, where somebody asked."""

    def __call__(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        kept = _TAPPED.get()
        if kept is not None:
            kept.append(_as_vectors(inputs[0]))


def tap_head(network: nn.Module, head: str) -> None:
    """Let `head_inputs` see what enters the module named `head`."""
    network.get_submodule(head).register_forward_pre_hook(_Tap())


@contextmanager
def head_inputs() -> Iterator[list[Tensor]]:
    """A list that receives (B, D) float32 for every tapped network that runs inside."""
    kept: list[Tensor] = []
    token = _TAPPED.set(kept)
    try:
        yield kept
    finally:
        _TAPPED.reset(token)


def _as_vectors(entering: Tensor) -> Tensor:
    """(B, D) from (B, D), maps (B, D, H, W) or tokens (B, S, D): the mean over places."""
    if entering.ndim == 4:
        entering = entering.mean((2, 3))
    elif entering.ndim == 3:
        entering = entering.mean(1)
    return entering.float()
