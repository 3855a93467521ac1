"""data: the built-in prompts and the named suites."""

import pathlib
from typing import Annotated, Any

import typer

from safety_neurons.cli import console
from safety_neurons.cli.options import Common
from safety_neurons.cli.pages import Contents
from safety_neurons.cli.verb import verb

app = typer.Typer(help="The built-in prompts and the named suites.", no_args_is_help=True, cls=Contents, rich_markup_mode=None)
Folder = Annotated[pathlib.Path | None, typer.Option(help="Folder of the suites' files. [default: $SAFETY_NEURONS_DATA]")]


@verb(app, "list")
def list_(common: Common) -> dict[str, Any]:
    """Built-in prompts, and suites by name: licence, size, where they come from, expected hash."""
    from safety_neurons.prompts import library
    from safety_neurons.suites import catalogue

    entries, suites = library(), catalogue()
    if not common.json:
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


@verb(app, "verify")
def verify(
    common: Common,
    suites: Annotated[list[str] | None, typer.Argument(help="Suites by name, or files. [default: every suite]")] = None,
    folder: Folder = None,
    any_edition: Annotated[bool, typer.Option("--any-edition", help="Take editions of another hash with as many prompts.")] = False,
) -> dict[str, Any]:
    """Check that suites are there, whole and unchanged before a run starts; fetches what is missing unless --offline."""
    from safety_neurons.errors import InputError
    from safety_neurons.suites import catalogue
    from safety_neurons.suites import verify as look

    asked = suites or [entry["name"] for entry in catalogue()]
    with console.status("verify", quiet=common.json) as report:
        checks = []
        for name in asked:
            if report is not None:
                report(name)
            checks.append(look(name, folder=folder, offline=common.offline, any_edition=any_edition))
    failed = [check for check in checks if not check.ok]
    if not common.json:
        rows = [[c.name, "yes" if c.ok else "no", c.prompts, c.expected, ", ".join(dict.fromkeys(c.hashes)) or None] for c in checks]
        console.print_table("Suites", ["name", "ready", "prompts", "expected", "hash"], rows)
        for check in checks:
            for line in ([check.problem] if check.problem else []) + [f"{check.name}: {note}" for note in check.notes]:
                console.say(f"  {line}")
    if failed:
        names = ", ".join(check.name for check in failed)
        raise InputError(f"not ready: {names} ({len(failed)} of {len(checks)}); the first: {failed[0].problem}")
    return {"suites": [check.to_json() for check in checks]}
