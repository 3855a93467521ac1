"""Reading runs: what a report needs of every folder, checked before anything is drawn."""

import pathlib
from collections.abc import Sequence

from safety_neurons.display.parts import RECORD, ReportedRun
from safety_neurons.errors import InputError, UsageError
from safety_neurons.results import read_json


def read_runs(paths: Sequence[pathlib.Path | str]) -> list[ReportedRun]:
    """The runs, each once, in the order given.

    Raises:
        UsageError: no run was given.
        InputError: a folder without a run record, an unfinished run, or a damaged record; the message names it.
    """
    runs: dict[pathlib.Path, ReportedRun] = {}
    for path in map(pathlib.Path, paths):
        folder = path.parent if path.name == RECORD else path
        runs.setdefault(folder.resolve(), _read(folder))
    if not runs:
        raise UsageError("no run was given, expected the folders of finished runs; give the --out folders of find, verify or compare")
    return list(runs.values())


def _read(folder: pathlib.Path) -> ReportedRun:
    source = folder / RECORD
    if not source.is_file():
        what = "has no run.json" if folder.is_dir() else "is not a folder" if folder.exists() else "does not exist"
        raise InputError(f"{str(folder)!r} {what}, expected the folder of a finished run; give the --out folder of find, verify or compare")
    record = read_json(source)
    shape = {"verb": str, "status": str, "arguments": dict}
    if not isinstance(record, dict) or not all(isinstance(record.get(part), kind) for part, kind in shape.items()):
        raise InputError(f"{str(source)!r} is not a run record, expected verb, status and arguments; run the verb again")
    if record["status"] != "finished" or not isinstance(record.get("result"), dict):
        status = " ".join(record["status"].split())[:40]
        raise InputError(
            f"the run in {str(folder)!r} is not finished (status {status!r}), expected a finished one;"
            " repeat its command to continue it, or leave it out"
        )
    return ReportedRun(folder, record)
