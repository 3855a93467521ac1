"""Reading runs: what a report needs of every folder, checked before anything is drawn."""

import functools
import pathlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from safety_neurons.errors import InputError, UsageError
from safety_neurons.neurons import NeuronSet, Scores
from safety_neurons.results import Completions, read_json

RECORD = "run.json"
T = TypeVar("T")
_FLAGS = frozenset({"merge_adapters", "trust_remote_code", "as_published", "merge", "no_check", "no_fill", "vllm"})
_ARGUMENTS = frozenset({"sets", "organisms"})
_TWO_WORDS = ("find", "verify", "guard", "analyze", "study", "organism", "data")


@dataclass(frozen=True)
class ReportedRun:
    """One finished run."""

    folder: pathlib.Path
    record: Mapping[str, Any]

    @property
    def verb(self) -> str:
        """Such as `find-contrast`."""
        return str(self.record["verb"])

    @property
    def kind(self) -> str:
        """What its result is: the verb, `find` for every detector, `ranking` for a comparison over several organisms."""
        if self.verb.startswith("find-"):
            return "find"
        return "ranking" if self.verb == "compare" and "ranking" in self.result else self.verb

    @property
    def label(self) -> str:
        """Name of the folder."""
        return self.folder.name

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The options it was run with."""
        return self.record["arguments"]

    @property
    def result(self) -> Mapping[str, Any]:
        """What it gave."""
        return self.record["result"]

    @property
    def models(self) -> tuple[str, ...]:
        """The models it was run on, the base first."""
        return tuple(str(self.arguments[part]) for part in ("base", "aligned", "model") if self.arguments.get(part))

    @property
    def method(self) -> str:
        """The detector of a find run, such as `contrast`."""
        return str(self.result.get("method") or self.verb.removeprefix("find-"))

    @property
    def command(self) -> str:
        """The command line that repeats it, defaults left out where they are null."""
        first, _, second = self.verb.partition("-")
        words = [first, second] if second and first in _TWO_WORDS else [self.verb]
        for option, value in self.arguments.items():
            if value is None or value is False:
                continue
            dashed = "--" + option.replace("_", "-")
            if isinstance(value, list):
                words += [str(each) for each in value] if option in _ARGUMENTS else [word for each in value for word in (dashed, str(each))]
            else:
                words += [dashed] if option in _FLAGS and value is True else [dashed, str(value)]
        return "safety-neurons " + shlex.join(words)

    @functools.cached_property
    def scores(self) -> Scores | None:
        """Its scores, where the file is still in the folder."""
        path = self.folder / "scores.safetensors"
        return Scores.load(path) if path.is_file() else None

    @functools.cached_property
    def neurons(self) -> NeuronSet | None:
        """Its neurons, where the file is still in the folder."""
        path = self.folder / "neurons.safetensors"
        return NeuronSet.load(path) if path.is_file() else None

    @functools.cached_property
    def completions(self) -> Completions | None:
        """Its completions, where the file is still in the folder."""
        path = self.folder / "completions.jsonl"
        return Completions.load(path) if path.is_file() else None


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


def guarded(run: ReportedRun, work: Callable[[], T]) -> T:
    """What `work` makes of a run.

    Raises:
        InputError: the record has not the shape that its verb writes.
    """
    try:
        return work()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:90]
        raise InputError(
            f"{str(run.folder / RECORD)!r} has not the result of {run.verb[:40]!r} ({detail}), expected this version's; repeat it"
        ) from error
