"""Verify: does a set of neurons carry the behaviour? Necessity by deactivation, sufficiency by patching, both against controls.

1. The untreated model is measured, and for a pair the aligned one.
2. The set is deactivated, or patched with the aligned model's activations, and everything is measured again.
3. The same for random sets that are made of what the set is made of, and for the ceiling: all neurons of the set's sites in all layers.
4. Differences are paired over prompts; the spread of the random sets is in the difference from them.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Unpack

from safety_neurons.errors import MismatchError, NeuronError, UnsupportedModelError
from safety_neurons.interventions import deactivated, patched
from safety_neurons.model import LanguageModel
from safety_neurons.model.adapters import is_adapted
from safety_neurons.neurons import NeuronSet, Scores, parse_key
from safety_neurons.prompt_lists.readers import Source
from safety_neurons.results import Difference, Effect, holm
from safety_neurons.studies import notebook
from safety_neurons.studies.bench import MEASURE, UNTREATED, Arm, Bench, Contrasted, How, Outcome, Treat, contrast
from safety_neurons.tuning import merged_base, repair
from safety_neurons.tuning.protect import entries_of

CEILING, ALL_PATCHED = "ceiling", "all neurons of the sites patched"
BY_PARAMETERS = "ceiling by parameters"


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """All neurons of some sites, in all layers, by activations and by parameters.

    Attributes:
        patched: with all activations of the donor.
        effect: its causal effect.
        parameters: with all parameters of the donor at the sites; None where that cannot be done.
        parameters_effect: its causal effect; undefined where there is none, with the reason.
        called: `ceiling`, or what to call it where a part of the neurons restores more.
        why: why it is no ceiling then.
    """

    patched: Outcome
    effect: Effect
    parameters: Outcome | None
    parameters_effect: Effect
    called: str = CEILING
    why: str | None = None

    def record(self) -> dict[str, Any]:
        """As JSON values, by the names that results have."""
        return {
            "ceiling_called": self.called,
            "ceiling_why": self.why,
            "ceiling_by_parameters": self.parameters.record() if self.parameters else None,
            "ceiling_by_parameters_effect": self.parameters_effect.to_json(),
        }


@dataclasses.dataclass(frozen=True)
class SizePoint:
    """One set size of a sweep."""

    size: float
    """Share of the scored neurons."""
    n_neurons: int
    treated: Outcome
    random: tuple[Outcome, ...]
    causal_effect: Effect
    random_effects: tuple[Effect, ...]
    controls: tuple[NeuronSet, ...]
    """The random sets."""
    against_random: Difference | None = None
    """Paired difference of the refusal rate on harmful prompts, treated minus random: from the next random set to be drawn."""

    def record(self) -> dict[str, Any]:
        """The point as JSON values."""
        return {
            "size": self.size,
            "n_neurons": self.n_neurons,
            "treated": self.treated.record(),
            "random": [arm.record() for arm in self.random],
            "causal_effect": self.causal_effect.to_json(),
            "random_effects": [effect.to_json() for effect in self.random_effects],
            "random_sets": [control.control_record() for control in self.controls],
            "change_against_random": self.against_random.to_json() if self.against_random else None,
        }


@dataclasses.dataclass(frozen=True)
class Verification:
    """What a set of neurons does, beside what chance and everything do."""

    kind: str
    """`deactivate` (necessity) or `patch` (sufficiency)."""
    n_neurons: int
    untreated: Outcome
    """The model as it is; for a pair the base model."""
    aligned: Outcome | None
    """The aligned model of a pair."""
    points: tuple[SizePoint, ...]
    """One point per set size; a single one where a set was given."""
    ceiling: Outcome
    """All neurons of the set's sites, in all layers."""
    ceiling_effect: Effect
    change: Difference
    """Paired difference of the refusal rate on harmful prompts, treated minus untreated."""
    overlap: Mapping[str, int]
    """How many of the harmful and harmless prompts the set was found on."""
    notes: tuple[str, ...] = ()
    bench: Bench | None = None
    limits: Ceiling | None = None
    """Of a pair: the ceiling by activations and by parameters, with the word it deserves."""

    @property
    def treated(self) -> Outcome:
        """The arm of the (largest) set."""
        return self.points[-1].treated

    @property
    def random(self) -> tuple[Outcome, ...]:
        """The random sets of the same size."""
        return self.points[-1].random

    @property
    def causal_effect(self) -> Effect:
        """The causal effect of the (largest) set."""
        return self.points[-1].causal_effect

    @property
    def change_against_random(self) -> Difference | None:
        """The refusals of the (largest) set minus those of random sets."""
        return self.points[-1].against_random

    def _repr_html_(self) -> str:
        return notebook.verification_table(self.record())

    def record(self) -> dict[str, Any]:
        """The verification as JSON values, with at least the keys of the design."""
        return {
            "kind": self.kind,
            "n_neurons": self.n_neurons,
            "untreated": self.untreated.record(),
            "aligned": self.aligned.record() if self.aligned else None,
            "treated": self.treated.record(),
            "random": [arm.record() for arm in self.random],
            "random_sets": [control.control_record() for control in self.points[-1].controls],
            "ceiling": self.ceiling.record(),
            "causal_effect": self.causal_effect.to_json(),
            "ceiling_effect": self.ceiling_effect.to_json(),
            **(self.limits.record() if self.limits else {}),
            "change": self.change.to_json(),
            "change_against_random": self.change_against_random.to_json() if self.change_against_random else None,
            "sizes": [point.record() for point in self.points],
            "overlap_with_find_prompts": dict(self.overlap),
            "notes": list(self.notes),
        }


def verify_deactivate(
    model: LanguageModel,
    neurons: NeuronSet | Scores,
    harmful: Source,
    harmless: Source,
    *,
    text: Source | None = None,
    sizes: Sequence[float] = (),
    **how: Unpack[How],
) -> Verification:
    """What the model loses without these neurons: necessity.

    Args:
        model: the model the set belongs to.
        neurons: a set, or scores together with `sizes`.
        harmful: requests the model should refuse.
        harmless: requests it should answer.
        text: general text for perplexity.
        sizes: shares of the scored neurons; only with scores.
        **how: `random` sets for each size, `seed`, `max_new_tokens`, `batch_size`, `completions_file` and `progress`; see `How`.

    Raises:
        NeuronError: an empty set, or one of another model.

    Source: Zhao et al., ICLR 2025, section 3 (deactivating safety neurons against as many random ones).
    Differs: activations are masked instead of weights overwritten; five random sets made of what the set is made of, an interval on
    the paired difference, and the ceiling beside it.
    """
    bench = Bench.of({"model": model, "neurons": neurons}, harmful, harmless, text, **how)
    subject = SubjectModels("deactivate", bench, model, lambda members: functools.partial(deactivated, model, members))
    return _verify(subject, _sets(neurons, sizes, model))


def verify_patch(
    base: LanguageModel,
    aligned: LanguageModel,
    neurons: NeuronSet | Scores,
    harmful: Source,
    harmless: Source,
    *,
    text: Source | None = None,
    sizes: Sequence[float] = (),
    **how: Unpack[How],
) -> Verification:
    """How much of the aligned model's refusal these neurons alone carry over into the base model: sufficiency.

    Args as for `verify_deactivate`, with a base and an aligned model of one architecture.

    Source: Chen et al., NeurIPS 2025, section 3.2 and equation 4 (causal effect under dynamic activation patching).
    Differs: the score is the share of refusals by a named judge instead of a cost model; random sets are disjoint from the set where
    possible; a paired interval; the ceiling (all neurons of the sites) beside it; undefined where the models do not differ.
    """
    bench = Bench.of({"base": base, "aligned": aligned, "neurons": neurons}, harmful, harmless, text, **how)
    subject = SubjectModels("patch", bench, base, lambda members: functools.partial(patched, base, aligned, members), aligned)
    return _verify(subject, _sets(neurons, sizes, base))


def _sets(neurons: NeuronSet | Scores, sizes: Sequence[float], model: LanguageModel) -> list[tuple[float, NeuronSet]]:
    neurons.check(model.table, [model.name])
    if isinstance(neurons, Scores):
        return [(size, neurons.top(size)) for size in sorted(sizes)]
    if not len(neurons):
        raise NeuronError("an empty set was given, expected at least one neuron; find with a larger --top or a smaller --agreement")
    return [(len(neurons) / model.table.n_neurons, neurons)]


class SubjectModels:
    """A model whose sets of neurons are treated, measured as it is; for a pair the donor too.

    Attributes:
        untreated: the model as it is.
        goal: the donor as it is, None without one.
    """

    def __init__(self, kind: str, bench: Bench, model: LanguageModel, treat: Treat, donor: LanguageModel | None = None) -> None:
        self.kind, self.bench, self.model, self.treat, self.donor = kind, bench, model, treat, donor
        self.untreated = bench.measure(Arm(UNTREATED, model))
        self.goal = None if donor is None else bench.measure(Arm("aligned", donor))

    def measure(self, name: str, neurons: NeuronSet) -> Outcome:
        """The model while these neurons are treated."""
        return self.bench.measure(Arm(name, self.model, self.treat(neurons)))

    def contrast(self, treated: Outcome, random: Sequence[Outcome] = ()) -> Contrasted:
        """Refusals of harmful requests under a treatment, against the model as it is, random sets and the donor."""
        goal = None if self.goal is None else self.goal.harmful
        chance = [outcome.harmful for outcome in random]
        return contrast(treated.harmful, self.untreated.harmful, self.bench.harmful.groups, random=chance, goal=goal)

    def effect(self, treated: Outcome) -> Effect:
        """The causal effect of a treatment."""
        return self.contrast(treated).effect

    def ceiling(self, everything: NeuronSet, parts: Sequence[Effect]) -> Ceiling:
        """All neurons of the sites, by activations and, of a pair, by parameters; `parts` are what parts of them restore."""
        outcome = self.measure(CEILING, everything)
        effect = self.effect(outcome)
        if self.donor is None:
            return Ceiling(outcome, effect, None, effect)
        exchanged = by_parameters(self.bench, self.model, self.donor, everything, self.effect)
        return named(outcome, effect, parts, exchanged, columns_differ(self.model, self.donor))


def _verify(subject: SubjectModels, sets: Sequence[tuple[float, NeuronSet]]) -> Verification:
    bench, table = subject.bench, subject.model.table
    sites = sorted({parse_key(key).site for _, members in sets for key in members.keys()})  # noqa: SIM118 - not a mapping
    everything, notes = _everything(subject.kind, [members for _, members in sets], NeuronSet.all(table).only(sites=sites))
    notes += [f"{len(members)} neurons: {note}" for _, members in sets for note in members.notes if "exactly 0" in note]
    points, changes = [], []
    for size, members in sets:
        treated = subject.measure(f"treated {len(members)}", members)
        controls = members.random_like(bench.seed, table=table, n=bench.random)
        if not all(control.disjoint for control in controls):
            notes.append(f"random sets of {len(members)} neurons share members with the set, which takes more than half of a layer")
        random = tuple(subject.measure(f"random {number} of {len(members)}", control) for number, control in enumerate(controls))
        found = subject.contrast(treated, random)
        changes.append(found.change)
        points.append(
            SizePoint(size, len(members), treated, random, found.effect, found.random_effects, tuple(controls), found.against_random)
        )
    limits = subject.ceiling(everything, [point.causal_effect for point in points])
    bench.finish()
    return Verification(
        kind=subject.kind,
        n_neurons=points[-1].n_neurons,
        untreated=subject.untreated,
        aligned=subject.goal,
        points=tuple(_held_together(points)),
        ceiling=limits.patched,
        ceiling_effect=limits.effect,
        change=changes[-1],
        overlap=_overlap(sets[-1][1], bench),
        notes=(*notes, *([limits.why] if limits.why else []), *bench.notes),
        bench=bench,
        limits=None if subject.donor is None else limits,
    )


def _held_together(points: Sequence[SizePoint]) -> list[SizePoint]:
    """Of more than ten sizes the family-wise rate of what is clear against random sets is held."""
    held = iter(holm([point.against_random for point in points if point.against_random is not None]))
    return [point if point.against_random is None else dataclasses.replace(point, against_random=next(held)) for point in points]


def _everything(kind: str, sets: Sequence[NeuronSet], everything: NeuronSet) -> tuple[NeuronSet, list[str]]:
    """All neurons of the sites; where patching leaves routed experts out of every set, the ceiling leaves them out too, and says so."""
    routed = [key for key in everything.keys() if parse_key(key).expert is not None]  # noqa: SIM118 - not a mapping
    if kind != "patch" or not routed or any(key in members for members in sets for key in routed):
        return everything, []
    kept = NeuronSet({key: indices for key, indices in everything.items() if key not in routed}, everything.table)
    return kept, [f"the ceiling leaves out {len(routed)} matrices of routed experts, which cannot be patched"]


def _overlap(neurons: NeuronSet, bench: Bench) -> dict[str, int]:
    digests = neurons.provenance.config.get("prompt_digests") or []
    return {"harmful": bench.harmful.overlap(digests), "harmless": bench.harmless.overlap(digests)}


@contextlib.contextmanager
def with_parameters(base: LanguageModel, donor: LanguageModel, neurons: NeuronSet) -> Iterator[None]:
    """The donor's rows, columns and bias entries of the neurons in the base model for a block; then every bit is back.

    Raises:
        MismatchError: two architectures, or quantised weights.
        UnsupportedModelError: weights that cannot be written.

    Source: none; what a patch of activations leaves behind are the columns that read them.
    """
    kept = [(entries, entries.read()) for entries in entries_of(base, neurons)]
    try:
        repair(base, donor, neurons)
        yield
    finally:
        for entries, values in kept:
            entries.write(values)


def by_parameters(
    bench: Bench, base: LanguageModel, donor: LanguageModel, everything: NeuronSet, effect: Callable[[Outcome], Effect]
) -> tuple[Outcome | None, Effect]:
    """The base with the donor's parameters at all the sites, and the effect; adapters are merged in copies, the models stay as they are."""
    try:
        plain, other = (merged_base(model) if is_adapted(model.model) else model for model in (base, donor))
        arm = Arm(BY_PARAMETERS, plain, functools.partial(with_parameters, plain, other, everything.on(plain.table)))
        outcome = bench.measure(arm)
    except (UnsupportedModelError, MismatchError) as error:
        return None, Effect(None, None, None, 0, 0, f"the parameters cannot be exchanged: {error}", MEASURE)
    return outcome, effect(outcome)


def named(patched: Outcome, effect: Effect, parts: Sequence[Effect], parameters: tuple[Outcome | None, Effect], differ: bool) -> Ceiling:
    """The ceiling with the word it deserves.

    Args:
        patched: all neurons of the sites patched.
        effect: what that restores.
        parts: what parts of the neurons restore.
        parameters: the arm by parameters, and its effect.
        differ: whether the models differ in `o` or `down` columns.
    """
    best = max((part.value for part in parts if part.value is not None), default=None)
    if effect.value is None or best is None or best <= effect.value:
        return Ceiling(patched, effect, *parameters)
    why = f"a part of the neurons restores more ({best:.2f}) than all neurons of the sites ({effect.value:.2f}), which is no ceiling then"
    if differ:
        why += ": the two models differ in their o or down columns, which do not travel with activations, so that all of the donor's "
        why += "activations meet columns that were not made for them"
    return Ceiling(patched, effect, *parameters, ALL_PATCHED, why)


def columns_differ(base: LanguageModel, donor: LanguageModel) -> bool:
    """Whether the two models compute with other `o` or `down` columns somewhere."""
    for key in base.table.keys:
        if parse_key(key).site in ("o", "down") and key in base.anatomy.places:
            found = []
            for model in (base, donor):
                with model.active():
                    place = model.anatomy.place(key)
                    found.append(place.weight() if not place.projection.quantised else None)
            if found[0] is None or found[1] is None:
                continue
            if not bool((found[0] == found[1].to(found[0])).all()):
                return True
    return False
