"""Sets of neurons by matrix: algebra, counts, random controls made of what a set is made of, files, and how
sets and scores are shown.
"""

import abc
import dataclasses
import functools
import math
import os
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import numpy as np
from jaxtyping import Bool, Int64

from safety_neurons.arguments import well_typed
from safety_neurons.counting import numbered
from safety_neurons.errors import ForeignModelError, NeuronError, SafetyNeuronsError, UsageError
from safety_neurons.neurons.table import (
    SITES,
    Provenance,
    SiteTable,
    UnitBlock,
    check_sites,
    keys_within,
    layers_within,
    parse_key,
    read_arrays,
    sort_keys,
    write_arrays,
)
from safety_neurons.results import html_table


def extra_variance(parts: Iterable[tuple[int, int]], *, forced: bool = False) -> float:
    """Variance of what a set does minus what many random sets like it do on average, were it a random one
    itself, in units of the variance between these.

    Of draws from everything it is 1. Random sets that keep clear of k of N units are drawn from the N − k
    others: they have more in common with one another, and less with the set, than sets have by chance, so
    that it is N ÷ (N − 2 k) where every unit does as much; infinite at half, where there is one such set.

    Args:
        parts: of every layer how many units the set takes, and of how many.
        forced: whether a set of more than half is held against sets that take all it leaves, and not against
            draws from everything.

    Source: none; sums over draws without replacement (`tests/neurons/test_sets.py` draws them).
    """
    apart = among = 0.0
    for taken, whole in parts:
        left = whole - taken
        if 2 * taken <= whole:
            apart += taken * whole / max(left, 1)
            among += taken * (whole - 2 * taken) / max(left, 1)
        elif forced:
            apart += whole * left / taken
            among += (2 * taken - whole) * left / taken
        else:
            apart, among = apart + taken * left / whole, among + taken * left / whole
    return apart / among if among > 0 else math.inf if apart > 0 else 1.0


def moved_units(
    members: Mapping[str, Int64[np.ndarray, " member"]], table: SiteTable, seed: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """The members with every unit moved to a random unit of its layer (and expert).

    Counts per matrix and of units stay.

    Args:
        members: sorted indices by key, all of them in the table.
        table: the model's matrices.
        seed: not negative; the same numbers give the same members.
    """
    moved: dict[str, np.ndarray] = {}
    for block in table.blocks:
        held = {key: members[key] for key in block.keys if key in members and len(members[key])}
        if held:
            moved |= _moved(block, held, np.random.default_rng([*seed, *parse_key(block.keys[0]).order]))
    return moved


def written_extra(extra: float) -> dict[str, float | None]:
    """As an entry of a provenance, which holds no infinite number."""
    return {"extra_variance": extra if math.isfinite(extra) else None}


def _taken(members: Mapping[str, np.ndarray], table: SiteTable) -> Iterator[tuple[int, int]]:
    """Of every layer (and expert) how many units a set takes, and of how many."""
    for block in table.blocks:
        held = [block.held(key, members[key]) for key in block.keys if key in members]
        if held:
            yield int(np.count_nonzero(np.sum(held, axis=0))), block.n_units


def _moved(
    block: UnitBlock, held: Mapping[str, np.ndarray], generator: np.random.Generator
) -> dict[str, np.ndarray]:
    """The block's members moved: to units without any where there are enough, else to free neurons, else to
    whatever there is.
    """
    slots = np.stack([block.slots(key) for key in held], axis=1)
    counts = np.stack([block.held(key, indices) for key, indices in held.items()], axis=1)
    touched = np.asarray(counts.any(axis=1))
    parts = counts[touched]
    crowded = 2 * counts.sum(axis=0) > slots.sum(axis=0)
    wide = np.where(crowded, slots, slots - counts)
    rooms = ([np.where(touched[:, None], 0, slots)] if 2 * touched.sum() <= len(touched) else []) + [
        slots - counts,
        wide,
        slots,
    ]
    for room in rooms:
        places = _placed(parts, room, generator)
        if places is not None:
            break
    assert places is not None, "a set fits at least where it is"
    wanted = np.zeros_like(counts)
    wanted[places] = parts
    return {
        key: _filled(
            block.unit_of[key],
            wanted[:, site],
            indices if (room[:, site] < slots[:, site]).any() else None,
            generator,
        )
        for site, (key, indices) in enumerate(held.items())
    }


def _placed(
    parts: Int64[np.ndarray, "part site"],
    room: Int64[np.ndarray, "unit site"],
    generator: np.random.Generator,
) -> Int64[np.ndarray, " part"] | None:
    """A random unit for each part that has room for it, no unit twice; None where there is no such choice.

    Parts with equal counts are one kind. The most demanding kinds choose first; a part that finds no unit
    left makes others move along the shortest chain of kinds, so that a choice is found wherever there is one.
    """
    kinds, kind_of = np.unique(parts, axis=0, return_inverse=True)
    kind_of = kind_of.reshape(-1)
    fits = [(room >= kind).all(axis=1) for kind in kinds]
    owner = np.full(len(room), -1, np.int64)
    """The part that has each unit."""
    for kind in np.argsort(-kinds.sum(axis=1), kind="stable"):
        waiting = np.flatnonzero(kind_of == kind)
        open_units = generator.permutation(np.flatnonzero(fits[kind] & (owner < 0)))
        owner[open_units[: len(waiting)]] = waiting[: len(open_units)]
        for part in waiting[len(open_units) :]:
            if not _made_room(int(part), kind_of, fits, owner, generator):
                return None
    places = np.empty(len(parts), np.int64)
    places[owner[owner >= 0]] = np.flatnonzero(owner >= 0)
    return places


def _made_room(
    part: int,
    kind_of: Int64[np.ndarray, " part"],
    fits: list[Bool[np.ndarray, " unit"]],
    owner: np.ndarray,
    generator: np.random.Generator,
) -> bool:
    """Gives a part a unit by moving others, each to a unit that fits it.

    False where no chain of moves ends at a free unit.
    """
    came_from: dict[int, tuple[int, int]] = {}
    start = int(kind_of[part])
    waiting, seen = deque([start]), {start}
    while waiting:
        kind = waiting.popleft()
        free = np.flatnonzero(fits[kind] & (owner < 0))
        if len(free):
            unit = int(generator.choice(free))
            while kind != start:
                kind, left = came_from[kind]
                owner[unit], unit = owner[left], left
            owner[unit] = part
            return True
        for unit in generator.permutation(np.flatnonzero(fits[kind])):
            other = int(kind_of[owner[unit]])
            if other not in seen:
                seen.add(other)
                came_from[other] = (kind, int(unit))
                waiting.append(other)
    return False


def _filled(
    unit_of: Int64[np.ndarray, " neuron"],
    wanted: Int64[np.ndarray, " unit"],
    shunned: np.ndarray | None,
    generator: np.random.Generator,
) -> Int64[np.ndarray, " member"]:
    """Random neurons of a matrix, as many of each unit as wanted, none of those to be shunned."""
    open_neurons = wanted[unit_of] > 0
    if shunned is not None:
        open_neurons[shunned] = False
    candidates = generator.permutation(np.flatnonzero(open_neurons))
    candidates = candidates[np.argsort(unit_of[candidates], kind="stable")]
    units = unit_of[candidates]
    rank = np.arange(len(units)) - np.searchsorted(units, units)
    return np.sort(candidates[rank < wanted[units]])


FILE_NAME = "neurons.safetensors"
Kind = TypeVar("Kind", bound="ByMatrix")
_NOTHING = np.zeros(0, np.int64)
_NOTHING.setflags(write=False)


class HandMadeWarning(UserWarning):
    """A neuron or score file without a fingerprint: every index fits, but nothing says that it belongs to
    this model.
    """


class ByMatrix(abc.ABC):
    """One vector for each of some matrices of a model, and what neuron sets and scores share: provenance,
    checks, files, tables.
    """

    KIND: ClassVar[str]
    """`neurons` or `scores`: in the provenance, and in the name of the file in a run's folder."""

    def __init__(
        self, vectors: dict[str, np.ndarray], table: SiteTable | None, provenance: Provenance | None
    ) -> None:
        self._vectors = vectors
        self.table = table
        self.provenance = provenance or Provenance(
            self.KIND, model_fingerprint=table.fingerprint if table else ""
        )
        self.notes: tuple[str, ...] = ()

    def keys(self) -> list[str]:
        """The keys that have a vector, in order."""
        return list(self._vectors)

    def items(self) -> list[tuple[str, np.ndarray]]:
        """Pairs of a key and its vector: of a set sorted int64 indices, of scores float32 numbers."""
        return list(self._vectors.items())

    def __len__(self) -> int:
        return sum(len(vector) for vector in self._vectors.values())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, type(self)):
            return NotImplemented
        return self.keys() == other.keys() and all(
            np.array_equal(vector, other._vectors[key]) for key, vector in self.items()
        )

    @property
    def n_neurons(self) -> int:
        """Members of a set, or scored neurons."""
        return len(self)

    @well_typed
    def check(self, table: SiteTable, models: Iterable[str] = ()) -> list[str]:
        """Whether this can be used on a model with this table; what should be said about it is returned.

        Args:
            table: the model's matrices.
            models: the model's names with revisions; when given and not among those of the provenance, that
                is a note.

        Raises:
            ForeignModelError: found on another architecture. NeuronError: a matrix the model lacks, an index
            out of range, or another number of scores than neurons.
        """
        kind, origin = self.provenance.kind, self.provenance
        if origin.model_fingerprint and origin.model_fingerprint != table.fingerprint:
            raise ForeignModelError(
                f"the {kind} were found on {' and '.join(origin.models) or 'another architecture'} "
                f"(fingerprint {origin.model_fingerprint[:12]}), expected {table.architecture} "
                f"({table.fingerprint[:12]}); find them on this model"
            )
        self._fit(table)
        if not origin.model_fingerprint:
            return [
                (
                    f"the {kind} have no fingerprint, so nothing says that they belong to this "
                    f"{table.architecture}; every index fits"
                )
            ]
        others = [model for model in models if origin.models and model not in origin.models]
        same = f"the {kind} were found on {' and '.join(origin.models)}, which is the same architecture as"
        return [f"{same} {others[0]} with other weights"] if others else []

    @abc.abstractmethod
    def _fit(self, table: SiteTable) -> None:
        """Refuse vectors that are not of this table's matrices."""

    @well_typed
    def on(self: Kind, table: SiteTable, models: Iterable[str] = ()) -> Kind:
        """The same on a model with the given table, after `check`, whose findings are its `notes`."""
        notes = self.check(table, models)
        placed = type(self)(self._vectors, table, self.provenance)
        placed.notes = tuple(notes)
        return placed

    @well_typed
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file in one step: a vector per key, provenance and site table in the header."""
        write_arrays(path, self._vectors, header(self.provenance, self.table))

    @classmethod
    @well_typed
    def load(
        cls: type[Kind],
        path: str | os.PathLike[str],
        table: SiteTable | None = None,
        models: Iterable[str] = (),
    ) -> Kind:
        """Read a file (a folder means its `neurons.safetensors` or `scores.safetensors`); no model is needed.

        A file without a fingerprint, made by hand, is a `HandMadeWarning` when every index fits the table.

        Args:
            path: the file.
            table: matrices of the model it will be used on; without it, those stored in the file.
            models: names of that model, to note when it was found on others.

        Raises:
            ForeignModelError: found on another architecture. NeuronError: missing, damaged, another schema or
            kind, unknown key, negative index or one out of range.
        """
        arrays, metadata = read_arrays(path, f"{cls.KIND}.safetensors")
        provenance = Provenance.from_metadata(metadata, cls.KIND, path)
        masks = [key for key, vector in arrays.items() if cls is NeuronSet and _is_mask(vector)]
        if masks:
            raise NeuronError(
                f"{masks[0]!r} in {str(path)!r} holds {len(arrays[masks[0]])} numbers that are all 0 or 1, "
                "as a mask does; expected indices: store the places of the ones"
            )
        loaded = cls(arrays, stored_table(metadata, provenance), provenance)
        if table is None:
            return loaded
        placed = loaded.on(table, models)
        if not provenance.model_fingerprint:
            warnings.warn(placed.notes[0], HandMadeWarning, stacklevel=2)
        return placed

    def __repr__(self) -> str:
        return f"{type(self).__name__}({line_of(self)})"

    def _repr_html_(self) -> str:
        rows = [[site, f"{number:,}", share, layers] for site, number, share, layers in _per_site(self)]
        return html_table(line_of(self), ["site", "neurons", "of the site", "layers"], rows)


class NeuronSet(ByMatrix):
    """An immutable set of neurons: sorted indices per matrix.

    Sets with the same members are equal. `a & b`, `a | b`, `a - b` and `a ^ b` are set algebra; `len` counts
    neurons; iteration gives `(key, index)` pairs in the order layer, site, index.
    """

    KIND = "neurons"

    @well_typed
    def __init__(
        self, members: Mapping[str, Any], table: SiteTable | None = None, provenance: Provenance | None = None
    ) -> None:
        """Takes the members, in any order and with repeats; keys without members are dropped.

        Args:
            members: integers per key, each the index of a neuron of that matrix.
            table: the model's matrices; needed for shares, parameters and masks.
            provenance: where the set comes from.

        Raises:
            NeuronError: an unknown key, a negative index, something that is not an integer, or (with a table)
            an index out of range.
        """
        cleaned = {key: _indices(key, members[key]) for key in sort_keys(members.keys())}
        super().__init__(
            {key: indices for key, indices in cleaned.items() if len(indices)}, table, provenance
        )
        if table is not None:
            self._fit(table)

    @staticmethod
    @well_typed
    def all(table: SiteTable) -> "NeuronSet":
        """Every neuron of the table."""
        members = {key: np.arange(size, dtype=np.int64) for key, size in table.sizes.items()}
        return NeuronSet(members, table, Provenance("neurons", "all", model_fingerprint=table.fingerprint))

    # Looking inside

    def __getitem__(self, key: str) -> Int64[np.ndarray, " member"]:
        parse_key(key)
        return self._vectors.get(key, _NOTHING)

    def __contains__(self, item: object) -> bool:
        if isinstance(item, str):
            return item in self._vectors
        if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
            return bool(np.isin(item[1], self._vectors.get(item[0], _NOTHING)).all())
        return False

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return ((key, int(index)) for key, indices in self._vectors.items() for index in indices)

    def __hash__(self) -> int:
        return hash(tuple((key, indices.tobytes()) for key, indices in self.items()))

    def mask(self, key: str) -> Bool[np.ndarray, " neuron"]:
        """One bool per neuron of the matrix: whether it is a member.

        Raises:
            NeuronError: the set has no table, or the table has no such matrix.
        """
        mask = np.zeros(self._known_table("a mask")[key].size, bool)
        mask[self[key]] = True
        return mask

    # Algebra

    def __and__(self, other: "NeuronSet") -> "NeuronSet":
        return self._combine(other, "&", np.intersect1d)

    def __or__(self, other: "NeuronSet") -> "NeuronSet":
        return self._combine(other, "|", np.union1d)

    def __sub__(self, other: "NeuronSet") -> "NeuronSet":
        return self._combine(other, "-", np.setdiff1d)

    def __xor__(self, other: "NeuronSet") -> "NeuronSet":
        return self._combine(other, "^", np.setxor1d)

    def _combine(self, other: "NeuronSet", sign: str, function: Any) -> "NeuronSet":
        if not isinstance(other, NeuronSet):
            return NotImplemented
        mine, theirs = self.provenance, other.provenance
        if (
            mine.model_fingerprint
            and theirs.model_fingerprint
            and mine.model_fingerprint != theirs.model_fingerprint
        ):
            raise ForeignModelError(
                f"{len(self)} neurons of {_named(self)} {sign} {len(other)} neurons of {_named(other)}; "
                "expected sets of one architecture"
            )
        members = {key: function(self[key], other[key]) for key in {*self._vectors, *other._vectors}}
        config: dict[str, Any] = {"operation": sign, "left": _summary(self), "right": _summary(other)}
        searched = [
            set(check_sites(each.provenance.config["sites"]))
            for each in (self, other)
            if each.provenance.config.get("sites")
        ]
        if len(searched) == 2:
            config["sites"] = list(check_sites(searched[0] | searched[1]))
        if mine.config.get("layers") == theirs.config.get("layers"):
            config["layers"] = mine.config.get("layers")
        digests = [each.config.get("prompt_digests") or [] for each in (mine, theirs)]
        if any(digests):
            config["prompt_digests"] = list(dict.fromkeys([*digests[0], *digests[1]]))
        provenance = Provenance(
            "neurons",
            method=f"{mine.method or 'set'} {sign} {theirs.method or 'set'}",
            models=tuple(dict.fromkeys((*mine.models, *theirs.models))),
            model_fingerprint=mine.model_fingerprint or theirs.model_fingerprint,
            prompts_sha256=mine.prompts_sha256 if mine.prompts_sha256 == theirs.prompts_sha256 else "",
            config=config,
        )
        return NeuronSet(members, self.table or other.table, provenance)

    @well_typed
    def only(
        self, sites: Iterable[str] | None = None, layers: range | str | int | Iterable[int] | None = None
    ) -> "NeuronSet":
        """The members at these sites (of experts too) and layers; `None` keeps all."""
        n_layers = self.table.n_layers if self.table else None
        keys = keys_within(self._vectors, sites, layers, n_layers)
        config = dict(self.provenance.config)
        if sites is not None:
            config["sites"] = list(check_sites(sites))
        if layers is not None:
            config["layers"] = list(layers_within(self._vectors, layers, n_layers))
        return NeuronSet(
            {key: self[key] for key in keys}, self.table, dataclasses.replace(self.provenance, config=config)
        )

    # Counts

    @property
    def n_parameters(self) -> int:
        """Weight and bias entries of the members."""
        table = self._known_table("the number of parameters")
        return sum(len(indices) * table[key].parameters_per_neuron for key, indices in self.items())

    @functools.cached_property
    def n_units(self) -> int:
        """Distinct units: gate, up and down neurons of one index count once, so do a v row and the o columns
        it feeds.
        """
        units = self._known_table("the number of units").units()
        return (
            len(np.unique(np.concatenate([units[key][indices] for key, indices in self.items()])))
            if self._vectors
            else 0
        )

    @property
    def share_of_neurons(self) -> float:
        """Members divided by the candidates: the neurons of the sites and layers that were searched, where
        the provenance names them.
        """
        table = self._known_table("the share of neurons")
        return _share(len(self), _candidates(table, self.provenance.config))

    @property
    def share_of_all_neurons(self) -> float:
        """Members divided by all neurons of the model."""
        return _share(len(self), self._known_table("the share of neurons").n_neurons)

    @property
    def share_of_parameters(self) -> float:
        """Weight and bias entries of the members divided by all parameters of the model, tied ones once."""
        return _share(self.n_parameters, self._known_table("the share of parameters").n_parameters)

    def counts(self) -> dict[str, int]:
        """Members per key, for the keys that have any."""
        return {key: len(indices) for key, indices in self.items()}

    # Controls

    @property
    def disjoint(self) -> bool:
        """False for a random control that could not be kept apart from the set it is like.

        True for every other set.
        """
        return bool(self.provenance.config.get("disjoint", True))

    @property
    def extra_variance(self) -> float:
        """Of a random control `extra_variance` of the set it is like; 1 for every other set."""
        extra = self.provenance.config.get("extra_variance", 1.0)
        return math.inf if extra is None else float(extra)

    def control_record(self) -> dict[str, int | bool]:
        """What a random control is, as JSON values: `seed` and `number` of its draw, `n_neurons`, `n_units`,
        `disjoint`.
        """
        drawn = {name: int(self.provenance.config[name]) for name in ("seed", "number")}
        return {**drawn, "n_neurons": len(self), "n_units": self.n_units, "disjoint": self.disjoint}

    @well_typed
    def random_like(self, seed: int, table: SiteTable | None = None, n: int = 1) -> list["NeuronSet"]:
        """`n` random sets made of what this set is made of; the same seed gives the same sets.

        Every unit of the set is moved, with as many neurons in each of its matrices, to a random unit of the
        same layer (and expert): whole units stay whole, and the counts in every matrix and the number of
        units stay what they are. The random units are others than the set's where these are at most half of a
        layer's; where they are more, no neuron is shared as long as that is possible, and a random set that
        does share some says `disjoint == False`. Seed and number are in each set's provenance.

        Args:
            seed: not negative.
            table: the model's matrices, where the set does not know them.
            n: how many sets.
        """
        table = table or self._known_table("a random set")
        if seed < 0:
            raise UsageError(f"seed {seed} is negative; expected 0 or more")
        _check_range(self._vectors, table)
        return [self._one_random(seed, number, table) for number in range(n)]

    def _one_random(self, seed: int, number: int, table: SiteTable) -> "NeuronSet":
        members = moved_units(self._vectors, table, (seed, number))
        shared = [
            key
            for key, indices in self.items()
            if len(np.intersect1d(indices, members[key], assume_unique=True))
        ]
        searched = {
            name: self.provenance.config[name]
            for name in ("sites", "layers")
            if name in self.provenance.config
        }
        config = {
            "seed": seed,
            "number": number,
            "like": _summary(self),
            "disjoint": not shared,
            "not_disjoint": shared,
            **written_extra(extra_variance(_taken(self._vectors, table))),
            **searched,
        }
        return NeuronSet(
            members,
            table,
            Provenance(
                "neurons",
                "random",
                self.provenance.models,
                table.fingerprint,
                self.provenance.prompts_sha256,
                config,
            ),
        )

    def _fit(self, table: SiteTable) -> None:
        _check_range(self._vectors, table)

    def _known_table(self, what: str) -> SiteTable:
        if self.table is None:
            raise NeuronError(
                f"{what} needs the model's matrices, and this set has no site table; load it with "
                "table=model.table"
            )
        return self.table


def extra_of(controls: Iterable[NeuronSet]) -> float:
    """The largest `extra_variance` of some random controls; 1 without any."""
    return max((control.extra_variance for control in controls), default=1.0)


def header(provenance: Provenance, table: SiteTable | None) -> dict[str, str]:
    """The strings in a file's header: the provenance and, where known, the site table and its fingerprint."""
    metadata = provenance.metadata()
    if table is not None:
        metadata["sites"] = table.to_json()
        metadata["model_fingerprint"] = provenance.model_fingerprint or table.fingerprint
    return metadata


def stored_table(metadata: Mapping[str, str], provenance: Provenance) -> SiteTable | None:
    """The site table of a file header.

    Raises:
        NeuronError: it is damaged, or is not the one the fingerprint is of.
    """
    if "sites" not in metadata:
        return None
    table = SiteTable.from_json(metadata["sites"])
    if provenance.model_fingerprint and table.fingerprint != provenance.model_fingerprint:
        raise NeuronError(
            "the header's site table and fingerprint do not belong together; expected one model's: make "
            "the file again"
        )
    return table


def _check_range(members: Mapping[str, np.ndarray], table: SiteTable) -> None:
    for key, indices in members.items():
        if len(indices) and key not in table:
            raise NeuronError(
                f"{len(indices)} neurons at {key!r}, but this {table.architecture} has no such matrix; "
                "use neurons of this model"
            )
        if len(indices) and indices[-1] >= table[key].size:
            raise NeuronError(
                f"index {indices[-1]} at {key!r} is out of range, expected 0 to {table[key].size - 1}; "
                "use neurons of this model"
            )


def _is_mask(vector: np.ndarray) -> bool:
    """Whether a stored vector says of each neuron whether it is a member."""
    whole = vector.ndim == 1 and len(vector) > 2 and vector.dtype.kind in "iu"
    return whole and bool(np.isin(vector, (0, 1)).all())


def in_numpy(values: Any) -> np.ndarray:
    """A vector of numbers; a tensor of any device and type too: numpy has no bfloat16, and takes no tensor
    with a gradient.
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() and values.element_size() < 4 else values
    return np.asarray(values)


def _indices(key: str, values: Any) -> np.ndarray:
    array = in_numpy(values)
    if array.size == 0:
        return _NOTHING
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise NeuronError(
            f"{key!r} holds {array.dtype} with shape {array.shape}, expected one axis of integer indices"
        )
    if array.min() < 0:
        raise NeuronError(f"index {array.min()} at {key!r} is negative, expected 0 or more")
    if int(array.max()) > np.iinfo(np.int64).max:
        raise NeuronError(f"index {array.max()} at {key!r} is out of range, expected a neuron's number")
    indices = np.unique(array).astype(np.int64)
    indices.setflags(write=False)
    return indices


def _named(neurons: NeuronSet) -> str:
    return (
        " and ".join(neurons.provenance.models)
        or f"an architecture {neurons.provenance.model_fingerprint[:12]}"
    )


def _summary(neurons: NeuronSet) -> dict[str, Any]:
    return {
        "method": neurons.provenance.method,
        "models": list(neurons.provenance.models),
        "n_neurons": len(neurons),
    }


def _candidates(table: SiteTable, config: Mapping[str, Any]) -> int:
    """Neurons that were searched.

    All of them where the provenance, which a file may bring from anywhere, does not fit the table.
    """
    try:
        return table.select(config.get("sites") or None, config.get("layers")).n_neurons
    except (SafetyNeuronsError, TypeError):
        return table.n_neurons


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def line_of(neurons: ByMatrix) -> str:
    """`120 neurons (0.50 % of those searched) in 4 layers: down 120; contrast on base, aligned`."""
    parts = [numbered(len(neurons), "neuron")]
    share = getattr(neurons, "share_of_neurons", None) if neurons.table is not None else None
    if share is not None:
        parts[0] += (
            f" ({100 * share:.2f} % of those searched, "
            f"{100 * getattr(neurons, 'share_of_parameters', 0.0):.3f} % of all parameters)"
        )
    rows = _per_site(neurons)
    if rows:
        layers = len({parse_key(key).layer for key, _ in neurons.items()})
        parts[0] += f" in {numbered(layers, 'layer')}: " + ", ".join(
            f"{site} {number:,}" for site, number, _, _ in rows
        )
    origin = " on ".join(
        text for text in (neurons.provenance.method, ", ".join(neurons.provenance.models)) if text
    )
    return "; ".join([*parts, *([origin] if origin else [])])


def _per_site(neurons: ByMatrix) -> list[tuple[str, int, str, str]]:
    """Site, members, share of the site's neurons, layers, for the sites that have members."""
    rows = []
    for site in SITES:
        counts = {key: len(vector) for key, vector in neurons.items() if parse_key(key).site == site}
        number = sum(counts.values())
        if not number:
            continue
        size = (
            sum(info.size for info in neurons.table.sites if parse_key(info.key).site == site)
            if neurons.table
            else 0
        )
        layers = sorted({parse_key(key).layer for key in counts})
        rows.append((site, number, f"{100 * number / size:.2f} %" if size else "", _spans(layers)))
    return rows


def _spans(layers: list[int]) -> str:
    """`0-3, 7` for 0, 1, 2, 3, 7."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
