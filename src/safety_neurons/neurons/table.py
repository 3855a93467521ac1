"""Name the matrices of a model, count their neurons and units, and read and write files of one vector a
matrix.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from safety_neurons import strict_json
from safety_neurons.arguments import fits
from safety_neurons.declarations import listed
from safety_neurons.errors import NeuronError, UsageError
from safety_neurons.results import plain
from safety_neurons.results.run import now, safetensors_bytes, write_bytes

MOST_NEURONS = 1 << 24
"""Neurons of one site at most, in a file: lists of them are made in memory."""


@dataclass(frozen=True)
class SiteInfo:
    """One matrix of a model."""

    key: str
    """Its name, such as `layers.3.down`."""
    size: int
    """Neurons of the site."""
    weights_per_neuron: int
    """Weight entries that belong to one neuron (the length of its row or column)."""
    biases_per_neuron: int
    """Bias entries that belong to one neuron (0 or 1)."""
    n_heads: int = 0
    """Heads of this site: query heads for `q` and `o`, key-value heads for `k` and `v`, 0 for feed-forward
    sites.
    """
    head_dim: int = 0
    """Neurons per head, 0 for feed-forward sites."""

    @property
    def parameters_per_neuron(self) -> int:
        """Weight and bias entries of one neuron."""
        return self.weights_per_neuron + self.biases_per_neuron


@dataclass(frozen=True)
class UnitBlock:
    """Matrices of one layer (or expert) whose neurons make up the same units: `gate up down`, `v o`, or one
    matrix alone.
    """

    keys: tuple[str, ...]
    n_units: int
    unit_of: dict[str, np.ndarray]
    """By key the unit of each of its neurons, numbered from 0 within the block."""

    def slots(self, key: str) -> np.ndarray:
        """How many neurons each unit has in a matrix of the block (int64, one number per unit)."""
        return np.bincount(self.unit_of[key], minlength=self.n_units)

    def held(self, key: str, indices: np.ndarray) -> np.ndarray:
        """How many of some neurons of a matrix each unit has (int64, one number per unit)."""
        return np.bincount(self.unit_of[key][indices], minlength=self.n_units)


@dataclass(frozen=True)
class SiteTable:
    """All matrices of a model, in the order of keys.

    Two models with equal fingerprints can share neuron sets.
    """

    architecture: str
    """Class of the model, such as `LlamaForCausalLM`."""
    n_parameters: int
    """All parameters of the model, tied ones once.

    Not part of the fingerprint, so that an adapter does not change it.
    """
    sites: tuple[SiteInfo, ...]

    def __post_init__(self) -> None:
        ordered = sort_keys(info.key for info in self.sites)
        if len(set(ordered)) != len(ordered):
            raise NeuronError("the site table names a key twice; expected every key once")
        by_key = {info.key: info for info in self.sites}
        object.__setattr__(self, "sites", tuple(by_key[key] for key in ordered))

    @functools.cached_property
    def _by_key(self) -> dict[str, SiteInfo]:
        return {info.key: info for info in self.sites}

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """Neurons of every key, in the order of keys."""
        return {info.key: info.size for info in self.sites}

    @functools.cached_property
    def keys(self) -> tuple[str, ...]:
        """All keys, in order."""
        return tuple(info.key for info in self.sites)

    @functools.cached_property
    def n_neurons(self) -> int:
        """Neurons of all sites together."""
        return sum(info.size for info in self.sites)

    @functools.cached_property
    def n_layers(self) -> int:
        """Highest layer number plus one."""
        return max((parse_key(info.key).layer for info in self.sites), default=-1) + 1

    def __getitem__(self, key: str) -> SiteInfo:
        info = self._by_key.get(key)
        if info is None:
            raise NeuronError(
                f"this {self.architecture} has no matrix {key!r}; its keys run from {self.keys[:1]} to "
                f"{self.keys[-1:]}"
            )
        return info

    def __contains__(self, key: object) -> bool:
        return key in self._by_key

    def __repr__(self) -> str:
        return (
            f"SiteTable({self.architecture}: {len(self.sites)} sites in {self.n_layers} layers, "
            f"{self.n_neurons:,} neurons)"
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the class and the sites, as hexadecimal text: equal exactly when neuron sets are
        interchangeable.
        """
        content = json.dumps(
            [self.architecture, [asdict(info) for info in self.sites]], sort_keys=True, separators=(",", ":")
        )
        return hashlib.sha256(content.encode()).hexdigest()

    def select(
        self, sites: Iterable[str] | None = None, layers: range | str | int | Iterable[int] | None = None
    ) -> "SiteTable":
        """The table with only these sites (of experts too) and layers (`None` for all; `A:B` excludes B).

        Raises:
            UsageError: an unknown site, or layers outside the model.
            NeuronError: nothing is left.
        """
        infos = [self[key] for key in keys_within(self.keys, sites, layers, self.n_layers)]
        if not infos:
            raise NeuronError(
                f"no matrix of this {self.architecture} is among sites "
                f"{sorted(check_sites(sites or []))} of layers {layers}; choose others"
            )
        return SiteTable(self.architecture, self.n_parameters, tuple(infos))

    def to_json(self) -> str:
        """The table as JSON text, as stored in file headers."""
        fields = ("size", "weights_per_neuron", "biases_per_neuron", "n_heads", "head_dim")
        rows = {info.key: [getattr(info, field) for field in fields] for info in self.sites}
        return json.dumps(
            {
                "architecture": self.architecture,
                "n_parameters": self.n_parameters,
                "fields": fields,
                "sites": rows,
            }
        )

    @staticmethod
    def from_json(text: str) -> "SiteTable":
        """The table that `to_json` wrote.

        Raises:
            NeuronError: the text is not such a table.
        """
        try:
            content = strict_json.loads(text)
            fields = [str(field) for field in content["fields"]]
            rows = [*content["sites"].values(), [content["n_parameters"]]]
            if not all(type(value) is int and 0 <= value < 2**50 for row in rows for value in row):
                raise ValueError("a size that is no whole number from 0")
            sites = tuple(
                SiteInfo(parse_key(key) and key, **dict(zip(fields, row, strict=True)))
                for key, row in content["sites"].items()
            )
            if any(info.size > MOST_NEURONS for info in sites):
                raise ValueError(f"a site of more than {MOST_NEURONS:,} neurons")
            return SiteTable(str(content["architecture"]), content["n_parameters"], sites)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise NeuronError(
                f"damaged site table in a file header ({error}); expected what SiteTable.to_json writes: "
                "make the file again"
            ) from error

    def units(self) -> dict[str, np.ndarray]:
        """For every key the unit number of each of its neurons (int64, one per neuron, numbered from 0 over
        the whole table).

        A feed-forward index is one unit: its `gate`, `up` and `down` neurons share a number. A `v` row shares
        a number with the `o` columns it feeds: those of the query heads of its group, same place in the head.
        A `q` or `k` neuron is its own unit.
        """
        units: dict[str, np.ndarray] = {}
        first_of_block: dict[str, int] = {}
        used = 0
        for info in self.sites:
            key = parse_key(info.key)
            if key.site in MLP_SITES:
                if key.block not in first_of_block:
                    first_of_block[key.block] = used
                    used += max(
                        self._by_key[name].size
                        for site in MLP_SITES
                        if (name := f"{key.block}.{site}") in self._by_key
                    )
                units[info.key] = first_of_block[key.block] + np.arange(info.size, dtype=np.int64)
            elif (
                key.site == "o"
                and (value := self._by_key.get(f"{key.block}.v")) is not None
                and _fed(value, info)
            ):
                units[info.key] = units[value.key][_value_row_of_output_column(value, info)]
            else:
                units[info.key] = used + np.arange(info.size, dtype=np.int64)
                used += info.size
        return units

    @functools.cached_property
    def blocks(self) -> tuple[UnitBlock, ...]:
        """The matrices grouped by the units they share, in the order of their first keys."""
        groups: dict[int, dict[str, np.ndarray]] = {}
        for key, numbers in self.units().items():
            if len(numbers):
                groups.setdefault(int(numbers[0]), {})[key] = (
                    numbers - numbers[0]
                )  # All matrices of a block begin with its first unit.
        return tuple(
            UnitBlock(tuple(part), max(int(one.max()) for one in part.values()) + 1, part)
            for part in groups.values()
        )


def _fed(value: SiteInfo, output: SiteInfo) -> bool:
    """Whether the heads of `v` and `o` line up, so that a column's row can be told."""
    return (
        value.n_heads > 0
        and output.n_heads % value.n_heads == 0
        and value.head_dim == output.head_dim
        and value.head_dim > 0
    )


def _value_row_of_output_column(value: SiteInfo, output: SiteInfo) -> np.ndarray:
    columns = np.arange(output.size, dtype=np.int64)
    head, place = np.divmod(columns, output.head_dim)
    return head // (output.n_heads // value.n_heads) * value.head_dim + place


ATTENTION_SITES = ("q", "k", "v", "o")
MLP_SITES = ("gate", "up", "down")
SITES = ATTENTION_SITES + MLP_SITES
OUTPUT_SITES = ("q", "k", "v", "gate", "up")
"""Sites whose neurons are output features (rows of the weight)."""
INPUT_SITES = ("o", "down")
"""Sites whose neurons are input features (columns of the weight)."""

_NUMBER = r"(0|[1-9][0-9]{0,8})"
_PATTERN = re.compile(
    rf"layers\.{_NUMBER}\.(?:experts\.{_NUMBER}\.|(shared_expert)\.)?(q|k|v|o|gate|up|down)"
)


class Key(NamedTuple):
    """One matrix: the site of a layer, of one of its experts, or of its shared expert."""

    layer: int
    expert: int | None
    shared: bool
    site: str

    def __str__(self) -> str:
        if self.shared:
            return f"layers.{self.layer}.shared_expert.{self.site}"
        if self.expert is not None:
            return f"layers.{self.layer}.experts.{self.expert}.{self.site}"
        return f"layers.{self.layer}.{self.site}"

    @property
    def block(self) -> str:
        """The part of the key before the site: the sub-layer whose matrices share units."""
        return str(self).rpartition(".")[0]

    @property
    def order(self) -> tuple[int, int, int, int]:
        """Where the key stands among keys: layer, site, then dense before experts by number before the shared
        expert.
        """
        kind = 2 if self.shared else 1 if self.expert is not None else 0
        return (self.layer, SITES.index(self.site), kind, self.expert or 0)


@functools.lru_cache(maxsize=1 << 17)
def parse_key(key: str) -> Key:
    """The parts of a key such as `layers.3.down`, `layers.3.experts.7.up` or `layers.3.shared_expert.gate`.

    Raises:
        NeuronError: the text is not a key.
    """
    match = _PATTERN.fullmatch(key) if isinstance(key, str) else None
    if match is None:
        raise NeuronError(
            f"unknown key {str(key)[:80]!r}; expected layers.N.SITE (also layers.N.experts.E.SITE or "
            f"layers.N.shared_expert.SITE) with SITE one of {' '.join(SITES)}"
        )
    layer, expert, shared, site = match.groups()
    if (expert or shared) and site in ATTENTION_SITES:
        raise NeuronError(
            f"unknown key {key!r}: an expert has no {site} site; expected one of {' '.join(MLP_SITES)} there"
        )
    return Key(int(layer), None if expert is None else int(expert), shared is not None, site)


def sort_keys(keys: Iterable[str]) -> list[str]:
    """The keys in the order by which ties are broken: layer, site, then dense before experts by number before
    the shared expert.
    """
    return sorted(keys, key=lambda key: parse_key(key).order)


def check_sites(sites: Iterable[str]) -> tuple[str, ...]:
    """The sites in their own order, each once.

    Raises:
        UsageError: a name is not a site.
    """
    wanted = listed(sites if isinstance(sites, str) else tuple(sites)) or ()
    unknown = [site for site in wanted if site not in SITES]
    if unknown:
        raise UsageError(f"unknown site {unknown[0]!r}; expected some of {' '.join(SITES)}")
    return tuple(site for site in SITES if site in wanted)


def parse_layers(layers: "range | str | int | Iterable[int] | None", n_layers: int) -> tuple[int, ...]:
    """The layer numbers that `layers` means in a model of `n_layers` layers.

    Args:
        layers: `None` for all, a range or list of numbers, one number, or text: `A:B` (B excluded, either end
            may be left out, negative numbers count from the end) or `A`.
        n_layers: layers of the model.

    Raises:
        UsageError: the text is not a range, or a layer is outside the model; an end that reaches past its
            layers is not cut.
    """
    if layers is None:
        return tuple(range(n_layers))
    if isinstance(layers, str):
        return _layers_of_text(layers, n_layers)
    # An array of no dimension is one number, though it has an iterator.
    alone = not isinstance(layers, Iterable) or not getattr(layers, "shape", (1,))
    several: list[Any] = [layers] if alone else list(layers)  # type: ignore[arg-type]
    if not all(fits(layer, int) for layer in several):
        raise UsageError(
            f"layers {layers!r}; expected A:B (B excluded), one number, or whole numbers in a list"
        )
    wanted = sorted({int(layer) for layer in several})
    outside = [layer for layer in wanted if not 0 <= layer < n_layers]
    if outside:
        raise UsageError(
            f"layer {outside[0]} asked, but the layers are 0 to {n_layers - 1}; give layers inside that range"
        )
    return tuple(wanted)


def _layers_of_text(text: str, n_layers: int) -> tuple[int, ...]:
    match = re.fullmatch(r"\s*(-?\d+)?\s*(:)?\s*(-?\d+)?\s*", text)
    if match is None or (match[2] is None and (match[1] is None or match[3] is not None)):
        raise UsageError(f"--layers {text!r} is not a range; expected A:B (B excluded) or one number")
    if match[2] is None:
        number = int(match[1])
        return parse_layers(number + n_layers if number < 0 else number, n_layers)
    ends = [None if end is None else int(end) for end in (match[1], match[3])]
    if any(end is not None and abs(end) > n_layers for end in ends):
        raise UsageError(
            f"--layers {text!r} reaches outside of the {n_layers} layers, 0 to {n_layers - 1}; give A:B with "
            f"B at most {n_layers}, or leave the end out"
        )
    chosen = tuple(range(n_layers))[slice(*ends)]
    if not chosen:
        raise UsageError(f"--layers {text!r} selects none of the layers 0 to {n_layers - 1}; widen the range")
    return chosen


def layers_within(
    keys: Iterable[str], layers: "range | str | int | Iterable[int] | None", n_layers: int | None
) -> tuple[int, ...]:
    """The layer numbers that `layers` means, in a model of `n_layers` layers or, where None, one as deep as
    the keys or the range.
    """
    if n_layers is None:
        n_layers = max((parse_key(key).layer for key in keys), default=0) + 1
        if isinstance(layers, str) and ":" in layers:  # The model may well have layers without a member.
            n_layers = max(n_layers, *map(int, re.findall(r"\d+", layers)), 1)
    return parse_layers(layers, n_layers)


def keys_within(
    keys: Iterable[str],
    sites: Iterable[str] | None,
    layers: "range | str | int | Iterable[int] | None",
    n_layers: int | None,
) -> list[str]:
    """The keys at these sites (of experts too) and layers; `None` keeps all.

    Errors as for `check_sites` and `parse_layers`.
    """
    known = list(keys)
    wanted = SITES if sites is None else check_sites(sites)
    numbers = set(layers_within(known, layers, n_layers))
    return [key for key in known if parse_key(key).layer in numbers and parse_key(key).site in wanted]


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
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)
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
    def from_metadata(metadata: Mapping[str, str], kind: str, path: str | os.PathLike[str]) -> "Provenance":
        """The provenance in the header of a file; what a file made by hand leaves out stays empty.

        Raises:
            NeuronError: another schema or kind, or a damaged entry.
        """
        schema = metadata.get("schema", SCHEMA)
        if schema != SCHEMA:
            raise NeuronError(
                f"schema {schema[:60]!r} is not one this version reads; expected {SCHEMA!r}: update the "
                "package or make the file again"
            )
        stored = metadata.get("kind", kind)
        if stored != kind:
            raise NeuronError(
                f"{str(path)!r} is a file of {stored[:40]!r}, expected {kind!r}; pass the {kind} file of the "
                "same run"
            )
        try:
            models = strict_json.loads(metadata.get("models", "[]"))
            config = strict_json.loads(metadata.get("config", "{}"))
        except ValueError as error:
            raise NeuronError(
                f"damaged header ({error}); expected JSON in 'models' and 'config': make the file again"
            ) from error
        if not isinstance(models, list) or not isinstance(config, dict):
            raise NeuronError(
                "damaged header; expected a list in 'models' and an object in 'config': make the file again"
            )
        text = {
            name: metadata.get(name, "")
            for name in ("method", "model_fingerprint", "prompts_sha256", "version", "created")
        }
        return Provenance(kind=kind, models=tuple(str(model) for model in models), config=config, **text)


class Content(NamedTuple):
    """What a file holds."""

    arrays: dict[str, np.ndarray]
    """Vectors by key, in the order of keys."""
    metadata: dict[str, str]
    """The header's strings."""


def write_arrays(
    path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes the file in one step: a crash leaves the old file or the new one, never half of one.

    Raises:
        RunError: the place cannot be written.
    """
    ordered = {key: np.ascontiguousarray(arrays[key]) for key in sort_keys(arrays)}
    write_bytes(path, safetensors_bytes(ordered, metadata))


def read_arrays(path: str | os.PathLike[str], name: str) -> Content:
    """The vectors and header of a file; a folder means the file called `name` in it.

    Raises:
        NeuronError: missing, damaged, not a safetensors file, an unknown key, or an entry that is not a
        vector.
    """
    source = pathlib.Path(path)
    if source.is_dir():
        source = source / name
    if not source.is_file():
        raise NeuronError(f"no file {str(source)!r}; expected a {name} file: check the path")
    try:
        with source.open("rb") as stream:
            if stream.read(20).startswith(b"version https://git-"):
                raise NeuronError(
                    f"{str(source)!r} is a Git LFS pointer, expected the safetensors file itself: run "
                    "'git lfs pull'"
                )
        with safe_open(source, framework="numpy") as opened:
            metadata = dict(opened.metadata() or {})
            arrays = {key: opened.get_tensor(key) for key in sort_keys(opened.keys())}
    except (SafetensorError, TypeError, ValueError, AttributeError, KeyError) as error:
        raise NeuronError(
            f"cannot read {str(source)!r} ({str(error)[:120]}); expected a whole safetensors file: "
            "make or copy it again"
        ) from error
    except OSError as error:
        raise NeuronError(
            f"cannot read {str(source)!r} ({error.strerror or error}); expected a readable safetensors file"
        ) from error
    for key, array in arrays.items():
        parse_key(key)
        if array.ndim != 1:
            raise NeuronError(
                f"{key!r} in {str(source)!r} has shape {array.shape}, expected one axis: one entry per neuron"
            )
    return Content(arrays, metadata)
