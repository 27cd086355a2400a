"""Options that several commands share, and their reading."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

import compress_uq as cuq
from compress_uq_cli.console import note

Arch = Annotated[
    str | None,
    typer.Option(help="compress-uq:NAME, torchvision:NAME, timm:NAME or package.module:callable."),
]
ArchOption = Annotated[
    list[str] | None, typer.Option("--arch-option", help="KEY=VALUE for the architecture, such as widths=128,64.")
]
NumClasses = Annotated[int | None, typer.Option(help="Number of classes, where neither file nor data tell it.")]
Data = Annotated[
    str | None, typer.Option(help="A data set's name, a folder of class folders, or package.module:callable.")
]
DataRoot = Annotated[Path, typer.Option(help="Where the named data sets lie or are downloaded to.")]
Mean = Annotated[str | None, typer.Option(help="Per channel, of pixels in 0..1, comma-separated.")]
Std = Annotated[str | None, typer.Option(help="Per channel, of pixels in 0..1, comma-separated.")]
Ood = Annotated[
    list[str] | None, typer.Option(help="An out-of-distribution set: a name or a folder of images; repeatable.")
]
Dropout = Annotated[float | None, typer.Option(help="Dropout rate, above 0 and below 1.")]
UqOption = Annotated[list[str] | None, typer.Option(help="KEY=VALUE for the method; repeatable.")]
DropoutAt = Annotated[str | None, typer.Option(help="auto, or modules to drop after: names or patterns.")]
ValidationOod = Annotated[
    list[str] | None,
    typer.Option(help="An out-of-distribution set to choose a score on, never reported on; repeatable."),
]
Epochs = Annotated[int | None, typer.Option(help="Epochs of training, 0 or more.")]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Peak learning rate.")]
BatchSize = Annotated[int | None, typer.Option(help="Images per step.")]
Augment = Annotated[str | None, typer.Option(help="Augmentation; by default what suits the data set.")]
ClassWeights = Annotated[str | None, typer.Option(help="none, balanced, or a weight per class, comma-separated.")]
Workers = Annotated[int | None, typer.Option(help="Processes that load images.")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda[:i].")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that is there.")]
UnsafeLoad = Annotated[
    bool, typer.Option("--unsafe-load", help="Allow a whole pickled model, whose loading can run code.")
]


_REPEATED = frozenset(
    "ood validation_ood require arch_option keep budget criterion_option schedule_option uq_option".split()
)


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Lay a TOML file under the command line's own options."""
    if path is None or context.resilient_parsing:
        return path
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise cuq.InputError(f"--config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise cuq.InputError(f"--config {path} is not TOML: {error}") from error
    known = {p.name for p in context.command.params if p.name is not None} - {"config", "model"}
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in known:
            raise cuq.errors.UnknownNameError(f"key of {path}", key, (k.replace("_", "-") for k in known))
        values[name] = _as_option(value, repeated=name in _REPEATED)
    context.default_map = {**(context.default_map or {}), **values}
    return path


def _as_option(value: Any, *, repeated: bool) -> Any:
    """A TOML list is a repeated option where there is one, and a comma-separated one otherwise."""
    if repeated:
        return [str(v) for v in value] if isinstance(value, list) else [str(value)]
    return ",".join(str(v) for v in value) if isinstance(value, list) else value


Config = Annotated[
    Path | None,
    typer.Option(help="TOML file with options; the command line wins.", callback=_read_config, is_eager=True),
]


def numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    """Comma-separated numbers.

    Raises:
        InputError: something else.
    """
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise cuq.InputError(f"{option} {text!r}: expected numbers separated by commas") from error


def pairs(given: list[str] | None, option: str) -> dict[str, str]:
    """`KEY=VALUE` pairs, the values as they are.

    Raises:
        InputError: not a pair.
    """
    found = {}
    for text in given or ():
        key, separator, value = text.partition("=")
        if not (key and separator and value):
            raise cuq.InputError(f"{option} {text!r}: expected KEY=VALUE")
        found[key.replace("-", "_")] = value
    return found


def arch_options(pairs: list[str] | None) -> dict[str, Any]:
    """`KEY=VALUE` pairs; a value with commas is a sequence of numbers.

    Raises:
        InputError: not a pair of a name and numbers.
    """
    options: dict[str, Any] = {}
    for pair in pairs or ():
        key, found, text = pair.partition("=")
        try:
            values = [int(part) for part in text.split(",") if part]
        except ValueError as error:
            raise cuq.InputError(f"--arch-option {pair!r}: expected whole numbers, such as widths=128,64") from error
        if not found or not key or not values:
            raise cuq.InputError(f"--arch-option {pair!r}: expected KEY=VALUE, such as widths=128,64")
        options[key] = values if key in ("widths", "hidden") or len(values) > 1 else values[0]
    return options


def method(name: str, given: dict[str, Any], texts: dict[str, str]) -> Any:
    """A configured uncertainty method; an option that it has no use for is named in a note."""
    configured, unused = cuq.configure_method(name, given, texts)
    if unused:
        note(f"note: {name} has no use for {', '.join('--' + option.replace('_', '-') for option in unused)}")
    return configured


def named_data(bundle: cuq.Bundle, data: str | None) -> str | None:
    """The data that were named, else the bundle's own where a name is enough to find them."""
    name = data or bundle.origin.data
    return name if data is not None or name in cuq.data.DATASETS else None


def class_weights(text: str | None) -> str | tuple[float, ...] | None:
    """`none`, `balanced`, or a weight per class."""
    if text is None or text.isalpha():
        return text
    return numbers(text, "--class-weights")


def given(**values: Any) -> dict[str, Any]:
    """The options that were given, so that defaults stay where they are defined."""
    return {name: value for name, value in values.items() if value is not None}
