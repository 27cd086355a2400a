"""What cannot be pruned as it stands, found before any work starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.utils import parametrize

from compress_uq.errors import PruningError

__all__ = ["naming_what_breaks", "refuse_unprunable"]


def refuse_unprunable(model: nn.Module) -> None:
    """Check that layers own their weights alone and plainly.

    Raises:
        PruningError: all is frozen, or a layer is parametrised, masked, or shares its weight with another.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise PruningError(
            "nothing can be pruned: every parameter is frozen; set requires_grad on the layers that may lose channels"
        )
    for name, module in model.named_modules():
        for finding in _disguises(module):
            raise PruningError(f"layer {name or type(module).__name__} {finding}")
    _refuse_shared(model)


def _disguises(module: nn.Module) -> Iterator[str]:
    """What stands between a module and its plain weights."""
    if parametrize.is_parametrized(module):
        weight = next(iter(module.parametrizations))  # type: ignore[arg-type]
        yield (
            f"has a parametrised {weight}, such as weight_norm: remove it first with "
            f"torch.nn.utils.parametrize.remove_parametrizations(layer, {weight!r})"
        )
    own = dict(module.named_parameters(recurse=False))
    buffers = dict(module.named_buffers(recurse=False))
    for key in own:
        name, _, suffix = key.rpartition("_")
        if suffix == "orig" and f"{name}_mask" in buffers:
            yield (
                f"carries a mask of torch.nn.utils.prune on its {name}: make it permanent first with "
                f"torch.nn.utils.prune.remove(layer, {name!r})"
            )
        elif suffix == "orig" and f"{name}_u" in buffers:
            yield f"has spectral_norm: remove it first with torch.nn.utils.remove_spectral_norm(layer, {name!r})"
        elif suffix == "g" and f"{name}_v" in own:
            yield f"has weight_norm: remove it first with torch.nn.utils.remove_weight_norm(layer, {name!r})"


def _refuse_shared(model: nn.Module) -> None:
    """Two layers with one parameter cannot lose channels apart from each other."""
    seen: dict[nn.Parameter, tuple[nn.Module, str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{key}".lstrip(".")
            owner, other = seen.setdefault(parameter, (module, full))
            if owner is not module:
                raise PruningError(f"{full} and {other} are one shared parameter: give each layer its own first")


@contextmanager
def naming_what_breaks(model: nn.Module) -> Iterator[None]:
    """Inside the block a pruned model runs for the first time.

    Raises:
        PruningError: it fails; names the module whose own code counts on the channels that are gone.
    """
    entered: list[str] = []
    names = {module: name for name, module in model.named_modules()}
    hooks = []
    for module in names:
        hooks.append(module.register_forward_pre_hook(lambda m, _: entered.append(names[m])))
        hooks.append(module.register_forward_hook(lambda m, i, o: entered.remove(names[m])))
    try:
        yield
    except Exception as error:  # whatever the model's own code raises
        if not entered:
            raise
        name = entered[-1]
        owner = name if next(iter(model.get_submodule(name).children()), None) else name.rpartition(".")[0]
        kind = type(model.get_submodule(owner)).__name__
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PruningError(
            f"{owner or 'the model'} ({kind}) counts its channels in its own code and cannot lose them: {reason}; "
            f"keep its layers, as in keep=[{owner or '...'!r}]"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
