"""Which version of a judge's weights is judging: the hub's commit, or a hash of a local folder's files."""

import hashlib
import json
import pathlib

from safety_neurons.model.folders import model_contents


def revision_of(folder: pathlib.Path | None) -> str:
    """The commit of a snapshot of the hub; for other folders a hash of what they hold."""
    if folder is None:
        return "in memory"
    held = model_contents(folder)
    return held.get("commit") or hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()[:16]
