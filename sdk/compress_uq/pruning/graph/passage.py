"""Whether channels come through an operation in their order, or the trace would take them for others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch_pruning import ops
from torch_pruning.dependency import shape_infer

__all__ = ["mark_reshapes", "obstacle", "split_parts"]

_REARRANGING = frozenset("PixelShuffle PixelUnshuffle Im2Col Col2Im".split())
_ALONG_A_DIMENSION = frozenset("Index IndexSelect Flip Roll Gather Sort".split())


def mark_reshapes(nodes: Iterable[Any]) -> None:
    """Only a flattened or unflattened map repeats a channel; any other view is plain arithmetic to torch-pruning.

    Its own rule depends on whether some linear layer saw tokens anywhere in the model.
    """
    for node in nodes:
        if node.type == ops.OPTYPE.RESHAPE and not _is_flat(*_shapes(node.grad_fn)):
            node.type = ops.OPTYPE.ELEMENTWISE


def obstacle(graph: Any, node: Any) -> str:
    """Why channels cannot be followed through an operation; empty where they can."""
    name = type(node.grad_fn).__name__.rstrip("0123456789").removesuffix("Backward")
    if isinstance(node.module, ops._ReshapeOp):
        return _through_view(graph, node)
    if isinstance(node.module, ops._SliceOp):
        return _through_slice(graph, node)
    if not isinstance(node.module, ops._ElementWiseOp):
        return ""
    if name in _REARRANGING:
        return f"{name} rearranges them"
    if name in _ALONG_A_DIMENSION:
        (shape,) = [m.shape for m in node.grad_fn._input_metadata]
        width = _width(graph, node)
        if any(0 <= dim < len(shape) and shape[dim] == width for dim in _dimensions(node.grad_fn, len(shape))):
            return f"{name} rearranges them"
    return ""


def split_parts(graph: Any, node: Any) -> int | None:
    """Into how many equal parts a split divides the channels: 1 where it is none of channels, None if unequal."""
    grad_fn = node.grad_fn
    if not isinstance(node.module, ops._SplitOp) or not hasattr(grad_fn, "_saved_self_sym_sizes"):
        return 1
    shape = grad_fn._saved_self_sym_sizes
    size = shape[_dimensions(grad_fn, len(shape))[0]]
    if size != _width(graph, node):
        return 1
    if hasattr(grad_fn, "_saved_split_sizes"):
        sizes = set(grad_fn._saved_split_sizes)
        return int(size // sizes.pop()) if len(sizes) == 1 else None
    return None if size % grad_fn._saved_split_size else int(size // grad_fn._saved_split_size)


def _through_slice(graph: Any, node: Any) -> str:
    grad_fn = node.grad_fn
    shape = grad_fn._saved_self_sym_sizes
    size = shape[_dimensions(grad_fn, len(shape))[0]]
    whole = grad_fn._saved_start == 0 and grad_fn._saved_end >= size and grad_fn._saved_step == 1
    return "a slice takes some of them by number" if not whole and size == _width(graph, node) else ""


def _through_view(graph: Any, node: Any) -> str:
    before, after = _shapes(node.grad_fn)
    width = _width(graph, node)
    if width is None or len(before) < 2 or len(after) < 2:
        return ""
    if _is_flat(before, after):
        whole, flat = (before, after) if len(after) == 2 else (after, before)
        return (
            "" if whole[1] in (width, flat[1]) or width == flat[1] != whole[-1] else "they are flattened from the end"
        )
    if width in (before[1], after[1]) and before[1] == after[1]:
        return ""
    if width in (before[-1], after[-1]) and before[-1] == after[-1]:
        return ""
    return f"a view of {tuple(before)} as {tuple(after)} rearranges them"


def _shapes(grad_fn: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Before and after a view."""
    before = getattr(grad_fn, "_saved_self_sym_sizes", ())
    return tuple(before), tuple(grad_fn._input_metadata[0].shape)


def _is_flat(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """(N, C, ...) to (N, C x ...) or back."""
    return 2 in (len(before), len(after)) and before[:1] == after[:1]


def _width(graph: Any, node: Any) -> int | None:
    """How many channels come in."""
    for source in node.inputs:
        found = shape_infer.infer_out_channels_recursively(graph, source, [0])
        if found is not None:
            return int(found)
    return None


def _dimensions(grad_fn: Any, rank: int) -> list[int]:
    """Along which an operation moves things; all of them where it does not tell."""
    if hasattr(grad_fn, "_saved_dims"):
        found = list(grad_fn._saved_dims)
    elif hasattr(grad_fn, "_saved_dim"):
        found = [grad_fn._saved_dim]
    elif hasattr(grad_fn, "_saved_indices"):
        return [d for d, index in enumerate(grad_fn._saved_indices) if index is not None]
    else:
        found = list(range(rank))
    return [dim - 2**64 + rank if dim >= 2**63 else dim % rank for dim in found]
