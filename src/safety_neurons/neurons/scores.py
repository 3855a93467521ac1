"""Scores: one number per neuron, and the neurons that a rule takes from them."""

import dataclasses
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from safety_neurons.errors import NeuronError, NumericalError, UsageError
from safety_neurons.neurons import files
from safety_neurons.neurons.keys import check_sites, parse_key, parse_layers, sort_keys
from safety_neurons.neurons.provenance import Provenance
from safety_neurons.neurons.selection import Selection, said_of_zeros
from safety_neurons.neurons.sets import HandMadeWarning, NeuronSet, check, header, stored_table
from safety_neurons.neurons.site_table import SiteTable
from safety_neurons.neurons.tables import html_of, line_of

FILE_NAME = "scores.safetensors"


class Scores:
    """One float32 score per neuron of every matrix that was searched; immutable. The largest scores are taken."""

    def __init__(self, values: Mapping[str, Any], table: SiteTable | None = None, provenance: Provenance | None = None) -> None:
        """Rounds the values to float32, so that sets chosen in memory and from the file agree.

        Args:
            values: a vector per key, as long as the matrix has neurons.
            table: the model's matrices.
            provenance: where the scores come from.

        Raises:
            NeuronError: an unknown key, or (with a table) a vector of another length than the matrix.
            NumericalError: NaN or infinity.
        """
        self._values = {key: _vector(key, values[key]) for key in sort_keys(values)}
        self.table = table
        self.provenance = provenance or Provenance("scores", model_fingerprint=table.fingerprint if table else "")
        self.notes: tuple[str, ...] = ()
        if table is not None:
            _check_lengths(self._values, table)

    # Looking inside

    def keys(self) -> list[str]:
        """The scored keys, in order."""
        return list(self._values)

    def items(self) -> list[tuple[str, np.ndarray]]:
        """Pairs of a key and its float32 scores."""
        return list(self._values.items())

    def __getitem__(self, key: str) -> Float32[np.ndarray, " neuron"]:
        parse_key(key)
        if key not in self._values:
            raise NeuronError(f"{key!r} is not scored; the scored keys run from {self.keys()[:1]} to {self.keys()[-1:]}")
        return self._values[key]

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return sum(len(value) for value in self._values.values())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Scores):
            return NotImplemented
        return self.keys() == other.keys() and all(np.array_equal(value, other[key]) for key, value in self.items())

    __hash__ = None  # type: ignore[assignment]  # compared by value, and large: not meant as a dictionary key

    @property
    def n_neurons(self) -> int:
        """Scored neurons."""
        return len(self)

    # Selection

    def top(self, fraction: float | int) -> NeuronSet:
        """The `round(fraction * n)` neurons with the largest scores of all `n` scored ones, matrices taken together.

        Halves round to even; at least one neuron when the fraction is above 0. Ties break by (layer, site, index).
        """
        return self.select(Selection(top=fraction))

    def count(self, k: int) -> NeuronSet:
        """Exactly `k` neurons with the largest scores, matrices taken together. Ties break by (layer, site, index)."""
        return self.select(Selection(count=k))

    def top_per_matrix(self, k: int) -> NeuronSet:
        """The `k` neurons with the largest scores of every matrix; a smaller matrix is taken whole. Ties break by index."""
        return self.select(Selection(top_per_matrix=k))

    def threshold(self, eps: float | int) -> NeuronSet:
        """Every neuron whose score is at least `eps` (compared as float32)."""
        return self.select(Selection(threshold=eps))

    def top_units(self, k: int) -> NeuronSet:
        """The neurons of the `k` highest-scored distinct units: ranks are walked from the top until a further unit would be too many.

        A unit counts once, however many of its neurons are passed on the way. Ties break by (layer, site, index).

        Raises:
            NeuronError: the scores have no table.
            UsageError: there are fewer units than asked for.
        """
        if self.table is None:
            raise NeuronError("units need the model's matrices, and these scores have no site table; load them with table=model.table")
        numbers = self.table.units()
        values = np.concatenate([value for _, value in self.items()])
        units = np.concatenate([numbers[key] for key in self.keys()])
        order = np.argsort(-values.astype(np.float64), kind="stable")
        _, first = np.unique(units[order], return_index=True)
        if not 0 < k <= len(first):
            raise UsageError(f"{k} units asked, but {len(first)} are scored; ask for 1 to {len(first)}")
        ends = np.sort(first)
        stop = len(order) if k == len(first) else ends[k]
        chosen = np.zeros(len(values), bool)
        chosen[order[:stop]] = True
        parts = np.split(chosen, np.cumsum([len(value) for _, value in self.items()])[:-1])
        return self.neurons({key: np.flatnonzero(part) for key, part in zip(self.keys(), parts, strict=True)})

    def select(self, selection: Selection) -> NeuronSet:
        """The neurons that a selection takes from these scores; the set's `notes` say how many of them score exactly 0, if some do.

        Raises:
            UsageError: the selection has an agreement, which needs the scores of every prompt, not their mean.
        """
        if selection.agreement is not None:
            raise UsageError("agreement needs the scores of every prompt and these are means over prompts; give it to the find verb")
        members = {key: np.flatnonzero(mask) for key, mask in selection.choose(self._values).items()}
        found = self.neurons(members, selection)
        found.notes = tuple(said_of_zeros(self._values, members))
        return found

    def neurons(self, members: Mapping[str, Any], selection: Selection | None = None) -> NeuronSet:
        """The given members as a set that carries the provenance of these scores and, where given, the selection."""
        config = dict(self.provenance.config)
        if selection is not None:
            config["selection"] = selection.config()
        config.setdefault("sites", list(check_sites({parse_key(key).site for key in self._values})))
        config.setdefault("layers", sorted({parse_key(key).layer for key in self._values}))
        return NeuronSet(members, self.table, dataclasses.replace(self.provenance, kind="neurons", config=config))

    def restrict(self, sites: Iterable[str] | None = None, layers: range | str | int | Iterable[int] | None = None) -> "Scores":
        """The scores at these sites (of experts too) and layers; `None` keeps all.

        Raises:
            NeuronError: nothing is left.
        """
        wanted = None if sites is None else check_sites(sites)
        n_layers = self.table.n_layers if self.table else max((parse_key(key).layer for key in self._values), default=0) + 1
        numbers = set(parse_layers(layers, n_layers))
        kept = {
            key: value
            for key, value in self.items()
            if parse_key(key).layer in numbers and (wanted is None or parse_key(key).site in wanted)
        }
        if not kept:
            raise NeuronError(f"no score is left at sites {list(wanted or [])} of layers {layers}; choose others")
        config = dict(self.provenance.config) | {
            "sites": list(check_sites({parse_key(key).site for key in kept})),
            "layers": sorted({parse_key(key).layer for key in kept}),
        }
        return Scores(kept, self.table, dataclasses.replace(self.provenance, config=config))

    def rank_correlation(self, other: "Scores") -> float:
        """Spearman's rank correlation over the keys both have, ties given their mean rank; NaN where one side is constant.

        Raises:
            NeuronError: no key in common, or a shared key with different numbers of neurons.
        """
        shared = [key for key in self._values if key in other]
        if not shared:
            raise NeuronError("the two scores have no key in common; expected scores of one architecture over overlapping sites")
        unequal = [key for key in shared if len(self[key]) != len(other[key])]
        if unequal:
            raise NeuronError(f"{unequal[0]!r} has {len(self[unequal[0]])} and {len(other[unequal[0]])} scores; expected one architecture")
        mine = _ranks(np.concatenate([self[key] for key in shared]))
        theirs = _ranks(np.concatenate([other[key] for key in shared]))
        mine, theirs = mine - mine.mean(), theirs - theirs.mean()
        spread = float(np.sqrt((mine @ mine) * (theirs @ theirs)))
        return float(np.clip(mine @ theirs / spread, -1.0, 1.0)) if spread > 0 else float("nan")

    # Files and models

    def check(self, table: SiteTable, models: Iterable[str] = ()) -> list[str]:
        """Whether the scores belong to a model with this table; what should be said about it is returned. Errors as for `NeuronSet`."""
        notes = check(self.provenance, {key: np.arange(len(value)) for key, value in self.items()}, table, models)
        _check_lengths(self._values, table)
        return notes

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file in one step: a float32 vector per key, provenance and site table in the header."""
        files.write(path, self._values, header(self.provenance, self.table))

    @staticmethod
    def load(path: str | os.PathLike[str], table: SiteTable | None = None, models: Iterable[str] = ()) -> "Scores":
        """The scores in a file (a folder means its `scores.safetensors`); arguments and errors as for `NeuronSet.load`."""
        arrays, metadata = files.read(path, FILE_NAME)
        provenance = Provenance.from_metadata(metadata, "scores")
        loaded = Scores(arrays, stored_table(metadata, provenance), provenance)
        if table is None:
            return loaded
        notes = loaded.check(table, models)
        placed = Scores(loaded._values, table, provenance)
        placed.notes = tuple(notes)
        if not provenance.model_fingerprint:
            warnings.warn(placed.notes[0], HandMadeWarning, stacklevel=2)
        return placed

    def __repr__(self) -> str:
        return f"Scores({line_of(self)})"

    def _repr_html_(self) -> str:
        return html_of(self)


def _vector(key: str, values: Any) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "fiu":
        raise NeuronError(f"{key!r} holds {array.dtype} with shape {array.shape}, expected one axis of scores")
    with np.errstate(over="ignore"):
        vector = array.astype(np.float32)
    bad = int((~np.isfinite(vector)).sum())
    if bad:
        raise NumericalError(
            f"{bad} of {vector.size} scores of {key!r} are NaN or infinite, expected numbers; check the model's weights and dtype"
        )
    vector.setflags(write=False)
    return vector


def _check_lengths(values: Mapping[str, np.ndarray], table: SiteTable) -> None:
    for key, value in values.items():
        if len(value) != table[key].size:
            raise NeuronError(f"{len(value)} scores for {key!r}, expected {table[key].size}, one per neuron; use scores of this model")


def _ranks(values: Float[np.ndarray, " neuron"]) -> Float[np.ndarray, " neuron"]:
    _, place, number = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(number)
    return (last - (number - 1) / 2)[place]
