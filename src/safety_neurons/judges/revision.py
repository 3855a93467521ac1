"""Which version of a judge's weights is judging: the hub's commit, a hash of a local folder's files, or one of the weights in memory."""

import hashlib
import json
import pathlib
from collections.abc import Sequence

from safety_neurons.model import LanguageModel
from safety_neurons.model.files import model_contents
from safety_neurons.model.identity import identity


def revision_of(folder: pathlib.Path, *adapters: pathlib.Path) -> str:
    """The commit of a snapshot of the hub; for other folders, and several, a hash of what they hold."""
    held = [model_contents(one) for one in (folder, *adapters)]
    return held[0]["commit"] if len(held) == 1 and "commit" in held[0] else _hash(held[0] if len(held) == 1 else held)


def revision_in_memory(model: LanguageModel) -> str:
    """A hash of what a model in memory computes with: its name says nothing of that."""
    return _hash(identity(model))


def _hash(value: dict[str, str] | Sequence[dict[str, str]]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
