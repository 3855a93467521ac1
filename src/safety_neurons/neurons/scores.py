"""Scores: one number per neuron; the selection of neurons from them, at once or by agreement over prompts."""

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32

from safety_neurons.arguments import well_typed
from safety_neurons.errors import NeuronError, NumericalError, UsageError
from safety_neurons.neurons.sets import ByMatrix, NeuronSet, in_numpy
from safety_neurons.neurons.table import Provenance, SiteTable, check_sites, keys_within, parse_key, sort_keys

RARE = 0.1
"""Share of the prompts below which a matrix's agreement is said to rest on few of them."""


def number_of(fraction: float | int, n: int) -> int:
    """How many of `n` neurons a fraction means: `round(fraction * n)` (halves to even), at least 1 when the
    fraction is above 0.
    """
    return max(round(fraction * n), 1 if fraction > 0 and n > 0 else 0)


def largest(values: Float[np.ndarray, " neuron"], count: int) -> Bool[np.ndarray, " neuron"]:
    """A mask of exactly `count` largest entries; among equal ones those that come first."""
    if count >= len(values):
        return np.ones(len(values), bool)
    if count <= 0:
        return np.zeros(len(values), bool)
    cut = np.partition(values, len(values) - count)[len(values) - count]
    chosen = values > cut
    chosen[np.flatnonzero(values == cut)[: count - int(chosen.sum())]] = True
    return chosen


@well_typed
@dataclass(frozen=True)
class Selection:
    """Which neurons are taken; exactly one of the first four is given.

    Scores are rounded to float32 before they are ranked, so that a set chosen in memory and one chosen from
    the file are the same. Equal scores are taken in the order (layer, site, index).
    """

    top: float | int | None = None
    """Share of all scored neurons, largest scores first, over all matrices together: `round(top * n)`, at
    least 1 when above 0.
    """
    count: int | None = None
    """Number of neurons, largest scores first, over all matrices together."""
    top_per_matrix: int | None = None
    """Number of neurons of each matrix, largest scores first; a smaller matrix is taken whole."""
    threshold: float | int | None = None
    """Every neuron whose score is at least this."""
    agreement: float | int | None = None
    """When given, the rule acts on every prompt, and neurons chosen in at least this share of the prompts are
    kept (1.0: in all).

    A neuron's share is taken of the prompts of which its matrix read a token: of an expert, those that were
    routed to it.
    """

    def __post_init__(self) -> None:
        given = [
            f"--{name.replace('_', '-')}"
            for name in ("top", "count", "top_per_matrix", "threshold")
            if getattr(self, name) is not None
        ]
        if len(given) != 1:
            raise UsageError(
                f"selection by {' and '.join(given) or 'nothing'}; expected exactly one of --top, --count, "
                "--top-per-matrix, --threshold"
            )
        if self.top is not None and not 0 <= self.top <= 1:
            raise UsageError(
                f"--top {self.top} is not a share; expected a number from 0 to 1 (0.05 for five per cent)"
            )
        for name in ("count", "top_per_matrix"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UsageError(
                    f"--{name.replace('_', '-')} {value} is negative; expected a number of neurons"
                )
        if self.threshold is not None and math.isnan(self.threshold):
            raise UsageError("--threshold is not a number; expected a score")
        if self.agreement is not None and not 0 < self.agreement <= 1:
            raise UsageError(
                f"--agreement {self.agreement} is not a share of the prompts; expected above 0 and at most 1"
            )

    @staticmethod
    def of(
        *,
        top: float | int | None = None,
        count: int | None = None,
        top_per_matrix: int | None = None,
        threshold: float | int | None = None,
        agreement: float | int | None = None,
        default_top: float | int,
    ) -> "Selection":
        """The selection from a verb's options; `default_top` stands in when none of the four is given."""
        if top is None and count is None and top_per_matrix is None and threshold is None:
            top = default_top
        return Selection(top, count, top_per_matrix, threshold, agreement)

    def config(self) -> dict[str, Any]:
        """The options that are given, as JSON values."""
        return {
            entry.name: getattr(self, entry.name)
            for entry in fields(self)
            if getattr(self, entry.name) is not None
        }

    @well_typed
    def choose(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A bool vector per key that says which neurons the rule takes from these scores (agreement plays no
        part here).

        Raises:
            NumericalError: a score is NaN.
            UsageError: more neurons are asked than there are.
        """
        rounded = {key: _rounded(key, values[key]) for key in sort_keys(values)}
        if self.threshold is not None:
            eps = np.float32(self.threshold)
            return {key: value >= eps for key, value in rounded.items()}
        if self.top_per_matrix is not None:
            return {key: largest(value, self.top_per_matrix) for key, value in rounded.items()}
        everything = np.concatenate(list(rounded.values())) if rounded else np.zeros(0, np.float32)
        wanted = number_of(self.top, len(everything)) if self.top is not None else int(self.count or 0)
        if wanted > len(everything):
            raise UsageError(
                f"{wanted} neurons asked, but {len(everything)} are scored; ask for fewer or search more "
                "sites"
            )
        chosen = largest(everything, wanted)
        ends = np.cumsum([len(value) for value in rounded.values()])
        return dict(zip(rounded, np.split(chosen, ends[:-1]), strict=True)) if rounded else {}


def said_of_zeros(values: Mapping[str, np.ndarray], members: Mapping[str, np.ndarray]) -> list[str]:
    """A line that says how many chosen neurons have a score of exactly 0, where some have: nothing but their
    place chose them.

    Args:
        values: scores by key.
        members: the chosen indices by key.
    """
    zeros = {
        key: int((np.asarray(values[key], np.float32)[indices] == 0).sum())
        for key, indices in members.items()
        if key in values
    }
    idle_members = sum(zeros.values())
    if not idle_members:
        return []
    idle = sum(count for key, count in zeros.items() if not np.asarray(values[key], np.float32).any())
    where = f", {idle} of them in matrices that no token reached" if idle else ""
    total = sum(len(indices) for indices in members.values())
    return [
        (
            f"{idle_members} of the {total} chosen neurons have a score of exactly 0{where}: ask for "
            "fewer, or search other sites"
        )
    ]


def _rounded(key: str, values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        rounded = np.asarray(values).astype(np.float32)
    missing = int(np.isnan(rounded).sum())
    if missing:
        raise NumericalError(
            f"{missing} of {rounded.size} scores of {key!r} are NaN, expected numbers; check the model's "
            "weights and dtype"
        )
    return rounded


class Votes:
    """Agreement over prompts in a stream: in how many prompts each neuron was chosen.

    Memory does not grow with prompts.

    A prompt says something of a matrix only where the matrix read one of its tokens, which is not so of every
    routed expert; so each matrix has its own number of prompts, and a neuron's agreement is its share of
    those.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        """Starts with no prompts.

        Args:
            sizes: neurons of every key that will be voted on.
        """
        self._counts = {key: np.zeros(sizes[key], np.int64) for key in sort_keys(sizes)}
        self._seen = dict.fromkeys(self._counts, 0)
        self._routed = {key for key in self._counts if parse_key(key).expert is not None}
        self._prompts = 0

    @property
    def n_prompts(self) -> int:
        """Prompts counted so far."""
        return self._prompts

    def cast(self, selection: Selection, scores: Mapping[str, np.ndarray]) -> None:
        """One prompt votes for the neurons that a selection takes from its scores.

        The rule is applied to all announced keys, whatever was routed where, so that a share or number means
        the same in every prompt. Neurons whose score is exactly 0 get no vote but by a threshold; an expert
        whose scores are all 0 saw no token of this prompt.

        Args:
            selection: the rule.
            scores: of the prompt by key; a key that is left out is as one whose scores are all 0.
        """
        whole = {
            key: np.asarray(scores.get(key, np.zeros(len(counts)))) for key, counts in self._counts.items()
        }
        chosen = selection.choose(whole)
        positive = {key: np.asarray(value, np.float32) != 0 for key, value in whole.items()}
        reached = [key for key in chosen if key not in self._routed or positive[key].any()]
        self.add(
            {
                key: chosen[key] if selection.threshold is not None else chosen[key] & positive[key]
                for key in reached
            }
        )

    def add(self, chosen: Mapping[str, np.ndarray]) -> None:
        """Counts one prompt; a key that is left out read no token of it, so that the prompt says nothing of
        its neurons.

        Raises:
            NeuronError: a key that was not announced, or a mask of another length.
        """
        for key, mask in chosen.items():
            if key not in self._counts or mask.shape != self._counts[key].shape:
                raise NeuronError(
                    f"a vote for {key!r} with shape {mask.shape}; expected one bool per neuron of an "
                    "announced key"
                )
        for key, mask in chosen.items():
            self._counts[key] += mask.astype(bool)
            self._seen[key] += 1
        self._prompts += 1

    def members(self, share: float | int) -> dict[str, np.ndarray]:
        """The indices (sorted int64) chosen in at least `share` of the prompts that their key saw, for the
        keys that have any.

        Raises:
            NeuronError: no prompt was counted.
        """
        if self._prompts == 0:
            raise NeuronError(
                "no prompt was counted, so there is no agreement; give at least one usable prompt"
            )
        needed = {key: max(math.ceil(share * seen - 1e-9), 1) for key, seen in self._seen.items()}
        members = {
            key: np.flatnonzero(counts >= needed[key]).astype(np.int64)
            for key, counts in self._counts.items()
        }
        return {key: indices for key, indices in members.items() if len(indices)}

    def said_of(self, keys: Collection[str]) -> list[str]:
        """A line for agreements of few prompts: experts to which less than a tenth of the prompts sent a
        token.
        """
        rare = {key: seen for key in keys if (seen := self._seen[key]) < RARE * self._prompts}
        if not rare:
            return []
        least = min(rare, key=lambda key: rare[key])
        return [
            f"{len(rare)} of the {len(keys)} matrices with chosen neurons read a token of less than "
            f"{RARE:.0%} of the {self._prompts} prompts, and agree over those alone (fewest: {least}, "
            f"{rare[least]})"
        ]

    def agreement_for_one(self) -> float:
        """The largest agreement that would keep at least one neuron (0.0 before the first vote)."""
        return max(
            (int(counts.max(initial=0)) / max(self._seen[key], 1) for key, counts in self._counts.items()),
            default=0.0,
        )

    def state(self) -> dict[str, np.ndarray]:
        """Everything needed to go on later, as arrays for a checkpoint."""
        return {
            "votes.prompts": np.array([self._prompts], np.int64),
            "votes.seen": np.array(list(self._seen.values()), np.int64),
            **{f"votes.{key}": counts.copy() for key, counts in self._counts.items()},
        }

    def merge(self, state: Mapping[str, np.ndarray]) -> None:
        """Counts also what other prompts have voted, as `state` returned it.

        Raises:
            NeuronError: the state is of other keys or sizes.
        """
        other = Votes({key: len(counts) for key, counts in self._counts.items()})
        other.restore(state)
        self._prompts += other._prompts
        for key, counts in other._counts.items():
            self._counts[key] += counts
            self._seen[key] += other._seen[key]

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Goes on from what `state` returned; other entries of the mapping are ignored.

        Raises:
            NeuronError: the state is of other keys or sizes.
        """
        for key, counts in self._counts.items():
            stored = state.get(f"votes.{key}")
            if (
                stored is None
                or stored.shape != counts.shape
                or "votes.prompts" not in state
                or "votes.seen" not in state
            ):
                raise NeuronError(
                    f"the stored votes do not fit {key!r} with {len(counts)} neurons; expected the state "
                    "of the same run: start anew"
                )
        self._prompts = int(state["votes.prompts"][0])
        self._seen = dict(zip(self._counts, state["votes.seen"].tolist(), strict=True))
        self._counts = {key: state[f"votes.{key}"].astype(np.int64) for key in self._counts}


class Scores(ByMatrix):
    """One float32 score per neuron of every matrix that was searched; immutable.

    The largest scores are taken.
    """

    KIND = "scores"

    @well_typed
    def __init__(
        self, values: Mapping[str, Any], table: SiteTable | None = None, provenance: Provenance | None = None
    ) -> None:
        """Rounds the values to float32, so that sets chosen in memory and from the file agree.

        Args:
            values: a vector per key, as long as the matrix has neurons.
            table: the model's matrices.
            provenance: where the scores come from.

        Raises:
            NeuronError: an unknown key, or (with a table) a vector of another length than the matrix.
            NumericalError: NaN or infinity.
        """
        vectors = {key: _vector(key, values[key]) for key in sort_keys(values.keys())}
        super().__init__(vectors, table, provenance)
        if table is not None:
            self._fit(table)

    # Looking inside

    def __getitem__(self, key: str) -> Float32[np.ndarray, " neuron"]:
        parse_key(key)
        if key not in self._vectors:
            raise NeuronError(
                f"{key!r} is not scored; the scored keys run from {self.keys()[:1]} to {self.keys()[-1:]}"
            )
        return self._vectors[key]

    def __contains__(self, key: object) -> bool:
        return key in self._vectors

    def __iter__(self) -> Iterator[str]:
        return iter(self._vectors)

    # Selection

    @well_typed
    def top(self, fraction: float | int) -> NeuronSet:
        """The `round(fraction * n)` neurons with the largest scores of all `n` scored ones, matrices taken
        together.

        Halves round to even; at least one neuron when the fraction is above 0. Ties break by (layer, site,
        index).
        """
        return self.select(Selection(top=fraction))

    @well_typed
    def count(self, k: int) -> NeuronSet:
        """Exactly `k` neurons with the largest scores, matrices taken together.

        Ties break by (layer, site, index).
        """
        return self.select(Selection(count=k))

    @well_typed
    def top_per_matrix(self, k: int) -> NeuronSet:
        """The `k` neurons with the largest scores of every matrix; a smaller matrix is taken whole.

        Ties break by index.
        """
        return self.select(Selection(top_per_matrix=k))

    @well_typed
    def threshold(self, eps: float | int) -> NeuronSet:
        """Every neuron whose score is at least `eps` (compared as float32)."""
        return self.select(Selection(threshold=eps))

    @well_typed
    def top_units(self, k: int) -> NeuronSet:
        """The neurons of the `k` highest-scored distinct units: ranks are walked from the top until a further
        unit would be too many.

        A unit counts once, however many of its neurons are passed on the way. Ties break by (layer, site,
        index).

        Raises:
            NeuronError: the scores have no table.
            UsageError: there are fewer units than asked for.
        """
        if self.table is None:
            raise NeuronError(
                "units need the model's matrices, and these scores have no site table; load them with "
                "table=model.table"
            )
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

    @well_typed
    def select(self, selection: Selection) -> NeuronSet:
        """The neurons that a selection takes from these scores.

        The set's `notes` say how many of them score exactly 0, if some do.

        Raises:
            UsageError: the selection has an agreement, which needs the scores of every prompt, not their
            mean.
        """
        if selection.agreement is not None:
            raise UsageError(
                "agreement needs the scores of every prompt and these are means over prompts; give it to "
                "the find verb"
            )
        members = {key: np.flatnonzero(mask) for key, mask in selection.choose(self._vectors).items()}
        chosen = self.neurons(members, selection)
        chosen.notes = tuple(said_of_zeros(self._vectors, members))
        return chosen

    @well_typed
    def neurons(self, members: Mapping[str, Any], selection: Selection | None = None) -> NeuronSet:
        """The given members as a set that carries the provenance of these scores and, where given, the
        selection.
        """
        config = dict(self.provenance.config)
        if selection is not None:
            config["selection"] = selection.config()
        config.setdefault("sites", list(check_sites({parse_key(key).site for key in self._vectors})))
        config.setdefault("layers", sorted({parse_key(key).layer for key in self._vectors}))
        return NeuronSet(
            members, self.table, dataclasses.replace(self.provenance, kind="neurons", config=config)
        )

    @well_typed
    def restrict(
        self, sites: Iterable[str] | None = None, layers: range | str | int | Iterable[int] | None = None
    ) -> "Scores":
        """The scores at these sites (of experts too) and layers; `None` keeps all.

        Raises:
            NeuronError: nothing is left.
        """
        names = keys_within(self._vectors, sites, layers, self.table.n_layers if self.table else None)
        if not names:
            raise NeuronError(
                f"no score is left at sites {list(check_sites(sites or []))} of layers {layers}; choose "
                "others"
            )
        values = {key: self[key] for key in names}
        config = dict(self.provenance.config) | {
            "sites": list(check_sites({parse_key(key).site for key in values})),
            "layers": sorted({parse_key(key).layer for key in values}),
        }
        return Scores(values, self.table, dataclasses.replace(self.provenance, config=config))

    @well_typed
    def rank_correlation(self, other: "Scores") -> float:
        """Spearman's rank correlation over the keys both have, ties given their mean rank.

        NaN where one side is constant.

        Raises:
            NeuronError: no key in common, or a shared key with different numbers of neurons.
        """
        shared = [key for key in self._vectors if key in other]
        if not shared:
            raise NeuronError(
                "the two scores have no key in common; expected scores of one architecture over "
                "overlapping sites"
            )
        unequal = [key for key in shared if len(self[key]) != len(other[key])]
        if unequal:
            raise NeuronError(
                f"{unequal[0]!r} has {len(self[unequal[0]])} and {len(other[unequal[0]])} scores; "
                "expected one architecture"
            )
        from scipy.stats import (
            spearmanr,
        )  # Here, since it takes longer to import than all else that sets and scores need.

        mine, theirs = (np.concatenate([each[key] for key in shared]) for each in (self, other))
        if not np.ptp(mine) or not np.ptp(theirs):
            return float("nan")
        return float(spearmanr(mine, theirs).statistic)

    def _fit(self, table: SiteTable) -> None:
        for key, value in self.items():
            if key not in table:
                raise NeuronError(
                    f"{len(value)} neurons at {key!r}, but this {table.architecture} has no such matrix; "
                    "use neurons of this model"
                )
            if len(value) != table[key].size:
                raise NeuronError(
                    f"{len(value)} scores for {key!r}, expected {table[key].size}, one per neuron; use "
                    "scores of this model"
                )


def _vector(key: str, values: Any) -> np.ndarray:
    array = in_numpy(values)
    if array.ndim != 1 or array.dtype.kind not in "fiu":
        raise NeuronError(
            f"{key!r} holds {array.dtype} with shape {array.shape}, expected one axis of scores"
        )
    with np.errstate(over="ignore"):
        vector = array.astype(np.float32)
    bad = int((~np.isfinite(vector)).sum())
    if bad:
        raise NumericalError(
            f"{bad} of {vector.size} scores of {key!r} are NaN or infinite, expected numbers; check the "
            "model's weights and dtype"
        )
    vector.setflags(write=False)
    return vector


def kept_share(
    safety: np.ndarray, utility: np.ndarray | None, size: int, safety_share: float, utility_share: float
) -> np.ndarray:
    """Of each neuron, the share of weights among the largest of the matrix on safety and not among the
    largest on utility.

    Args:
        safety: one importance per weight, neuron after neuron.
        utility: the same on the other text; None where there is none.
        size: neurons of the matrix.
        safety_share: share of the matrix's weights that counts as important for safety, at least one weight.
        utility_share: the same for utility.

    Returns:
        One number from 0 to 1 per neuron.

    Source: the set difference of Wei et al. (ICML 2024, arXiv 2402.05162), section 3.3.
    Differs: they take single weights away; this counts them per row or column.
    """
    important = _largest(safety, safety_share)
    if utility is not None:
        important &= ~_largest(utility, utility_share)
    share: np.ndarray = important.reshape(size, -1).mean(1)
    return share


def _largest(values: np.ndarray, share: float) -> np.ndarray:
    """Which of the numbers are the largest; of those that are the smallest none, unless all of them are."""
    order = np.argsort(-values.ravel(), kind="stable")
    count = max(1, round(share * values.size))
    chosen = np.zeros(values.size, bool)
    chosen[order[:count]] = True
    least = values.ravel()[order[-1]]
    if count < values.size and values.ravel()[order[count - 1]] == least:
        chosen &= values.ravel() > least  # As of weights without a gradient: which of them would be chance.
    return chosen
