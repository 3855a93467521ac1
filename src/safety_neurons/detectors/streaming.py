"""Keep the sums over batches of a running `find` in a checkpoint that survives a kill."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from safety_neurons.errors import NumericalError, RunError
from safety_neurons.model import LanguageModel
from safety_neurons.model.language_model import identity, json_sha256
from safety_neurons.neurons import Votes
from safety_neurons.results import Checkpoint

Sums = dict[str, np.ndarray]
Progress = Callable[[int, int, int], None]


@dataclass
class BatchSums:
    """What one batch adds.

    Attributes:
        sums: one array per name, added up over batches.
        scores: one entry per prompt of the batch (site key to score of each neuron); only wanted where prompts vote.
    """

    sums: Sums = field(default_factory=dict)
    scores: list[dict[str, np.ndarray]] = field(default_factory=list)


@dataclass(frozen=True)
class Folded:
    """What all batches gave.

    Attributes:
        sums: by name.
        votes: of the prompts; None without agreement.
        failed: why a sequence is not in them, by its index.
    """

    sums: Sums
    votes: Votes | None
    failed: Mapping[int, str]


class Stream:
    """Arrays and plain values of one running `find`, kept in a checkpoint when there is one.

    Args:
        checkpoint: where to keep them; None keeps them in memory only.
        key: identifies the configuration; a checkpoint of another one is refused.

    Raises:
        RunError: the checkpoint belongs to another configuration.
    """

    def __init__(self, checkpoint: Checkpoint | None, key: Mapping[str, Any]) -> None:
        self._checkpoint = checkpoint
        self._key = {} if checkpoint is None else {name: _told(value) for name, value in key.items()}
        self.arrays: Sums = {}
        self.state: dict[str, Any] = {}
        self._new = False
        stored = checkpoint.load() if checkpoint is not None else None
        if stored is not None:
            arrays, state = stored
            theirs = state.get("key")
            theirs = theirs if isinstance(theirs, dict) else {}
            other = sorted(name for name in {*self._key, *theirs} if theirs.get(name) != self._key.get(name))
            if other:
                message = f"the partial result here was made with different {' and '.join(other)}"
                raise RunError(f"{message}: use another output folder, or overwrite this one")
            self.arrays, self.state = dict(arrays), dict(state)

    def save(self) -> None:
        """Write everything at once; a kill in the middle leaves the previous state."""
        if self._checkpoint is not None:
            self._checkpoint.save(self.arrays, {**self.state, "key": self._key})
        self._new = False

    def went_on(self, prepare: Callable[[], None] | None = None) -> None:
        """A step is done and the state is whole: save it, if the last time is some seconds of work ago.

        Args:
            prepare: brings arrays and state up to date before they are written.
        """
        self._new = True
        if self._checkpoint is not None and self._checkpoint.due:
            if prepare is not None:
                prepare()
            self.save()

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """For a block that changes the state: an interruption in it saves nothing."""
        new, self._new = self._new, False
        yield
        self._new = new

    @contextlib.contextmanager
    def kept(self, prepare: Callable[[], None] | None = None) -> Iterator[None]:
        """Save what is new when an error or an interruption ends the block."""
        try:
            yield
        except BaseException:
            if self._new:
                if prepare is not None:
                    prepare()
                self.save()
            raise

    def named(self, prefix: str) -> Sums:
        """Arrays whose name starts with `prefix/`, without the prefix."""
        return {name[len(prefix) + 1 :]: values for name, values in self.arrays.items() if name.startswith(f"{prefix}/")}

    def put(self, prefix: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Set arrays under `prefix/`."""
        self.arrays.update({f"{prefix}/{name}": values for name, values in arrays.items()})

    def add(self, sums: Mapping[str, np.ndarray]) -> None:
        """Add arrays, in float64, to those under `sum/`."""
        for name, values in sums.items():
            stored = self.arrays.get(f"sum/{name}")
            self.arrays[f"sum/{name}"] = np.asarray(values, dtype=np.float64) + (0.0 if stored is None else stored)

    def drop(self, prefix: str) -> None:
        """Forget the arrays under `prefix/`."""
        for name in [name for name in self.arrays if name.startswith(f"{prefix}/")]:
            del self.arrays[name]


def _told(value: Any) -> str:
    """Hash of an entry of the key; models count by their weights, tokenizers and templates, and not by their names."""
    if isinstance(value, list):
        value = [identity(item) if isinstance(item, LanguageModel) else item for item in value]
    return json_sha256(value)


def check_finite(sums: Sums) -> None:
    """Raise an error that names the first site whose numbers are not all finite."""
    for name, values in sums.items():
        if not np.isfinite(values).all():
            raise NumericalError(f"site {name.rsplit('/', 1)[-1]} gave NaN or infinity: check the model's weights, or use --dtype float32")


def to_numpy(values: torch.Tensor) -> np.ndarray:
    """A float64 array on the host."""
    return values.detach().to("cpu", torch.float64).numpy()
