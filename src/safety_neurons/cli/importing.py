"""import: what others made, in this project's forms."""

import pathlib
import time
from typing import Annotated, Any

import typer

from safety_neurons.cli import console
from safety_neurons.cli.options import Common
from safety_neurons.cli.pages import Contents
from safety_neurons.cli.session import default_folder
from safety_neurons.cli.verb import verb

app = typer.Typer(help="Bring in what others made: attack prompts.", no_args_is_help=True, cls=Contents, rich_markup_mode=None)


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
        console.out().print(f"\n[dim]attacks[/dim] {path}", soft_wrap=True)
    return {"attacks": str(path.absolute()), "n_attacks": len(found), "methods": counts, "notes": found.notes}


def _counted(found: Any) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for attack in found:
        groups.setdefault((attack.method, attack.source_model, attack.label), []).append(attack)
    return [
        {"method": method, "source_model": model, "label": label, "attacks": len(items), "goals": sum(bool(item.goal) for item in items)}
        for (method, model, label), items in groups.items()
    ]
