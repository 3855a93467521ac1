"""From a path to text: compression, encodings, and files that are not what their name says."""

import difflib
import gzip
import io
import zlib
from pathlib import Path

from safety_neurons.errors import InputError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt")
EXPECTED = "expected .jsonl, .json, .csv, .tsv or .txt, plain or .gz"

LARGEST = 1 << 29
"""Bytes of a file, of a compressed one unpacked: more is no list of prompts."""

_OTHER_FORMATS = {
    b"PK\x03\x04": "a zip archive (or an .xlsx workbook)",
    b"PAR1": "a Parquet file",
    b"\x1f\x8b": "gzip data",
    b"%PDF": "a PDF",
    b"\x28\xb5\x2f\xfd": "Zstandard data",
    b"SQLite format 3": "a database",
}


def file_format(path: Path) -> str:
    """The suffix that says how to read the file, without `.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    suffix = {".ndjson": ".jsonl", ".jsonlines": ".jsonl", ".text": ".txt"}.get(suffix, suffix)
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: the ending {suffix or '(none)'!r} says no known format; {EXPECTED}; convert or rename the file")
    return suffix


def read_text(path: Path) -> tuple[str, list[str]]:
    """The whole file as text, and notes on what was removed.

    Raises:
        InputError: Absent, a folder, empty, a Git LFS pointer, damaged, binary or not UTF-8.
    """
    return text_of(_read_bytes(path), path)


def text_of(data: bytes, path: Path) -> tuple[str, list[str]]:
    """A file's bytes as text, and notes on what was removed.

    Args:
        data: The bytes as they are stored.
        path: The file, or the archive and member as one path; its ending says whether the bytes are compressed.

    Raises:
        InputError: Empty, a Git LFS pointer, damaged, binary or not UTF-8.
    """
    notes: list[str] = []
    if data.startswith(b"version https://git-lfs"):
        raise InputError(
            f"{path}: a Git LFS pointer of {len(data)} bytes, not the data; run `git lfs pull` where it was cloned or download the file"
        )
    data = _uncompressed(path, data)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return _of_utf16(path, data), ["UTF-16 text; read as such"]
    if data.startswith(b"\xef\xbb\xbf"):
        data = data[3:]
    if not data.strip():
        raise InputError(f"{path}: the file is empty; expected at least one prompt")
    _refuse_binary(path, data)
    try:
        return data.decode("utf-8"), notes
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}: not UTF-8 at byte {error.start} (0x{data[error.start]:02x}, line {line}); expected UTF-8; "
            f"convert it, e.g. `iconv -f WINDOWS-1252 -t UTF-8 {path.name}`"
        ) from None


def _of_utf16(path: Path, data: bytes) -> str:
    try:
        text = data.decode("utf-32" if data.startswith(b"\xff\xfe\x00\x00") else "utf-16")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: begins like UTF-16 text and is not ({error.reason}); expected UTF-8; convert or repair it") from None
    if not text.strip():
        raise InputError(f"{path}: the file is empty; expected at least one prompt")
    if "\0" in text:
        raise InputError(f"{path}: NUL characters, so not text; expected text; convert or repair the file")
    return text


def _read_bytes(path: Path) -> bytes:
    try:
        if path.is_dir():
            files = sorted(entry.name for entry in path.iterdir() if any(suffix in entry.name for suffix in SUFFIXES))
            found = f"it holds {', '.join(files[:5])}{' …' if len(files) > 5 else ''}; " if files else ""
            raise InputError(f"{path}: a folder, expected a file; {found}name the file itself")
        if not path.exists():
            raise InputError(_missing(path))
        if not path.is_file():  # it may have no end, and is empty when it is read again for its hash
            raise InputError(f"{path}: a pipe or a device; expected a file that can be read twice; write it to one")
        if path.stat().st_size > LARGEST:
            raise InputError(f"{path}: more than {LARGEST >> 20} MiB; expected a list of prompts; split it or take the first lines of it")
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}); expected a readable file; check the path and its permissions"
        ) from None


def _missing(path: Path) -> str:
    near: list[str] = []
    if path.parent.is_dir():
        near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1, cutoff=0.6)
        hint = f"did you mean {path.parent / near[0]}?" if near else "check the path, or use builtin:harmful"
    else:
        hint = f"its folder {path.parent} does not exist either; check the path"
    return f"{path}: no such file; expected a prompt file or a builtin: name; {hint}"


def _uncompressed(path: Path, data: bytes) -> bytes:
    if path.suffix.lower() != ".gz":
        return data
    if not data:
        raise InputError(f"{path}: the file is empty; expected at least one prompt")
    if not data.startswith(b"\x1f\x8b"):
        raise InputError(f"{path}: named .gz but not gzip data; expected gzip; remove .gz from its name or download it again")
    try:
        with gzip.open(io.BytesIO(data)) as stream:
            unpacked = stream.read(LARGEST + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path}: the gzip data is cut off or damaged ({error}); expected a whole file; download it again") from None
    if len(unpacked) > LARGEST:
        raise InputError(f"{path}: unpacks to more than {LARGEST >> 20} MiB; expected a list of prompts; unpack and look at it first")
    return unpacked


def _refuse_binary(path: Path, data: bytes) -> None:
    for magic, what in _OTHER_FORMATS.items():
        if data.startswith(magic):
            raise InputError(f"{path}: the content is {what}; {EXPECTED}; unpack or convert it first")
    at = data.find(b"\x00")
    if at >= 0:
        raise InputError(
            f"{path}: a NUL byte at byte {at} ({data.count(0)} in all), so not UTF-8 text; expected text; convert or repair the file"
        )
