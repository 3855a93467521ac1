"""How a verb is declared: its own options plus the common ones, errors in one line, an exit code, JSON on request."""

import dataclasses
import functools
import inspect
import os
import signal
from collections.abc import Callable
from typing import Any, NoReturn

import typer

from safety_neurons.cli import console
from safety_neurons.cli.options import Common
from safety_neurons.cli.pages import Page
from safety_neurons.errors import SafetyNeuronsError, command_line

Verb = Callable[..., dict[str, Any] | None]


def verb(app: typer.Typer, name: str) -> Callable[[Verb], Verb]:
    """Register a function as a command. It gets `common` and returns the object that `--json` prints."""

    def register(function: Verb) -> Verb:
        own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "common"]
        shared = [
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
            for field in dataclasses.fields(Common)
        ]

        @functools.wraps(function)
        def command(**options: Any) -> None:
            common = Common(**{field.name: options.pop(field.name) for field in dataclasses.fields(Common)})
            run_guarded(lambda: function(common, **options), as_json=common.json, debug=common.debug)

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + shared
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        del command.__wrapped__
        app.command(name, cls=Page, help=inspect.getdoc(function), no_args_is_help=False)(command)
        return function

    return register


def run_guarded(call: Callable[[], dict[str, Any] | None], *, as_json: bool, debug: bool) -> None:
    """Run a verb; turn every failure into one line and an exit code."""
    with command_line():
        _run_guarded(call, as_json=as_json, debug=debug)


def _run_guarded(call: Callable[[], dict[str, Any] | None], *, as_json: bool, debug: bool) -> None:
    try:
        with console.ours(debug=debug):
            result = call()
            stream = console.streams().out
            if as_json and result is not None:
                stream.write(console.json_line(result))
            stream.flush()
    except SafetyNeuronsError as error:
        fail(str(error), error.exit_code, error, as_json=as_json, debug=debug)
    except KeyboardInterrupt as error:
        message = f"interrupted: {error or 'nothing was started'}"
        fail(message, 128 + signal.SIGINT, error, as_json=as_json, debug=debug)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), console.streams().out.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        if is_usage(error):
            raise
        message = f"{type(error).__name__}: {' '.join(str(error).split())} (not foreseen: run again with --debug and report the traceback)"
        fail(message, 1, error, as_json=as_json, debug=debug)


def is_usage(error: Exception) -> bool:
    """Whether the command-line library raised it (it comes in several versions, with and without click inside)."""
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def fail(message: str, exit_code: int, error: BaseException, *, as_json: bool, debug: bool) -> NoReturn:
    """Say one line (or one JSON object) and exit."""
    if debug:
        import traceback

        traceback.print_exception(error, file=console.streams().err)
    line = console.line_of(message)
    if as_json:
        console.streams().out.write(console.json_line({"error": line, "exit_code": exit_code}))
    else:
        console.tell(f"safety-neurons: {line}\n")
    raise SystemExit(exit_code)
