"""`compress-uq`: the commands, and how a failure ends."""

from __future__ import annotations

import os
import re
import sys
import traceback

import typer

import compress_uq as cuq
from compress_uq_cli import (
    benchmark,
    calibrate,
    demo,
    evaluate,
    export,
    methods,
    predict,
    prune,
    sensitivity,
    study,
    train,
    verify,
)
from compress_uq_cli.console import complain

__all__ = ["app", "main", "run"]

app = typer.Typer(
    name="compress-uq",
    help="Prune a trained classifier and ship it with calibrated uncertainty in one ONNX file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("prune")(prune.prune)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("calibrate")(calibrate.calibrate)
app.command("export")(export.export)
app.command("benchmark")(benchmark.benchmark)
app.command("verify")(verify.verify)
app.command("predict")(predict.predict)
app.command("methods")(methods.methods)
app.command("sensitivity")(sensitivity.sensitivity)
app.command("study")(study.study)
app.command("demo")(demo.demo)


@app.callback(invoke_without_command=True)
def _options(version: bool = typer.Option(False, "--version", help="Print the version and stop.")) -> None:
    if version:
        typer.echo(cuq.__version__)
        raise typer.Exit


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; the exit code.

    0 done, 1 a requirement is not met, 2 bad input, 3 a fault of ours, 130 interrupted.
    """
    try:
        code = app(args=arguments, standalone_mode=False)
    except typer.TyperException as error:
        if error.format_message():
            complain(_with_value(error.format_message(), sys.argv[1:] if arguments is None else arguments))
        return 2
    except cuq.errors.RequirementNotMetError as error:
        complain(str(error))
        return 1
    except (cuq.errors.InputError, cuq.errors.MissingDependencyError, cuq.errors.GateError) as error:
        complain(str(error))
        return 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception:
        traceback.print_exc()
        complain("this is a fault of compress-uq, not of your input: please report it with the lines above")
        return 3
    if code == 130:
        complain("interrupted; nothing is half-written")
    return code if isinstance(code, int) else 0


def _with_value(message: str, arguments: list[str]) -> str:
    """A usage error with what was given, where the message names only the option."""
    option = re.search(r"'(--[\w-]+)'", message)
    if option is None or option[1] not in arguments[:-1]:
        return message
    return f"{message} (given: {option[1]} {arguments[arguments.index(option[1]) + 1]})"


def run() -> None:
    """The console script."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code == 130:
        os._exit(code)  # threads of a library that was interrupted may not end by themselves
    sys.exit(code)
