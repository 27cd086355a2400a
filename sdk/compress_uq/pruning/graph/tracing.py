"""One forward pass recorded as torch-pruning's dependency graph, with what else has to be known about it."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch_pruning import _helpers
from torch_pruning.pruner import function

from compress_uq.errors import ModelError, PruningError
from compress_uq.models import ChannelSelect, as_logits
from compress_uq.pruning.graph.blocks import Block, standing_in
from compress_uq.pruning.graph.passage import mark_reshapes

__all__ = ["Loose", "Trace", "trace"]

_KNOWN = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.PReLU,
    nn.Embedding,
    nn.LSTM,
    ChannelSelect,
)


@dataclass(frozen=True)
class Loose:
    """A parameter or floating-point buffer of a module that is no layer."""

    owner: nn.Module
    key: str
    name: str
    is_buffer: bool


@dataclass(frozen=True)
class Trace:
    """A dependency graph and what its nodes stand for."""

    graph: Any
    loose: Mapping[nn.Parameter, Loose]
    """By the tensor that the graph knows it by."""
    contracted: frozenset[nn.Parameter]
    """Loose parameters that something was multiplied by and summed over, or indexed: not one value a channel."""

    def groups(self, heads: Sequence[nn.Module], roots: Sequence[type]) -> list[Any]:
        """torch-pruning's groups of the layers of some types, but those that hold outputs of `heads`.

        Raises:
            PruningError: the channels' ways through the model cannot be followed.
        """
        try:
            return list(self.graph.get_all_groups(ignored_layers=list(heads), root_module_types=list(roots)))
        except Exception as error:  # whatever torch-pruning stumbles over
            raise PruningError(
                f"the channels' ways through the model cannot be followed: {_first_line(error)}"
            ) from error


class _ChannelSelectPruner(function.BasePruningFunc):  # type: ignore[misc]
    """Each side of a `ChannelSelect` belongs to the stream on that side."""

    TARGET_MODULES = ChannelSelect

    def prune_out_channels(self, layer: ChannelSelect, idxs: Sequence[int]) -> nn.Module:
        layer.remove_outputs(list(idxs))
        return layer

    def prune_in_channels(self, layer: ChannelSelect, idxs: Sequence[int]) -> nn.Module:
        layer.remove_inputs(list(idxs))
        return layer

    def get_out_channels(self, layer: ChannelSelect) -> int:
        return layer.out_channels

    def get_in_channels(self, layer: ChannelSelect) -> int:
        return layer.in_channels


class _TwoSided(function.BasePruningFunc):  # type: ignore[misc]
    """A block whose input channels are not its output channels; it is cut elsewhere."""

    def __init__(self, blocks: Mapping[nn.Module, Block]) -> None:
        super().__init__()
        self.blocks = blocks

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        raise NotImplementedError

    def prune_in_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        raise NotImplementedError

    def get_out_channels(self, layer: nn.Module) -> int | None:
        return self.blocks[layer].channels[1] if layer in self.blocks else None

    def get_in_channels(self, layer: nn.Module) -> int | None:
        return self.blocks[layer].channels[0] if layer in self.blocks else None


class _Straight(_TwoSided):
    """A block whose output channel c is its input channel c."""

    prune_in_channels = _TwoSided.prune_out_channels


class _Graph(torch_pruning.DependencyGraph):  # type: ignore[misc]
    """Knows a flattened map from any other view."""

    def _trace(self, *args: Any, **options: Any) -> Any:
        nodes = super()._trace(*args, **options)
        self._2d_4d = True
        mark_reshapes(nodes.values())
        return nodes


class _Uses(TorchFunctionMode):
    """Notes which of some parameters, also seen through a view, enter an operation that is no plain arithmetic."""

    CONTRACTIONS = frozenset(
        """matmul __matmul__ __rmatmul__ mm bmm addmm addbmm baddbmm mv einsum tensordot linear bilinear embedding
        conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d __getitem__ index_select gather
        layer_norm batch_norm group_norm instance_norm rms_norm scaled_dot_product_attention""".split()
    )
    VIEWS = frozenset(
        """view reshape flatten unflatten unsqueeze squeeze t transpose permute expand expand_as to contiguous clone
        __get__ movedim swapaxes repeat""".split()
    )

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.origin: dict[int, nn.Parameter] = {id(p): p for p in parameters}
        self.alive: list[Any] = []
        self.found: set[nn.Parameter] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        entering = [self.origin[id(a)] for a in (*args, *(kwargs or {}).values()) if id(a) in self.origin]
        name = getattr(func, "__name__", "")
        if entering and name in self.CONTRACTIONS:
            self.found.update(entering)
        elif entering and name in self.VIEWS and isinstance(result, Tensor):
            self.alive.append(result)
            self.origin[id(result)] = entering[0]
        return result


def trace(model: nn.Module, example: Tensor, blocks: dict[nn.Module, Block]) -> Trace:
    """Run the model once; it is in eval mode afterwards, and its parameters' flags are as they were.

    Raises:
        PruningError: the model does not run on the example, or cannot be followed.
    """
    with torch.enable_grad(), _all_trainable(model), _loose(model, blocks) as loose, standing_in(blocks):
        uses = _Uses(list(loose))
        hidden = {inner for module in blocks for inner in module.modules() if inner is not module}
        graph = _Graph()
        straight, sided = _Straight(blocks), _TwoSided(blocks)
        pruners: dict[type, Any] = {ChannelSelect: _ChannelSelectPruner()}
        pruners |= {type(module): straight if block.straight else sided for module, block in blocks.items()}
        dims = [_helpers.UnwrappedParameters(p, _last_long(p)) for p in loose]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                graph.build_dependency(
                    model,
                    example_inputs=example[:1],
                    forward_fn=lambda network, images: _outputs(network, images, uses, hidden),
                    customized_pruners=pruners,
                    unwrapped_parameters=dims,
                    verbose=False,
                )
        except (PruningError, ModelError):
            raise
        except Exception as error:  # whatever the model's own code raises
            raise PruningError(
                f"the model cannot be traced on images of shape {tuple(example.shape[1:])}: {_first_line(error)}"
            ) from error
    return Trace(graph, loose, frozenset(uses.found))


def _outputs(model: nn.Module, images: Tensor, uses: _Uses, hidden: Collection[nn.Module]) -> list[Tensor]:
    """The logits; and where layers were passed over, those of the auxiliary classifiers that run while training."""
    ran: set[nn.Module] = set()
    layers = [m for m in model.modules() if isinstance(m, _KNOWN) and m not in hidden]
    hooks = [m.register_forward_hook(lambda module, *_: ran.add(module)) for m in layers]
    with uses if uses.origin else nullcontext():
        outputs = [as_logits(model(images))]
        if len(ran) < len(set(layers)):
            outputs = _training_outputs(model, images) or outputs
    for hook in hooks:
        hook.remove()
    return outputs


def _training_outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What the outermost module returns besides the logits when it trains, its children in eval mode."""
    model.training = True
    try:
        result = model(images)
    except Exception:  # it may want labels, or a larger batch
        return []
    finally:
        model.training = False
    several = list(result.values()) if isinstance(result, Mapping) else result
    if not isinstance(several, tuple | list):
        return []
    return [o for o in several if isinstance(o, Tensor) and o.grad_fn is not None]


@contextmanager
def _all_trainable(model: nn.Module) -> Iterator[None]:
    """Autograd sees what needs a gradient: a frozen branch would be missing from the graph."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def _loose(model: nn.Module, blocks: Mapping[nn.Module, Block]) -> Iterator[dict[nn.Parameter, Loose]]:
    """Loose tensors; buffers among them are parameters meanwhile, or the graph would not know of them."""
    inside = {inner for module in blocks for inner in module.modules()}
    found: dict[nn.Parameter, Loose] = {}
    replaced: list[tuple[nn.Module, str, Tensor]] = []
    for prefix, module in model.named_modules():
        if module in inside or isinstance(module, _KNOWN):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.numel() > 1:
                found[parameter] = Loose(module, key, f"{prefix}.{key}".lstrip("."), False)
        for key, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_floating_point() and buffer.numel() > 1:
                stand_in = nn.Parameter(buffer.detach())
                module._buffers[key] = stand_in
                replaced.append((module, key, buffer))
                found[stand_in] = Loose(module, key, f"{prefix}.{key}".lstrip("."), True)
    try:
        yield found
    finally:
        for module, key, buffer in replaced:
            module._buffers[key] = buffer


def _last_long(tensor: Tensor) -> int:
    """The last dimension that is longer than one."""
    return max(d for d, size in enumerate(tensor.shape) if size > 1)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
