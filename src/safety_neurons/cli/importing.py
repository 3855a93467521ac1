"""import: what others made, in this project's forms."""

import pathlib
import time
from typing import Annotated, Any

import typer

from safety_neurons.cli import console
from safety_neurons.cli.options import Common, Count, Model, Threshold, Top
from safety_neurons.cli.pages import Contents
from safety_neurons.cli.session import Session, default_folder
from safety_neurons.cli.verb import verb
from safety_neurons.errors import UsageError

PUBLISHED_Z = 3.0
"""The z-score above which NeuroStrike takes a neuron."""
FORMS = ("sn-tune", "change-scores", "neurostrike", "weights")

app = typer.Typer(help="Bring in what others made: prompts, neurons.", no_args_is_help=True, cls=Contents, rich_markup_mode=None)


@verb(app, "attacks")
def attacks(
    common: Common,
    files: Annotated[list[pathlib.Path], typer.Argument(help="JailbreakBench artefacts, HarmBench test cases, or plain lists.")],
    goals: Annotated[str | None, typer.Option(help="Behaviours by id: a suite by name or a file.")] = None,
    folder: Annotated[pathlib.Path | None, typer.Option(help="Folder of the suites' files, for --goals by name.")] = None,
    method: Annotated[str | None, typer.Option(help="How they were made, where the file does not say.")] = None,
    source_model: Annotated[str | None, typer.Option(help="The model they were made on, where the file does not say.")] = None,
    read_as: Annotated[str, typer.Option("--as", help="What a plain list holds: prompts, suffixes or templates.")] = "prompts",
    adaptive: Annotated[bool, typer.Option("--adaptive", help="They were optimised on the model they will be used on.")] = False,
) -> dict[str, Any]:
    """Read attack prompts made elsewhere and write them as one JSON Lines file, each labelled static-transfer or adaptive."""
    from safety_neurons.suites import Attacks, import_attacks, suite

    known = None if goals is None else suite(goals, folder=folder, offline=common.offline).prompts
    read = [
        import_attacks(file, method=method, source_model=source_model, goals=known, read_as=read_as, adaptive=adaptive) for file in files
    ]
    found = Attacks(
        [attack for part in read for attack in part], "attacks", [f"{part.name}: {note}" for part in read for note in part.notes]
    )
    out = common.out or default_folder("import-attacks", time.strftime("%Y%m%d-%H%M%S"))
    path = found.save(pathlib.Path(out) / "attacks.jsonl")
    counts = _counted(found)
    if not common.json:
        rows = [[entry["method"], entry["source_model"] or None, entry["label"], entry["attacks"], entry["goals"]] for entry in counts]
        console.print_table("Attacks", ["method", "source model", "label", "attacks", "with goal"], rows)
        console.print_notes(found.notes)
        console.say(("dim", "\nattacks "), str(path))
    return {"attacks": str(path.absolute()), "n_attacks": len(found), "methods": counts, "notes": found.notes}


def _counted(found: Any) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for attack in found:
        groups.setdefault((attack.method, attack.source_model, attack.label), []).append(attack)
    return [
        {"method": method, "source_model": model, "label": label, "attacks": len(items), "goals": sum(bool(item.goal) for item in items)}
        for (method, model, label), items in groups.items()
    ]


@verb(app, "neurons")
def neurons(
    common: Common,
    file: Annotated[pathlib.Path, typer.Argument(help="The file.")],
    model: Model,
    form: Annotated[str, typer.Option("--format", help="sn-tune, change-scores, neurostrike or weights.")],
    kv: Annotated[str, typer.Option(help="sn-tune: k and v indices are heads (the row is worked out), rows, or published.")] = "heads",
    utility: Annotated[pathlib.Path | None, typer.Option(help="weights: the same on harmless text, which is taken away.")] = None,
    top: Top = None,
    count: Count = None,
    threshold: Threshold = None,
) -> dict[str, Any]:
    """Read neurons found by other projects' code, safely, and write them as this project's files."""
    options = {name: str(value) if isinstance(value, pathlib.Path) else value for name, value in locals().items() if name != "common"}
    if form not in FORMS:
        raise UsageError(f"--format {form!r} is unknown; expected one of {', '.join(FORMS)}")
    session = Session("import-neurons", common, options)

    def work() -> dict[str, Any]:
        from safety_neurons.neurons import Selection

        loaded = session.model(model)
        found = _foreign(form, file, utility, loaded.table, kv)
        result: dict[str, Any] = {"format": form}
        if form == "sn-tune":
            chosen = found
        else:
            given = threshold if threshold is not None or top or count or form != "neurostrike" else PUBLISHED_Z
            selection = Selection.of(top=top, count=count, threshold=given, default_top=0.05)
            path = session.folder.path("scores.safetensors").absolute()
            found.save(path)
            chosen, result["scores"] = found.select(selection), str(path)
        path = session.folder.path("neurons.safetensors").absolute()
        chosen.save(path)
        return {
            **result,
            "neurons": str(path),
            "n_neurons": chosen.n_neurons,
            "n_parameters": chosen.n_parameters,
            "share_of_all_neurons": chosen.share_of_all_neurons,
            "counts": chosen.counts(),
        }

    return session.run(work, _show_neurons)


def _foreign(form: str, file: pathlib.Path, utility: pathlib.Path | None, table: Any, kv: str) -> Any:
    from safety_neurons.model import files
    from safety_neurons.neurons import foreign

    if form == "sn-tune":
        return foreign.read_sn_tune(file, table, kv=kv)
    if form == "change-scores":
        return foreign.change_scores(files.read_torch(file), table, file)
    if form == "neurostrike":
        return foreign.probe_scores(files.read_named(file), table, file)
    other = files.read_weights(utility) if utility is not None else None
    return foreign.weight_scores(files.read_weights(file), other, table, path=file)


def _show_neurons(result: dict[str, Any]) -> None:
    """How many neurons came, and where they are."""
    console.print_table(
        f"{result['n_neurons']:,} neurons", ["matrix", "neurons"], [[key, count] for key, count in result["counts"].items()]
    )
    console.say(("dim", "\nneurons "), result["neurons"])
