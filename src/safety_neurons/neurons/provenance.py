"""Provenance: where a neuron or score file comes from, as text in the header of the file."""

import functools
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from safety_neurons import strict_json
from safety_neurons.errors import NeuronError
from safety_neurons.results import plain
from safety_neurons.results.files import now

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
