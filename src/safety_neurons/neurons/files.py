"""Reading and writing the safetensors files of neurons and scores: whole or not at all, and checked on the way in."""

import os
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from safety_neurons.errors import NeuronError
from safety_neurons.neurons.keys import parse_key, sort_keys
from safety_neurons.results.files import safetensors_bytes, write_bytes


class Content(NamedTuple):
    """What a file holds."""

    arrays: dict[str, np.ndarray]
    """Vectors by key, in the order of keys."""
    metadata: dict[str, str]
    """The header's strings."""


def write(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes the file in one step: a crash leaves the old file or the new one, never half of one.

    Raises:
        RunError: the place cannot be written.
    """
    ordered = {key: np.ascontiguousarray(arrays[key]) for key in sort_keys(arrays)}
    write_bytes(path, safetensors_bytes(ordered, metadata))


def read(path: str | os.PathLike[str], name: str) -> Content:
    """The vectors and header of a file; a folder means the file called `name` in it.

    Raises:
        NeuronError: missing, damaged, not a safetensors file, an unknown key, or an entry that is not a vector.
    """
    source = pathlib.Path(path)
    if source.is_dir():
        source = source / name
    if not source.is_file():
        raise NeuronError(f"no file {str(source)!r}; expected a {name} file: check the path")
    try:
        with source.open("rb") as stream:
            if stream.read(20).startswith(b"version https://git-"):
                raise NeuronError(f"{str(source)!r} is a Git LFS pointer, expected the safetensors file itself: run 'git lfs pull'")
        with safe_open(source, framework="numpy") as opened:
            metadata = dict(opened.metadata() or {})
            arrays = {key: opened.get_tensor(key) for key in sort_keys(opened.keys())}
    except (SafetensorError, TypeError, ValueError, AttributeError, KeyError) as error:
        raise NeuronError(
            f"cannot read {str(source)!r} ({str(error)[:120]}); expected a whole safetensors file: make or copy it again"
        ) from error
    except OSError as error:
        raise NeuronError(f"cannot read {str(source)!r} ({error.strerror or error}); expected a readable safetensors file") from error
    for key, array in arrays.items():
        parse_key(key)
        if array.ndim != 1:
            raise NeuronError(f"{key!r} in {str(source)!r} has shape {array.shape}, expected one axis: one entry per neuron")
    return Content(arrays, metadata)
