"""Compare: all detectors on one pair of models at one budget, beside random sets and, where it is known, the truth.

1. Every method scores the neurons of the same sites on the same find prompts.
2. Of each, as many units are taken as the budget says, largest scores first: a unit counts once, and all its neurons are in the set.
3. Sufficiency: each set is patched into the base model; causal effect, refusals and over-refusals on prompts no method has seen.
4. Necessity: each set is deactivated in the aligned model; the share of refusals that is lost.
5. Recall is the share of the true units that the set holds; agreement is the Jaccard index of two sets beside what chance gives.
"""

import contextlib
import dataclasses
import itertools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from safety_neurons.detectors import find
from safety_neurons.detectors.methods import METHODS, Method, by_name, with_options
from safety_neurons.errors import UsageError
from safety_neurons.interventions import deactivated, patched
from safety_neurons.model import LanguageModel
from safety_neurons.model.batches import BatchSize
from safety_neurons.neurons import SITES, NeuronSet, Scores, SiteTable, parse_key
from safety_neurons.prompts import Prompts, as_prompts
from safety_neurons.prompts.readers import Source
from safety_neurons.results import Checkpoint, Difference, Effect, Estimate, Rate, against_random, causal_effect, holm, paired_difference
from safety_neurons.results.files import read_json, write_json
from safety_neurons.studies import notebook
from safety_neurons.studies.arms import Arm, Bench, Progress
from safety_neurons.studies.ceilings import Ceiling, by_parameters, columns_differ, named
from safety_neurons.studies.kept import hold_answers
from safety_neurons.studies.verification import MEASURE

SECONDS = "seconds.json"
RANDOM = "random"
"""What names of random sets begin with."""
Verdicts = Sequence[bool | None]


@dataclasses.dataclass(frozen=True)
class MethodResult:
    """One row of the comparison."""

    method: str
    n_neurons: int
    n_units: int
    recall: float | None
    """Share of the true units in the set; None where no truth is known."""
    causal_effect: Effect
    harmful_refused: Rate
    harmless_refused: Rate
    necessity: Difference
    """Refusals of harmful requests that the aligned model loses while the set is deactivated: aligned minus deactivated, paired."""
    against_random: Difference | None
    """Refusals with the set patched in, minus those with random sets; None for a random set, and where there are none."""
    necessity_against_random: Difference | None
    """Refusals lost with the set off, minus those lost with random sets off."""
    seconds: float
    """Wall time of finding, in seconds; 0 for random."""
    neurons: NeuronSet
    control: dict[str, Any] | None
    """Of a random set: `like` (the set whose make-up it has), `seed`, `number`, `disjoint`; None for a method."""

    def record(self) -> dict[str, Any]:
        """The row as JSON values."""
        row = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "neurons"}
        return row | {name: value.to_json() for name, value in row.items() if isinstance(value, Estimate)}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Detectors side by side."""

    budget: int
    """Units in every set."""
    n_units: int
    """Units there are to choose from."""
    sites: tuple[str, ...]
    untreated: Arm
    aligned: Arm
    ceiling_effect: Effect
    methods: tuple[MethodResult, ...]
    agreement: tuple[dict[str, Any], ...]
    """For every two methods: Jaccard index of their units, and what two random sets of the budget would have."""
    bench: Bench
    limits: Ceiling
    """The ceiling by activations and by parameters, with the word it deserves."""

    def _repr_html_(self) -> str:
        return notebook.comparison_table(self.record())

    def record(self) -> dict[str, Any]:
        """The comparison as JSON values."""
        return {
            "budget": self.budget,
            "n_units": self.n_units,
            "sites": list(self.sites),
            "untreated": self.untreated.record(),
            "aligned": self.aligned.record(),
            "ceiling_effect": self.ceiling_effect.to_json(),
            **self.limits.record(),
            "methods": [row.record() for row in self.methods],
            "agreement": list(self.agreement),
        }


def compare(
    base: LanguageModel,
    aligned: LanguageModel,
    harmful: Source,
    harmless: Source,
    *,
    find_prompts: Source,
    find_harmless: Source | None = None,
    truth: NeuronSet | None = None,
    sites: Sequence[str] | None = None,
    top: float = 0.05,
    methods: Sequence[str] | None = None,
    random: int = 5,
    seed: int = 0,
    max_new_tokens: int = 64,
    batch_size: BatchSize = "auto",
    completions_file: pathlib.Path | None = None,
    place: Callable[[str], pathlib.Path] | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """All detectors at one budget.

    Args:
        base: the less safe model.
        aligned: the safer model of the same architecture.
        harmful: requests on which refusal is measured.
        harmless: requests on which over-refusal is measured.
        find_prompts: requests the methods may look at; should share none with `harmful`.
        find_harmless: harmless prompts for the methods that look at some; without them only mask of these is run.
        truth: the neurons that carry the behaviour, where that is known; the budget is then its number of units.
        sites: where to look; by default all with a truth (no method is told where it lies), else `down`.
        top: budget as a share of the units, without a truth.
        methods: names from `METHODS`; None for all that can be run.
        random: number of random sets, made of what the truth is made of, or the methods' sets in turn.
        seed: of random sets.
        max_new_tokens: length of a completion, in tokens.
        batch_size: prompts per pass.
        completions_file: where completions are kept; a killed run continues from it.
        place: where a file of that name is kept: every method's `NAME.scores.safetensors` as soon as they are there, which a killed
            comparison takes up again, and the partial state of the method at work. None keeps no such file.
        progress: told the name of every step.

    Raises:
        UsageError: an unknown method, a budget that is no share, or an empty truth.
    """
    harmful, find_prompts = as_prompts(harmful), as_prompts(find_prompts)
    harmless = None if harmless is None else as_prompts(harmless)
    find_harmless = None if find_harmless is None else as_prompts(find_harmless)
    methods = check_methods(methods, find_harmless is not None)
    if not methods and truth is None:
        raise UsageError("no method and no truth was given; expected one of them at least, for random sets to be like it")
    if truth is None and not 0 < top <= 1:
        raise UsageError(f"top {top} is not a share; expected above 0 and at most 1 (0.05 for five per cent)")
    truth = truth.on(base.table) if truth is not None else None
    if truth is not None and not len(truth):
        raise UsageError("the truth is an empty set; expected at least one neuron")
    sites = tuple(sites) if sites else SITES if truth is not None else ("down",)
    sites = tuple(site for site in sites if any(parse_key(key).site == site for key in base.table.keys))
    everything = NeuronSet.all(base.table).only(sites=sites)
    n_units = everything.n_units
    budget = truth.n_units if truth is not None else max(1, round(top * n_units))
    asked = {"prompts": find_prompts, "find_harmless": find_harmless, "truth": truth, "sites": sites, "budget": budget}
    hold_answers(completions_file, base=base, aligned=aligned, seed=seed, max_new_tokens=max_new_tokens, **asked)
    bench = Bench(harmful, harmless, None, max_new_tokens, batch_size, seed, completions_file, progress)
    make = _Rows(bench, base, aligned, truth, bench.measure(base, "untreated"), bench.measure(aligned, "aligned"))
    shelf, rows = _Shelf(place), []
    for name in methods:
        if progress is not None:
            progress(f"find {name}")
        method = with_options(name, sites=sites, max_new_tokens=max_new_tokens, units=budget)
        shown = {"harmless": find_harmless} if method.HARMLESS != "none" and find_harmless is not None else {}
        scores, seconds = shelf.scores(method, (base, aligned), find_prompts, **shown, batch_size=batch_size)
        rows.append(make.row(name, whole_units(scores.top_units(budget), sites), seconds))
    rows += [make.row(f"random {number}", *drawn) for number, drawn in enumerate(_controls(rows, truth, sites, random, seed))]
    rows = make.compared(rows)
    patched_all = bench.measure(base, "ceiling", lambda: patched(base, aligned, everything))
    exchanged = by_parameters(bench, base, aligned, everything, make.effect, MEASURE)
    ceiling, parts = make.effect(patched_all), [row.causal_effect for row in rows]
    limits = named(patched_all, ceiling, parts, exchanged, columns_differ(base, aligned))
    bench.finish()
    agreement = _agreements(rows, budget, n_units)
    return Comparison(budget, n_units, sites, make.untreated, make.goal, ceiling, tuple(rows), agreement, bench, limits)


def check_methods(methods: Sequence[str] | None, with_harmless: bool) -> list[str]:
    """The methods asked for, or all that can be run.

    Raises:
        UsageError: an unknown name, or a method that needs harmless prompts where there are none.
    """
    if methods is None:
        return [name for name, method in METHODS.items() if with_harmless or method.HARMLESS != "needed"]
    lacking = [name for name in methods if by_name(name).HARMLESS == "needed" and not with_harmless]
    if lacking:
        raise UsageError(f"{lacking[0]} reads harmless prompts too; give some, or leave it out")
    return list(methods)


@dataclasses.dataclass
class _Rows:
    """Makes the row of a set: everything that is measured of it."""

    bench: Bench
    base: LanguageModel
    aligned: LanguageModel
    truth: NeuronSet | None
    untreated: Arm
    goal: Arm
    verdicts: dict[str, tuple[Verdicts, Verdicts]] = dataclasses.field(default_factory=dict)
    """By row, on every harmful request: whether it is refused with the set patched in, and with it off."""

    def effect(self, arm: Arm) -> Effect:
        """The causal effect of a patched arm."""
        return causal_effect(self.untreated.harmful, self.goal.harmful, arm.harmful, MEASURE, self.bench.harmful.groups)

    def row(self, name: str, neurons: NeuronSet, seconds: float, like: str = "") -> MethodResult:
        """Patch the set, deactivate it, hold it against the truth."""
        arm = self.bench.measure(self.base, name, lambda: patched(self.base, self.aligned, neurons))
        without = self.bench.verdicts(self.aligned, f"{name} deactivated", "harmful", lambda: deactivated(self.aligned, neurons))
        self.verdicts[name] = arm.harmful, tuple(without)
        return MethodResult(
            name,
            len(neurons),
            neurons.n_units,
            unit_recall(neurons, self.truth) if self.truth is not None else None,
            self.effect(arm),
            arm.harmful_refused,
            arm.harmless_refused,
            paired_difference(self.goal.harmful, without, self.bench.harmful.groups),
            None,
            None,
            seconds,
            neurons,
            {"like": like, **neurons.control_record()} if like else None,
        )

    def compared(self, rows: Sequence[MethodResult]) -> list[MethodResult]:
        """The rows, each method's beside the random sets; of more than ten, the family-wise rate is held."""
        chance = [self.verdicts[row.method] for row in rows if row.method.startswith(RANDOM)]
        real = [row.method for row in rows if not row.method.startswith(RANDOM)]
        if not chance:
            return list(rows)
        shared = self.bench.harmful.groups
        patched_in = [against_random(self.verdicts[name][0], [one for one, _ in chance], shared) for name in real]
        # Lost with the set off: the sign of refusals with it off.
        off = [against_random(_lost(self.verdicts[name][1]), [_lost(other) for _, other in chance], shared) for name in real]
        held = holm([*patched_in, *off])
        found = dict(zip(real, zip(held[: len(real)], held[len(real) :], strict=True), strict=True))
        return [
            dataclasses.replace(row, against_random=found[row.method][0], necessity_against_random=found[row.method][1])
            if row.method in found
            else row
            for row in rows
        ]


def _lost(refused: Verdicts) -> list[bool | None]:
    return [None if verdict is None else not verdict for verdict in refused]


class _Shelf:
    """Scores of finished methods with the seconds they took, and the partial state of the one at work."""

    def __init__(self, place: Callable[[str], pathlib.Path] | None) -> None:
        self.place = place
        self.seconds: dict[str, float] = {}
        if place is not None and place(SECONDS).exists():
            self.seconds = read_json(place(SECONDS))

    def scores(self, method: Method, pair: tuple[LanguageModel, LanguageModel], prompts: Prompts, **options: Any) -> tuple[Scores, float]:
        """What an earlier, killed run found by this method on the same prompts, or what the method finds now."""
        models = pair if method.PAIR else pair[1:]
        if self.place is None:
            return self._timed(method, models, prompts, options)
        units = getattr(method, "units", None)  # A set of another size is another search.
        kept_as = method.NAME if units is None else f"{method.NAME}-{units}"
        file = self.place(f"{kept_as}.scores.safetensors")
        if kept_as in self.seconds and file.exists():
            kept = Scores.load(file, table=pair[0].table)
            if kept.provenance.prompts_sha256 in ("", prompts.sha256):
                return kept, self.seconds[kept_as]
        checkpoint = Checkpoint(self.place(f"checkpoints/{kept_as}.safetensors"))
        found, self.seconds[kept_as] = self._timed(method, models, prompts, {**options, "checkpoint": checkpoint})
        found.save(file)
        write_json(self.place(SECONDS), self.seconds)
        checkpoint.delete()
        return found, self.seconds[kept_as]

    @staticmethod
    def _timed(method: Method, models: Sequence[LanguageModel], prompts: Prompts, options: dict[str, Any]) -> tuple[Scores, float]:
        started = time.perf_counter()
        return find(method, models, prompts, **options).scores, time.perf_counter() - started


def _controls(
    rows: Sequence[MethodResult], truth: NeuronSet | None, sites: Sequence[str], random: int, seed: int
) -> list[tuple[NeuronSet, float, str]]:
    """Random sets, the seconds they took, and what each is like: the truth where there is one, otherwise the methods' sets in turn."""
    models = [("truth", whole_units(truth, sites))] if truth is not None else [(row.method, row.neurons) for row in rows]
    drawn = [members.random_like(seed, n=random) for _, members in models]
    return [(drawn[number % len(models)][number], 0.0, models[number % len(models)][0]) for number in range(random)]


def whole_units(neurons: NeuronSet, sites: Sequence[str]) -> NeuronSet:
    """The set with every neuron of the sites that belongs to one of its units, so that a unit is treated as one."""
    assert neurons.table is not None
    chosen = np.array(sorted(_units(neurons)))
    members = {key: np.flatnonzero(np.isin(part, chosen)) for key, part in _unit_numbers(neurons.table, sites).items()}
    return NeuronSet(members, neurons.table, neurons.provenance)


def _unit_numbers(table: SiteTable, sites: Sequence[str]) -> dict[str, np.ndarray]:
    """The unit of every neuron at the sites, numbered over the whole table."""
    numbers = table.units()
    return {key: numbers[key] for key in table.select(sites=sites).keys}


def unit_recall(neurons: NeuronSet, truth: NeuronSet) -> float:
    """Share of the true units that are in the set."""
    true, found = _units(truth), _units(neurons)
    return len(true & found) / len(true)


def _units(neurons: NeuronSet) -> set[int]:
    table = neurons.table
    numbers = table.units() if table is not None else {}
    return {int(unit) for key, indices in neurons.items() for unit in numbers[key][indices]}


def _agreements(rows: Sequence[MethodResult], budget: int, n_units: int) -> tuple[dict[str, Any], ...]:
    chance_overlap = budget * budget / n_units
    chance = chance_overlap / (2 * budget - chance_overlap)
    found = {row.method: _units(row.neurons) for row in rows}
    pairs = []
    for first, second in itertools.combinations(found, 2):
        with contextlib.suppress(ZeroDivisionError):
            jaccard = len(found[first] & found[second]) / len(found[first] | found[second])
            pairs.append({"methods": [first, second], "jaccard": jaccard, "chance": chance})
    return tuple(pairs)
