"""What a classifier may return, brought to one form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from compress_uq.errors import ModelError

__all__ = ["as_logits"]


def as_logits(output: Any) -> Tensor:
    """The logits (N, K) in what a model returned: a tensor, or an object or mapping with `logits`.

    Raises:
        ModelError: anything else, such as a tuple, or a single logit.
    """
    if isinstance(output, Mapping):
        output = output.get("logits", output)
    elif not isinstance(output, Tensor):
        output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise ModelError(
            f"the model returned a {type(output).__name__}: expected a tensor of logits, "
            "or an object or dict with `logits`; wrap it so that forward() returns the logits"
        )
    if output.ndim != 2:
        raise ModelError(f"the model returned a tensor of shape {tuple(output.shape)}: expected logits (N, classes)")
    if output.shape[1] < 2:
        raise ModelError(
            "the model returns a single logit: use the two-logit form (logits of both classes; "
            "torch.stack([torch.zeros_like(z), z], 1) of a sigmoid's logit z is equivalent)"
        )
    return output
