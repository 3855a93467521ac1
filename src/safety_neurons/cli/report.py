"""report: one self-contained HTML page from finished runs."""

import pathlib
from typing import Annotated, Any

import typer

from safety_neurons.cli import console
from safety_neurons.cli.options import Common
from safety_neurons.cli.verb import verb


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    verb(app, "report")(report)


def report(
    common: Common,
    runs: Annotated[list[pathlib.Path], typer.Argument(help="Folders of finished runs.", show_default=False)],
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Safety neurons",
) -> dict[str, Any]:
    """One self-contained HTML page from finished runs; --out names the file."""
    from safety_neurons.report import write_report

    path = write_report(runs, common.out or pathlib.Path("report.html"), title=title)
    if not common.json:
        console.say(("dim", "report "), str(path))
    return {"report": str(path)}
