"""Modules whose whole state is named tensors and plain options: fitted once, then saved, loaded and exported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from compress_uq.errors import InputError, UncertaintyError
from compress_uq.registry import Registry

__all__ = ["Fitted", "Plain", "fitted_record", "restore_fitted"]

Plain = bool | int | float | str


class Fitted(nn.Module):
    """What `fit` found, as buffers that move, save and export with the model; built empty, it refuses to work."""

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    """Names of the tensors that `fit` finds."""
    error: ClassVar[type[InputError]] = UncertaintyError

    def __init__(self, options: Mapping[str, Plain] | None = None, **tensors: Tensor) -> None:
        super().__init__()
        self.options: dict[str, Plain] = dict(options or {})
        """What the forward needs and is no tensor, such as a number of neighbours."""
        for name in self.needs:
            self.register_buffer(name, tensors.get(name))

    def require_fitted(self) -> None:
        """Refuse to pass for something that was fitted.

        Raises:
            InputError: `fit` was not called; of the class that `error` names.
        """
        if any(getattr(self, name) is None for name in self.needs):
            raise self.error(f"{self.name!r} is used before it was fitted: call fit first")


def fitted_record(module: Fitted | None) -> dict[str, Any] | None:
    """What `restore_fitted` needs besides the tensors; plain values."""
    return None if module is None else {"name": module.name, "options": module.options}


def restore_fitted(
    registry: Registry[Any], record: Mapping[str, Any] | None, state: Mapping[str, Tensor], prefix: str
) -> Any:
    """The module that a record and the tensors under `prefix` describe; None for no record."""
    if record is None:
        return None
    tensors = {name.removeprefix(prefix): t.clone() for name, t in state.items() if name.startswith(prefix)}
    return registry[record["name"]](record["options"], **tensors)
