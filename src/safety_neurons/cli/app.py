"""The command line's table of contents."""

import sys
from typing import Any

import typer
from typer.main import get_command

from safety_neurons import __version__
from safety_neurons.cli import checks, compare, data, find, organism, report, verify
from safety_neurons.cli import run as rerun
from safety_neurons.cli.pages import SETTINGS, Contents
from safety_neurons.cli.verb import fail, is_usage

HELP = "Find the neurons which make a language model safe, prove that they do, and put them to use."


def build() -> typer.core.TyperGroup:
    """The command, with every verb."""
    app = typer.Typer(
        help=HELP,
        no_args_is_help=True,
        add_completion=False,
        cls=Contents,
        context_settings=SETTINGS,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback()(options)
    checks.register(app)
    app.add_typer(find.app, name="find")
    app.add_typer(verify.app, name="verify")
    compare.register(app)
    report.register(app)
    rerun.register(app)
    app.add_typer(organism.app, name="organism")
    app.add_typer(data.app, name="data")
    command = get_command(app)
    assert isinstance(command, typer.core.TyperGroup)
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
