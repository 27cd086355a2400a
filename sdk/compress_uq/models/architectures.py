"""From a reference such as `torchvision:resnet18` to a model.

Four kinds of reference: `compress-uq:NAME`, `torchvision:NAME`, `timm:NAME` and `package.module:callable`.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from compress_uq.errors import MissingDependencyError, ModelError, UnknownNameError
from compress_uq.models.resnet18 import resnet18
from compress_uq.models.resnet_cifar import resnet20, resnet56
from compress_uq.models.small import cnn, mlp
from compress_uq.models.vgg import vgg19
from compress_uq.registry import Entry, Registry

__all__ = ["ARCHITECTURES", "Architecture", "build_model", "import_callable"]

Builder = Callable[..., nn.Module]

ARCHITECTURES: Registry[Builder] = Registry(
    "architecture",
    Entry("mlp", "perceptron of any widths (options: widths)", "Charpentier, networks 128, 128-64, 64-64", mlp),
    Entry("cnn", "plain convolutional net (options: widths, kernel_size, hidden)", "LeCun 1998 with batch norm", cnn),
    Entry("resnet20", "ResNet-20 for 32x32, shortcuts without weights", "He 2016, option A", resnet20),
    Entry("resnet56", "ResNet-56 for 32x32, shortcuts without weights", "He 2016, option A", resnet56),
    Entry("resnet18", "ResNet-18 for small images", "He 2016, 3x3 stem after kuangliu", resnet18),
    Entry("vgg19", "VGG-19 with batch norm for small images", "Simonyan 2015, layout after kuangliu", vgg19),
)


@dataclass(frozen=True)
class Architecture:
    """All that is needed to build a model again: the reference and what it is called with."""

    reference: str
    num_classes: int
    input_shape: tuple[int, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, seed: int | None = None) -> nn.Module:
        """A freshly initialised model, its weights drawn from `seed` where one is given."""
        if seed is not None:
            torch.manual_seed(seed)
        return build_model(
            self.reference, num_classes=self.num_classes, input_shape=self.input_shape, options=self.options
        )

    @property
    def imports_user_code(self) -> bool:
        """True for `package.module:callable`, which a file may name but never imports by itself."""
        return self.reference.partition(":")[0] not in _SOURCES

    def to_json(self) -> dict[str, Any]:
        """Plain types only."""
        shape = None if self.input_shape is None else list(self.input_shape)
        return {
            "reference": self.reference,
            "num_classes": self.num_classes,
            "input_shape": shape,
            "options": {k: list(v) if isinstance(v, tuple) else v for k, v in self.options.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Architecture:
        """The inverse of `to_json`."""
        shape = data.get("input_shape")
        return cls(
            data["reference"],
            int(data["num_classes"]),
            None if shape is None else tuple(shape),
            data.get("options", {}),
        )


def build_model(
    arch: str,
    *,
    num_classes: int,
    input_shape: tuple[int, ...] | None = None,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A freshly initialised classifier.

    Args:
        arch: `compress-uq:NAME`, `torchvision:NAME`, `timm:NAME` or `package.module:callable`.
        num_classes: K, passed to whatever takes it.
        input_shape: (C, H, W) of one image, passed to whatever takes it.
        options: further arguments of the architecture, such as `{"widths": (128, 64)}` for `mlp`.

    Raises:
        UnknownNameError: no such architecture; names the nearest.
        ModelError: the callable cannot be imported or does not return an `nn.Module`.
        MissingDependencyError: `timm:` without timm.
    """
    source, separator, name = arch.partition(":")
    if not separator or not name:
        raise ModelError(
            f"architecture {arch!r}: expected compress-uq:NAME, torchvision:NAME, timm:NAME or package.module:callable"
        )
    if num_classes < 2:
        raise ModelError(f"num_classes={num_classes}: a classifier needs at least two classes")
    arguments: dict[str, Any] = {"num_classes": num_classes, "input_shape": input_shape, **(options or {})}
    with _input_errors(arch):
        model = _SOURCES.get(source, _build_imported)(arch, name, arguments)
    if not isinstance(model, nn.Module):
        raise ModelError(f"architecture {arch!r} returned {type(model).__name__}: expected a torch.nn.Module")
    return model


def import_callable(reference: str, what: str) -> Callable[..., Any]:
    """The object that `package.module:callable` names; the current folder is importable.

    Raises:
        ModelError: it cannot be imported, or is not callable.
    """
    module_name, _, attribute = reference.partition(":")
    import_from_here()
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ModelError(f"{what} {reference!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ModelError(f"{what} {reference!r} is a {type(found).__name__}: expected a callable")
    return found  # type: ignore[no-any-return]


def import_from_here() -> None:
    """Make the current folder importable, as uvicorn does."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)


@contextmanager
def _input_errors(arch: str) -> Iterator[None]:
    """A wrong argument for an architecture is the caller's mistake, told in one line."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if isinstance(error, ModelError | UnknownNameError):
            raise
        raise ModelError(f"architecture {arch!r} cannot be built: {error}") from error


def _accepted(builder: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What the builder takes of `num_classes` and `input_shape`, and every option that was asked for."""
    parameters = inspect.signature(builder).parameters
    optional = {"num_classes", "input_shape"}
    return {k: v for k, v in arguments.items() if v is not None and (k in parameters or k not in optional)}


def _build_own(_arch: str, name: str, arguments: dict[str, Any]) -> nn.Module:
    builder = ARCHITECTURES[name]
    return builder(**_accepted(builder, arguments))


def _build_torchvision(_arch: str, name: str, arguments: dict[str, Any]) -> nn.Module:
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise UnknownNameError("torchvision architecture", name, known)
    arguments.pop("input_shape")
    return torchvision.models.get_model(name, weights=None, **arguments)  # type: ignore[no-any-return]


def _build_timm(arch: str, name: str, arguments: dict[str, Any]) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise MissingDependencyError(f"{arch!r} needs timm: pip install 'compress-uq[timm]'") from error
    if not timm.is_model(name):
        raise UnknownNameError("timm architecture", name, timm.list_models())
    shape = arguments.pop("input_shape")
    if shape is not None:
        arguments.setdefault("in_chans", shape[0])
    return timm.create_model(name, pretrained=False, **arguments)


def _build_imported(arch: str, _name: str, arguments: dict[str, Any]) -> nn.Module:
    builder = import_callable(arch, "architecture")
    return builder(**_accepted(builder, arguments))  # type: ignore[no-any-return]


_SOURCES: dict[str, Callable[[str, str, dict[str, Any]], nn.Module]] = {
    "compress-uq": _build_own,
    "torchvision": _build_torchvision,
    "timm": _build_timm,
}
