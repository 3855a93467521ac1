"""What files hold, as hashes: two files are the same when their bytes are, whatever they are called and wherever they lie."""

import functools
import hashlib
import os
import pathlib
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from safety_neurons.errors import InputError

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
