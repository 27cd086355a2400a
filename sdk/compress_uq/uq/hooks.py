"""Hooks that methods put into a network, marked so that a copy can be freed of them."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

__all__ = ["Hook", "bare_copy", "replace_forward"]


class Hook:
    """A hook of this package."""

    def __call__(self, *arguments: Any) -> Any:
        """What torch calls."""
        raise NotImplementedError


def replace_forward(module: nn.Module, hook: Hook) -> None:
    """Let a hook compute a module's answer from its inputs, where the module's own answer is not needed."""
    module.forward = hook


def bare_copy(network: nn.Module) -> nn.Module:
    """A copy of a network without the hooks that this package put there."""
    bare = copy.deepcopy(network)
    for module in bare.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [k for k, hook in hooks.items() if isinstance(hook, Hook)]:
                del hooks[key]
        if isinstance(vars(module).get("forward"), Hook):
            del module.forward
    return bare
