"""Files written whole or not at all: a crash, a kill or a full disk leaves the old file or the new one, never half of one."""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from safety_neurons import strict_json
from safety_neurons.errors import InputError, RunError

PathLike = str | os.PathLike[str]


def write_bytes(path: PathLike, content: bytes) -> None:
    """Writes a file in one step, through a temporary file beside it.

    Raises:
        RunError: the place cannot be written (permissions, no such folder, disk full); the old file is untouched.
    """
    target = pathlib.Path(path)
    temporary: str | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


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
