"""Data files inside zip archives: `ARCHIVE.zip/MEMBER`, or the archive itself where it holds one."""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safety_neurons.errors import InputError
from safety_neurons.prompts.files import LARGEST

READABLE = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".gz")


def located(path: Path) -> tuple[Path, str] | None:
    """The archive and the member that a path means; None where no archive is in it.

    Raises:
        InputError: The archive is damaged, has no such member, or holds several and none is named.
    """
    archive = next((part for part in path.parents if part.suffix.lower() == ".zip" and part.is_file()), None)
    if archive is not None:
        member = path.relative_to(archive).as_posix()
        inside = members(archive)
        if member not in inside:
            raise InputError(f"{path}: the archive has no such member; it has {_listed(inside)}; name one of them")
        return archive, member
    if path.suffix.lower() != ".zip" or not path.is_file():
        return None
    inside = members(path)
    if len(inside) != 1:
        raise InputError(f"{path}: expected one data file inside, found {len(inside)} ({_listed(inside)}); name one as {path.name}/MEMBER")
    return path, inside[0]


def members(archive: Path) -> list[str]:
    """Data files inside an archive, without what operating systems put beside them."""
    with _opened(archive) as file:
        names = [item.filename for item in file.infolist() if not item.is_dir()]
    return sorted(name for name in names if not name.startswith("__MACOSX/") and Path(name).suffix.lower() in READABLE)


def read_member(archive: Path, member: str) -> bytes:
    """The bytes of a member."""
    with _opened(archive) as file, file.open(member) as stream:
        data = stream.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise InputError(f"{archive / member}: unpacks to more than {LARGEST >> 20} MiB; expected a list of prompts; look at it first")
    return data


def _listed(names: list[str]) -> str:
    return (", ".join(names[:8]) + (" …" if len(names) > 8 else "")) if names else "none"


@contextmanager
def _opened(archive: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(archive) as file:
            yield file
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise InputError(f"{archive}: the zip archive is damaged or locked ({error}); expected a whole one; download it again") from None
    except OSError as error:
        raise InputError(
            f"{archive}: cannot be read ({error.strerror or error}); expected a readable file; check its permissions"
        ) from None
