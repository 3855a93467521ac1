"""import and export: what others made in this project's forms, and neurons by the names they have in other tools."""

import dataclasses
import pathlib
import time
from typing import Annotated, Any

from safety_neurons.cli import console
from safety_neurons.cli.options import ModelName, NeuronFile
from safety_neurons.cli.session import Session, default_folder
from safety_neurons.cli.verb import verb
from safety_neurons.declarations import Declaration, Flag, OneOf, Panel, Positional, Reads
from safety_neurons.detectors.methods import Sized

PUBLISHED_Z = 3.0
"""The z-score above which NeuroStrike takes a neuron."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Foreign(Declaration):
    """Attack prompts made elsewhere, and what their files do not say."""

    files: Annotated[list[pathlib.Path], Positional]
    """JailbreakBench artefacts, HarmBench test cases, or plain lists."""
    goals: str | None = None
    """Behaviours by id: a suite by name or a file."""
    folder: pathlib.Path | None = None
    """Folder of the suites' files, for --goals by name."""
    method: str | None = None
    """How they were made, where the file does not say."""
    source_model: str | None = None
    """The model they were made on, where the file does not say."""
    read_as: Annotated[str, Flag("--as")] = "prompts"
    """What a plain list holds: prompts, suffixes or templates."""
    adaptive: bool = False
    """They were optimised on the model they will be used on."""


@verb("import attacks")
def attacks(session: Session, foreign: Foreign) -> dict[str, Any]:
    """Read attack prompts made elsewhere and write them as one JSON Lines file, each labelled static-transfer or adaptive."""
    from safety_neurons.suites import Attacks, import_attacks, suite

    common, labels = session.common, foreign.values()
    files, goals, folder = (labels.pop(name) for name in ("files", "goals", "folder"))
    known = None if goals is None else suite(goals, folder=folder, offline=common.offline).prompts
    read = [import_attacks(file, goals=known, **labels) for file in files]
    found = Attacks(
        [attack for part in read for attack in part], "attacks", [f"{part.name}: {note}" for part in read for note in part.notes]
    )
    out = common.out or default_folder("import-attacks", time.strftime("%Y%m%d-%H%M%S"))
    path = found.save(pathlib.Path(out) / "attacks.jsonl")
    counts = _counted(found)
    if not session.quiet:
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForeignFile(Declaration):
    """Neurons found by another project's code, and the model they belong to."""

    file: Annotated[pathlib.Path, Positional, Reads("files")]
    """The file."""
    model: Annotated[ModelName, Panel("Models")]
    """ID[@REVISION][+ADAPTER…], a folder, or organism:NAME."""
    form: Annotated[str, Flag("--format"), OneOf("sn-tune", "change-scores", "neurostrike", "weights")]
    """sn-tune, change-scores, neurostrike or weights."""
    kv: str = "heads"
    """sn-tune: k and v indices are heads (the row is worked out), rows, or published."""
    utility: Annotated[pathlib.Path | None, Reads("files")] = None
    """weights: the same on harmless text, which is taken away."""


@dataclasses.dataclass(frozen=True)
class Kept(Sized):
    """Which of them are kept."""

    threshold: Annotated[float | int | None, Panel(Sized.PANEL)] = None
    """Keep scores of at least this."""


@verb("import neurons")
def import_neurons(session: Session, source: ForeignFile, kept: Kept) -> dict[str, Any]:
    """Read neurons found by other projects' code, safely, and write them as this project's files."""

    def work() -> dict[str, Any]:
        from safety_neurons.neurons import Selection

        loaded = session.model(source.model)
        found = _foreign(source, loaded.table)
        result: dict[str, Any] = {"format": source.form}
        if source.form == "sn-tune":
            chosen = found
        else:
            selection = kept.selection
            if source.form == "neurostrike" and not any(kept.values().values()):
                selection = Selection.of(threshold=PUBLISHED_Z, default_top=Kept.DEFAULT_TOP)
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

    return session.run(work)


def _foreign(source: ForeignFile, table: Any) -> Any:
    from safety_neurons.model import files
    from safety_neurons.neurons import foreign

    form, file, utility = source.form, source.file, source.utility
    if form == "sn-tune":
        return foreign.read_sn_tune(file, table, kv=source.kv)
    if form == "change-scores":
        return foreign.change_scores(files.read_torch(file), table, file)
    if form == "neurostrike":
        return foreign.probe_scores(files.read_named(file), table, file)
    other = files.read_weights(utility) if utility is not None else None
    return foreign.weight_scores(files.read_weights(file), other, table, path=file)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedNeurons(Declaration):
    """Neurons, and the tool whose names they get."""

    neurons: NeuronFile
    """Neuron file (or the folder of a find run)."""
    model: Annotated[ModelName, Panel("Models")]
    """ID[@REVISION][+ADAPTER…], a folder, or organism:NAME."""
    tool: Annotated[str, Flag("--to"), OneOf("transformer-lens", "nnsight")] = "transformer-lens"
    """transformer-lens or nnsight."""


@verb("export neurons")
def export_neurons(session: Session, named: NamedNeurons) -> dict[str, Any]:
    """Write the neurons as JSON: TransformerLens hook names, or nnsight paths, each with its indices."""
    tool = named.tool

    def work() -> dict[str, Any]:
        from safety_neurons.model.sites import nnsight_paths
        from safety_neurons.neurons.foreign import transformer_lens_names
        from safety_neurons.results.run import write_json

        loaded = session.model(named.model)
        chosen = session.neurons(named.neurons, loaded)
        names = nnsight_paths(loaded.anatomy, chosen) if tool == "nnsight" else transformer_lens_names(chosen, loaded.table)
        path = session.folder.path(f"{tool}.json").absolute()
        write_json(path, names)
        return {"names": str(path), "tool": tool, "n_neurons": len(chosen), "places": list(names)}

    return session.run(work)
