"""The command line's table of contents."""

import importlib
import sys
from typing import Any

import typer
from typer.main import get_command

from safety_neurons import __version__
from safety_neurons.cli.pages import SETTINGS, Contents
from safety_neurons.cli.verb import APPS, VERBS, fail, is_usage

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
    """Import the modules of a verb and make its command."""
    for module in VERBS[name][0].split():
        importlib.import_module(f"safety_neurons.cli.{module}")
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
