"""Files and run folders: what is written in one step, hashed, recorded, locked, and gone on with.

A killed process leaves the old file or the new one, never half of one; temporaries lie in the target's folder
and say what they are (`PARTIAL`), so that whatever a kill left behind is known for what it is.

The same run goes on, another is an error, a finished run stays as it is. Which run it is, is told by what was
read and not by how that was called: the verb, the content of every file an argument names, all other
arguments as they are, and the version of this package.
"""

import contextlib
import copy
import datetime
import errno
import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import pathlib
import platform
import shutil
import socket
import stat
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from safety_neurons import strict_json
from safety_neurons.counting import numbered
from safety_neurons.errors import InputError, RunError
from safety_neurons.results.records import RunRecord, plain

PathLike = str | os.PathLike[str]
PARTIAL = ".safety-neurons-partial"
"""The end of every temporary's name."""
_OLD = ".old"


def write_bytes(path: PathLike, content: bytes) -> None:
    """Writes a file in one step, through a temporary file beside it.

    Raises:
        RunError: the place cannot be written (permissions, no such folder, disk full); the old file is
        untouched.
    """
    target = pathlib.Path(path)
    temporary: str | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        mine = _remove_left(target)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=mine, suffix=PARTIAL)
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except OSError as error:
        raise RunError(
            f"cannot write {str(target)!r} ({error.strerror or error}); choose a writable place with "
            "free space"
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _remove_left(target: pathlib.Path) -> str:
    """Remove the temporaries that dead processes of this machine left for a file; how one of this process
    begins.

    A file of no run has nobody else who would look after them.
    """
    host = f".{target.name}.{hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]}-"
    with contextlib.suppress(OSError):  # another user's: theirs to remove
        for left in target.parent.iterdir():
            if left.name.startswith(host) and left.name.endswith(PARTIAL):
                try:
                    os.kill(int(left.name[len(host) :].partition("-")[0]), 0)
                except (ProcessLookupError, ValueError):
                    left.unlink(missing_ok=True)
    return f"{host}{os.getpid()}-"


@contextlib.contextmanager
def whole_folder(path: PathLike) -> Iterator[pathlib.Path]:
    """A folder beside the wanted one that takes its place at the end of the block.

    After an exception, what was there is as it was.

    Raises:
        RunError: the place cannot be written.
    """
    folder = pathlib.Path(path)
    partial, old = (folder.with_name(f".{folder.name}{kind}{PARTIAL}") for kind in ("", _OLD))
    try:
        _restore(old)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            if folder.exists():
                folder.rename(old)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            _restore(old)
    except OSError as error:
        raise RunError(
            f"cannot write {str(folder)!r} ({error.strerror or error}); choose a writable place with "
            "free space"
        ) from error


def remove_partial(folder: PathLike) -> None:
    """Removes what killed processes left unfinished in a folder and below.

    Only for who alone may write there.
    """
    for left in sorted(pathlib.Path(folder).rglob(f".*{PARTIAL}")):
        if left.name.endswith(f"{_OLD}{PARTIAL}"):
            _restore(left)
        elif left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                left.unlink()


def _restore(old: pathlib.Path) -> None:
    """Puts a folder back that was set aside for one which did not come; where that came, it goes."""
    if old.is_dir():
        folder = old.with_name(old.name.removeprefix(".").removesuffix(f"{_OLD}{PARTIAL}"))
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(folder)


def _umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


def now() -> str:
    """The time, UTC, ISO 8601; that of SOURCE_DATE_EPOCH (seconds since 1970) where it is set.

    Raises:
        InputError: SOURCE_DATE_EPOCH is no time.
    """
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if not given:
        return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    try:
        return datetime.datetime.fromtimestamp(int(given), datetime.UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        raise InputError(
            f"SOURCE_DATE_EPOCH {given[:40]!r} is no time; expected seconds since 1970: correct or unset it"
        ) from None


def elapsed(started: float) -> float:
    """Seconds since a reading of `time.monotonic`, at least 0.

    Under SOURCE_DATE_EPOCH 0: files that are to be the same each time cannot say how long it took.
    """
    return 0.0 if os.environ.get("SOURCE_DATE_EPOCH") else max(0.0, time.monotonic() - started)


def safetensors_bytes(arrays: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """The safetensors file of numpy arrays."""
    return ordered_header(save(dict(arrays), metadata=dict(metadata)))


def ordered_header(content: bytes) -> bytes:
    """The same safetensors file with the names in its header in order.

    The library writes metadata in a random one.
    """
    length = struct.unpack("<Q", content[:8])[0]
    header = strict_json.loads(content[8 : 8 + length])
    header = {
        name: dict(sorted(entry.items())) if name == "__metadata__" else entry
        for name, entry in sorted(header.items())
    }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format wants tensors at multiples of eight
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def write_json(path: PathLike, value: Any) -> None:
    """Writes the value as readable JSON in one step.

    Raises:
        RunError: the place cannot be written.
    """
    text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode("utf-8", errors="backslashreplace"))


def read_json(path: PathLike, *, constants: bool = False) -> Any:
    """The value in a JSON file.

    Args:
        path: of the file.
        constants: let `Infinity` and `NaN` pass, which configurations of models may hold.

    Raises:
        InputError: missing, unreadable, not JSON, or JSON that is refused (`safety_neurons.strict_json`).
    """
    source = pathlib.Path(path)
    try:
        return strict_json.loads(source.read_bytes(), constants=constants)
    except OSError as error:
        raise InputError(
            f"cannot read {str(source)!r} ({error.strerror or error}); expected a JSON file: check the path"
        ) from error
    except ValueError as error:
        raise InputError(
            f"{str(source)!r} is not JSON ({str(error)[:100]}); expected a file this package wrote: make "
            "it again"
        ) from error


Contents = dict[str, str]
"""SHA-256 by the file's place in what was named; a single file's place is empty."""


def contents_of(path: str | os.PathLike[str], wanted: Sequence[str] = ("**/*",)) -> Contents:
    """Hashes of a file, or of the files of a folder that fit a pattern.

    Hidden ones (locks, temporaries, caches) are no content.

    A file is read once in a process as long as its size, times and inode stay the same.

    Raises:
        InputError: a file that cannot be read.
    """
    source = pathlib.Path(path)
    places = {"": source} if not source.is_dir() else dict(_files(source, wanted))
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(places, pool.map(file_sha256, places.values()), strict=True))


def within(prefix: object, contents: Mapping[str, str]) -> Contents:
    """The same contents one level deeper: of one of several things that were named together."""
    return {f"{prefix}/{name}" if name else str(prefix): digest for name, digest in contents.items()}


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes.

    Raises:
        InputError: it cannot be read, or is no regular file.
    """
    try:
        status = os.stat(path)
        # A pipe or a device may have no end, and is empty when it is read again.
        if not stat.S_ISREG(status.st_mode):
            raise InputError(
                f"{str(path)!r} is a pipe or a device; expected a file that can be read twice: write "
                "it to one"
            )
        seen = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        return _digest(os.path.abspath(path), seen)
    except OSError as error:
        raise InputError(
            f"cannot read {str(path)!r} ({error.strerror or error}); expected a readable file: check the path"
        ) from error


@functools.lru_cache(maxsize=4096)
def _digest(path: str, _seen: tuple[int, ...]) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _files(folder: pathlib.Path, wanted: Sequence[str]) -> Iterator[tuple[str, pathlib.Path]]:
    """Sorted by place, so that the order in which a disk lists them does not matter."""
    for path in sorted({path for pattern in wanted for path in folder.glob(pattern)}):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            yield relative.as_posix(), path


_LOCK, _HOLDER = ".lock", ".lock.json"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_OF_THE_SYSTEM: dict[str, Any] = (
    {"fallback_to_soft": False} if "fallback_to_soft" in inspect.signature(FileLock).parameters else {}
)
"""No lock that a killed process would leave behind in the place of one of the system."""


class Lock:
    """A lock of the operating system, which ends with its process however that ends.

    Who holds it is written beside it. Within one process it may be taken again: it does not stand in its own
    way.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        """Names the lock; nothing is taken yet."""
        self.folder = folder
        self.notes: list[str] = []
        self._held: FileLock | None = None

    def take(self) -> None:
        """Takes the lock without waiting; where the file system knows no locks, `notes` says so.

        Raises:
            RunError: another process holds it, or the folder is not writable.
        """
        path = self.folder.resolve() / _LOCK
        lock = FileLock(path, timeout=0, thread_local=False, is_singleton=True, **_OF_THE_SYSTEM)
        try:
            lock.acquire()
        except Timeout:
            raise RunError(
                f"{str(self.folder)!r} is in use by {self._holder()}; wait until it has ended, or choose "
                "another --out"
            ) from None
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
                raise RunError(
                    f"cannot write in {str(self.folder)!r} ({error.strerror or error}); choose a writable "
                    "--out"
                ) from error
            self.notes.append(
                f"the file system of {str(self.folder)!r} knows no locks: a second process on the same "
                "--out is not noticed"
            )
            return
        self._held = lock
        if lock.lock_counter == 1:
            write_json(
                path.with_name(_HOLDER), {"pid": os.getpid(), "host": socket.gethostname(), "since": now()}
            )

    def release(self) -> None:
        """Gives the lock back, where it is held; the last to do so leaves nothing of it in the folder."""
        lock, self._held = self._held, None
        if lock is None:
            return
        if lock.lock_counter == 1:  # While it is held, so that nobody's but our own is removed.
            for name in (_HOLDER, _LOCK):
                with contextlib.suppress(OSError):
                    (pathlib.Path(lock.lock_file).parent / name).unlink()
        lock.release()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.release()

    def _holder(self) -> str:
        try:
            holder = read_json(self.folder / _HOLDER)
            return (
                f"process {int(holder['pid'])} on {str(holder['host'])[:60]} since "
                f"{str(holder['since'])[:30]}"
            )
        except (InputError, LookupError, TypeError, ValueError):
            return "another process"


EVERY = 5.0
"""Seconds of work after which a state is worth saving: what a kill costs at most, beside a step."""
SHARE = 0.1
"""Share of the time that saving may take: a state that takes longer to write is written less often."""


class Saved(NamedTuple):
    """What a checkpoint holds."""

    arrays: dict[str, np.ndarray]
    state: dict[str, Any]


class Checkpoint:
    """Arrays and a small state under one path; saving replaces both in one step."""

    def __init__(self, path: PathLike, clock: Callable[[], float] = time.monotonic) -> None:
        """Names the file; nothing is written yet. `due` goes by the seconds of the clock."""
        self.path = pathlib.Path(path)
        self._clock = clock
        self._last, self._cost = clock(), 0.0

    def beside(self, name: str) -> "Checkpoint":
        """Another one in the same folder, of a part of the work."""
        other = copy.copy(self)
        other.path = self.path.with_stem(f"{self.path.stem}-{name}")
        return other

    @property
    def due(self) -> bool:
        """Whether enough time went by since the last save, or the start, for the next one."""
        return not 0 <= self._clock() - self._last < max(EVERY, self._cost / SHARE)  # a clock may go back

    def save(self, arrays: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> None:
        """Writes arrays and state (JSON values) in one step.

        Raises:
            RunError: the place cannot be written; the previous checkpoint is untouched.
        """
        start = self._clock()
        whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        write_bytes(self.path, safetensors_bytes(whole, {"state": json.dumps(plain(state))}))
        self._last = self._clock()
        self._cost = self._last - start

    def load(self) -> Saved | None:
        """The last state saved, or `None` where there is none.

        Raises:
            RunError: the file is damaged.
        """
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="numpy") as opened:
                state = strict_json.loads((opened.metadata() or {})["state"])
                if not isinstance(state, dict):
                    raise ValueError(f"its state is a {type(state).__name__}")
                return Saved({name: opened.get_tensor(name) for name in opened.keys()}, state)  # noqa: SIM118  # not a mapping
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"cannot read checkpoint {str(self.path)!r} ({str(error)[:80]}); delete it or pass "
                "--overwrite to start anew"
            ) from error

    def delete(self) -> None:
        """Removes the file, where there is one."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()


Value = TypeVar("Value")
CACHED = "cached"
"""Folder of a run in which the results of its parts lie."""


class Cache:
    """JSON results of the parts of a run, each under the hash of what it was computed from.

    A killed run computes none again.
    """

    def __init__(self, place: Callable[[str], pathlib.Path] | None = None) -> None:
        """Names where entries lie; nothing is kept without a place.

        Args:
            place: where a file of that name lies, such as `RunFolder.path`.
        """
        self.place = place

    def cached(self, key: Any, compute: Callable[[], Value], files: Sequence[pathlib.Path] = ()) -> Value:
        """What was computed for this key before, or what `compute` gives now.

        Args:
            key: a dataclass of JSON values: everything that decides the result, models and sets by their
                content.
            compute: gives JSON values.
            files: what `compute` writes beside its result; where one is gone or another, everything is
                computed anew.

        Raises:
            RunError: the entry cannot be written.
        """
        if self.place is None:
            return compute()
        named = {"of": type(key).__name__, "version": _versions().get(PACKAGE), **plain(key)}
        digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
        entry = self.place(f"{CACHED}/{digest}.json")
        with contextlib.suppress(InputError, LookupError, TypeError):  # A damaged entry is no entry.
            known = read_json(entry)
            if known["key"] == named and known["files"] == [file_sha256(path) for path in files]:
                return cast(Value, known["value"])
        value = cast(Value, plain(compute()))
        write_json(entry, {"key": named, "value": value, "files": [file_sha256(path) for path in files]})
        return value


RECORD = "run.json"
SCHEMA = "safety-neurons/1"
IMMATERIAL = frozenset(
    {"progress", "json", "debug", "quiet", "verbose", "out", "overwrite", "dry_run", "gate"}
)
"""Arguments that cannot change a result, so that they are no part of the configuration."""
ANSWERED_BY = "answered_by.json"
"""What kept answers depend on; it goes with them."""
CONTINUED = ("completions.jsonl", "judgements.sqlite", "capability.json", "harmless-answers.jsonl")
"""Files in which studies look for what they have done already."""
PACKAGE = "safety-neurons"
_PACKAGES = (PACKAGE, "torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")


class RunFolder:
    """The folder of one run, with `run.json` in it from the first moment on."""

    def __init__(
        self,
        out: PathLike,
        verb: str,
        config: Mapping[str, Any],
        overwrite: bool = False,
        inputs: Mapping[str, Contents] | None = None,
    ) -> None:
        """Creates the folder, or goes on in it when it holds the same run.

        Until it is finished, no other process may write there.

        Args:
            out: the folder.
            verb: what is run, such as `find contrast`.
            config: the arguments; those in `IMMATERIAL` are recorded but not compared.
            overwrite: start anew; files that an earlier run did not write stay.
            inputs: by argument the content of what it names, which is compared in the place of its words.

        Raises:
            RunError: unwritable, damaged, another run's, or another process is at work in it.
        """
        self.folder = pathlib.Path(out)
        self.resumed = False
        self._made: list[pathlib.Path] = []
        self._lock = Lock(self.folder)
        self.notes = self._lock.notes
        first = _first_record(verb, plain(dict(config)), inputs or {})
        self._record = first if overwrite else self._read() or first
        if self._record is not first:
            self._compare(first)
        if not self.finished:
            self._make()
            self._lock.take()
            self._begin(first, overwrite=overwrite)
        elif (self.folder / _LOCK).exists():  # It was killed between its last record and its end.
            with contextlib.suppress(RunError):
                self._lock.take()
                self._begin(first, overwrite=False)
        self._started = time.monotonic()

    def _begin(self, first: dict[str, Any], *, overwrite: bool) -> None:
        """Go on, or start, in a folder that no other process is in."""
        try:
            remove_partial(self.folder)
            if overwrite:
                self._clear()
            # Once more: until the lock was taken, somebody else may have finished it.
            earlier = None if overwrite else self._read()
            if earlier is not None:
                self._record = earlier
                self._compare(first)
            else:
                self._write()
            self.resumed = earlier is not None
        except BaseException:
            self._lock.release()
            raise
        if self.finished:
            self._remove(
                [f"checkpoints/{left.name}" for left in self.folder.glob("checkpoints/*.safetensors")]
            )
            self._lock.release()

    # What others use

    @property
    def finished(self) -> bool:
        """Whether the run was finished, now or earlier; then there is nothing to do."""
        return bool(self._record["status"] == "finished")

    @property
    def record(self) -> RunRecord:
        """What `run.json` says; a finished run's `result` has its files where the folder lies now."""
        return {
            **cast(RunRecord, self._record),
            "result": _placed(
                self._record.get("result"), self.folder.absolute(), self._record.get("paths", [])
            ),
        }

    def path(self, name: str) -> pathlib.Path:
        """Where the file `name` of this run lies (absolute).

        It is noted as the run's own, so that starting anew removes it.

        Raises:
            RunError: the name leaves the folder.
        """
        target = (self.folder / name).resolve()
        if not target.is_relative_to(self.folder.resolve()) or name == RECORD:
            raise RunError(
                f"{name!r} is not a file of the run; expected a name inside {str(self.folder)!r} other "
                f"than {RECORD}"
            )
        if name not in self._record["files"]:
            self._record["files"].append(name)
            if not self.finished:
                self._update()
        return target

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file of this run; paths in the folder are relative to it, so that it may be moved."""
        write_json(self.path(name), _unplaced(plain(value), self._roots)[0])

    @property
    def _roots(self) -> tuple[pathlib.Path, pathlib.Path]:
        return self.folder.absolute(), self.folder.resolve()

    def cached(self, key: Any, compute: Callable[[], Value], files: Sequence[pathlib.Path] = ()) -> Value:
        """`Cache.cached` in this folder; what is finished of the run stays there."""
        return Cache(self.path).cached(key, compute, files)

    def checkpoint(self, name: str) -> Checkpoint:
        """A checkpoint of this run; all of them are removed when it is finished."""
        return Checkpoint(self.path(f"checkpoints/{name}.safetensors"))

    def finish(self, record: Mapping[str, Any] | None = None, **about: Any) -> None:
        """Marks the run as finished and writes down what it gave.

        Args:
            record: the result, as JSON values; paths in the folder relative to it, where `paths` says.
            about: further entries of `run.json`, such as `device`, `hashes`, `timings`.
        """
        seconds = self._record["timings"].get("seconds", 0.0) + elapsed(self._started)
        timings = {
            **self._record["timings"],
            "finished": now(),
            "seconds": seconds,
            **plain(about.pop("timings", {})),
        }
        result, paths = _unplaced(plain(dict(record or {})), self._roots)
        self._record |= {
            **plain(about),
            "result": result,
            "paths": paths,
            "status": "finished",
            "timings": timings,
        }
        left = [
            name
            for name in self._record["files"]
            if not name.startswith("checkpoints/") and (self.folder / name).exists()
        ]
        dropped = [name for name in self._record["files"] if name.startswith("checkpoints/")]
        self._record["files"] = left
        self._update()
        self._remove(dropped)
        self._lock.release()

    def abandon(self) -> None:
        """Takes back a run that has written nothing yet, so that the corrected command may use the same
        folder.
        """
        if self.finished or any((self.folder / name).exists() for name in self._record["files"]):
            self._lock.release()
            return
        self._remove([ANSWERED_BY, RECORD])
        self._lock.release()
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()

    # How it is kept

    def _make(self) -> None:
        try:
            self._made = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"cannot make the folder {str(self.folder)!r} ({error.strerror or error}); choose a "
                "writable --out"
            ) from error

    def _write(self) -> None:
        write_json(self.folder / RECORD, self._record)

    def _update(self) -> None:
        if not (self.folder / RECORD).is_file():
            raise RunError(f"{str(self.folder)!r} is not there any more: start its run again")
        self._write()

    def _read(self) -> dict[str, Any] | None:
        source = self.folder / RECORD
        try:
            if not source.exists():
                return None
            record = read_json(source)
        except (InputError, OSError) as error:
            raise RunError(
                f"damaged {str(source)!r} ({str(error)[:80]}); pass --overwrite or choose another --out"
            ) from error
        shape = {
            "verb": str,
            "status": str,
            "arguments": dict,
            "inputs": dict,
            "versions": dict,
            "files": list,
            "timings": dict,
        }
        whole = isinstance(record, dict) and all(
            isinstance(record.get(name), kind) for name, kind in shape.items()
        )
        whole = whole and record["status"] in ("running", "finished")
        lists = [record.get("files"), record.get("notes", [])] if whole else []
        whole = whole and all(
            isinstance(texts, list) and all(isinstance(text, str) for text in texts) for texts in lists
        )
        whole = whole and (record["status"] == "running" or isinstance(record.get("result"), dict))
        seconds = record["timings"].get("seconds", 0.0) if whole else None
        if (
            not isinstance(seconds, int | float)
            or isinstance(seconds, bool)
            or record.get("schema") != SCHEMA
        ):
            raise RunError(
                f"{str(source)!r} is not a run record of this version; pass --overwrite or choose "
                "another --out"
            )
        return record

    def _compare(self, now: Mapping[str, Any]) -> None:
        """Raises a RunError that says what is not as it was: the record is another run's."""
        earlier, where = self._record, f"{str(self.folder)!r} holds a run"
        advice = "choose another --out, or pass --overwrite to start anew"
        if earlier["verb"] != now["verb"]:
            raise RunError(f"{where} of {earlier['verb']!r}, not {now['verb']!r}; {advice}")
        before, after = _material(earlier), _material(now)
        for name in sorted({*before, *after}):
            if before.get(name) != after.get(name):
                raise RunError(
                    f"{where} with {name} {_shown(before.get(name))!r}, not {_shown(after.get(name))!r}; "
                    f"{advice}"
                )
        for name in sorted({*earlier["inputs"], *now["inputs"]}):
            what = _changed(earlier["inputs"].get(name), now["inputs"].get(name))
            if what is None:
                continue
            named, given = (str(record["arguments"].get(name)) for record in (earlier, now))
            if named != given:  # nothing has changed: other things were named
                raise RunError(f"{where} with {name} {_shown(named)!r}, not {_shown(given)!r}; {advice}")
            raise RunError(f"{where} on another {name}: {_shown(given)!r} {what} since; {advice}")
        theirs, ours = (str(record["versions"].get(PACKAGE)) for record in (earlier, now))
        if theirs != ours:
            raise RunError(f"{where} of version {theirs[:20]}, this is version {ours}; {advice}")
        gone = (name for name in earlier["files"] if not os.path.exists(self.folder / name))
        if self.finished and (lost := next(gone, None)) is not None:
            raise RunError(
                f"{where} that is finished, but its file {_shown(lost)!r} is not there; put it back, or "
                f"{advice}"
            )

    def _clear(self) -> None:
        """Removes what an earlier run noted as its own.

        Of one whose notes cannot be read, whatever a run goes on from.
        """
        try:
            earlier = read_json(self.folder / RECORD)
        except (InputError, OSError):
            earlier = None
        noted = earlier.get("files") if isinstance(earlier, dict) else None
        states = [
            path
            for pattern in ("checkpoints/*.safetensors", f"{CACHED}/*.json")
            for path in self.folder.glob(pattern)
        ]
        partial = [str(path.relative_to(self.folder)) for path in states]  # Those of parts are not noted.
        named = noted if isinstance(noted, list) else CONTINUED
        self._remove([*named, *partial, ANSWERED_BY, RECORD])

    def _remove(self, names: list[str]) -> None:
        """Removes files of the run, and folders that are empty without them."""
        root = self.folder.resolve()
        for name in names:
            with contextlib.suppress(
                OSError, ValueError
            ):  # A name too long for a file, or with a zero in it.
                target = (root / str(name)).resolve()
                if target.is_relative_to(root) and target.is_file():
                    target.unlink()
        for folder in ("checkpoints", CACHED):
            with contextlib.suppress(OSError):
                (root / folder).rmdir()


def _material(record: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that are compared by their words: the others cannot change a result, or name what is compared
    by content.
    """
    return {
        name: value
        for name, value in record["arguments"].items()
        if name not in IMMATERIAL and name not in record["inputs"]
    }


def _changed(before: Any, after: Any) -> str | None:
    """How the content of an input is another one; None where it is the same."""
    if before == after:
        return None
    if not isinstance(before, dict) or not isinstance(after, dict):
        return "was not there" if after is not None else "was there"
    names = sorted({*before, *after})  # Null is not "not there": a record may be damaged.
    changed = [at for at in names if (at in before, before.get(at)) != (at in after, after.get(at))]
    others = f" and {numbered(len(changed) - 1, 'more file')}" if len(changed) > 1 else ""
    kind = "new" if changed[0] not in before else "gone" if changed[0] not in after else "other content"
    named = f" ({kind}: {changed[0]}{others})" if changed[0] else ""
    return f"has changed{named}"


def _unplaced(value: Any, roots: tuple[pathlib.Path, ...]) -> tuple[Any, list[list[str | int]]]:
    """A JSON value with the paths that lie in a folder relative to it, and where in the value they are."""
    if isinstance(value, str) and value.startswith("/"):
        inside = next(
            (
                pathlib.PurePath(value).relative_to(root)
                for root in roots
                if pathlib.PurePath(value).is_relative_to(root)
            ),
            None,
        )
        return (value, []) if inside is None else (inside.as_posix(), [[]])
    items: list[tuple[Any, Any]] = list(
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    if not items:
        return value, []
    done = [(key, *_unplaced(item, roots)) for key, item in items]
    paths: list[list[str | int]] = [[key, *path] for key, _, inner in done for path in inner]
    return (
        {key: item for key, item, _ in done} if isinstance(value, dict) else [item for _, item, _ in done]
    ), paths


def _placed(value: Any, root: pathlib.Path, paths: Any) -> Any:
    """The inverse of `_unplaced` for a folder that may lie elsewhere now.

    What is no path of the value stays as it is.
    """
    for path in paths if isinstance(paths, list) else ():
        value = _with_root(value, root, path if isinstance(path, list) else [None])
    return value


def _with_root(value: Any, root: pathlib.Path, path: list[Any]) -> Any:
    if not path:
        inside = (
            isinstance(value, str) and not value.startswith("/") and ".." not in pathlib.PurePath(value).parts
        )
        return str(root / value) if inside else value
    step, rest = path[0], path[1:]
    if isinstance(value, dict) and isinstance(step, str) and step in value:
        return {**value, step: _with_root(value[step], root, rest)}
    if isinstance(value, list) and isinstance(step, int) and 0 <= step < len(value):
        return [_with_root(item, root, rest) if number == step else item for number, item in enumerate(value)]
    return value


def _first_record(verb: str, arguments: dict[str, Any], inputs: Mapping[str, Contents]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "verb": verb,
        "arguments": arguments,
        "inputs": {name: dict(contents) for name, contents in inputs.items()},
        "status": "running",
        "versions": {"python": platform.python_version(), "platform": platform.platform(), **_versions()},
        "seeds": {name: value for name, value in arguments.items() if "seed" in name},
        "hashes": {},
        "device": None,
        "timings": {"started": now()},
        "files": [],
    }


@functools.cache  # Metadata of a package are read whole for its version, which takes a millisecond each.
def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _shown(named: Any) -> str:
    """What was named, and of a very long one the end: paths that differ mostly do so there."""
    text = str(named)
    return text if len(text) <= 300 else f"…{text[-300:]}"
