"""Where dropout can go: a model's own dropout layers, or the ends of its blocks, found from the module tree.

The tree is read by these rules, which know no architecture by name:

* `nn.Sequential`, `nn.ModuleList` and `nn.ModuleDict` are sequences, and so is a module that holds one with two or
  more children of one class that is not itself a sequence (a stage, an encoder).
* In a sequence, a child with a weight matrix is a block, or a sequence again; layers without one (norms, activations,
  poolings) that follow in an `nn.Sequential` belong to the block before them.
* Layers that the root holds directly are a stem: they count only where there is nothing else, each with its norm.
* The classifier, and what comes after it, is not dropped.
"""

from __future__ import annotations

import copy
import difflib
import fnmatch
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from compress_uq.errors import UncertaintyError
from compress_uq.uq.kinds import KINDS, LAYERS, own_shape
from compress_uq.uq.traces import Trace, is_leaf, is_weighted, trace

__all__ = ["Site", "find_head", "find_sites", "functional_dropout", "named_sites"]

_SEQUENCES = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_OWN = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_UNSUPPORTED = (nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True)
class Site:
    """A place where something is dropped."""

    module: str
    """Dotted name in the model."""
    p: float
    shape: tuple[int, ...]
    """Of one mask, broadcast over what it drops: (C, 1, 1) drops channels of one image's output."""
    own: bool
    """True for a dropout layer that the model came with and that drops as it always did."""
    of_weights: bool = False
    """True where the mask is of the module's weights, not of its output."""


def find_sites(model: nn.Module, example: Tensor, p: float | None, kind: str = "auto") -> tuple[Site, ...]:
    """All candidate sites in the order they run.

    They are the model's own dropout where it has any, otherwise the ends of its blocks; for kinds that drop parts of
    layers, its linear and convolutional layers.

    Args:
        model: a classifier.
        example: images (N, C, H, W).
        p: dropout rate; None for the layer's own, and 0.1 where a site is new.
        kind: one of `KINDS`.

    Raises:
        UncertaintyError: there is none.
    """
    traced = trace(model, example)
    modules = dict(model.named_modules())
    if KINDS[kind].at_layers:
        names = _layers(model, traced, kind)
    else:
        names = [n for n, m in modules.items() if isinstance(m, _OWN) and m.p > 0 and n in traced.order]
        if not names:
            _refuse_unsupported(modules)
            head = _head(model, traced)
            before = {n for n in traced.order if traced.order[n] < traced.order[head]}
            names = [n for n in _block_ends(model) if n in before]
            names = names or [n for n in _stem_ends(model, traced) if n in before]
    if not names:
        raise UncertaintyError(
            "no place for dropout was found before the classifier: name modules with --dropout-at (at=), "
            f"of {', '.join(list(traced.order)[:6])} …"
        )
    return _in_order([_site_at(model, name, p, traced, kind) for name in names], traced)


def _refuse_unsupported(modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        if isinstance(module, _UNSUPPORTED) and module.p > 0:
            raise UncertaintyError(f"{name} is a {type(module).__name__}: only Dropout to Dropout3d can be sampled")


def find_head(model: nn.Module, example: Tensor) -> str | None:
    """The classifier: the last layer with a weight matrix that runs once; None where there is none.

    Args:
        model: a network without sampled members.
        example: images (N, C, H, W).
    """
    try:
        return _head(model, trace(model, example))
    except UncertaintyError:
        return None


def named_sites(
    model: nn.Module, patterns: Sequence[str], example: Tensor, p: float | None, kind: str = "auto"
) -> tuple[Site, ...]:
    """Sites at the modules that the caller names, by name or shell pattern, in the order they run.

    For kinds that drop parts of layers a module stands for the layers inside it.

    Raises:
        UncertaintyError: a pattern that matches nothing (names the nearest), or a module that cannot be a site.
    """
    names = [name for name, _ in model.named_modules() if name]
    found: dict[str, None] = {}
    for pattern in (given.strip() for given in patterns):
        matching = fnmatch.filter(names, pattern)
        if not matching:
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UncertaintyError(f"--dropout-at {pattern!r}: the model has no such module{hint}")
        found |= dict.fromkeys(matching)
    traced = trace(model, example)
    if KINDS[kind].at_layers:
        inside = [n for n in _layers(model, traced, kind) if any(f"{n}.".startswith(f"{name}.") for name in found)]
        if not inside:
            raise UncertaintyError(
                f"--dropout-at {','.join(patterns)}: no linear or convolutional layer in there whose {kind}s can go"
            )
        found = dict.fromkeys(inside)
    return _in_order([_site_at(model, name, p, traced, kind) for name in found], traced)


def _in_order(sites: Sequence[Site], traced: Trace) -> tuple[Site, ...]:
    return tuple(sorted(sites, key=lambda site: traced.order[site.module]))


def _layers(model: nn.Module, traced: Trace, kind: str) -> list[str]:
    """Layers that parts can be dropped of: the classifier loses connections, but none of its classes."""
    head = _head(model, traced)
    found = [n for n, m in model.named_modules() if type(m) in LAYERS and n in traced.order]
    if KINDS[kind].of_weights:
        modules = dict(model.named_modules())
        return [n for n in found if getattr(modules[n], "padding_mode", "zeros") == "zeros"]
    return [n for n in found if traced.order[n] < traced.order[head]]


def _site_at(model: nn.Module, name: str, p: float | None, traced: Trace, kind: str) -> Site:
    """The site at a module: its own dropout, or new dropout of a kind."""
    module, chosen = model.get_submodule(name), KINDS[kind]
    if name not in traced.order:
        raise UncertaintyError(
            f"dropout cannot go at {name}: it does not run exactly once, or does not return a tensor"
        )
    own = isinstance(module, _OWN)
    rate = p or (module.p if isinstance(module, _OWN) else 0.1)
    if not rate:
        raise UncertaintyError(f"{name} is a dropout layer with p = 0: give a rate with --dropout (p=)")
    if own and chosen.keeps_own:
        return Site(name, rate, own_shape(module, traced.shapes[name]), True)
    return Site(name, rate, chosen.mask(module, name, traced), False, chosen.of_weights)


def functional_dropout(model: nn.Module, example: Tensor) -> tuple[str, ...]:
    """Names of the modules that call dropout as a function while training; such calls are not sites."""
    probe = copy.deepcopy(model).train()
    stack: list[str] = [""]
    found: set[str] = set()
    for name, module in probe.named_modules():
        module.register_forward_pre_hook(lambda _m, _a, name=name: stack.append(name))
        module.register_forward_hook(lambda _m, _a, _o: stack.pop() and None)

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            module = probe.get_submodule(stack[-1])
            if func in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d) and not isinstance(
                module, nn.modules.dropout._DropoutNd
            ):
                arguments = dict(zip(("input", "p", "training"), args, strict=False)) | (kwargs or {})
                if arguments.get("p", 0.5) > 0 and arguments.get("training", True):
                    found.add(stack[-1] or "forward")
            return func(*args, **(kwargs or {}))

    try:
        with torch.no_grad(), Watch():
            probe(torch.cat([example, example]))
    except (RuntimeError, ValueError):
        return ()  # a model that cannot run in training mode on two images is told so by fine-tuning
    return tuple(sorted(found))


def _is_sequence(module: nn.Module) -> bool:
    if isinstance(module, _SEQUENCES):
        return True
    for child in module.children():
        if isinstance(child, _SEQUENCES):
            classes = Counter(type(c) for c in child.children() if not isinstance(c, _SEQUENCES) and not is_leaf(c))
            if any(count >= 2 for count in classes.values()):
                return True
    return False


def _block_ends(root: nn.Module) -> list[str]:
    """Names of the modules that end a block; a superset in tree order, filtered by what ran."""
    return list(_visit(root, "", isinstance(root, _SEQUENCES)))


def _visit(module: nn.Module, prefix: str, in_sequence: bool) -> Iterator[str]:
    end: str | None = None
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if not is_weighted(child):
            if end is not None and isinstance(module, nn.Sequential) and not isinstance(child, (nn.Flatten, *_OWN)):
                end = path
            continue
        if end is not None:
            yield end
        end = None
        if _is_sequence(child):
            yield from _visit(child, f"{path}.", True)
        elif in_sequence or not is_leaf(child):
            end = path
    if end is not None:
        yield end


def _stem_ends(root: nn.Module, traced: Trace) -> list[str]:
    """For a model that is a handful of layers: each weighted layer, or the norm that runs directly after it."""
    ran = [n for n, m in root.named_modules() if n in traced.order and is_leaf(m)]
    leaves = sorted(ran, key=traced.order.__getitem__)
    modules = dict(root.named_modules())
    ends = []
    for name, after in zip(leaves, [*leaves[1:], None], strict=True):
        if is_weighted(modules[name]):
            normed = after is not None and type(modules[after]).__name__.startswith(("BatchNorm", "LayerNorm"))
            ends.append(after if normed and after is not None else name)
    return ends


def _head(model: nn.Module, traced: Trace) -> str:
    """The weighted layer that runs last."""
    weighted = [n for n, m in model.named_modules() if n in traced.order and is_leaf(m) and is_weighted(m)]
    if not weighted:
        raise UncertaintyError("the model has no layer with a weight matrix")
    last: str = max(weighted, key=traced.order.__getitem__)
    return last
