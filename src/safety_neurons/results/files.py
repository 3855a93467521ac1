"""Files written whole or not at all, to the same bytes wherever the same is written, and the hashes of what files hold.

A crash, a kill or a full disk leaves the old file or the new one, never half of one. What is not finished carries a name of its own
(`PARTIAL`), so that whatever a kill left behind is known for what it is.
"""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
import stat
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from safetensors.numpy import save

from safety_neurons import strict_json
from safety_neurons.errors import InputError, RunError

PathLike = str | os.PathLike[str]
PARTIAL = ".safety-neurons-partial"
"""The end of every temporary's name."""
_OLD = ".old"
_RESERVED = frozenset({"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))})
_LONGEST_NAME = 200


def write_bytes(path: PathLike, content: bytes) -> None:
    """Writes a file in one step, through a temporary file beside it.

    Raises:
        RunError: the place cannot be written (permissions, no such folder, disk full); the old file is untouched.
    """
    target = pathlib.Path(path)
    temporary: str | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=PARTIAL)
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except OSError as error:
        raise RunError(f"cannot write {str(target)!r} ({error.strerror or error}); choose a writable place with free space") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


@contextlib.contextmanager
def whole_folder(path: PathLike) -> Iterator[pathlib.Path]:
    """A folder beside the wanted one that takes its place at the end of the block; after an exception, what was there is as it was.

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
        raise RunError(f"cannot write {str(folder)!r} ({error.strerror or error}); choose a writable place with free space") from error


def remove_partial(folder: PathLike) -> None:
    """Removes what killed processes left unfinished in a folder and below; only for who alone may write there."""
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
    mask = os.umask(0)
    os.umask(mask)
    return mask


def plain_name(name: object, what: str) -> str:
    """A name out of a file that is to become the name of a file or folder: a name, never a path.

    Raises:
        InputError: empty, too long, with a separator, a drive, a control character or a leading dot, or reserved by a system.
    """
    text = str(name)
    fits = 0 < len(text.encode(errors="replace")) <= _LONGEST_NAME and text == text.strip() and not text.startswith(".")
    if not fits or re.search(r'[\x00-\x1f\x7f-\x9f/\\:*?"<>|\ud800-\udfff]', text) or text.split(".")[0].lower() in _RESERVED:
        raise InputError(
            f"{what} {text[:60]!r} is not a plain name; expected letters, digits, '-', '_' and '.', without folders: rename it"
        )
    return text


def now() -> str:
    """The time, UTC, ISO 8601; that of SOURCE_DATE_EPOCH (seconds since 1970) where it is set, so that files can be made again.

    Raises:
        InputError: SOURCE_DATE_EPOCH is no time.
    """
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if not given:
        return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    try:
        return datetime.datetime.fromtimestamp(int(given), datetime.UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        raise InputError(f"SOURCE_DATE_EPOCH {given[:40]!r} is no time; expected seconds since 1970: correct or unset it") from None


def safetensors_bytes(arrays: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """The safetensors file of numpy arrays."""
    return ordered_header(save(dict(arrays), metadata=dict(metadata)))


def ordered_header(content: bytes) -> bytes:
    """The same safetensors file with the names in its header in order; the library writes metadata in a random one."""
    length = struct.unpack("<Q", content[:8])[0]
    header = strict_json.loads(content[8 : 8 + length])
    header = {name: dict(sorted(entry.items())) if name == "__metadata__" else entry for name, entry in sorted(header.items())}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format wants tensors at multiples of eight
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def plain(value: Any) -> Any:
    """The value as JSON values: records by their fields, numpy as numbers and lists, paths as text, NaN and infinity as null."""
    if value is None or isinstance(value, (bool, int, str)):
        return value  # First, because a file of completions holds little else.
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, (list, tuple, range)):
        return [plain(item) for item in value]
    if hasattr(value, "to_json") and not isinstance(value, type):
        return plain(value.to_json())
    if callable(getattr(value, "record", None)) and not isinstance(value, type):
        return plain(value.record())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {entry.name: plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item) for item in value)
    return str(value)


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
        raise InputError(f"cannot read {str(source)!r} ({error.strerror or error}); expected a JSON file: check the path") from error
    except ValueError as error:
        raise InputError(f"{str(source)!r} is not JSON ({str(error)[:100]}); expected a file this package wrote: make it again") from error


Contents = dict[str, str]
"""SHA-256 by the file's place in what was named; a single file's place is empty."""


def contents_of(path: str | os.PathLike[str], wanted: Sequence[str] = ("**/*",)) -> Contents:
    """Hashes of a file, or of the files of a folder that fit a pattern; hidden ones (locks, temporaries, caches) are no content.

    A file is read once in a process as long as its size, times and inode stay the same.

    Raises:
        InputError: a file that cannot be read.
    """
    source = pathlib.Path(path)
    places = {"": source} if not source.is_dir() else dict(_files(source, wanted))
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(places, pool.map(file_sha256, places.values()), strict=True))


def within(place: object, contents: Mapping[str, str]) -> Contents:
    """The same contents one level deeper: of one of several things that were named together."""
    return {f"{place}/{name}" if name else str(place): digest for name, digest in contents.items()}


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes.

    Raises:
        InputError: it cannot be read, or is no regular file.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe or a device may have no end, and is empty when it is read again
            raise InputError(f"{str(path)!r} is a pipe or a device; expected a file that can be read twice: write it to one")
        seen = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        return _digest(os.path.abspath(path), seen)
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r} ({error.strerror or error}); expected a readable file: check the path") from error


@functools.lru_cache(maxsize=4096)
def _digest(path: str, _seen: tuple[int, ...]) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _files(folder: pathlib.Path, wanted: Sequence[str]) -> Iterator[tuple[str, pathlib.Path]]:
    """Sorted by place, so that the order in which a disk lists them does not matter."""
    for path in sorted({path for pattern in wanted for path in folder.glob(pattern)}):
        place = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in place.parts):
            yield place.as_posix(), path
