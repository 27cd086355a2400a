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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from compress_uq.cost import evaluation_mode
from compress_uq.errors import UncertaintyError

__all__ = ["Site", "find_head", "find_sites", "functional_dropout", "named_sites"]

_SEQUENCES = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_ELEMENTWISE = (nn.Dropout,)
_CHANNELWISE = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_UNSUPPORTED = (nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True)
class Site:
    """A place whose output is dropped."""

    module: str
    """Dotted name in the model."""
    p: float
    shape: tuple[int, ...]
    """Of the mask of one image, broadcast over the module's output: (C, 1, 1) drops channels."""
    own: bool
    """True for a dropout layer that the model came with."""


@dataclass(frozen=True)
class _Trace:
    """What one forward pass showed: output shapes and order of the modules that ran exactly once."""

    shapes: dict[str, tuple[int, ...]]
    order: dict[str, int]


def find_sites(model: nn.Module, example: Tensor, p: float | None) -> tuple[Site, ...]:
    """All candidate sites in the order they run: the model's own where it has any, otherwise the ends of its blocks.

    Args:
        model: a classifier.
        example: images (N, C, H, W).
        p: dropout rate; None for the layer's own, and 0.1 where a site is new.

    Raises:
        UncertaintyError: neither is there.
    """
    trace = _trace(model, example)
    modules = dict(model.named_modules())
    own = [
        Site(name, p or module.p, _own_shape(module, trace.shapes[name]), True)
        for name, module in modules.items()
        if isinstance(module, _ELEMENTWISE + _CHANNELWISE) and module.p > 0 and name in trace.order
    ]
    if own:
        return tuple(sorted(own, key=lambda site: trace.order[site.module]))
    unsupported = [n for n, m in modules.items() if isinstance(m, _UNSUPPORTED) and m.p > 0]
    if unsupported:
        raise UncertaintyError(
            f"{unsupported[0]} is a {type(modules[unsupported[0]]).__name__}: only Dropout to Dropout3d can be sampled"
        )
    head = _head(model, trace)
    names = [name for name in _block_ends(model) if name in trace.order and trace.order[name] < trace.order[head]]
    if not names:
        names = [n for n in _stem_ends(model, trace) if trace.order[n] < trace.order[head]]
    sites = [_site_at(model, name, p, trace) for name in names]
    if not sites:
        raise UncertaintyError(
            "no place for dropout was found before the classifier: name modules with --dropout-at (at=), "
            f"of {', '.join(list(trace.order)[:6])} …"
        )
    return tuple(sorted(sites, key=lambda site: trace.order[site.module]))


def find_head(model: nn.Module, example: Tensor) -> str | None:
    """The classifier: the last layer with a weight matrix that runs once; None where there is none.

    Args:
        model: a network without sampled members.
        example: images (N, C, H, W).
    """
    try:
        return _head(model, _trace(model, example))
    except UncertaintyError:
        return None


def named_sites(model: nn.Module, patterns: Sequence[str], example: Tensor, p: float | None) -> tuple[Site, ...]:
    """Sites at the modules that the caller names, by name or shell pattern, in the order they run.

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
    trace = _trace(model, example)
    sites = [_site_at(model, name, p, trace) for name in found]
    return tuple(sorted(sites, key=lambda site: trace.order[site.module]))


def _site_at(model: nn.Module, name: str, p: float | None, known: _Trace) -> Site:
    """The site at a module's output: its own dropout layer, or new channel dropout."""
    module = model.get_submodule(name)
    if name not in known.order:
        raise UncertaintyError(
            f"dropout cannot go at {name}: it does not run exactly once, or does not return a tensor"
        )
    if isinstance(module, _ELEMENTWISE + _CHANNELWISE):
        rate = p or module.p
        if not rate:
            raise UncertaintyError(f"{name} is a dropout layer with p = 0: give a rate with --dropout (p=)")
        return Site(name, rate, _own_shape(module, known.shapes[name]), True)
    return Site(name, p or 0.1, _channel_shape(module, name, known), False)


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


def _trace(model: nn.Module, example: Tensor) -> _Trace:
    shapes: dict[str, tuple[int, ...]] = {}
    order: dict[str, int] = {}
    runs: Counter[str] = Counter()
    handles = []
    for name, module in model.named_modules():
        if not name:
            continue

        def note(_module: nn.Module, _inputs: Any, output: Any, name: str = name) -> None:
            runs[name] += 1
            if isinstance(output, Tensor):
                shapes[name] = tuple(output.shape[1:])
                order[name] = len(order)

        handles.append(module.register_forward_hook(note))
    try:
        with evaluation_mode(model), torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    once = {name for name in order if runs[name] == 1}
    return _Trace({n: s for n, s in shapes.items() if n in once}, {n: i for n, i in order.items() if n in once})


def _weighted(module: nn.Module) -> bool:
    return any(p.ndim >= 2 for p in module.parameters())


def _leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _is_sequence(module: nn.Module) -> bool:
    if isinstance(module, _SEQUENCES):
        return True
    for child in module.children():
        if isinstance(child, _SEQUENCES):
            classes = Counter(type(c) for c in child.children() if not isinstance(c, _SEQUENCES) and not _leaf(c))
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
        if not _weighted(child):
            if end is not None and isinstance(module, nn.Sequential) and not isinstance(child, nn.Flatten):
                end = path
            continue
        if end is not None:
            yield end
        end = None
        if _is_sequence(child):
            yield from _visit(child, f"{path}.", True)
        elif in_sequence or not _leaf(child):
            end = path
    if end is not None:
        yield end


def _stem_ends(root: nn.Module, trace: _Trace) -> list[str]:
    """For a model that is a handful of layers: each weighted layer, or the norm that runs directly after it."""
    leaves = sorted((n for n, m in root.named_modules() if n in trace.order and _leaf(m)), key=trace.order.__getitem__)
    modules = dict(root.named_modules())
    ends = []
    for name, after in zip(leaves, [*leaves[1:], None], strict=True):
        if _weighted(modules[name]):
            normed = after is not None and type(modules[after]).__name__.startswith(("BatchNorm", "LayerNorm"))
            ends.append(after if normed and after is not None else name)
    return ends


def _head(model: nn.Module, trace: _Trace) -> str:
    """The weighted layer that runs last."""
    weighted = [n for n, m in model.named_modules() if n in trace.order and _leaf(m) and _weighted(m)]
    if not weighted:
        raise UncertaintyError("the model has no layer with a weight matrix")
    last: str = max(weighted, key=trace.order.__getitem__)
    return last


def _own_shape(module: nn.Module, output: tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(module, _ELEMENTWISE):
        return output
    return (output[0], *(1 for _ in output[1:]))


def _channel_shape(module: nn.Module, name: str, trace: _Trace) -> tuple[int, ...]:
    """The mask that drops whole channels: the axis as long as the last layer inside is wide, the first of two."""
    output = trace.shapes[name]
    inside = [
        (trace.order[f"{name}.{n}" if n else name], m)
        for n, m in module.named_modules()
        if (f"{name}.{n}" if n else name) in trace.order and _leaf(m) and any(True for _ in m.parameters())
    ]
    width = len(next(max(inside, key=lambda item: item[0])[1].parameters())) if inside else None
    channels_last = len(output) > 1 and output[0] != width and output[-1] == width
    if len(output) == 2:  # tokens (S, D): features come last
        channels_last = True
    if channels_last:
        return (*(1 for _ in output[:-1]), output[-1])
    return (output[0], *(1 for _ in output[1:]))
