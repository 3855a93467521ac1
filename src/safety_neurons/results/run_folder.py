"""RunFolder: where one run writes. The same configuration goes on, another is an error, a finished run stays as it is."""

import contextlib
import datetime
import importlib.metadata
import pathlib
import platform
import time
from collections.abc import Mapping
from typing import Any

from safety_neurons.errors import InputError, RunError
from safety_neurons.results.checkpoint import Checkpoint
from safety_neurons.results.files import PathLike, plain, read_json, write_json

RECORD = "run.json"
SCHEMA = "safety-neurons/1"
IMMATERIAL = frozenset({"progress", "json", "debug", "quiet", "verbose", "out", "overwrite", "dry_run", "gate"})
"""Arguments that cannot change a result, so that they are no part of the configuration."""
_PACKAGES = ("safety-neurons", "torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")


class RunFolder:
    """The folder of one run, with `run.json` in it from the first moment on."""

    def __init__(self, out: PathLike, verb: str, config: Mapping[str, Any], overwrite: bool = False) -> None:
        """Creates the folder, or goes on in it when it holds a run of the same verb and configuration.

        Args:
            out: the folder.
            verb: what is run, such as `find contrast`.
            config: the arguments; those in `IMMATERIAL` are recorded but not compared.
            overwrite: start anew whatever the folder holds of an earlier run; files the earlier run did not write stay.

        Raises:
            RunError: unwritable, damaged, or a run of another configuration.
        """
        self.folder = pathlib.Path(out)
        self.resumed = False
        self._made: list[pathlib.Path] = []
        arguments = plain(dict(config))
        earlier = None if overwrite else self._read()
        if overwrite:
            self._clear()
        if earlier is not None:
            self._compare(earlier, verb, arguments)
            self._record = earlier
            self.resumed = True
        else:
            self._record = _first_record(verb, arguments)
            self._make()
            self._write()
        self._started = time.monotonic()

    # What others use

    @property
    def finished(self) -> bool:
        """Whether the run was finished, now or earlier; then there is nothing to do."""
        return bool(self._record["status"] == "finished")

    @property
    def record(self) -> dict[str, Any]:
        """What `run.json` says; after a finished run its `result` is what was passed to `finish`."""
        return dict(self._record)

    def path(self, name: str) -> pathlib.Path:
        """Where the file `name` of this run lies (absolute); it is noted as the run's own, so that starting anew removes it.

        Raises:
            RunError: the name leaves the folder.
        """
        target = (self.folder / name).resolve()
        if not target.is_relative_to(self.folder.resolve()) or name == RECORD:
            raise RunError(f"{name!r} is not a file of the run; expected a name inside {str(self.folder)!r} other than {RECORD}")
        if name not in self._record["files"]:
            self._record["files"].append(name)
            if not self.finished:
                self._write()
        return target

    def checkpoint(self, name: str) -> Checkpoint:
        """A checkpoint of this run; all of them are removed when it is finished."""
        return Checkpoint(self.path(f"checkpoints/{name}.safetensors"))

    def finish(self, record: Mapping[str, Any] | None = None, **about: Any) -> None:
        """Marks the run as finished and writes down what it gave.

        Args:
            record: the result, as JSON values; kept under `result`.
            about: further entries of `run.json`, such as `device`, `hashes`, `timings`.
        """
        seconds = self._record["timings"].get("seconds", 0.0) + time.monotonic() - self._started
        timings = {**self._record["timings"], "finished": _now(), "seconds": seconds, **plain(about.pop("timings", {}))}
        self._record |= {**plain(about), "result": plain(dict(record or {})), "status": "finished", "timings": timings}
        kept = [name for name in self._record["files"] if not name.startswith("checkpoints/")]
        dropped = [name for name in self._record["files"] if name.startswith("checkpoints/")]
        self._record["files"] = kept
        self._write()
        self._remove(dropped)

    def abandon(self) -> None:
        """Takes back a run that has written nothing yet, so that the corrected command may use the same folder."""
        if self.finished or any((self.folder / name).exists() for name in self._record["files"]):
            return
        self._remove([RECORD])
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()

    # How it is kept

    def _make(self) -> None:
        try:
            self._made = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot make the folder {str(self.folder)!r} ({error.strerror or error}); choose a writable --out") from error

    def _write(self) -> None:
        write_json(self.folder / RECORD, self._record)

    def _read(self) -> dict[str, Any] | None:
        source = self.folder / RECORD
        try:
            if not source.exists():
                return None
            found = read_json(source)
        except (InputError, OSError) as error:
            raise RunError(f"damaged {str(source)!r} ({str(error)[:80]}); pass --overwrite or choose another --out") from error
        shape = {"verb": str, "status": str, "arguments": dict, "files": list, "timings": dict}
        whole = isinstance(found, dict) and all(isinstance(found.get(name), kind) for name, kind in shape.items())
        whole = whole and found["status"] in ("running", "finished") and all(isinstance(name, str) for name in found["files"])
        seconds = found["timings"].get("seconds", 0.0) if whole else None
        if not isinstance(seconds, int | float) or isinstance(seconds, bool) or found.get("schema") != SCHEMA:
            raise RunError(f"{str(source)!r} is not a run record of this version; pass --overwrite or choose another --out")
        return found

    def _compare(self, earlier: Mapping[str, Any], verb: str, arguments: Mapping[str, Any]) -> None:
        if earlier["verb"] != verb:
            raise RunError(
                f"{str(self.folder)!r} holds a run of {earlier['verb']!r}, not {verb!r}; choose another --out or pass --overwrite"
            )
        before, now = _material(earlier["arguments"]), _material(arguments)
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                raise RunError(
                    f"{str(self.folder)!r} holds a run with {name} {str(before.get(name))[:60]!r}, not {str(now.get(name))[:60]!r}; "
                    "choose another --out or pass --overwrite"
                )

    def _clear(self) -> None:
        """Removes what an earlier run noted as its own."""
        with contextlib.suppress(RunError):
            earlier = self._read()
            self._remove([*(earlier or {}).get("files", []), *([RECORD] if earlier else [])])

    def _remove(self, names: list[str]) -> None:
        root = self.folder.resolve()
        for name in names:
            target = (root / str(name)).resolve()
            if target.is_relative_to(root) and target.is_file():
                with contextlib.suppress(OSError):
                    target.unlink()
        with contextlib.suppress(OSError):
            (root / "checkpoints").rmdir()


def _material(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in IMMATERIAL}


def _first_record(verb: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "verb": verb,
        "arguments": arguments,
        "status": "running",
        "versions": {"python": platform.python_version(), "platform": platform.platform(), **_versions()},
        "seeds": {name: value for name, value in arguments.items() if "seed" in name},
        "hashes": {},
        "device": None,
        "timings": {"started": _now()},
        "files": [],
    }


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
