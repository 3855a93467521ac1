"""Verify: does a set of neurons carry the behaviour? Necessity by deactivation, sufficiency by patching, both
against controls.

1. The untreated model is measured, and for a pair the aligned one.
2. The set is deactivated, or patched with the aligned model's activations, and everything is measured again.
3. The same for random sets that are made of what the set is made of, and for the ceiling: all neurons of the
    set's sites in all layers.
4. Differences are paired over prompts; the spread of the random sets is in the difference from them.

`progressive` switches a set off layer by layer and neuron by neuron: what is left of safety and of capability
beside random orders.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from safety_neurons.arguments import well_typed
from safety_neurons.counting import numbered
from safety_neurons.display import Displayed
from safety_neurons.errors import MismatchError, NeuronError, UnsupportedModelError, UsageError
from safety_neurons.interventions import deactivated, patched, rerouted
from safety_neurons.interventions.by_row import SetTreatment
from safety_neurons.model import LanguageModel
from safety_neurons.model.adapters import is_adapted
from safety_neurons.neurons import NeuronSet, Scores, SiteTable, parse_key
from safety_neurons.neurons.experts import experts_of, random_experts, whole_experts
from safety_neurons.neurons.sets import extra_of
from safety_neurons.prompt_lists.readers import Source
from safety_neurons.results import Difference, Effect, difference_over_seeds, holm, paired_difference
from safety_neurons.results.estimates import GroupLabels
from safety_neurons.results.measured import (
    CeilingRecord,
    CurveRecord,
    ProgressiveRecord,
    SizeRecord,
    StepRecord,
    TwoSidedRecord,
    VerificationRecord,
)
from safety_neurons.results.records import Recorded, called
from safety_neurons.studies.bench import (
    MEASURE,
    UNTREATED,
    Arm,
    ArmOutcome,
    Bench,
    Contrasted,
    How,
    Treat,
    Treatment,
    Verdicts,
    contrast,
    try_out,
)
from safety_neurons.studies.losses import Loss, lost
from safety_neurons.studies.vocabulary import Neuron, strongest
from safety_neurons.tuning import merged_base, repair
from safety_neurons.tuning.protect import entries_of

Turn = tuple[str, str, NeuronSet]
"""A point of a progressive curve: the order it is of, the point's name, and what is off."""
Part = tuple[Effect, Verdicts]
"""What a part of the neurons restores, and which harmful requests are refused then."""
CEILING, ALL_PATCHED = "ceiling", "all neurons of the sites patched"
BY_PARAMETERS = "ceiling by parameters"


class HowVerified(How, total=False):
    """How a set is verified: `How`, and what of the set and of what else it changes."""

    text: Source | None
    """General text for perplexity."""
    sizes: Sequence[float]
    """Shares of the scored neurons; only with scores."""


@dataclasses.dataclass(frozen=True)
class Ceiling(Recorded[CeilingRecord]):
    """All neurons of some sites, in all layers, by activations and by parameters.

    Attributes:
        patched: with all activations of the donor.
        effect: its causal effect.
        parameters: with all parameters of the donor at the sites; None where that cannot be done.
        parameters_effect: its causal effect; undefined where there is none, with the reason.
        name: `ceiling`, or what to call it where a part of the neurons restores more.
        why: why it is no ceiling then.
    """

    patched: ArmOutcome = dataclasses.field(metadata=called(None))
    effect: Effect = dataclasses.field(metadata=called(None))
    parameters: ArmOutcome | None = dataclasses.field(metadata=called("ceiling_by_parameters"))
    parameters_effect: Effect = dataclasses.field(metadata=called("ceiling_by_parameters_effect"))
    name: str = dataclasses.field(default=CEILING, metadata=called("ceiling_called"))
    why: str | None = dataclasses.field(default=None, metadata=called("ceiling_why"))


@dataclasses.dataclass(frozen=True)
class SizePoint(Recorded[SizeRecord]):
    """One set size of a sweep."""

    size: float
    """Share of the neurons that were searched."""
    n_neurons: int
    treated: ArmOutcome
    random: tuple[ArmOutcome, ...]
    causal_effect: Effect
    random_effects: tuple[Effect, ...]
    controls: tuple[NeuronSet, ...] = dataclasses.field(metadata=called(None))
    """The random sets."""
    change: Difference
    """Paired difference of the refusal rate on harmful prompts, treated minus untreated."""
    against_random: Difference | None = dataclasses.field(
        default=None, metadata=called("change_against_random")
    )
    """Paired difference of the refusal rate on harmful prompts, treated minus random: from the next random
    set to be drawn.
    """
    loss: Loss | None = None
    """Of a set that is off: what came in the place of refusals."""

    ALSO = ("random_sets",)

    @property
    def random_sets(self) -> list[dict[str, int | bool]]:
        """How the random sets were drawn, as JSON values."""
        return [control.control_record() for control in self.controls]


@dataclasses.dataclass(frozen=True)
class Verification(Recorded[VerificationRecord], Displayed):
    """What a set of neurons does, beside what chance and everything do."""

    kind: str
    """`deactivate` (necessity) or `patch` (sufficiency)."""
    n_neurons: int
    untreated: ArmOutcome
    """The model as it is; for a pair the base model."""
    aligned: ArmOutcome | None
    """The aligned model of a pair."""
    points: tuple[SizePoint, ...] = dataclasses.field(metadata=called("sizes"))
    """One point per set size; a single one where a set was given."""
    ceiling: ArmOutcome
    """All neurons of the set's sites, in all layers."""
    ceiling_effect: Effect
    change: Difference
    """Paired difference of the refusal rate on harmful prompts, treated minus untreated."""
    harm_change: Difference
    """The same of answers that do harm."""
    max_new_tokens: int
    """Longest answer, in tokens."""
    overlap: Mapping[str, int] = dataclasses.field(metadata=called("overlap_with_find_prompts"))
    """How many of the harmful and harmless prompts the set was found on."""
    notes: tuple[str, ...] = ()
    bench: Bench | None = dataclasses.field(default=None, metadata=called(None))
    limits: Ceiling | None = dataclasses.field(default=None, metadata=called(None))
    """Of a pair: the ceiling by activations and by parameters, with the word it deserves."""

    ALSO = ("treated", "random", "random_sets", "causal_effect", "change_against_random")

    @property
    def verb(self) -> str:
        """`verify-deactivate` or `verify-patch`."""
        return f"verify-{self.kind}"

    @property
    def treated(self) -> ArmOutcome:
        """The arm of the (largest) set."""
        return self.points[-1].treated

    @property
    def random(self) -> tuple[ArmOutcome, ...]:
        """The random sets of the same size."""
        return self.points[-1].random

    @property
    def random_sets(self) -> list[dict[str, int | bool]]:
        """How these were drawn, as JSON values."""
        return self.points[-1].random_sets

    @property
    def causal_effect(self) -> Effect:
        """The causal effect of the (largest) set."""
        return self.points[-1].causal_effect

    @property
    def change_against_random(self) -> Difference | None:
        """The refusals of the (largest) set minus those of random sets."""
        return self.points[-1].against_random

    def record(self) -> VerificationRecord:
        """As JSON values; single entries are of the largest set."""
        written = super().record()
        return {**written, **self.limits.record()} if self.limits else written


@well_typed
def verify_deactivate(
    model: LanguageModel,
    neurons: NeuronSet | Scores,
    harmful: Source,
    harmless: Source,
    *,
    experts: bool = False,
    **how: Unpack[HowVerified],
) -> Verification:
    """What the model loses without these neurons: necessity.

    Args:
        model: the model the set belongs to.
        neurons: a set, or scores together with `sizes`.
        harmful: requests the model should refuse.
        harmless: requests it should answer.
        experts: turn whole experts off at the router instead (`rerouted`), beside random other experts of the
            same layers; the ceiling has all experts silent.
        **how: `text` for perplexity, `sizes` (shares of the scored neurons, only with scores), `random` sets
            for each size, `seed`, `max_new_tokens`, `batch_size`, `completions_file` and `progress`; see
            `HowVerified` and `How`.

    Raises:
        NeuronError: an empty set, one of another model, or with `experts` one that is not made of whole
            experts.

    Source: Zhao et al., ICLR 2025, section 3 (deactivating safety neurons against as many random ones).
    Differs: activations are masked instead of weights overwritten; five random sets made of what the set is
    made of, an interval on the paired difference, and the ceiling beside it.
    """
    sets = _sets(neurons, how.pop("sizes", ()), model)
    if experts:
        for _, members in sets:
            whole_experts(members, model.table)
    treat = functools.partial(_off_at_router if experts else _off, model)
    try_out(model, treat(sets[-1][1]))
    given = {"model": model, "neurons": neurons, **({"experts": True} if experts else {})}
    bench = Bench.of(given, harmful, harmless, **how)
    return _verify(
        SubjectModels("deactivate", bench, model, treat), sets, random_experts if experts else _random_units
    )


def _off(model: LanguageModel, members: NeuronSet) -> SetTreatment:
    return SetTreatment(deactivated, (model,), members)


def _off_at_router(model: LanguageModel, members: NeuronSet) -> Treatment:
    """The experts at the router; all of a layer together, as in the ceiling, are silent instead."""
    everything, off = experts_of(model.table), whole_experts(members, model.table)
    if any(len(off[layer]) == len(everything[layer]) for layer in off):
        return _off(model, members)
    return functools.partial(rerouted, model, members)


Drawn = Callable[[NeuronSet, SiteTable, int, int], list[NeuronSet]]


def _random_units(members: NeuronSet, table: SiteTable, seed: int, n: int) -> list[NeuronSet]:
    return members.random_like(seed, table=table, n=n)


@well_typed
def verify_patch(
    base: LanguageModel,
    aligned: LanguageModel,
    neurons: NeuronSet | Scores,
    harmful: Source,
    harmless: Source,
    **how: Unpack[HowVerified],
) -> Verification:
    """How much of the aligned model's refusal these neurons alone carry over into the base model:
    sufficiency.

    Args as for `verify_deactivate`, with a base and an aligned model of one architecture.

    Source: Chen et al., NeurIPS 2025, section 3.2 and equation 4 (causal effect under dynamic activation
    patching). Differs: the score is the share of refusals by a named judge instead of a cost model; random
    sets are disjoint from the set where possible; a paired interval; the ceiling (all neurons of the sites)
    beside it; undefined where the models do not differ.
    """
    sets = _sets(neurons, how.pop("sizes", ()), base)

    def treat(members: NeuronSet) -> SetTreatment:
        return SetTreatment(patched, (base, aligned), members)

    try_out(base, treat(sets[-1][1]))
    bench = Bench.of({"base": base, "aligned": aligned, "neurons": neurons}, harmful, harmless, **how)
    return _verify(SubjectModels("patch", bench, base, treat, aligned), sets)


@dataclasses.dataclass(frozen=True)
class TwoSided(Recorded[TwoSidedRecord], Displayed):
    """Sufficiency and necessity of the same sets."""

    verb = "verify-both"

    patch: Verification
    """The aligned model's activations in the base model."""
    deactivate: Verification
    """The same neurons off in the aligned model."""

    ALSO = ("n_neurons", "max_new_tokens", "overlap_with_find_prompts", "notes")

    @property
    def n_neurons(self) -> int:
        """Of the (largest) set."""
        return self.patch.n_neurons

    @property
    def max_new_tokens(self) -> int:
        """Longest answer, in tokens."""
        return self.patch.max_new_tokens

    @property
    def overlap(self) -> Mapping[str, int]:
        """How many of the harmful and harmless prompts the set was found on."""
        return self.patch.overlap

    overlap_with_find_prompts = overlap

    @property
    def notes(self) -> tuple[str, ...]:
        """Of both, each once."""
        return tuple(dict.fromkeys((*self.patch.notes, *self.deactivate.notes)))

    @property
    def bench(self) -> Bench | None:
        """Where the answers of the patched models are; those of the other side stand beside them."""
        return self.patch.bench


@well_typed
def verify_both(
    base: LanguageModel,
    aligned: LanguageModel,
    neurons: NeuronSet | Scores,
    harmful: Source,
    harmless: Source,
    **how: Unpack[HowVerified],
) -> TwoSided:
    """Sufficiency and necessity of the same sets, size by size: what they carry from the aligned model into
    the base model, and what the aligned model loses without them.

    Args as for `verify_patch`. Answers of the second side go to a file beside `completions_file`, called
    `deactivated-…`.

    Source: Chen et al., NeurIPS 2025, section 3.2, and Zhao et al., ICLR 2025, section 3. Differs: both of
    the same sets; a set can restore refusals without which the model still has them, and the other way round.
    """
    given = (neurons, harmful, harmless)
    # What cannot be switched off is refused before the answers of the first side are written.
    try_out(aligned, _off(aligned, _sets(neurons, how.get("sizes", ()), aligned)[-1][1]))
    patch = verify_patch(base, aligned, *given, **how)
    if (file := how.get("completions_file")) is not None:
        how["completions_file"] = Path(file).with_name(f"deactivated-{Path(file).name}")
    return TwoSided(patch, verify_deactivate(aligned, *given, **how))


def _sets(
    neurons: NeuronSet | Scores, sizes: Sequence[float], model: LanguageModel
) -> list[tuple[float, NeuronSet]]:
    neurons.check(model.table, [model.name])
    if isinstance(neurons, Scores):
        if not len(sizes):
            raise UsageError(
                "scores without --sizes; expected shares of the scored neurons, such as 0.01 and 0.05"
            )
        return [(size, neurons.top(size)) for size in sorted(sizes)]
    if not len(neurons):
        raise NeuronError(
            "an empty set was given, expected at least one neuron; find with a larger --top or a smaller "
            "--agreement"
        )
    return [(neurons.on(model.table).share_of_neurons, neurons)]


class SubjectModels:
    """A model whose sets of neurons are treated, measured as it is; for a pair the donor too.

    Attributes:
        untreated: the model as it is.
        goal: the donor as it is, None without one.
    """

    def __init__(
        self, kind: str, bench: Bench, model: LanguageModel, treat: Treat, donor: LanguageModel | None = None
    ) -> None:
        self.kind, self.bench, self.model, self.treat, self.donor = kind, bench, model, treat, donor
        self.untreated = bench.measure(Arm(UNTREATED, model))
        self.goal = None if donor is None else bench.measure(Arm("aligned", donor))

    def arm(self, name: str, neurons: NeuronSet) -> Arm:
        """The model while these neurons are treated."""
        return Arm(name, self.model, self.treat(neurons))

    def measure(self, name: str, neurons: NeuronSet) -> ArmOutcome:
        """What the model does then."""
        return self.bench.measure(self.arm(name, neurons))

    def contrast(
        self, treated: ArmOutcome, random: Sequence[ArmOutcome] = (), extra: float = 1.0
    ) -> Contrasted:
        """Refusals of harmful requests under a treatment, against the model as it is, random sets and the
        donor.
        """
        goal = None if self.goal is None else self.goal.harmful
        chance = [outcome.harmful for outcome in random]
        told: dict[str, Any] = {"random": chance, "goal": goal, "extra": extra}
        return contrast(treated.harmful, self.untreated.harmful, self.bench.harmful.groups, **told)

    def effect(self, treated: ArmOutcome) -> Effect:
        """The causal effect of a treatment."""
        return self.contrast(treated).effect

    def loss(self, off: ArmOutcome) -> Loss:
        """What became of refusals while neurons are off."""
        groups = self.bench.harmful.groups
        return lost(self.untreated, off.harmful, off.complied, off.broken, groups, off.perplexity_rate)

    def ceiling(self, everything: NeuronSet, parts: Sequence[Part]) -> Ceiling:
        """All neurons of the sites, by activations and, of a pair, by parameters, held against parts of
        them.
        """
        outcome = self.measure(CEILING, everything)
        effect = self.effect(outcome)
        if self.donor is None:
            return Ceiling(outcome, effect, None, effect)
        exchanged = by_parameters(self.bench, self.model, self.donor, everything, self.effect)
        groups = self.bench.harmful.groups
        return named(outcome, effect, parts, exchanged, columns_differ(self.model, self.donor), groups)


def _treated(members: NeuronSet) -> str:
    """Name of the arm of a set."""
    return f"treated {len(members)}"


def _random(members: NeuronSet, controls: Sequence[NeuronSet]) -> list[tuple[str, NeuronSet]]:
    """Names of the arms of random sets like it, with these."""
    return [(f"random {number} of {len(members)}", control) for number, control in enumerate(controls)]


def _verify(
    subject: SubjectModels, sets: Sequence[tuple[float, NeuronSet]], draw: Drawn = _random_units
) -> Verification:
    bench, table = subject.bench, subject.model.table
    sites = sorted({parse_key(key).site for _, members in sets for key in members.keys()})  # noqa: SIM118 - not a mapping
    everything, notes = _everything(
        subject.kind, [members for _, members in sets], NeuronSet.all(table).only(sites=sites)
    )
    notes += [
        f"{numbered(len(members), 'neuron')}: {note}"
        for _, members in sets
        for note in members.notes
        if "exactly 0" in note
    ]
    points = []
    drawn = [draw(members, table, bench.seed, bench.random) for _, members in sets]
    bench.ahead(
        [
            subject.arm(name, members)
            for (_, chosen), controls in zip(sets, drawn, strict=True)
            for name, members in [(_treated(chosen), chosen), *_random(chosen, controls)]
        ]
        + [subject.arm(CEILING, everything)]
    )
    for (size, members), controls in zip(sets, drawn, strict=True):
        treated = subject.measure(_treated(members), members)
        if not all(control.disjoint for control in controls):
            notes.append(
                f"random sets of {numbered(len(members), 'neuron')} share members with the set, which takes "
                "more than half of a layer"
            )
        random = tuple(itertools.starmap(subject.measure, _random(members, controls)))
        contrasted = subject.contrast(treated, random, extra_of(controls))
        points.append(
            SizePoint(
                size,
                len(members),
                treated,
                random,
                contrasted.effect,
                contrasted.random_effects,
                tuple(controls),
                contrasted.change,
                contrasted.against_random,
                subject.loss(treated) if subject.kind == "deactivate" else None,
            )
        )
    harm_change = paired_difference(
        points[-1].treated.complied, subject.untreated.complied, bench.harmful.groups
    )
    points, harm_change = _held(points, harm_change)
    limits = subject.ceiling(everything, [(point.causal_effect, point.treated.harmful) for point in points])
    bench.finish()
    return Verification(
        kind=subject.kind,
        n_neurons=points[-1].n_neurons,
        untreated=subject.untreated,
        aligned=subject.goal,
        points=tuple(points),
        ceiling=limits.patched,
        ceiling_effect=limits.effect,
        change=points[-1].change,
        harm_change=harm_change,
        max_new_tokens=bench.longest,
        overlap=bench.seen_in(sets[-1][1]),
        notes=(*notes, *bench.notes),
        bench=bench,
        limits=None if subject.donor is None else limits,
    )


def _held(points: Sequence[SizePoint], harm_change: Difference) -> tuple[list[SizePoint], Difference]:
    """The differences of a sweep and that of harm; of more than ten the family-wise rate is held. `loss`
    stays apart: it is asked of a set only where another difference is clear too.
    """
    told = [one for point in points for one in (point.change, point.against_random) if one is not None]
    *held, harm = holm([*told, harm_change])
    rest = iter(held)
    return [
        dataclasses.replace(
            point,
            change=next(rest),
            against_random=None if point.against_random is None else next(rest),
        )
        for point in points
    ], harm


def _everything(kind: str, sets: Sequence[NeuronSet], everything: NeuronSet) -> tuple[NeuronSet, list[str]]:
    """All neurons of the sites; where patching leaves routed experts out of every set, the ceiling leaves
    them out too, and says so.
    """
    routed = [key for key in everything.keys() if parse_key(key).expert is not None]  # noqa: SIM118 - not a mapping
    if kind != "patch" or not routed or any(key in members for members in sets for key in routed):
        return everything, []
    dense = NeuronSet(
        {key: indices for key, indices in everything.items() if key not in routed}, everything.table
    )
    return dense, [
        f"the ceiling leaves out {numbered(len(routed), 'matrix', 'matrices')} of routed experts, which "
        "cannot be patched"
    ]


@contextlib.contextmanager
def with_parameters(base: LanguageModel, donor: LanguageModel, neurons: NeuronSet) -> Iterator[None]:
    """The donor's rows, columns and bias entries of the neurons in the base model for a block.

    Then every bit is back.

    Raises:
        MismatchError: two architectures, or quantised weights.
        UnsupportedModelError: weights that cannot be written.

    Source: none; what a patch of activations leaves behind are the columns that read them.
    """
    originals = [(entries, entries.read()) for entries in entries_of(base, neurons)]
    try:
        repair(base, donor, neurons)
        yield
    finally:
        for entries, values in originals:
            entries.write(values)


def by_parameters(
    bench: Bench,
    base: LanguageModel,
    donor: LanguageModel,
    everything: NeuronSet,
    effect: Callable[[ArmOutcome], Effect],
) -> tuple[ArmOutcome | None, Effect]:
    """The base with the donor's parameters at all the sites, and the effect.

    Adapters are merged in copies, the models stay as they are.
    """
    try:
        plain, other = (merged_base(model) if is_adapted(model.model) else model for model in (base, donor))
        arm = Arm(
            BY_PARAMETERS, plain, functools.partial(with_parameters, plain, other, everything.on(plain.table))
        )
        outcome = bench.measure(arm)
    except (UnsupportedModelError, MismatchError) as error:
        return None, Effect(None, None, None, 0, 0, f"the parameters cannot be exchanged: {error}", MEASURE)
    return outcome, effect(outcome)


def named(
    patched: ArmOutcome,
    effect: Effect,
    parts: Sequence[Part],
    parameters: tuple[ArmOutcome | None, Effect],
    differ: bool,
    groups: GroupLabels = None,
) -> Ceiling:
    """The ceiling with the word it deserves.

    Args:
        patched: all neurons of the sites patched.
        effect: what that restores.
        parts: what parts of the neurons restore; one that restores more has to do so clearly, prompt by
            prompt.
        parameters: the arm by parameters, and its effect.
        differ: whether the models differ in `o` or `down` columns.
        groups: what the harmful requests share.
    """
    defined = [(one.value, refused) for one, refused in parts if one.value is not None]
    held = holm([paired_difference(refused, patched.harmful, groups) for _, refused in defined])
    whole = effect.value
    more = [
        value
        for (value, _), one in zip(defined, held, strict=True)
        if whole is not None and value > whole and one.clear
    ]
    if not more or whole is None:
        return Ceiling(patched, effect, *parameters)
    why = (
        f"a part of the neurons restores clearly more ({max(more):.2f}) than all neurons of the sites "
        f"({whole:.2f}), which is no ceiling then"
    )
    if differ:
        why += (
            ": the two models differ in their o or down columns, which do not travel with activations, so "
            "that all of the donor's "
        )
        why += "activations meet columns that were not made for them"
    return Ceiling(patched, effect, *parameters, ALL_PATCHED, why)


def columns_differ(base: LanguageModel, donor: LanguageModel) -> bool:
    """Whether the two models compute with other `o` or `down` columns somewhere."""
    for key in base.table.keys:
        if parse_key(key).site in ("o", "down") and key in base.anatomy.places:
            weights = []
            for model in (base, donor):
                with model.active():
                    site = model.anatomy.place(key)
                    weights.append(site.weight() if not site.projection.quantised else None)
            if weights[0] is None or weights[1] is None:
                continue
            if not bool((weights[0] == weights[1].to(weights[0])).all()):
                return True
    return False


FRONT, BACK, ALONE, SCORE = "front to back", "back to front", "one layer alone", "by score"
RANDOM_LAYERS, RANDOM_NEURONS = "random order of layers", "random neurons"
_STEPS = (1, 2, 5)


@dataclasses.dataclass(frozen=True)
class Step(Recorded[StepRecord]):
    """One point of a curve."""

    order: str
    step: str
    """What was switched off last: a layer, or the number of neurons."""
    layers: tuple[int, ...]
    """Layers with neurons that are off."""
    n_neurons: int
    arm: ArmOutcome = dataclasses.field(metadata=called(None))
    change: Difference
    """Refusals of harmful requests, off minus untreated, paired."""

    def record(self) -> StepRecord:
        """As JSON values, with those of the arm."""
        return {**super().record(), **self.arm.record()}


@dataclasses.dataclass(frozen=True)
class Progressive(Displayed):
    """Curves of safety and capability while more and more is off."""

    verb = "analyze-progressive"

    n_neurons: int
    untreated: ArmOutcome
    steps: tuple[Step, ...]
    groups: GroupLabels
    """What the harmful requests share."""
    notes: tuple[str, ...]

    def curve(self, order: str) -> list[Step]:
        """The steps of one order, in order."""
        return [step for step in self.steps if step.order == order]

    @property
    def orders(self) -> list[str]:
        """Names of the curves."""
        return list(dict.fromkeys(step.order for step in self.steps))

    def record(self) -> ProgressiveRecord:
        """As JSON values: the points of every curve, and the mean of each with the band of random ones."""
        named = [order for order in self.orders if not order.startswith((RANDOM_LAYERS, RANDOM_NEURONS))]
        curves: list[CurveRecord] = [
            {
                "order": order,
                "points": [step.record() for step in self.curve(order)],
                "neurons_for_half": self._half(order),
            }
            for order in named
        ]
        bands = {
            name: self._band(name)
            for name in (RANDOM_LAYERS, RANDOM_NEURONS)
            if any(order.startswith(name) for order in self.orders)
        }
        return {
            "n_neurons": self.n_neurons,
            "untreated": self.untreated.record(),
            "curves": curves,
            "random": bands,
        }

    def _half(self, order: str) -> int | None:
        """Fewest neurons of the curve's points at which at most half of the refusals are left."""
        whole = self.untreated.harmful_refused.value
        if order == ALONE or not whole:
            return None
        sizes = [
            step.n_neurons
            for step in self.curve(order)
            if (left := step.arm.harmful_refused.value) is not None and left <= whole / 2
        ]
        return min(sizes, default=None)

    def _band(self, kind: str) -> list[dict[str, Any]]:
        """Step by step the mean and the range over random orders."""
        curves = [self.curve(order) for order in self.orders if order.startswith(kind)]
        return [self._over(steps) for steps in zip(*curves, strict=True)]

    def _over(self, steps: Sequence[Step]) -> dict[str, Any]:
        band: dict[str, Any] = {
            "n_neurons": [step.n_neurons for step in steps],
            "layers": [list(step.layers) for step in steps],
        }
        for name in ("harmful_refused", "harmless_refused", "perplexity", "divergence"):
            values = [getattr(step.arm, name) for step in steps]
            numbers = [value if isinstance(value, float | None) else value.value for value in values]
            known = [number for number in numbers if number is not None]
            mean = sum(known) / len(known) if known else None
            band[name] = {
                "value": mean,
                "low": min(known, default=None),
                "high": max(known, default=None),
                "n": len(known),
            }
        arms = [step.arm.harmful for step in steps]
        band["change"] = difference_over_seeds(
            arms, [self.untreated.harmful] * len(arms), self.groups, "random order"
        ).to_json()
        return band


@well_typed
def progressive(
    model: LanguageModel,
    neurons: NeuronSet,
    harmful: Source,
    harmless: Source,
    *,
    scores: Scores | None = None,
    text: Source | None = None,
    points: int = 8,
    **how: Unpack[How],
) -> Progressive:
    """Switches a set off bit by bit: layers front to back, back to front and each alone; neurons by score.

    Beside the layers: as many random orders of them (the band says how much an order matters), and beside the
    set random sets with as many neurons in every matrix, taken front to back. Beside the order by score, of
    the set's members alone: at every point random sets that are made of what the members switched off so far
    are made of.

    Args:
        model: the model that refuses.
        neurons: the set.
        harmful: requests the model should refuse.
        harmless: requests it should answer.
        scores: those the set was taken from, or any others; neuron by neuron goes down the ranks its members
            have there, those that have none last.
        text: general text for perplexity.
        points: most steps of a curve; more layers than that are taken in groups of neighbours.
        **how: `random` orders and sets (3 by default), the `seed` of both, and the rest of `How`.

    Raises:
        NeuronError: an empty set.

    Source: Zhao et al., ICLR 2025, section 2.3 (progressively deactivating layers and neurons). Differs: both
    directions and each layer alone; bands of random orders and random neurons; harmless requests, perplexity
    and divergence at every point.
    """
    neurons.check(model.table, [model.name])
    if not len(neurons):
        raise NeuronError("an empty set was given, expected at least one neuron")
    neurons = neurons.on(model.table)
    facts = {"model": model, "neurons": neurons, "scores": scores}
    bench = Bench.of(facts, harmful, harmless, text, **{"random": 3, **how})
    bench.say_seen(neurons)
    random, seed = bench.random, bench.seed
    walker = _Walker(bench, model, bench.measure(Arm(UNTREATED, model)))
    blocks = layer_blocks(neurons, points)
    turns = [*_cumulative(FRONT, neurons, blocks), *_cumulative(BACK, neurons, blocks[::-1])]
    turns += [(ALONE, _named(block), neurons.only(layers=block)) for block in blocks]
    generator = np.random.default_rng(seed)
    for number in range(random if len(blocks) > 2 else 0):
        shuffled = [blocks[position] for position in generator.permutation(len(blocks))]
        turns += _cumulative(f"{RANDOM_LAYERS} {number}", neurons, shuffled)
    if scores is not None:
        sizes = ladder(len(neurons), points)
        ranked = strongest(neurons, scores, len(neurons))
        turns += [(SCORE, str(size), _together(ranked[:size], model.table)) for size in sizes]
        drawn = [_together(ranked[:size], model.table).random_like(seed, n=random) for size in sizes]
        for number in range(random):
            turns += [
                (f"{RANDOM_NEURONS} {number}", str(size), sets[number])
                for size, sets in zip(sizes, drawn, strict=True)
            ]
    else:
        for number, control in enumerate(neurons.random_like(seed, table=model.table, n=random)):
            turns += _cumulative(f"{RANDOM_NEURONS} {number}", control, blocks)
    steps = walker.steps(turns)
    bench.finish()
    return Progressive(
        len(neurons), walker.untreated, tuple(_family(steps)), bench.harmful.groups, tuple(bench.notes)
    )


def _family(steps: Sequence[Step]) -> list[Step]:
    """Of more than ten points the family-wise rate of what is clear is held, random orders apart."""
    named = [step for step in steps if not step.order.startswith((RANDOM_LAYERS, RANDOM_NEURONS))]
    held = dict(zip(map(id, named), holm([step.change for step in named]), strict=True))
    return [dataclasses.replace(step, change=held.get(id(step), step.change)) for step in steps]


@dataclasses.dataclass
class _Walker:
    """Measures sets that are off, each once however often it comes by."""

    bench: Bench
    model: LanguageModel
    untreated: ArmOutcome

    def steps(self, turns: Sequence[Turn]) -> list[Step]:
        """The points of all curves, whose sets answer in as few batches as they fit in."""
        arms: dict[NeuronSet, Arm] = {}
        for order, name, neurons in turns:
            if len(neurons):
                arms.setdefault(neurons, Arm(f"{order}, {name}", self.model, _off(self.model, neurons)))
        self.bench.ahead(list(arms.values()))
        nothing = dataclasses.replace(self.untreated, divergence=0.0)
        measured = {neurons: self.bench.measure(arm) for neurons, arm in arms.items()}
        return [self._step(turn, measured.get(turn[2], nothing)) for turn in turns]

    def _step(self, turn: Turn, arm: ArmOutcome) -> Step:
        order, name, neurons = turn
        change = paired_difference(arm.harmful, self.untreated.harmful, self.bench.harmful.groups)
        layers = tuple(sorted({parse_key(key).layer for key in neurons.keys()}))  # noqa: SIM118 - not a mapping
        return Step(order, name, layers, len(neurons), arm, change)


def _cumulative(order: str, neurons: NeuronSet, blocks: Sequence[Sequence[int]]) -> list[Turn]:
    """Blocks of layers off one after another."""
    off: list[int] = []
    turns = []
    for block in blocks:
        off += block
        turns.append((order, _named(block), neurons.only(layers=sorted(off))))
    return turns


def layer_blocks(neurons: NeuronSet, points: int) -> list[list[int]]:
    """The layers that hold members, front to back, in at most `points` groups of neighbours."""
    layers = sorted({parse_key(key).layer for key in neurons.keys()})  # noqa: SIM118 - not a mapping
    return [part.tolist() for part in np.array_split(np.array(layers), min(points, len(layers)))]


def ladder(largest: int, points: int) -> list[int]:
    """Whole numbers 1, 2, 5, 10, … below the largest, the last `points` of them with the largest itself."""
    sizes = [step * 10**power for power in range(12) for step in _STEPS if step * 10**power < largest]
    return [*sizes, largest][-points:]


def _together(neurons: Sequence[Neuron], table: SiteTable) -> NeuronSet:
    members: dict[str, list[int]] = {}
    for key, index in neurons:
        members.setdefault(key, []).append(index)
    return NeuronSet(members, table)


def _named(block: Sequence[int]) -> str:
    return f"layer {block[0]}" if len(block) == 1 else f"layers {block[0]} to {block[-1]}"
