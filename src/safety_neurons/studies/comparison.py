"""Compare: all detectors on one pair of models at one budget, beside random sets and, where it is known, the
truth.

1. Every method scores the neurons of the same sites on the same find prompts.
2. Of each, as many units are taken as the budget says, largest scores first: a unit counts once, and all its
    neurons are in the set.
3. Sufficiency: each set is patched into the base model; causal effect, refusals and over-refusals on prompts
    no method has seen.
4. Necessity: each set is deactivated in the aligned model; the share of refusals that is lost, and what comes
    in their place.
5. A planted truth goes the same way as a set of its own: what its size can do at all, beside the methods and
    ranked with none.
6. Recall is the share of the true units that the set holds; agreement is the Jaccard index of two sets beside
    what chance gives.
"""

import contextlib
import dataclasses
import itertools
import pathlib
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypedDict, Unpack, cast

import numpy as np

from safety_neurons.arguments import well_typed
from safety_neurons.capability.measures import measure_perplexity
from safety_neurons.detectors import find
from safety_neurons.detectors.methods import METHODS, EarlyStop, Method, by_name, with_options
from safety_neurons.display import Displayed
from safety_neurons.errors import UnsupportedModelError, UsageError
from safety_neurons.interventions import deactivated, patched
from safety_neurons.interventions.by_row import SetTreatment
from safety_neurons.model import LanguageModel
from safety_neurons.model.batches import BatchSize
from safety_neurons.neurons import SITES, NeuronSet, Scores, SiteTable, parse_key
from safety_neurons.neurons.sets import extra_of
from safety_neurons.prompt_lists import Prompts, as_prompts
from safety_neurons.prompt_lists.readers import Source
from safety_neurons.results import (
    Checkpoint,
    Difference,
    Effect,
    Rate,
    against_random,
    holm,
    paired_difference,
    rate,
)
from safety_neurons.results.measured import (
    AgreementRecord,
    ComparisonRecord,
    ControlRecord,
    MethodRecord,
)
from safety_neurons.results.records import Recorded, called
from safety_neurons.results.run import Cache, elapsed
from safety_neurons.studies.bench import Arm, ArmOutcome, Bench, How, Verdicts, content_of
from safety_neurons.studies.losses import Loss, answered_or_kept, lost
from safety_neurons.studies.verification import CEILING, Ceiling, SubjectModels, by_parameters

RANDOM, TRUTH = "random", "truth"
"""What names of random sets begin with, and the name of the planted truth as a set: neither is a method."""
LONGEST_READ = 128
"""Tokens of the answers that methods write and read, however long those are that are judged."""
UNPATCHED = "neurons of routed experts cannot be patched, since both models may send a token to others"
Place = Callable[[str], pathlib.Path]
"""Where a file of that name is kept."""


@dataclasses.dataclass(frozen=True)
class MethodResult(Recorded[MethodRecord]):
    """One row of the comparison."""

    method: str
    n_neurons: int
    n_units: int
    recall: float | None
    """Share of the true units in the set; None where no truth is known."""
    causal_effect: Effect
    harmful_refused: Rate
    harmful_complied: Rate
    """Answers that do harm while the set is patched in."""
    harmless_refused: Rate
    complied_off: Rate
    """Answers of the aligned model that do harm while the set is deactivated."""
    necessity: Difference
    """Refusals of harmful requests that the aligned model loses while the set is deactivated: aligned minus
    deactivated, paired.
    """
    loss: Loss
    """What came in the place of these refusals."""
    perplexity_off: Rate | None
    """Of general text, by the aligned model with the set off; None without a text."""
    against_random: Difference | None
    """Refusals with the set patched in, minus those with random sets.

    None for a random set, and where there are none.
    """
    necessity_against_random: Difference | None
    """Refusals lost with the set off, minus those lost with random sets off."""
    behind: Difference | None
    """Refusals with the method's set that restores most patched in, minus those with this one, over the same
    requests; None for that set itself, a random one and the truth.
    """
    necessity_behind: Difference | None
    """Refusals lost with the set off that costs most, minus those lost with this one off; of neither a broken
    answer is a loss. None for that set itself, one that breaks the model, a random one and the truth.
    """
    seconds: float
    """Wall time of finding, in seconds; 0 for random sets and the truth."""
    neurons: NeuronSet = dataclasses.field(metadata=called(None))
    control: ControlRecord | None
    """Of a random set, how it was drawn; None for a method."""


@dataclasses.dataclass(frozen=True)
class Comparison(Recorded[ComparisonRecord], Displayed):
    """Detectors side by side."""

    verb = "compare"

    budget: int
    """Units in every set."""
    n_units: int
    """Units there are to choose from."""
    sites: tuple[str, ...]
    untreated: ArmOutcome
    aligned: ArmOutcome
    ceiling_effect: Effect
    methods: tuple[MethodResult, ...]
    truth: MethodResult | None
    """The planted truth as a set, whole units at the searched sites; held against random sets by itself."""
    agreement: tuple[AgreementRecord, ...]
    """For every two sets, but a random one and that which it was kept apart from: Jaccard index of their
    units, and what two random sets of the budget would have.
    """
    bench: Bench = dataclasses.field(metadata=called(None))
    limits: Ceiling = dataclasses.field(metadata=called(None))
    """The ceiling by activations and by parameters, with the word it deserves."""

    ALSO = ("max_new_tokens",)

    @property
    def max_new_tokens(self) -> int:
        """Longest answer, in tokens."""
        return self.bench.longest

    def record(self) -> ComparisonRecord:
        """As JSON values."""
        return {**super().record(), **self.limits.record()}


class Comparing(How, total=False):
    """How methods are compared; `random` sets are made of what the truth is made of, or the methods' sets in
    turn.
    """

    find_general: Source | None
    """General prompts for the methods that look at some, which are not run without; a set without which their
    perplexity has risen too far breaks the model.
    """
    sites: Sequence[str] | None
    """Where to look; by default all with a truth (no method is told where it lies), else `down`."""
    top: float
    """Budget as a share of the units, without a truth (default 0.05)."""
    methods: Sequence[str] | None
    """Names from `METHODS`; None for all that can be run."""
    settle: float
    """For methods that average along a path: `methods.EarlyStop` (default 0, all points)."""


@well_typed
def compare(
    base: LanguageModel,
    aligned: LanguageModel,
    harmful: Source,
    harmless: Source,
    *,
    find_prompts: Source,
    find_harmless: Source | None = None,
    truth: NeuronSet | None = None,
    place: Place | None = None,
    **how: Unpack[Comparing],
) -> Comparison:
    """All detectors at one budget.

    Args:
        base: the less safe model.
        aligned: the safer model of the same architecture.
        harmful: requests on which refusal is measured.
        harmless: requests on which over-refusal is measured.
        find_prompts: requests the methods may look at; should share none with `harmful`.
        find_harmless: harmless prompts for the methods that look at some; without them only mask of these is
            run.
        truth: the neurons that carry the behaviour, where that is known; the budget is then its number of
            units.
        place: where a file of that name is kept: every method's `NAME.scores.safetensors` as soon as they are
            there, which a killed comparison takes up again, and the partial state of the method at work. None
            keeps no such file.
        **how: the fields of `Comparing`.

    Raises:
        UsageError: an unknown method, a budget that is no share, or a truth that is empty or lies at none of
            the sites.
    """
    find_prompts = as_prompts(find_prompts)
    texts = {
        name: as_prompts(text)
        for name, text in (("harmless", find_harmless), ("general", how.pop("find_general", None)))
        if text is not None
    }
    top, sites, named_ones = how.pop("top", 0.05), how.pop("sites", None), how.pop("methods", None)
    settle = how.pop("settle", 0.0)
    methods = check_methods(named_ones, texts)
    if truth is None:
        _check_budget(methods, top)
    truth = truth.on(base.table) if truth is not None else None
    if truth is not None and not len(truth):
        raise UsageError("the truth is an empty set; expected at least one neuron")
    sites = tuple(sites) if sites else SITES if truth is not None else ("down",)
    sites = tuple(site for site in sites if any(parse_key(key).site == site for key in base.table.keys))
    methods, left_out = fitting(methods, sites, base.table, named=named_ones is not None)
    itself = [] if truth is None else [_searched(truth, sites)]
    everything = NeuronSet.all(base.table).only(sites=sites)
    n_units = everything.n_units
    budget = truth.n_units if truth is not None else max(1, round(top * n_units))
    asked: dict[str, Any] = {
        "prompts": find_prompts,
        **{f"find_{name}": text for name, text in texts.items()},
        "truth": truth,
        "sites": sites,
        "budget": budget,
    }
    bench = Bench.of({"base": base, "aligned": aligned, **asked}, harmful, harmless, **how)
    subject = SubjectModels(
        "patch", bench, base, lambda members: SetTreatment(patched, (base, aligned), members), aligned
    )
    make = _Rows(subject, truth, texts.get("general"))
    bench.say(left_out)
    bench.say_seen(find_prompts, *(text for name, text in texts.items() if name == "harmless"))
    searches = Searches((base, aligned), place)

    def search(name: str) -> Candidate:
        bench.tell(f"find {name}")
        method = searching(name, sites, bench.longest, (budget, n_units), settle)
        shown = {kind: text for kind, text in texts.items() if kind in method.shown()}
        kept_as = f"{name}-{budget}" if hasattr(method, "units") else name  # Another size, another search.
        scores, cost = searches.scores(kept_as, method, find_prompts, bench.batch_size, **shown)
        bench.say(f"{name}: {note}" for note in cost["notes"])
        return Candidate(name, whole_units(scores.top_units(budget), sites), cost["seconds"])

    found = _found(methods, search, bench, named=named_ones is not None)
    truths = [Candidate(TRUTH, neurons) for neurons in itself]
    chance = make.controls(truths or found)
    make.ahead([*found, *truths, *chance], everything)
    rows, known, drawn = (list(map(make.row, some)) for some in (found, truths, chance))
    rows, known = make.compared([*rows, *drawn]), make.compared([*known, *drawn])[: len(known)]
    limits = make.ceiling(everything, [*rows, *known])
    bench.finish()
    return Comparison(
        budget=budget,
        n_units=n_units,
        sites=sites,
        untreated=make.subject.untreated,
        aligned=make.before,
        ceiling_effect=limits.effect,
        methods=tuple(rows),
        truth=next(iter(known), None),
        agreement=_agreements(rows, budget, n_units),
        bench=bench,
        limits=limits,
    )


def _check_budget(methods: Sequence[str], top: float) -> None:
    """Refuses a comparison without a truth that has no method either, or a budget that is no share."""
    if not methods:
        raise UsageError(
            "no method and no truth was given; expected one of them at least, for random sets to be like it"
        )
    if not 0 < top <= 1:
        raise UsageError(f"top {top} is not a share; expected above 0 and at most 1 (0.05 for five per cent)")


def check_methods(methods: Sequence[str] | None, texts: Collection[str]) -> list[str]:
    """The methods asked for, or all that can be run.

    Args:
        methods: names; None for all.
        texts: what there is beside the harmful prompts: `harmless`, `general`.

    Raises:
        UsageError: an unknown name, one that comes twice, or a method that needs a text that is not there.
    """
    names = list(METHODS if methods is None else methods)
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise UsageError(f"method {double!r} is named twice; expected every method once")
    lacks = {
        name: [text for text, needed in by_name(name).shown().items() if needed and text not in texts]
        for name in names
    }
    if methods is None:
        return [name for name, lacking in lacks.items() if not lacking]
    for name, lacking in lacks.items():
        if lacking:
            raise UsageError(f"{name} reads {lacking[0]} prompts too; give some, or leave it out")
    return list(methods)


def searching(
    name: str, sites: Sequence[str], longest: int, budget: tuple[int, int], settle: float
) -> Method:
    """A method as it searches sets of a budget: units, of all the units there are.

    Where a path may end early, it ends by the set that the budget takes.
    """
    early = {"settle": settle, "top": budget[0] / budget[1]} if issubclass(by_name(name), EarlyStop) else {}
    length = min(longest, LONGEST_READ)
    return with_options(
        name, sites=sites, max_new_tokens=length, units=budget[0], **(early if settle else {})
    )


def fitting(
    methods: Sequence[str], sites: Sequence[str], table: SiteTable, *, named: bool
) -> tuple[list[str], list[str]]:
    """The methods that can score a model, and why others are left out.

    Args:
        methods: names.
        sites: where they search.
        table: of the model.
        named: whether they were asked for by name, so that none is left out.

    Raises:
        UnsupportedModelError: one that was asked for cannot.
    """
    unfit = {name: with_options(name, sites=sites).unfit(table.keys) for name in methods}
    reasons = {name: reason for name, reason in unfit.items() if reason}
    if named and reasons:
        raise UnsupportedModelError(next(iter(reasons.values())))
    said = [f"{name} was left out: {reason}" for name, reason in reasons.items()]
    return [name for name in methods if name not in reasons], said


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A set that is to have a row.

    Attributes:
        name: of the row.
        neurons: the set.
        seconds: what finding it took.
        like: the method whose set it is made like; empty where it is none's.
    """

    name: str
    neurons: NeuronSet
    seconds: float = 0.0
    like: str = ""


def _found(
    methods: Sequence[str], search: Callable[[str], Candidate], bench: Bench, *, named: bool
) -> list[Candidate]:
    """The set of every method but those that find out at work that they do not fit the model.

    Raises:
        UnsupportedModelError: one that was asked for by name, or every one, does not fit.
    """
    found: list[Candidate] = []
    for name in methods:
        try:
            found.append(search(name))
        except UnsupportedModelError as error:
            if named or (name == methods[-1] and not found):
                raise
            bench.say([f"{name} was left out: {error}"])
    return found


class _Rows:
    """Makes the row of a set: everything that is measured of it."""

    def __init__(self, subject: SubjectModels, truth: NeuronSet | None, text: Prompts | None) -> None:
        assert subject.goal is not None
        assert subject.donor is not None
        self.subject, self.truth, self.goal, self.donor = subject, truth, subject.goal, subject.donor
        self.bench, self.text = subject.bench, text
        general = self.perplexity(Arm("aligned", self.donor))
        self.before = dataclasses.replace(
            self.goal, perplexity=None if general is None else general.value, perplexity_rate=general
        )
        """The aligned model as it is, with what the general text is to it."""
        self.verdicts: dict[str, tuple[Verdicts, Verdicts]] = {}
        """By row, on every harmful request: whether it is refused with the set patched in, and with it
        off.
        """
        self.kept: dict[str, Verdicts] = {}
        """By row the latter, where a broken answer is what the model as it is does."""

    def ahead(self, candidates: Sequence[Candidate], everything: NeuronSet) -> None:
        """Let the models answer under all sets in as few batches as they fit in, all neurons among them."""
        sets = {one.name: one.neurons for one in candidates if not routed_keys(one.neurons)}
        dense = _dense(everything)
        arms = {**sets, **({CEILING: dense} if len(dense) else {})}
        self.bench.ahead([self.subject.arm(name, neurons) for name, neurons in arms.items()])
        self.bench.ahead([self.without(one) for one in candidates], "harmful")

    def without(self, one: Candidate) -> Arm:
        """The aligned model with a set off."""
        return Arm(
            f"{one.name} deactivated", self.donor, SetTreatment(deactivated, (self.donor,), one.neurons)
        )

    def row(self, one: Candidate) -> MethodResult:
        """Patch the set, deactivate it, hold it against the truth."""
        name, neurons = one.name, one.neurons
        routed = routed_keys(neurons)
        outcome = self.bench.unmeasured(name) if routed else self.subject.measure(name, neurons)
        effect = self.subject.effect(outcome)
        if routed:
            effect = dataclasses.replace(effect, why=UNPATCHED)
            self.bench.say([f"sets with neurons of routed experts are deactivated alone: {UNPATCHED}"])
        without = self.without(one)
        off = self.bench.answered(without)
        verdicts, groups = (off.refused, off.complied, off.broken), self.bench.harmful.groups
        general = self.perplexity(without)
        self.verdicts[name] = outcome.harmful, off.refused
        self.kept[name] = answered_or_kept(self.before, off.refused, off.broken)
        return MethodResult(
            method=name,
            n_neurons=len(neurons),
            n_units=neurons.n_units,
            recall=unit_recall(neurons, self.truth) if self.truth is not None else None,
            causal_effect=effect,
            harmful_refused=outcome.harmful_refused,
            harmful_complied=outcome.harmful_complied,
            harmless_refused=outcome.harmless_refused,
            complied_off=rate(off.complied, groups),
            necessity=paired_difference(self.goal.harmful, off.refused, groups),
            loss=lost(self.before, *verdicts, groups, general),
            perplexity_off=general,
            against_random=None,
            necessity_against_random=None,
            behind=None,
            necessity_behind=None,
            seconds=one.seconds,
            neurons=neurons,
            control=cast(ControlRecord, {"like": one.like, **neurons.control_record()}) if one.like else None,
        )

    def perplexity(self, arm: Arm) -> Rate | None:
        """Of the general text; None without one."""
        if self.text is None:
            return None
        found = measure_perplexity(
            arm.model, self.text, arm.treatment, task="text", batch_size=self.bench.batch_size
        )
        self.bench.say_of(arm, found.notes)
        return found.rate

    def controls(self, found: Sequence[Candidate]) -> list[Candidate]:
        """Random sets made of what these sets are made of in turn."""
        drawn = [one.neurons.random_like(self.bench.seed, n=self.bench.random) for one in found]
        turns = [(number, number % len(found)) for number in range(self.bench.random)]
        return [
            Candidate(f"{RANDOM} {number}", drawn[like][number], like=found[like].name)
            for number, like in turns
        ]

    def ceiling(self, everything: NeuronSet, rows: Sequence[MethodResult]) -> Ceiling:
        """All neurons of the sites patched, but for those of routed experts."""
        parts = [(row.causal_effect, self.verdicts[row.method][0]) for row in rows]
        dense = _dense(everything)
        if len(dense):
            return self.subject.ceiling(dense, parts)
        outcome = self.bench.unmeasured(CEILING)
        effect = dataclasses.replace(self.subject.effect(outcome), why=UNPATCHED)
        exchanged = by_parameters(self.bench, self.subject.model, self.donor, everything, self.subject.effect)
        return Ceiling(outcome, effect, *exchanged)

    def compared(self, rows: Sequence[MethodResult]) -> list[MethodResult]:
        """The rows, each method's beside the random sets; of more than ten, the family-wise rate is held."""
        chance = [self.verdicts[row.method] for row in rows if row.method.startswith(RANDOM)]
        shared, extra = self.bench.harmful.groups, extra_of(row.neurons for row in rows)
        told: dict[tuple[str, str], Difference] = {}
        for row in rows:
            if row.method.startswith(RANDOM):
                continue
            told[row.method, "necessity"] = row.necessity
            if chance:
                patched_in, off = self.verdicts[row.method]
                told[row.method, "against_random"] = against_random(
                    patched_in, [one for one, _ in chance], shared, extra
                )
                # Lost with the set off: the sign of refusals with it off.
                told[row.method, "necessity_against_random"] = against_random(
                    _lost(off), [_lost(other) for _, other in chance], shared, extra
                )
        told |= self._behind(rows)
        held = dict(zip(told, holm(list(told.values())), strict=True))

        def changed(row: MethodResult) -> dict[str, Any]:
            return {name: one for (method, name), one in held.items() if method == row.method}

        return [dataclasses.replace(row, **changed(row)) for row in rows]

    def _behind(self, rows: Sequence[MethodResult]) -> dict[tuple[str, str], Difference]:
        """How far each method is behind the first one, in what it restores and in what is lost without it:
        intervals of two methods lie apart or overlap whatever they do to one and the same request.
        """
        own = [row for row in rows if row.method != TRUTH and not row.method.startswith(RANDOM)]
        patched_in = [(row, row.causal_effect.value, self.verdicts[row.method][0]) for row in own]
        off = [
            (row, None if row.loss.breaks else row.loss.sound.value, _lost(self.kept[row.method]))
            for row in own
        ]
        found = {}
        for name, measured in (("behind", patched_in), ("necessity_behind", off)):
            known = [(value, row, outcomes) for row, value, outcomes in measured if value is not None]
            _, first, most = max(known, key=lambda one: one[0], default=(None, None, ()))
            for _, row, outcomes in known:
                if row is not first:
                    found[row.method, name] = paired_difference(most, outcomes, self.bench.harmful.groups)
        return found


def routed_keys(neurons: NeuronSet) -> list[str]:
    """Keys of routed experts, which are computed only where the router chose their expert."""
    return [key for key in neurons.keys() if parse_key(key).expert is not None]  # noqa: SIM118 - not a mapping


def _dense(neurons: NeuronSet) -> NeuronSet:
    """Those of no routed expert."""
    routed = routed_keys(neurons)
    return NeuronSet({key: each for key, each in neurons.items() if key not in routed}, neurons.table)


def _lost(refused: Verdicts) -> list[bool | None]:
    return [None if verdict is None else not verdict for verdict in refused]


@dataclasses.dataclass(frozen=True)
class SearchKey:
    """What decides the scores of a method, by content."""

    method: Any
    models: Any
    prompts: str
    shown: Any
    notes: bool = True
    """That what a search said is kept beside its seconds."""


class SearchCost(TypedDict):
    """What a search took, and what it had to say."""

    seconds: float
    notes: list[str]


class Searches:
    """Searches on the same models: their scores are kept as `NAME.scores.safetensors`, and the partial state
    of the one at work too.
    """

    def __init__(self, models: Sequence[LanguageModel], place: Place | None) -> None:
        self.models, self.place, self.cache = models, place, Cache(place)
        self.content = None if place is None else content_of(models)  # Once: all weights are read for it.

    def scores(
        self, name: str, method: Method, prompts: Prompts, batch_size: BatchSize, **shown: Prompts
    ) -> tuple[Scores, SearchCost]:
        """What an earlier, killed run found by this very search, or what it finds now, and what that took and
        said.
        """
        models = self.models if method.PAIR else self.models[-1:]

        def search(**kept: Checkpoint) -> tuple[Scores, SearchCost]:
            started = time.monotonic()
            found = find(method, models, prompts, batch_size=batch_size, **shown, **kept)
            return found.scores, {"seconds": elapsed(started), "notes": list(found.notes)}

        if self.place is None:
            return search()
        file, checkpoint = (
            self.place(f"{name}.scores.safetensors"),
            Checkpoint(self.place(f"checkpoints/{name}.safetensors")),
        )

        def write() -> SearchCost:
            scores, cost = search(checkpoint=checkpoint)
            scores.save(file)
            return cost

        key = SearchKey([method.NAME, content_of(method)], self.content, prompts.sha256, content_of(shown))
        cost = self.cache.cached(key, write, [file])
        checkpoint.delete()
        return Scores.load(file, table=models[-1].table), cost


def _searched(truth: NeuronSet, sites: Sequence[str]) -> NeuronSet:
    """The truth as methods could find it: whole units at the searched sites."""
    found = whole_units(truth, sites)
    if not len(found):
        raise UsageError(
            f"the truth has no neuron at the sites {', '.join(sites)}; expected sites that hold some of it"
        )
    return found


def whole_units(neurons: NeuronSet, sites: Sequence[str]) -> NeuronSet:
    """The set with every neuron of the sites that belongs to one of its units, so that a unit is treated as
    one.
    """
    assert neurons.table is not None
    chosen = np.array(sorted(_units(neurons)))
    members = {
        key: np.flatnonzero(np.isin(part, chosen))
        for key, part in _unit_numbers(neurons.table, sites).items()
    }
    return NeuronSet(members, neurons.table, neurons.provenance)


def _unit_numbers(table: SiteTable, sites: Sequence[str]) -> dict[str, np.ndarray]:
    """The unit of every neuron at the sites, numbered over the whole table."""
    numbers = table.units()
    return {key: numbers[key] for key in table.select(sites=sites).keys}


def unit_recall(neurons: NeuronSet, truth: NeuronSet) -> float:
    """Share of the true units that are in the set."""
    true, chosen = _units(truth), _units(neurons)
    return len(true & chosen) / len(true)


def _units(neurons: NeuronSet) -> set[int]:
    table = neurons.table
    numbers = table.units() if table is not None else {}
    return {int(unit) for key, indices in neurons.items() for unit in numbers[key][indices]}


def _agreements(rows: Sequence[MethodResult], budget: int, n_units: int) -> tuple[AgreementRecord, ...]:
    chance_overlap = budget * budget / n_units
    chance = chance_overlap / (2 * budget - chance_overlap)
    units = {row.method: _units(row.neurons) for row in rows}
    like = {(row.control["like"], row.method) for row in rows if row.control is not None}
    pairs: list[AgreementRecord] = []
    for first, second in itertools.combinations(units, 2):
        if (first, second) in like:  # Kept apart from this very set: no chance is in that.
            continue
        with contextlib.suppress(ZeroDivisionError):
            jaccard = len(units[first] & units[second]) / len(units[first] | units[second])
            pairs.append({"methods": [first, second], "jaccard": jaccard, "chance": chance})
    return tuple(pairs)
