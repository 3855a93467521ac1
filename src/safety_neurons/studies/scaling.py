"""Verify scale: what a model does while the activations of a set are multiplied, factor by factor.

A set that carries the behaviour gives a dose curve: refusals fall below 1 and rise above it, while random
sets of the same make-up do not move them. What amplification costs stands beside it: over-refusal,
repetition and perplexity.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from safety_neurons.arguments import well_typed
from safety_neurons.counting import numbered
from safety_neurons.display import Displayed
from safety_neurons.errors import NeuronError, UsageError
from safety_neurons.guard import Guard
from safety_neurons.guard.verdict import said_of_unread
from safety_neurons.interventions import scaled
from safety_neurons.model import LanguageModel
from safety_neurons.neurons import NeuronSet
from safety_neurons.neurons.sets import extra_of
from safety_neurons.prompt_lists.readers import Source
from safety_neurons.results import Difference, Rate, holm, rate
from safety_neurons.results.measured import DoseRecord, ScalingRecord
from safety_neurons.results.records import Recorded, called
from safety_neurons.studies.bench import UNTREATED, Arm, ArmOutcome, Bench, How, contrast, try_out

FACTORS = (0.0, 0.5, 1.0, 2.0, 4.0)


@dataclasses.dataclass(frozen=True)
class Dose(Recorded[DoseRecord]):
    """The model with the set, and with random sets, scaled by one factor."""

    factor: float
    treated: ArmOutcome
    change: Difference
    """Refusals of harmful requests, scaled minus untreated, paired."""
    harm_change: Difference
    """The same of answers that do harm."""
    change_against_random: Difference | None
    """Refusals, the set scaled minus the next random set scaled; None without any, and of factor 1."""
    harm_change_against_random: Difference | None
    """The same of answers that do harm."""
    random: tuple[ArmOutcome, ...]


@dataclasses.dataclass(frozen=True)
class Scaling(Recorded[ScalingRecord], Displayed):
    """A dose curve."""

    verb = "verify-scale"

    n_neurons: int
    condition: str | None
    """The guard on whose word neurons are scaled; None for every request."""
    flagged: Mapping[str, Rate] | None
    """By kind of request the share that the guard flags."""
    max_new_tokens: int
    """Longest answer, in tokens."""
    untreated: ArmOutcome
    doses: tuple[Dose, ...]
    """One for every factor, smallest first."""
    controls: tuple[NeuronSet, ...] = dataclasses.field(metadata=called(None))
    overlap: Mapping[str, int] = dataclasses.field(metadata=called("overlap_with_find_prompts"))
    """How many of the harmful and harmless prompts the set was found on."""
    notes: tuple[str, ...]
    bench: Bench = dataclasses.field(metadata=called(None))

    ALSO = ("random_sets",)

    @property
    def random_sets(self) -> list[dict[str, int | bool]]:
        """How the random sets were drawn, as JSON values."""
        return [control.control_record() for control in self.controls]


@well_typed
def verify_scale(
    model: LanguageModel,
    neurons: NeuronSet,
    harmful: Source,
    harmless: Source,
    *,
    factors: Sequence[float | int] = FACTORS,
    text: Source | None = None,
    when: Guard | None = None,
    **how: Unpack[How],
) -> Scaling:
    """What the model does while these neurons are multiplied by each factor.

    Args:
        model: the model the set belongs to.
        neurons: the set.
        harmful: requests the model should refuse.
        harmless: requests it should answer.
        factors: of the activations; 0 is `verify_deactivate`, 1 the model as it is.
        text: general text for perplexity.
        when: a guard fit on this model: neurons are scaled only for the requests that it flags. General
            text is judged by it too.
        **how: as for `verify_deactivate`.

    Raises:
        NeuronError: an empty set, or one of another model.
        UsageError: no factor, or one that is given twice.

    Source: none; after activation steering, with multiples of neurons' own activations in the place of a
    direction, and random sets beside every factor.
    """
    neurons.check(model.table, [model.name])
    if not len(neurons):
        raise NeuronError("an empty set was given, expected at least one neuron")
    asked = sorted(float(factor) for factor in factors)
    if not asked or len({f"{factor:g}" for factor in asked}) < len(asked):  # Arms are called by them.
        raise UsageError(f"factors {list(factors)}; expected at least one, none twice")
    neurons, guard = neurons.on(model.table), None if when is None else when.bind(model)
    try_out(model, functools.partial(scaled, model, neurons, asked[-1], when=guard))
    facts = {"model": model, "neurons": neurons, "when": when}
    bench = Bench.of(facts, harmful, harmless, text, **how)
    untreated = bench.measure(Arm(UNTREATED, model))
    controls = neurons.random_like(bench.seed, table=model.table, n=bench.random)

    def measured(name: str, members: NeuronSet, factor: float) -> ArmOutcome:
        if factor == 1:  # Every bit is as it was (`scaled`), so that nothing has to be measured again.
            return dataclasses.replace(untreated, name=name, divergence=0.0)
        treat = functools.partial(scaled, model, members, factor, when=guard)
        return bench.measure(Arm(name, model, treat))

    doses = []
    for factor in asked:
        treated = measured(f"factor {factor:g}", neurons, factor)
        random = tuple(
            measured(f"random {number}, factor {factor:g}", control, factor)
            for number, control in enumerate(controls)
        )
        chance, groups = () if factor == 1 else random, bench.harmful.groups
        told, harm = (
            contrast(
                *(getattr(treated, kind), getattr(untreated, kind), groups),
                random=[getattr(outcome, kind) for outcome in chance],
                extra=extra_of(controls),
            )
            for kind in ("harmful", "complied")
        )
        against = told.against_random, harm.against_random
        doses.append(Dose(factor, treated, told.change, harm.change, *against, random))
    bench.finish()
    flagged, unread = (None, []) if guard is None else _flagged(guard, bench)
    return Scaling(
        n_neurons=len(neurons),
        condition=None if when is None else f"guard on {numbered(len(when.neurons), 'neuron')}",
        flagged=flagged,
        max_new_tokens=bench.longest,
        untreated=untreated,
        doses=tuple(_family(doses)),
        controls=tuple(controls),
        overlap=bench.seen_in(neurons),
        notes=(*bench.notes, *unread),
        bench=bench,
    )


def _flagged(guard: Guard, bench: Bench) -> tuple[dict[str, Rate], list[str]]:
    """The share of each kind of request that the guard flags, and how many it cannot read."""
    kinds = {"harmful": bench.harmful, "harmless": bench.harmless}
    verdicts = {kind: guard.score_encoded(guard.bound.encode(some), top=0) for kind, some in kinds.items()}
    shares = {kind: rate([one.told for one in some], kinds[kind].groups) for kind, some in verdicts.items()}
    return shares, [
        note for kind, some in verdicts.items() for note in said_of_unread(some, f"{kind} requests")
    ]


def _family(doses: Sequence[Dose]) -> list[Dose]:
    """Of more than ten comparisons, of refusals and harm, from the model as it is and from random sets alike,
    the family-wise rate is held; factor 1 is the model as it is, and compared with nothing.
    """
    names = ("change", "harm_change", "change_against_random", "harm_change_against_random")
    given: list[dict[str, Any]] = [
        {name: getattr(dose, name) for name in names if dose.factor != 1 and getattr(dose, name) is not None}
        for dose in doses
    ]
    held = iter(holm([one for row in given for one in row.values()]))
    changes: list[dict[str, Any]] = [{name: next(held) for name in row} for row in given]
    return [dataclasses.replace(dose, **row) for dose, row in zip(doses, changes, strict=True)]
