"""Make the command line from declarations: verbs by name, help pages, one line an error, an exit code, JSON
on request.
"""

import dataclasses
import importlib
import inspect
import os
import pathlib
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from safety_neurons import __version__
from safety_neurons.cli import console, processes
from safety_neurons.cli.session import NOTHING, Common, Session
from safety_neurons.declarations import Declaration, Option
from safety_neurons.errors import EndedError, SafetyNeuronsError, command_line

SETTINGS = {"max_content_width": 110}
"""Context settings of the command line: pages may be wider than click's 80 columns."""
REST = "Options"
INTERRUPTED = 128 + signal.SIGINT
"""Exit code."""


class Page(TyperCommand):
    """The help page of one verb."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, section by section."""
        write_options(self, ctx, formatter)


class Contents(TyperGroup):
    """The help page of a group of verbs."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the verbs, then the options."""
        self.format_commands(ctx, formatter)
        write_options(self, ctx, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write every verb with the whole sentence that it is described by."""
        write_section("Commands", self.described(ctx), formatter)

    def described(self, ctx: Any) -> list[tuple[str, str]]:
        """Every verb with its sentence."""
        verbs = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        return [(name, sentence(verb)) for name, verb in verbs if verb is not None and not verb.hidden]


def sentence(command: Any) -> str:
    """The first paragraph of a command's help, in one line."""
    return " ".join((command.help or "").split("\n\n")[0].split())


def write_options(command: Any, ctx: Any, formatter: Any) -> None:
    """The options of a command under the headings they were declared with, in the order of first mention.

    The others come last.
    """
    sections: dict[str, list[tuple[str, str]]] = {}
    for option in command.get_params(ctx):
        record = option.get_help_record(ctx)
        if record is not None:
            sections.setdefault(getattr(option, "rich_help_panel", None) or REST, []).append(record)
    for heading, records in sorted(sections.items(), key=lambda section: section[0] == REST):
        write_section(heading, records, formatter)


def write_section(heading: str, records: list[tuple[str, str]], formatter: Any) -> None:
    """A heading with a list of terms and what they mean."""
    with formatter.section(typer.style(heading, bold=True)):
        formatter.write_dl([(typer.style(term, fg=typer.colors.CYAN), text) for term, text in records])


Verb = Callable[..., dict[str, Any] | None]
VERBS = {
    "demo": ("runs", "The whole story on a small organism; ends with the path of a report."),
    "doctor": ("runs", "Check on your own model: coverage, identity, padding, self-patch, exactness, cost."),
    "compare": (
        "verify",
        (
            "Detectors side by side at equal budget, against random sets; on one pair of models, or over "
            "several organisms."
        ),
    ),
    "report": ("runs", "One self-contained HTML page from finished runs; --out names the file."),
    "run": (
        "recipes",
        (
            "Repeat a run: the same verb with the same arguments into another --out; common options given "
            "here take the place of its own. Of a recipe that lists published numbers, show them beside the "
            "measured ones."
        ),
    ),
    "find": ("find", "Score neurons by one method and keep the ones a selection takes."),
    "verify": ("verify", "Measure what a set of neurons does, beside random sets and the ceiling."),
    "tune": (
        "tune",
        "SN-Tune: train only the neurons of a set to refuse; everything else stays as it is, bit for bit.",
    ),
    "repair": (
        "tune",
        (
            "Put neurons back: their rows and columns become the reference's again, everything else stays as "
            "it was fine-tuned."
        ),
    ),
    "study": (
        "study",
        (
            "Whole experiments: does tuned safety outlive fine-tuning (rsn), how easily is it cut out again "
            "(stress), what keeps it (defences)."
        ),
    ),
    "evaluate": (
        "verify",
        (
            "Harm, over-refusal and capability of a model as it is or treated, by several judges, held to a "
            "gate."
        ),
    ),
    "analyze": (
        "analyze",
        "Understand sets of neurons: layers, overlap, languages, tax, transfer, vocabulary, progressive.",
    ),
    "guard": (
        "guard",
        "Stop unsafe output before it is written: fit, recalibrate, evaluate and serve a guard on neurons.",
    ),
    "organism": ("exchange", "Small models whose safety behaviour is known."),
    "data": ("exchange", "The built-in prompts and the named suites."),
    "import": ("exchange", "Bring in what others made: prompts, neurons."),
    "export": ("exchange", "Give neurons the names they have in other tools."),
}
"""For every verb or group of verbs the module it lives in, imported when it is asked for, and the sentence
that describes it.
"""
APPS: dict[str, typer.Typer] = {}
"""Those that are imported."""
DECLARED: dict[str, tuple[type[Declaration], ...]] = {}
"""By words of a verb that is imported, the declarations of its own options."""


def group(name: str, cls: type[Contents] = Contents) -> typer.Typer:
    """The group of verbs of a name, made when its first verb is."""
    if name in APPS:
        return APPS[name]
    app = APPS[name] = typer.Typer(
        add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
    )
    app.callback(help=VERBS[name][1], cls=cls, no_args_is_help=True)(
        lambda: None
    )  # Without it, a lone verb would take its place.
    return app


def verb(words: str) -> Callable[[Verb], Verb]:
    """Register a function as a command.

    The function takes a session and declarations, whose fields become flags, and returns the object that
    `--json` prints.

    Args:
        words: as they are typed, such as `verify patch`; its runs are called `verify-patch`.
    """
    first, _, last = words.partition(" ")

    def register(function: Verb) -> Verb:
        signature = inspect.signature(function, eval_str=True).parameters.values()
        taken = {
            parameter.name: parameter.annotation for parameter in signature if parameter.name != "session"
        }
        app = (
            group(first)
            if last
            else typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        )
        add(app, words, function, taken, inspect.getdoc(function))
        return APPS.setdefault(first, app) and function

    return register


def add(
    app: typer.Typer, words: str, function: Verb, taken: dict[str, type[Declaration]], sentence: str | None
) -> None:
    """Add a command to a group."""
    DECLARED[words] = tuple(taken.values())
    command = command_of(words, function, taken)
    app.command(words.split()[-1], cls=Page, help=sentence, no_args_is_help=False)(command)


def command_of(
    words: str, function: Callable[..., Any], taken: dict[str, type[Declaration]]
) -> Callable[..., None]:
    """A function for typer: one keyword argument an option of the declarations and of the common ones."""
    run = words.replace(" ", "-")
    kinds: dict[str, type[Declaration]] = {**taken, "common": Common}
    options = [option for kind in kinds.values() for option in kind.options()]
    twice = {one.name for one in options if sum(other.name == one.name for other in options) > 1}
    assert not twice, f"{run} declares {', '.join(sorted(twice))} twice"

    def command(**given: Any) -> None:
        begun: list[Session] = []

        def call() -> dict[str, Any] | None:
            parts = {
                key: kind(**{one.name: one.read(given[one.name]) for one in kind.options()})
                for key, kind in kinds.items()
            }
            for declaration in parts.values():
                declaration.check()
            for declaration in parts.values():
                declaration.look()
            common = parts.pop("common")
            assert isinstance(common, Common)
            processes.meet(words, common.device_map)
            session = Session(run, common, list(parts.values()))
            begun.append(session)
            if common.dry_run and run != "run":  # which passes it on to the verb that it repeats
                return importlib.import_module("safety_neurons.cli.plans").plan(session)
            return function(session, **parts)

        def left() -> str:
            return begun[0].left() if begun else NOTHING

        run_guarded(call, left, as_json=given["json"], debug=given["debug"])

    # Options that have to be given come first: Python wants those without a default ahead of the others.
    options.sort(key=lambda one: one.default is not dataclasses.MISSING)
    parameters = [_parameter(one) for one in options]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _parameter(option: Option) -> inspect.Parameter:
    """An option as typer wants it: an annotated keyword argument."""
    # A path is taken as text: of an empty one, `pathlib` makes the current folder.
    taken = {pathlib.Path: str, list[pathlib.Path]: list[str]}.get(option.type, option.type)
    optional = taken | None if option.default is None else taken
    limits: dict[str, Any] = {} if taken is option.type else {"metavar": "<path>"}
    if option.between is not None and not (option.between.above or option.between.below):
        limits |= {"min": option.between.low, "max": option.between.high}
    default = inspect.Parameter.empty if option.default is dataclasses.MISSING else option.default
    if option.positional:
        mark = typer.Argument(help=option.help)
    else:
        mark = typer.Option(option.flag, help=option.help, rich_help_panel=option.panel, **limits)
    return inspect.Parameter(
        option.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[optional, mark]
    )


class Interrupted(BaseException):
    """A command inside a command was interrupted; the message says what it left."""


def run_guarded(
    call: Callable[[], dict[str, Any] | None], left: Callable[[], str], *, as_json: bool, debug: bool
) -> None:
    """Run a verb; turn every failure into one line and an exit code.

    Args:
        call: runs it.
        left: says what there is of it after an interruption.
        as_json: whether a failure is one JSON object.
        debug: whether its traceback is shown.
    """
    with command_line(), processes.heeding():
        _run_guarded(call, left, as_json=as_json, debug=debug)


def _run_guarded(
    call: Callable[[], dict[str, Any] | None], left: Callable[[], str], *, as_json: bool, debug: bool
) -> None:
    try:
        with console.ours(debug=debug):
            result = call()
            processes.part()
            stream = console.streams().out
            if as_json and result is not None:
                stream.write(console.json_line(result))
            stream.flush()
    except EndedError as error:
        fail(f"{error}: {left()}", error.exit_code, error, as_json=as_json, debug=debug)
    except SafetyNeuronsError as error:
        fail(str(error), error.exit_code, error, as_json=as_json, debug=debug)
    except (KeyboardInterrupt, Interrupted) as error:
        processes.ending()
        said = left()
        if console.nested():  # The command around it says what is true of the whole.
            raise Interrupted(said) from None
        if said == NOTHING and isinstance(error, Interrupted):
            said = str(error)
        gone = processes.gone()
        message = f"{'interrupted' if gone is None else f'{gone} has ended'}: {said}"
        fail(message, 1 if gone else INTERRUPTED, error, as_json=as_json, debug=debug)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), console.streams().out.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        if is_usage(error):
            raise
        fail(unforeseen(error), 1, error, as_json=as_json, debug=debug)


def unforeseen(error: Exception) -> str:
    """What to say of an error that nothing in this package raises."""
    if isinstance(error, OSError) and error.filename is not None:
        # Whether a path is there is asked in many places, and the system may refuse to say: of a name that is
        # too long, in a folder that is not to be looked into, on a disk that fails.
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
        shown = repr(name if len(name) <= 100 else f"{name[:50]}…{name[-50:]}")
        return f"cannot use {shown} ({error.strerror}); expected a path that can be read or written: check it"
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said} (not foreseen: run again with --debug and report the traceback)"


def is_usage(error: Exception) -> bool:
    """Whether the command-line library raised it (it comes in several versions, with and without click
    inside).
    """
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def fail(message: str, exit_code: int, error: BaseException, *, as_json: bool, debug: bool) -> NoReturn:
    """Say one line (or one JSON object) and exit; of several processes one says it."""
    processes.ending()
    if not processes.speaks():
        processes.part(exit_code)
        raise SystemExit(exit_code)
    if debug:
        import traceback

        traceback.print_exception(error, file=console.streams().err)
    line = console.line_of(message)
    if as_json:
        console.streams().out.write(console.json_line({"error": line, "exit_code": exit_code}))
    else:
        console.tell(f"safety-neurons: {line}\n")
    processes.part(exit_code)
    raise SystemExit(exit_code)


HELP = "Find the neurons which make a language model safe, prove that they do, and put them to use."


class Verbs(dict[str, Any]):
    """Commands by name, each imported when it is asked for."""

    def __getitem__(self, name: str) -> Any:
        if super().__getitem__(name) is None:
            self[name] = load(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """The command, or the default for an unknown name."""
        try:
            return self[name]
        except KeyError:
            return default


class VerbList(Contents):
    """The first page, written without importing what it lists."""

    def described(self, ctx: Any) -> list[tuple[str, str]]:
        """Every verb with its sentence."""
        return [(name, VERBS[name][1]) for name in self.list_commands(ctx)]


def load(name: str) -> Any:
    """Import the module of a verb and make its command."""
    importlib.import_module(f"safety_neurons.cli.{VERBS[name][0]}")
    return get_command(APPS[name])


def build() -> typer.core.TyperGroup:
    """The command, with every verb."""
    app = typer.Typer(
        help=HELP,
        no_args_is_help=True,
        add_completion=False,
        cls=VerbList,
        context_settings=SETTINGS,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback()(options)
    command = get_command(app)
    assert isinstance(command, typer.core.TyperGroup)
    command.commands = Verbs(dict.fromkeys(VERBS))
    return command


def print_version(wanted: bool | None) -> None:
    """Print the version and stop."""
    if wanted:
        sys.stdout.write(f"safety-neurons {__version__}\n")
        raise typer.Exit


def options(
    _version: bool | None = typer.Option(
        None, "--version", help="Print the version and stop.", callback=print_version, is_eager=True
    ),
) -> None:
    """Options that come before the verb."""


@processes.heeding()
def run() -> None:
    """Run the command line on the words it was given; what cannot be parsed is one line and exit code 2."""
    words = sys.argv[1:]
    processes.hush()
    as_json, debug = "--json" in words, "--debug" in words
    try:
        code = build()(words, prog_name="safety-neurons", standalone_mode=False)
        if code == INTERRUPTED:  # While the command was read: nothing of ours was at work.
            raise KeyboardInterrupt
    except KeyboardInterrupt as stop:
        fail(f"interrupted: {NOTHING}", INTERRUPTED, stop, as_json=as_json, debug=debug)
    except Exception as caught:
        error: Any = caught
        if type(error).__name__ == "Abort":  # What some versions make of an interruption.
            fail(f"interrupted: {NOTHING}", INTERRUPTED, error, as_json=as_json, debug=debug)
        if not is_usage(error):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            error.show(file=sys.stdout)
            raise SystemExit(2) from None
        help_of = getattr(getattr(error, "ctx", None), "command_path", "safety-neurons")
        message = f"{error.format_message().rstrip('.')}; see `{help_of} --help`"
        fail(message, error.exit_code, error, as_json=as_json, debug=debug)
    raise SystemExit(code if isinstance(code, int) else 0)
