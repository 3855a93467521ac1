"""Safetensors files of neurons and scores: written whole or not at all, checked on the way in, with their provenance as header."""

import functools
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from safety_neurons import strict_json
from safety_neurons.errors import NeuronError
from safety_neurons.neurons.table import parse_key, sort_keys
from safety_neurons.results import plain
from safety_neurons.results.files import now, safetensors_bytes, write_bytes

SCHEMA = "safety-neurons/1"
KINDS = ("neurons", "scores", "delta")


@functools.cache
def _version() -> str:
    try:
        return importlib.metadata.version("safety-neurons")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@dataclass(frozen=True)
class Provenance:
    """What made a neuron set or scores, and on what."""

    kind: str
    """`neurons`, `scores` or `delta`."""
    method: str = ""
    """Detector or operation, such as `contrast`, `random` or `a - b`."""
    models: tuple[str, ...] = ()
    """Models as given, with revisions; for a pair the base first."""
    model_fingerprint: str = ""
    """Fingerprint of the site table; empty in files made by hand."""
    prompts_sha256: str = ""
    """Hash of the prompt list, to the character."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Options of the method, as JSON values; `sites` and `layers` are what was searched."""
    version: str = field(default_factory=_version)
    """Version of this package."""
    created: str = field(default_factory=now)
    """Time of making, UTC, ISO 8601; that of SOURCE_DATE_EPOCH where it is set."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise NeuronError(f"unknown kind {self.kind!r}; expected one of {' '.join(KINDS)}")
        object.__setattr__(self, "models", tuple(str(model) for model in self.models))
        object.__setattr__(self, "config", dict(self.config))

    def metadata(self) -> dict[str, str]:
        """The provenance as the string-to-string header of a safetensors file."""
        return {
            "schema": SCHEMA,
            "kind": self.kind,
            "method": self.method,
            "models": json.dumps(list(self.models), ensure_ascii=False),
            "model_fingerprint": self.model_fingerprint,
            "prompts_sha256": self.prompts_sha256,
            "config": json.dumps(plain(self.config), ensure_ascii=False, sort_keys=True, allow_nan=False),
            "version": self.version,
            "created": self.created,
        }

    @staticmethod
    def from_metadata(metadata: Mapping[str, str], kind: str) -> "Provenance":
        """The provenance in a file header; what a file made by hand leaves out stays empty.

        Raises:
            NeuronError: another schema or kind, or a damaged entry.
        """
        schema = metadata.get("schema", SCHEMA)
        if schema != SCHEMA:
            raise NeuronError(
                f"schema {schema[:60]!r} is not one this version reads; expected {SCHEMA!r}: update the package or make the file again"
            )
        found = metadata.get("kind", kind)
        if found != kind:
            raise NeuronError(f"this is a file of {found[:40]!r}, expected {kind!r}; pass the {kind} file of the same run")
        try:
            models = strict_json.loads(metadata.get("models", "[]"))
            config = strict_json.loads(metadata.get("config", "{}"))
        except ValueError as error:
            raise NeuronError(f"damaged header ({error}); expected JSON in 'models' and 'config': make the file again") from error
        if not isinstance(models, list) or not isinstance(config, dict):
            raise NeuronError("damaged header; expected a list in 'models' and an object in 'config': make the file again")
        text = {name: metadata.get(name, "") for name in ("method", "model_fingerprint", "prompts_sha256", "version", "created")}
        return Provenance(kind=kind, models=tuple(str(model) for model in models), config=config, **text)


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
