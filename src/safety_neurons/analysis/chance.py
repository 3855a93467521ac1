"""Sets under names, and what chance gives: how many marked neurons a random draw holds, exactly, beside the
number that was measured.

Neurons of one unit may be chosen together, in clumps. Where a method gives `gate`, `up` and `down` of a unit
one score, a set takes them together: three neurons are then one choice, and numbers of neurons vary between
unrelated sets as much as three times a number of units does. Where it scores them apart, they are three
choices. Which of the two a set is made of is read off the set: the share of its members that lie in whole
units.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Float, Int

from safety_neurons.arguments import well_typed
from safety_neurons.errors import ForeignModelError, InputError, NeuronError, UsageError
from safety_neurons.neurons import NeuronSet, Scores, Selection, SiteInfo, SiteTable, parse_key
from safety_neurons.results.records import ChanceRecord
from safety_neurons.strict_json import JsonObject

NEURONS, SCORES = "neurons.safetensors", "scores.safetensors"


@dataclasses.dataclass(frozen=True)
class Named:
    """A neuron set with a name, and the scores it was taken from where they are known."""

    name: str
    neurons: NeuronSet
    scores: Scores | None = None
    source: str = ""

    @property
    def table(self) -> SiteTable:
        """The matrices of the model.

        Raises:
            NeuronError: the set does not know them.
        """
        if self.neurons.table is None:
            raise NeuronError(
                f"the set {self.name!r} has no site table; expected a file that a find run wrote, or one "
                "beside such a file"
            )
        return self.neurons.table

    @functools.cached_property
    def searched(self) -> SiteTable:
        """The matrices the set could have been taken from: what was scored, what the provenance names, or all
        of them.
        """
        if self.scores is not None:
            keys = set(self.scores.keys())
            return SiteTable(
                self.table.architecture,
                self.table.n_parameters,
                tuple(info for info in self.table.sites if info.key in keys),
            )
        config = self.neurons.provenance.config
        try:
            found = self.table.select(config.get("sites") or None, config.get("layers"))
        except (InputError, NeuronError, TypeError):
            return self.table
        return found if all(key in found for key in self.neurons.keys()) else self.table  # noqa: SIM118 - not a mapping

    @property
    def method(self) -> str:
        """The detector, as the provenance says."""
        return self.neurons.provenance.method

    def record(self) -> JsonObject:
        """The set in a few words, as JSON values."""
        return {
            "name": self.name,
            "method": self.method,
            "models": list(self.neurons.provenance.models),
            "source": self.source,
            "n_neurons": len(self.neurons),
            "n_units": self.neurons.n_units,
            "n_candidates": self.searched.n_neurons,
            "share_of_neurons": len(self.neurons) / self.searched.n_neurons,
            "share_of_parameters": self.neurons.share_of_parameters,
            "has_scores": self.scores is not None,
        }


@well_typed
def read_named(
    specs: Sequence[str], *, top: float | None = None, count: int | None = None, together: bool = True
) -> list[Named]:
    """Sets and scores from files.

    Args:
        specs: `[NAME=]PATH` each: a neuron file, a score file, or the folder of a find run (both). Without a
            name it is the name of the folder or file, or the whole path where two share that.
        top: take this fraction of every list of scores, whatever set lies beside it.
        count: take this many of every list of scores.
        together: whether they are to be held against one another, and so have to be of one architecture.

    Raises:
        UsageError: nothing given, two of one name, both `top` and `count`, or scores without a set and
        neither of the two. NeuronError: a file that is missing or damaged. ForeignModelError: sets of
        different architectures.
    """
    if top is not None and count is not None:
        raise UsageError("top and count given together; expected one of them")
    if not specs:
        raise UsageError("no neuron set was given; expected at least one file or find run")
    items = [_read(spec, top, count) for spec in specs]
    return same_table(_with_names(items)) if together else _apart(_with_names(items))


@well_typed
def name_sets(sets: Iterable[tuple[str, NeuronSet]]) -> list[Named]:
    """Sets in memory with names; errors as for `read_named`."""
    return same_table([Named(name, neurons) for name, neurons in sets])


def same_table(items: Sequence[Named]) -> list[Named]:
    """The items, those without a site table on the table of the others.

    Raises:
        ForeignModelError: sets of different architectures. NeuronError: none knows its table, or an index
        that does not fit. UsageError: two items of one name.
    """
    _check_names(items)
    table = next((item.neurons.table for item in items if item.neurons.table is not None), None)
    if table is None:
        raise NeuronError(
            "no set knows its model's matrices; expected at least one file that a find run wrote"
        )
    for item in items:
        if item.neurons.table is not None and item.neurons.table.fingerprint != table.fingerprint:
            raise ForeignModelError(
                f"{item.name!r} belongs to {item.neurons.table.architecture} of other sizes than "
                f"{items[0].name!r}; expected sets of one architecture"
            )
    return [
        item if item.neurons.table is not None else dataclasses.replace(item, neurons=item.neurons.on(table))
        for item in items
    ]


def _apart(items: Sequence[Named]) -> list[Named]:
    """The items, each of whatever architecture.

    One without a site table is on that of the others, as in `same_table`.
    """
    _check_names(items)
    return list(items) if all(item.neurons.table is not None for item in items) else same_table(items)


def _check_names(items: Sequence[Named]) -> None:
    names = [item.name for item in items]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two sets are called {twice!r}; name them apart: NAME=PATH")


def _read(spec: str, top: float | None, count: int | None) -> tuple[str, Named]:
    name, path = _split(spec)
    source = pathlib.Path(path)
    if not source.exists():
        raise NeuronError(
            f"no file or folder {path!r}; expected a neuron file, a score file or the folder of a find run"
        )
    scores = _scores(source)
    wanted = Selection(top=top, count=count) if (top is not None or count is not None) else None
    if wanted is not None and scores is not None:
        neurons = scores.select(wanted)
    elif _has_set(source):
        neurons = NeuronSet.load(source)
    else:
        raise UsageError(f"{path!r} holds scores and no set; say how many neurons to take: --top or --count")
    return name, Named(
        name, neurons, scores if scores is not None and scores.table is not None else None, path
    )


def _split(spec: str) -> tuple[str, str]:
    """`NAME=PATH`, or a path alone; a path that exists is one even where it holds an equals sign."""
    name, sign, path = spec.partition("=")
    return ("", spec) if not sign or pathlib.Path(spec).exists() else (name.strip(), path)


def _scores(source: pathlib.Path) -> Scores | None:
    file = source / SCORES if source.is_dir() else source
    if not file.is_file():
        return None
    try:
        return Scores.load(file)
    except NeuronError:
        if source.is_dir():
            raise
        return None


def _has_set(source: pathlib.Path) -> bool:
    if source.is_dir():
        return (source / NEURONS).is_file() or not (source / SCORES).is_file()
    try:
        NeuronSet.load(source)
    except NeuronError:
        try:
            Scores.load(source)
        except NeuronError:
            return True  # Neither can be read: loading it as a set says what is wrong.
        return False
    return True


def _with_names(items: Sequence[tuple[str, Named]]) -> list[Named]:
    named = [
        dataclasses.replace(item, name=given or _called(pathlib.Path(item.source))) for given, item in items
    ]
    names = [item.name for item in named]
    return [
        item if given or names.count(item.name) == 1 else dataclasses.replace(item, name=item.source)
        for (given, _), item in zip(items, named, strict=True)
    ]


def _called(path: pathlib.Path) -> str:
    """The name of a run's folder, also where a file inside it was named."""
    return (
        path.absolute().parent.name
        if path.name in (NEURONS, SCORES)
        else path.name
        if path.is_dir()
        else path.stem
    )


Kind = tuple[str, ...]
_MadeOf = tuple[int, dict[str, int]]
"""Whole units of a set in a group, and by key its members beside them."""
_TAIL = 1e-16
_FIXED = 1e-3
"""Clumps smaller than this hold a number fixed."""


@dataclass(frozen=True)
class Expectation:
    """What chance gives for a number: its mean and the range that holds 95 % of random draws."""

    expected: float
    low: float
    """2.5 % point of random draws."""
    high: float
    """97.5 % point of random draws."""

    def verdict(self, value: float | int) -> str:
        """`more` above the range, `fewer` below it, `as chance` inside."""
        return "more" if value > self.high else "fewer" if value < self.low else "as chance"

    def record(self) -> dict[str, float]:
        """`{expected, low, high}`."""
        return asdict(self)


@dataclass(frozen=True)
class Counts:
    """The distribution of a whole number: probabilities of `start`, `start + 1` and so on."""

    start: int
    weights: Float[np.ndarray, " count"]
    least: float = 0.0
    """The smallest probability that can be told: 0 where the distribution is exact."""

    @property
    def values(self) -> np.ndarray:
        """The numbers that have a probability here."""
        return self.start + np.arange(len(self.weights))

    @property
    def mean(self) -> float:
        """Expected value."""
        return float(self.values @ self.weights)

    def at_least(self, count: int) -> float:
        """Probability of `count` or more."""
        return float(min(1.0, max(self.least, self.weights[max(0, count - self.start) :].sum())))

    def expectation(
        self, function: Callable[[np.ndarray], np.ndarray] = lambda counts: counts
    ) -> Expectation:
        """Mean and 95 % range of a function of the number that never falls where the number rises."""
        cumulative = np.cumsum(self.weights)
        low, high = (int(np.searchsorted(cumulative, share - 1e-12)) for share in (0.025, 0.975))
        found = np.asarray(function(self.values.astype(np.float64)), np.float64)
        last = len(found) - 1
        return Expectation(
            float(found @ self.weights), float(found[min(low, last)]), float(found[min(high, last)])
        )


@functools.lru_cache(maxsize=4096)
def hypergeometric(population: int, marked: int, drawn: int) -> Counts:
    """How many of `marked` among `population` a draw of `drawn` without replacement holds.

    Probabilities come from their ratios, so that a population of millions costs as much as its likely counts
    and loses no digits.

    Raises:
        UsageError: more marked or drawn than there are.
    """
    if not (0 <= marked <= population and 0 <= drawn <= population):
        raise UsageError(
            f"{marked} marked and {drawn} drawn of {population}; expected at most as many as there are"
        )
    first, last = max(0, marked + drawn - population), min(marked, drawn)
    count = np.arange(first, last, dtype=np.float64)
    with np.errstate(divide="ignore"):
        steps = np.log((marked - count) * (drawn - count)) - np.log(
            (count + 1) * (population - marked - drawn + count + 1)
        )
    logarithms = np.concatenate([[0.0], np.cumsum(steps)])
    weights = np.exp(logarithms - logarithms.max())
    return _trimmed(first, weights / weights.sum())


def clumped(mean: float, first: float, second: float, step: float = 1.0) -> Counts:
    """How many candidates two unrelated choices share where what is chosen comes in clumps: hypergeometric in
    clumps.

    Args:
        mean: expected number, in neurons.
        first: share of the candidates that the one choice has.
        second: share of the candidates that the other has.
        step: neurons of a clump; below 1 where clumps hold the number nearly fixed.
    """
    if mean <= 0 or step < _FIXED:
        return _on_numbers(np.array([mean]), np.ones(1))
    population = max(1, round(mean / (step * first * second)))
    marked, drawn = (min(population, max(1, round(share * population))) for share in (first, second))
    clumps = hypergeometric(population, marked, drawn)
    return _on_numbers(clumps.values * (mean / clumps.mean), clumps.weights)


def _on_numbers(values: np.ndarray, weights: np.ndarray) -> Counts:
    """A distribution on whole numbers with the mean of one on others: what lies between two goes to both."""
    below = np.floor(values + 1e-9).astype(np.int64)
    rest = np.clip(values - below, 0.0, 1.0)
    found = np.zeros(int(below[-1]) - int(below[0]) + 2)
    np.add.at(found, below - below[0], weights * (1 - rest))
    np.add.at(found, below - below[0] + 1, weights * rest)
    return _trimmed(int(below[0]), found)


def simulated_counts(draws: Float[np.ndarray, " draw"]) -> Counts:
    """The distribution of simulated whole numbers.

    What never came is not impossible, so a tail is never less likely than one draw.
    """
    whole = draws.astype(np.int64)
    return Counts(int(whole.min()), np.bincount(whole - whole.min()) / len(whole), 1 / (1 + len(whole)))


def total(parts: Iterable[Counts]) -> Counts:
    """The distribution of a sum of independent counts; 0 for sure where there is none."""
    whole = Counts(0, np.ones(1))
    for part in parts:
        whole = _trimmed(whole.start + part.start, np.convolve(whole.weights, part.weights))
    return whole


def _trimmed(start: int, weights: np.ndarray) -> Counts:
    """Without the ends that have no weight to speak of."""
    kept = np.flatnonzero(weights > _TAIL * weights.max())
    part = weights[kept[0] : kept[-1] + 1]
    return Counts(start + int(kept[0]), part / part.sum())


def mean_of_draw(
    values: Float[np.ndarray, " candidate"], counts: Float[np.ndarray, " candidate"], drawn: int | float
) -> Expectation:
    """Mean of a value over `drawn` of the candidates without replacement, with its 95 % range (normal).

    Args:
        values: a value per kind of candidate.
        counts: candidates of each kind.
        drawn: how many are drawn, at least one.
    """
    population = float(counts.sum())
    mean = float(values @ counts / population)
    variance = float((values - mean) ** 2 @ counts / population) / drawn
    variance *= (population - drawn) / (population - 1) if population > 1 else 0.0
    half = 1.959963984540054 * math.sqrt(max(variance, 0.0))
    return Expectation(mean, mean - half, mean + half)


def of_draws(draws: Float[np.ndarray, " draw"]) -> Expectation:
    """Mean and 95 % range of simulated values."""
    low, high = np.quantile(draws, (0.025, 0.975), method="inverted_cdf")
    return Expectation(float(draws.mean()), float(low), float(high))


def beside(value: float | int, chance: Expectation) -> ChanceRecord:
    """A value as JSON beside what chance gives: `{value, expected, low, high, verdict}`."""
    return {
        "value": value,
        "expected": chance.expected,
        "low": chance.low,
        "high": chance.high,
        "verdict": chance.verdict(value),
    }


# Clumps: neurons of one unit that are chosen together, and what that does to what chance gives


@dataclass(frozen=True)
class Group:
    """Units of one layer (or expert) that are made alike."""

    keys: tuple[str, ...]
    """The matrix of each neuron of a unit; a matrix comes as often as a unit has neurons in it."""
    places: Int[np.ndarray, "unit part"]
    """Where each neuron of each unit is in its matrix."""

    @property
    def kind(self) -> Kind:
        """The sites of a unit's neurons."""
        return tuple(parse_key(key).site for key in self.keys)

    @functools.cached_property
    def widths(self) -> dict[str, int]:
        """Neurons that a unit has in each matrix."""
        return {key: self.keys.count(key) for key in dict.fromkeys(self.keys)}

    @property
    def n_units(self) -> int:
        """Units of the group."""
        return len(self.places)

    @property
    def n_neurons(self) -> int:
        """Neurons of the group."""
        return self.places.size

    def held(self, neurons: NeuronSet) -> np.ndarray:
        """Which neurons of each unit are members: a bool per unit and part."""
        masks = {key: neurons.mask(key) for key in set(self.keys)}
        return np.stack([masks[key][self.places[:, part]] for part, key in enumerate(self.keys)], axis=1)


@functools.lru_cache(maxsize=8)
def groups(table: SiteTable) -> tuple[Group, ...]:
    """The units of a table, by the matrices they share.

    Matrices whose units are not made alike are taken one by one.
    """
    found = []
    for block in table.blocks:
        slots = {key: block.slots(key) for key in block.keys}
        alike = all(len(number) and number.min() == number.max() > 0 for number in slots.values())
        for keys in [block.keys] if alike else [(key,) for key in block.keys]:
            parts: list[str] = []
            columns = []
            for key in keys:
                width = int(slots[key][0]) if alike else 1
                order = np.argsort(block.unit_of[key], kind="stable") if alike else np.arange(table[key].size)
                columns.append(order.reshape(-1, width))
                parts += [key] * width
            found.append(Group(tuple(parts), np.concatenate(columns, axis=1)))
    return tuple(found)


class Clumps:
    """How far a set is made of whole units, by kind of unit.

    Args:
        neurons: the set.
        table: the matrices it could have been taken from.
    """

    def __init__(self, neurons: NeuronSet, table: SiteTable) -> None:
        self.neurons, self.table, self.groups = neurons, table, groups(table)
        members: dict[Kind, int] = {}
        in_whole: dict[Kind, int] = {}
        size: dict[Kind, int] = {}
        self.whole: list[int] = []
        """Whole units of the set, by group."""
        for group in self.groups:
            held = group.held(neurons)
            whole = int(held.all(axis=1).sum()) if len(group.keys) > 1 else 0
            self.whole.append(whole)
            size[group.kind] = size.get(group.kind, 0) + group.n_neurons
            members[group.kind] = members.get(group.kind, 0) + int(held.sum())
            in_whole[group.kind] = in_whole.get(group.kind, 0) + whole * len(group.keys)
        told = [kind for kind in size if len(kind) > 1 and members[kind]]
        shares = {kind: _share(in_whole[kind], members[kind], size[kind], len(kind)) for kind in told}
        known = sum(members[kind] for kind in told)
        usual = sum(shares[kind] * members[kind] for kind in told) / known if known else 1.0
        self.shares = {kind: shares.get(kind, usual if len(kind) > 1 else 0.0) for kind in size}
        """By kind the share of the members that were chosen as units.

        For a kind without members that of the others, 1 without any.
        """

    def step(self, place: Iterable[str] | None = None) -> float:
        """How much more the number of members in some matrices varies between random sets than if neurons
        were drawn one by one.

        Args:
            place: keys; without any the factor for a mean over layers.
        """
        everything = self._squares
        size = sum(group.n_neurons for group in self.groups)
        if place is None:
            return everything / max(1, size)
        counts = {key: self.table[key].size for key in place}
        share = sum(counts.values()) / max(1, size)
        if not 0 < share < 1:
            return 1.0
        deviations = share**2 * everything
        for number in {number for key in counts for number in self._groups_of[key]}:
            group = self.groups[number]
            inside = sum(key in counts for key in group.keys)
            together = self.shares[group.kind]
            deviations += group.n_units * together * (inside**2 - 2 * share * inside * len(group.keys))
            deviations += group.n_units * (1 - together) * inside * (1 - 2 * share)
        return _settled(deviations / (size * share * (1 - share)))

    @functools.cached_property
    def _squares(self) -> float:
        parts = [(group, self.shares[group.kind]) for group in self.groups]
        return sum(
            group.n_units * (share * len(group.keys) ** 2 + (1 - share) * len(group.keys))
            for group, share in parts
        )

    @functools.cached_property
    def _groups_of(self) -> Mapping[str, Sequence[int]]:
        found: dict[str, list[int]] = {}
        for number, group in enumerate(self.groups):
            for key in set(group.keys):
                found.setdefault(key, []).append(number)
        return found

    def head_step(self, info: SiteInfo) -> float:
        """The same for the members in one head of a matrix: columns of `o` that one row of `v` feeds lie in
        the heads of one group.
        """
        group = self.groups[self._groups_of[info.key][0]]
        width = group.keys.count(info.key)
        if width < 2 or not info.n_heads:
            return 1.0
        held = group.held(self.neurons)[:, [key == info.key for key in group.keys]]
        together = _share(int(held.all(axis=1).sum()) * width, int(held.sum()), held.size, width)
        n_groups = info.n_heads / width
        return _settled(together * (1 - 1 / n_groups) / (1 - 1 / info.n_heads) + 1 - together)

    def shared_step(self, other: "Clumps") -> float:
        """The same for the number of neurons that two unrelated sets share."""
        size = sum(group.n_neurons for group in self.groups)
        total = 0.0
        for group in self.groups:
            both = self.shares[group.kind] * other.shares[group.kind]
            total += group.n_neurons * (1 + both * (len(group.keys) - 1))
        return _settled(total / max(1, size))

    def touched(self) -> list[float]:
        """By group the share of units that a random set of this size and make-up has members of."""
        rate = len(self.neurons) / max(1, sum(group.n_neurons for group in self.groups))
        return [
            self.shares[group.kind] * rate
            + (1 - self.shares[group.kind]) * (1 - (1 - rate) ** len(group.keys))
            for group in self.groups
        ]


def _share(in_whole: int, members: int, size: int, parts: int) -> float:
    """The share in whole units beyond what members chosen one by one would have."""
    alone = (members / size) ** (parts - 1)
    return max(0.0, (in_whole / members - alone) / (1 - alone)) if alone < 1 else 1.0


def _settled(step: float) -> float:
    return 1.0 if abs(step - 1) < 1e-9 else max(0.0, step)


@dataclass
class _Drawn:
    """Simulated sets in one group: whole units, and by key the members beside them.

    Each a number per draw.
    """

    whole: np.ndarray
    single: dict[str, np.ndarray]

    def total(self, widths: Mapping[str, int]) -> np.ndarray:
        """Members."""
        return sum(
            (width * self.whole + self.single[key] for key, width in widths.items()),
            np.zeros(len(self.whole), np.int64),
        )


def simulated(
    sets: Sequence[NeuronSet], table: SiteTable, seed: int, draws: int, *, shared: bool = True
) -> np.ndarray:
    """Sizes of what unrelated sets have in common, or of what the first alone has, where each keeps its units
    in every layer.

    Args:
        sets: what the simulated sets are made of, matrix by matrix.
        table: the matrices.
        seed: of the draws.
        draws: how many.
        shared: True for members of all sets, False for members of the first and of no other.

    Returns:
        One number of neurons per draw.
    """
    generator = np.random.default_rng(seed)
    sizes = np.zeros(draws)
    clumps = [Clumps(part, table) for part in sets]
    for number, group in enumerate(clumps[0].groups):
        widths = group.widths
        parts = [_made_of(part, number, widths) for part in clumps]
        state = _Drawn(
            np.full(draws, parts[0][0], np.int64),
            {key: np.full(draws, n, np.int64) for key, n in parts[0][1].items()},
        )
        for part in parts[1:]:
            state = _met(state, part, group, generator, shared)
        sizes += state.total(widths)
    return sizes


def _made_of(clumps: Clumps, number: int, widths: Mapping[str, int]) -> _MadeOf:
    whole = clumps.whole[number]
    return whole, {key: len(clumps.neurons[key]) - width * whole for key, width in widths.items()}


def _met(
    state: _Drawn, other_set: _MadeOf, group: Group, generator: np.random.Generator, shared: bool
) -> _Drawn:
    """What is left of simulated sets after another, unrelated one: the members it has too, or those it
    lacks.
    """
    (whole, single), n_units, widths = other_set, group.n_units, group.widths
    both = _draw(generator, state.whole, n_units - state.whole, np.full(len(state.whole), whole))
    mine, other = state.whole - both, whole - both
    on_mine, on_other, on_single = {}, {}, {}
    for key, width in widths.items():
        free = width * (n_units - whole - mine)
        on_mine[key] = _draw(generator, width * mine, free, np.full(len(both), single[key]))
        on_other[key] = _draw(
            generator, width * other, width * (n_units - state.whole - other), state.single[key]
        )
        rest = state.single[key] - on_other[key]
        on_single[key] = _draw(generator, rest, free - rest, single[key] - on_mine[key])
    if shared:
        return _Drawn(both, {key: on_mine[key] + on_other[key] + on_single[key] for key in widths})
    broken = np.minimum(mine, sum(on_mine.values(), np.zeros(len(both), np.int64)))
    left = {
        key: state.single[key] - on_other[key] - on_single[key] + width * broken - on_mine[key]
        for key, width in widths.items()
    }
    return _Drawn(mine - broken, {key: np.maximum(number, 0) for key, number in left.items()})


def _draw(
    generator: np.random.Generator, marked: np.ndarray, others: np.ndarray, drawn: np.ndarray
) -> np.ndarray:
    """Hypergeometric numbers, one per draw."""
    if not (drawn.any() and marked.any()):
        return np.zeros_like(marked)
    others = np.maximum(others, 0)
    return generator.hypergeometric(marked, others, np.minimum(drawn, marked + others))
