"""How a verb is declared: by the declarations that its function takes; errors in one line, an exit code, JSON on request."""

import dataclasses
import inspect
import os
import signal
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from safety_neurons.cli import console
from safety_neurons.cli.options import Common
from safety_neurons.cli.pages import Contents, Page
from safety_neurons.cli.session import Session
from safety_neurons.declarations import Declaration, Option
from safety_neurons.errors import SafetyNeuronsError, command_line

Verb = Callable[..., dict[str, Any] | None]
VERBS = {
    "demo": ("story", "The whole story on a small organism; ends with the path of a report."),
    "doctor": ("story", "Check on your own model: coverage, identity, padding, self-patch, exactness, cost."),
    "compare": (
        "compare",
        "Detectors side by side at equal budget, against random sets; on one pair of models, or over several organisms.",
    ),
    "report": ("runs", "One self-contained HTML page from finished runs; --out names the file."),
    "run": (
        "runs",
        "Repeat a run: the same verb with the same arguments into another --out; common options given here take the place of its own.",
    ),
    "find": ("find", "Score neurons by one method and keep the ones a selection takes."),
    "verify": ("verify", "Measure what a set of neurons does, beside random sets and the ceiling."),
    "tune": ("tune", "SN-Tune: train only the neurons of a set to refuse; everything else stays as it is, bit for bit."),
    "repair": (
        "tune",
        "Put neurons back: their rows and columns become the reference's again, everything else stays as it was fine-tuned.",
    ),
    "study": ("study", "Whole experiments: does tuned safety outlive fine-tuning (rsn), how easily is it cut out again (stress)."),
    "evaluate": ("evaluate", "Harm, over-refusal and capability of a model as it is or treated, by several judges, held to a gate."),
    "analyze": (
        "analyze analyze_effects",
        "Understand sets of neurons: layers, overlap, languages, tax, transfer, vocabulary, progressive.",
    ),
    "guard": ("guard guard_serve", "Stop unsafe output before it is written: fit, recalibrate, evaluate and serve a guard on neurons."),
    "organism": ("shipped", "Small models whose safety behaviour is known."),
    "data": ("shipped", "The built-in prompts and the named suites."),
    "import": ("exchange", "Bring in what others made: prompts, neurons."),
    "export": ("exchange", "Give neurons the names they have in other tools."),
}
"""For every verb or group of verbs the modules it lives in, imported when it is asked for, and the sentence that describes it."""
APPS: dict[str, typer.Typer] = {}
"""Those that are imported."""
DECLARED: dict[str, tuple[type[Declaration], ...]] = {}
"""By words of a verb that is imported, the declarations of its own options."""


def group(name: str, cls: type[Contents] = Contents) -> typer.Typer:
    """The group of verbs of a name, made when its first verb is."""
    if name in APPS:
        return APPS[name]
    app = APPS[name] = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.callback(help=VERBS[name][1], cls=cls, no_args_is_help=True)(lambda: None)  # Without it, a lone verb would take its place.
    return app


def verb(words: str) -> Callable[[Verb], Verb]:
    """Register a function as a command.

    The function takes a session and declarations, whose fields become flags, and returns the object that `--json` prints.

    Args:
        words: as they are typed, such as `verify patch`; its runs are called `verify-patch`.
    """
    first, _, last = words.partition(" ")

    def register(function: Verb) -> Verb:
        signature = inspect.signature(function, eval_str=True).parameters.values()
        taken = {parameter.name: parameter.annotation for parameter in signature if parameter.name != "session"}
        app = group(first) if last else typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        add(app, words, function, taken, inspect.getdoc(function))
        return APPS.setdefault(first, app) and function

    return register


def add(app: typer.Typer, words: str, function: Verb, taken: dict[str, type[Declaration]], sentence: str | None) -> None:
    """Add a command to a group."""
    DECLARED[words] = tuple(taken.values())
    command = command_of(words.replace(" ", "-"), function, taken)
    app.command(words.split()[-1], cls=Page, help=sentence, no_args_is_help=False)(command)


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
    if option.between is not None and not (option.between.above or option.between.below):
        limits = {"min": option.between.low, "max": option.between.high}
    default = inspect.Parameter.empty if option.default is dataclasses.MISSING else option.default
    if option.positional:
        mark = typer.Argument(help=option.help)
    else:
        mark = typer.Option(option.flag, help=option.help, rich_help_panel=option.panel, **limits)
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[optional, mark])


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
