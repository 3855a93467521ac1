"""organism: small models whose safety behaviour is known."""

import pathlib
from typing import Annotated, Any

import typer

from safety_neurons.cli import console
from safety_neurons.cli.options import Common, listed
from safety_neurons.cli.pages import Contents
from safety_neurons.cli.session import default_folder
from safety_neurons.cli.verb import verb

app = typer.Typer(help="Small models whose safety behaviour is known.", no_args_is_help=True, cls=Contents, rich_markup_mode=None)


@verb(app, "list")
def list_(common: Common) -> dict[str, Any]:
    """Organisms that ship with the package, and recipes that can be built."""
    from safety_neurons import organism

    rows = organism.listing()
    if not common.json:
        console.print_table(
            "Organisms", ["name", "kind", "shipped", "parameters"], [[r["name"], r["kind"], r["shipped"], r["parameters"]] for r in rows]
        )
    return {"organisms": rows}


@verb(app, "build")
def build(
    common: Common,
    name: Annotated[str, typer.Option(help="Name of a recipe (see organism list).")] = "natural",
) -> dict[str, Any]:
    """Train an organism by its recipe into --out."""
    import time

    from safety_neurons import organism

    out = common.out or default_folder(f"organism-{name}", time.strftime("%Y%m%d-%H%M%S"))
    with console.status(f"build {name}", quiet=common.json) as progress:
        built = organism.build(name, seed=common.seed, out=pathlib.Path(out), progress=progress)
    if not common.json:
        console.say(f"{name} is in {built.path}\nbase    {built.base}\naligned {built.aligned}")
    return {"organism": str(built.path), "base": built.base, "aligned": built.aligned}


@verb(app, "requests")
def requests(
    common: Common,
    half: Annotated[
        str, typer.Option(help="Comma-separated halves: find, test (held out), train (what organisms were trained on).")
    ] = "find",
    language: Annotated[str, typer.Option(help="Comma-separated languages: en, de, es.")] = "en,de,es",
) -> dict[str, Any]:
    """Write every labelled request of the organisms' languages into --out: unsafe.jsonl and safe.jsonl."""
    import time

    from safety_neurons.organism.prompts import write_requests

    out = pathlib.Path(common.out or default_folder("organism-requests", time.strftime("%Y%m%d-%H%M%S")))
    counts = write_requests(out, listed(half) or (), listed(language) or ())
    if not common.json:
        rows = [[name, count] for name, count in counts.items()]
        console.print_table(str(out), ["file", "requests"], rows)
    return {"requests": str(out.absolute()), "counts": counts}
