"""export: neurons by the names they have in other tools."""

from typing import Annotated, Any

import typer

from safety_neurons.cli import console
from safety_neurons.cli.options import Common, Model
from safety_neurons.cli.pages import Contents
from safety_neurons.cli.session import Session
from safety_neurons.cli.verb import verb
from safety_neurons.errors import UsageError

TOOLS = ("transformer-lens", "nnsight")

app = typer.Typer(help="Give neurons the names they have in other tools.", no_args_is_help=True, cls=Contents, rich_markup_mode=None)


@verb(app, "neurons")
def neurons(
    common: Common,
    neurons: Annotated[str, typer.Option(help="Neuron file (or the folder of a find run).")],
    model: Model,
    tool: Annotated[str, typer.Option("--to", help="transformer-lens or nnsight.")] = "transformer-lens",
) -> dict[str, Any]:
    """Write the neurons as JSON: TransformerLens hook names, or nnsight paths, each with its indices."""
    options = {name: value for name, value in locals().items() if name != "common"}
    if tool not in TOOLS:
        raise UsageError(f"--to {tool!r} is unknown; expected one of {', '.join(TOOLS)}")
    session = Session("export-neurons", common, options)

    def work() -> dict[str, Any]:
        from safety_neurons.model.sites import nnsight_paths
        from safety_neurons.neurons.foreign import transformer_lens_names
        from safety_neurons.results.files import write_json

        loaded = session.model(model)
        chosen = session.neurons(neurons, loaded)
        names = nnsight_paths(loaded.anatomy, chosen) if tool == "nnsight" else transformer_lens_names(chosen, loaded.table)
        path = session.folder.path(f"{tool}.json").absolute()
        write_json(path, names)
        return {"names": str(path), "tool": tool, "n_neurons": len(chosen), "places": list(names)}

    return session.run(work, show)


def show(result: dict[str, Any]) -> None:
    """How many neurons at how many places, and the file."""
    console.say(f"{result['n_neurons']:,} neurons at {len(result['places'])} places of {result['tool']}")
    console.say(("dim", "names "), result["names"])
