"""repair: put a set of neurons back after someone else's fine-tune."""

from typing import Annotated, Any

import typer

from safety_neurons.cli import console
from safety_neurons.cli.options import Common, Model
from safety_neurons.cli.session import Session
from safety_neurons.cli.verb import verb
from safety_neurons.errors import UnsupportedModelError


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    verb(app, "repair")(repair)


def repair(
    common: Common,
    model: Model,
    reference: Annotated[str, typer.Option(help="The model whose neurons are as they should be.", rich_help_panel="Models")],
    neurons: Annotated[str, typer.Option(help="Neuron file (or the folder of a find run): what is put back.", rich_help_panel="Models")],
) -> dict[str, Any]:
    """Put neurons back: their rows and columns become the reference's again, everything else stays as it was fine-tuned."""
    session = Session("repair", common, {"model": model, "reference": reference, "neurons": neurons})

    def work() -> dict[str, Any]:
        import dataclasses

        from safety_neurons.tuning import repair as put_back

        loaded, before = session.model(model), session.model(reference)
        members = session.neurons(neurons, loaded)
        done = put_back(loaded, before, members)
        if done.rounded:
            session.notes.append(f"{done.rounded:,} of {done.n_entries:,} entries of the reference were rounded to {loaded.dtype}")
        return {**dataclasses.asdict(done), **saved(session, loaded, done)}

    return session.run(work, show)


def saved(session: Session, model: Any, done: Any) -> dict[str, str]:
    """Write what was repaired: the adapter where only that changed, else the model."""
    from safety_neurons.model.adapters import is_adapted
    from safety_neurons.results.files import whole_folder
    from safety_neurons.tuning.artefacts import save_checkpoint

    adapted = is_adapted(model.model)
    if adapted and done.changed:
        raise UnsupportedModelError(
            f"{done.changed} entries of the base below the adapter differ from the reference's, an adapter can only be cleared of its own "
            "share; pass --merge-adapters to repair the merged model"
        )
    name = "adapter" if adapted else "model"
    target = session.folder.folder.absolute() / name
    if adapted:
        active = list(model.adapters or [model.model.active_adapter])
        with whole_folder(target) as partial:
            model.model.save_pretrained(str(partial), selected_adapters=active, save_embedding_layers=False)
    else:
        save_checkpoint(target, model)
    for file in sorted(path for path in target.rglob("*") if path.is_file()):
        session.folder.path(str(file.relative_to(session.folder.folder.absolute())))
    return {name: str(target)}


def show(result: dict[str, Any]) -> None:
    """What was put back, and where it is."""
    place = result.get("model") or result.get("adapter")
    text = f"{result['n_neurons']:,} neurons put back: {result['changed']:,} of {result['n_entries']:,} weights differed"
    if result["adapter_changed"]:
        text += f", {result['adapter_changed']:,} entries of adapters cleared"
    console.say(f"{text}\n{'adapter' if 'adapter' in result else 'model'} {place}")
