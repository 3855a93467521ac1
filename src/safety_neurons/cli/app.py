"""The command line's table of contents."""

import importlib
import sys
from typing import Any

import typer
from typer.main import get_command

from safety_neurons import __version__
from safety_neurons.cli.pages import SETTINGS, Contents
from safety_neurons.cli.verb import fail, is_usage

HELP = "Find the neurons which make a language model safe, prove that they do, and put them to use."


VERBS = {
    "demo": ("checks", "The whole story on a small organism; ends with the path of a report."),
    "doctor": ("checks", "Check on your own model: coverage, identity, padding, self-patch, exactness, cost."),
    "compare": (
        "compare",
        "Detectors side by side at equal budget, against random sets; on one pair of models, or over several organisms.",
    ),
    "report": ("report", "One self-contained HTML page from finished runs; --out names the file."),
    "run": (
        "run",
        "Repeat a run: the same verb with the same arguments into another --out; common options given here take the place of its own.",
    ),
    "find": ("find", "Score neurons by one method and keep the ones a selection takes."),
    "verify": ("verify", "Measure what a set of neurons does, beside random sets and the ceiling."),
    "tune": ("tune", "SN-Tune: train only the neurons of a set to refuse; everything else stays as it is, bit for bit."),
    "repair": (
        "repair",
        "Put neurons back: their rows and columns become the reference's again, everything else stays as it was fine-tuned.",
    ),
    "study": ("study", "Whole experiments: does tuned safety outlive fine-tuning (rsn), how easily is it cut out again (stress)."),
    "evaluate": ("evaluate", "Harm, over-refusal and capability of a model as it is or treated, by several judges, held to a gate."),
    "analyze": ("analyze", "Understand sets of neurons: layers, overlap, languages, tax, transfer, vocabulary, progressive."),
    "guard": ("guard", "Stop unsafe output before it is written: fit, recalibrate, evaluate and serve a guard on neurons."),
    "organism": ("organism", "Small models whose safety behaviour is known."),
    "data": ("data", "The built-in prompts and the named suites."),
    "import": ("importing", "Bring in what others made: prompts, neurons."),
    "export": ("exporting", "Give neurons the names they have in other tools."),
}
"""For every verb the module it lives in, which is imported when the verb is asked for, and the sentence that describes it there."""


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


class Shelf(Contents):
    """The first page, written without importing what it lists."""

    def described(self, ctx: Any) -> list[tuple[str, str]]:
        """Every verb with its sentence."""
        return [(name, VERBS[name][1]) for name in self.list_commands(ctx)]


def load(name: str) -> Any:
    """Import the module of a verb and make its command."""
    module = importlib.import_module(f"safety_neurons.cli.{VERBS[name][0]}")
    holder = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    holder.callback()(lambda: None)
    if hasattr(module, "app"):
        holder.add_typer(module.app, name=name)
    else:
        module.register(holder)
    command = get_command(holder)
    assert isinstance(command, typer.core.TyperGroup)
    return command.commands[name]


def build() -> typer.core.TyperGroup:
    """The command, with every verb."""
    app = typer.Typer(
        help=HELP,
        no_args_is_help=True,
        add_completion=False,
        cls=Shelf,
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
    _version: bool | None = typer.Option(None, "--version", help="Print the version and stop.", callback=print_version, is_eager=True),
) -> None:
    """Options that come before the verb."""


def run() -> None:
    """Run the command line on the words it was given; what cannot be parsed is one line and exit code 2."""
    words = sys.argv[1:]
    try:
        code = build()(words, prog_name="safety-neurons", standalone_mode=False)
    except Exception as caught:
        error: Any = caught
        if not is_usage(error):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            error.show(file=sys.stdout)
            raise SystemExit(2) from None
        help_of = getattr(getattr(error, "ctx", None), "command_path", "safety-neurons")
        message = f"{error.format_message().rstrip('.')}; see `{help_of} --help`"
        fail(message, error.exit_code, error, as_json="--json" in words, debug="--debug" in words)
    raise SystemExit(code if isinstance(code, int) else 0)
