"""How a verb is declared: by the declarations that its function takes; errors in one line, an exit code, JSON on request."""

import dataclasses
import functools
import inspect
import os
import signal
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from safety_neurons.cli import console
from safety_neurons.cli.options import Common
from safety_neurons.cli.pages import Page
from safety_neurons.cli.session import Session
from safety_neurons.declarations import Declaration, Option
from safety_neurons.errors import SafetyNeuronsError, command_line

Verb = Callable[..., dict[str, Any] | None]


def verb(app: typer.Typer, name: str, run: str | None = None) -> Callable[[Verb], Verb]:
    """Register a function as a command.

    The function takes a session and declarations, whose fields become flags, and returns the object that `--json` prints.

    Args:
        app: group of commands.
        name: of the command.
        run: what its runs are called; by default the name.
    """

    def register(function: Verb) -> Verb:
        signature = inspect.signature(function, eval_str=True).parameters.values()
        if any(parameter.name == "common" for parameter in signature):
            return _by_signature(app, name, function)
        taken = {parameter.name: parameter.annotation for parameter in signature if parameter.name != "session"}
        command = command_of(run or name, function, taken)
        app.command(name, cls=Page, help=inspect.getdoc(function), no_args_is_help=False)(command)
        return function

    return register


def command_of(run: str, function: Callable[..., Any], taken: dict[str, type[Declaration]]) -> Callable[..., None]:
    """A function for typer: one keyword argument an option of the declarations and of the common ones."""
    kinds: dict[str, type[Declaration]] = {**taken, "common": Common}
    options = [option for kind in kinds.values() for option in kind.options()]
    twice = {one.name for one in options if sum(other.name == one.name for other in options) > 1}
    assert not twice, f"{run} declares {', '.join(sorted(twice))} twice"

    def command(**given: Any) -> None:
        def call() -> dict[str, Any] | None:
            parts = {key: kind(**{one.name: given[one.name] for one in kind.options()}) for key, kind in kinds.items()}
            for part in parts.values():
                part.check()
            common = parts.pop("common")
            assert isinstance(common, Common)
            return function(Session(run, common, list(parts.values())), **parts)

        run_guarded(call, as_json=given["json"], debug=given["debug"])

    # Options that have to be given come first: Python wants those without a default ahead of the others.
    options.sort(key=lambda one: one.default is not dataclasses.MISSING)
    parameters = [_parameter(one) for one in options]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _parameter(option: Option) -> inspect.Parameter:
    """An option as typer wants it: an annotated keyword argument."""
    optional = option.type | None if option.default is None else option.type
    limits: dict[str, Any] = {}
    if option.type is int and option.between is not None:
        limits = {"min": option.between.low, "max": option.between.high}
    default = inspect.Parameter.empty if option.default is dataclasses.MISSING else option.default
    if option.positional:
        mark = typer.Argument(help=option.help)
    else:
        words = [option.flag] if option.type is bool else []  # A switch is off unless it is given: no --no-… beside it.
        mark = typer.Option(*words, help=option.help, rich_help_panel=option.panel, **limits)
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[optional, mark])


def _by_signature(app: typer.Typer, name: str, function: Verb) -> Verb:
    """A verb whose options are still the parameters of its function."""
    own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "common"]
    shared = [_parameter(option) for option in Common.options()]

    @functools.wraps(function)
    def command(**options: Any) -> None:
        common = Common(**{option.name: options.pop(option.name) for option in Common.options()})
        run_guarded(lambda: function(common, **options), as_json=common.json, debug=common.debug)

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + shared
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    del command.__wrapped__
    app.command(name, cls=Page, help=inspect.getdoc(function), no_args_is_help=False)(command)
    return function


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
