"""data: the built-in prompts."""

from typing import Any

import typer

from safety_neurons.cli import console
from safety_neurons.cli.options import Common
from safety_neurons.cli.pages import Contents
from safety_neurons.cli.verb import verb

app = typer.Typer(help="The built-in prompts.", no_args_is_help=True, cls=Contents, rich_markup_mode=None)


@verb(app, "list")
def list_(common: Common) -> dict[str, Any]:
    """Names, languages and sizes of the built-in prompts."""
    from safety_neurons.prompts import library

    entries = library()
    if not common.json:
        console.print_table(
            "Built-in prompts", ["name", "language", "prompts"], [[e["name"], e["language"], e["prompts"]] for e in entries]
        )
    return {"prompts": entries}
