"""Checkpoint: the partial state of a long run, in one file that is always whole."""

import contextlib
import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from safety_neurons import strict_json
from safety_neurons.errors import RunError
from safety_neurons.results.files import PathLike, plain, safetensors_bytes, write_bytes

EVERY = 5.0
"""Seconds of work after which a state is worth saving: what a kill costs at most, beside the step under way."""
SHARE = 0.1
"""Share of the time that saving may take: a state that takes longer to write is written less often."""


class Saved(NamedTuple):
    """What a checkpoint holds."""

    arrays: dict[str, np.ndarray]
    state: dict[str, Any]


class Checkpoint:
    """Arrays and a small state under one path; saving replaces both in one step."""

    def __init__(self, path: PathLike, clock: Callable[[], float] = time.monotonic) -> None:
        """Names the file; nothing is written yet.

        Args:
            path: of the file.
            clock: seconds, by which `due` goes.
        """
        self.path = pathlib.Path(path)
        self._clock = clock
        self._last, self._cost = clock(), 0.0

    @property
    def due(self) -> bool:
        """Whether enough time went by since the last save, or since this object was made, for the next one."""
        return self._clock() - self._last >= max(EVERY, self._cost / SHARE)

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
                f"cannot read checkpoint {str(self.path)!r} ({str(error)[:80]}); delete it or pass --overwrite to start anew"
            ) from error

    def delete(self) -> None:
        """Removes the file, where there is one."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
