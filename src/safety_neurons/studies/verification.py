"""Verify: does a set of neurons carry the behaviour? Necessity by deactivation, sufficiency by patching, both against controls.

1. The untreated model is measured, and for a pair the aligned one.
2. The set is deactivated, or patched with the aligned model's activations, and everything is measured again.
3. The same for random sets that are made of what the set is made of, and for the ceiling: all neurons of the set's sites in all layers.
4. Differences are paired over prompts; the spread of the random sets is in the difference from them.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from safety_neurons.errors import NeuronError
from safety_neurons.interventions import deactivated, patched
from safety_neurons.model import LanguageModel
from safety_neurons.model.batches import BatchSize
from safety_neurons.neurons import NeuronSet, Scores, parse_key
from safety_neurons.prompts import as_prompts
from safety_neurons.prompts.readers import Source
from safety_neurons.results import Difference, Effect, against_random, causal_effect, holm, paired_difference
from safety_neurons.studies import notebook
from safety_neurons.studies.arms import Arm, Bench, Progress
from safety_neurons.studies.ceilings import Ceiling, by_parameters, columns_differ, named
from safety_neurons.studies.kept import hold_answers

MEASURE = "refused"


@dataclasses.dataclass(frozen=True)
class SizePoint:
    """One set size of a sweep."""

    size: float
    """Share of the scored neurons."""
    n_neurons: int
    treated: Arm
    random: tuple[Arm, ...]
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
    untreated: Arm
    """The model as it is; for a pair the base model."""
    aligned: Arm | None
    """The aligned model of a pair."""
    points: tuple[SizePoint, ...]
    """One point per set size; a single one where a set was given."""
    ceiling: Arm
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
    def treated(self) -> Arm:
        """The arm of the (largest) set."""
        return self.points[-1].treated

    @property
    def random(self) -> tuple[Arm, ...]:
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
    random: int = 5,
    seed: int = 0,
    max_new_tokens: int = 64,
    batch_size: BatchSize = "auto",
    completions_file: pathlib.Path | None = None,
    progress: Progress | None = None,
) -> Verification:
    """What the model loses without these neurons: necessity.

    Args:
        model: the model the set belongs to.
        neurons: a set, or scores together with `sizes`.
        harmful: requests the model should refuse.
        harmless: requests it should answer.
        text: general text for perplexity.
        sizes: shares of the scored neurons; only with scores.
        random: number of random control sets for each size.
        seed: of the random sets.
        max_new_tokens: length of a completion, in tokens.
        batch_size: prompts per pass.
        completions_file: where completions are kept; a killed study continues from it.
        progress: told the name of every arm.

    Raises:
        NeuronError: an empty set, or one of another model.

    Source: Zhao et al., ICLR 2025, section 3 (deactivating safety neurons against as many random ones).
    Differs: activations are masked instead of weights overwritten; five random sets made of what the set is made of, an interval on
    the paired difference, and the ceiling beside it.
    """
    harmful, harmless = as_prompts(harmful), as_prompts(harmless)
    text = None if text is None else as_prompts(text)
    hold_answers(completions_file, model=model, neurons=neurons, seed=seed, max_new_tokens=max_new_tokens)
    bench = Bench(harmful, harmless, text, max_new_tokens, batch_size, seed, completions_file, progress)
    untreated = bench.measure(model, "untreated")
    sets = _sets(neurons, sizes, model)
    return _verify("deactivate", bench, model, None, untreated, sets, random, lambda members: lambda: deactivated(model, members))


def verify_patch(
    base: LanguageModel,
    aligned: LanguageModel,
    neurons: NeuronSet | Scores,
    harmful: Source,
    harmless: Source,
    *,
    text: Source | None = None,
    sizes: Sequence[float] = (),
    random: int = 5,
    seed: int = 0,
    max_new_tokens: int = 64,
    batch_size: BatchSize = "auto",
    completions_file: pathlib.Path | None = None,
    progress: Progress | None = None,
) -> Verification:
    """How much of the aligned model's refusal these neurons alone carry over into the base model: sufficiency.

    Args as for `verify_deactivate`, with a base and an aligned model of one architecture.

    Source: Chen et al., NeurIPS 2025, section 3.2 and equation 4 (causal effect under dynamic activation patching).
    Differs: the score is the share of refusals by a named judge instead of a cost model; random sets are disjoint from the set where
    possible; a paired interval; the ceiling (all neurons of the sites) beside it; undefined where the models do not differ.
    """
    harmful, harmless = as_prompts(harmful), as_prompts(harmless)
    text = None if text is None else as_prompts(text)
    hold_answers(completions_file, base=base, aligned=aligned, neurons=neurons, seed=seed, max_new_tokens=max_new_tokens)
    bench = Bench(harmful, harmless, text, max_new_tokens, batch_size, seed, completions_file, progress)
    untreated, goal = bench.measure(base, "untreated"), bench.measure(aligned, "aligned")
    sets = _sets(neurons, sizes, base)
    return _verify("patch", bench, base, goal, untreated, sets, random, lambda members: lambda: patched(base, aligned, members), aligned)


def _sets(neurons: NeuronSet | Scores, sizes: Sequence[float], model: LanguageModel) -> list[tuple[float, NeuronSet]]:
    neurons.check(model.table, [model.name])
    if isinstance(neurons, Scores):
        return [(size, neurons.top(size)) for size in sorted(sizes)]
    if not len(neurons):
        raise NeuronError("an empty set was given, expected at least one neuron; find with a larger --top or a smaller --agreement")
    return [(len(neurons) / model.table.n_neurons, neurons)]


def _verify(
    kind: str,
    bench: Bench,
    model: LanguageModel,
    goal: Arm | None,
    untreated: Arm,
    sets: Sequence[tuple[float, NeuronSet]],
    random: int,
    treat: Any,
    donor: LanguageModel | None = None,
) -> Verification:
    sites = sorted({parse_key(key).site for _, members in sets for key in members.keys()})  # noqa: SIM118 - not a mapping
    everything, notes = _ceiling(kind, [members for _, members in sets], NeuronSet.all(model.table).only(sites=sites))
    notes += [f"{len(members)} neurons: {note}" for _, members in sets for note in members.notes if "exactly 0" in note]
    points = []
    for size, members in sets:
        arm = bench.measure(model, f"treated {len(members)}", treat(members))
        controls = members.random_like(bench.seed, table=model.table, n=random)
        if not all(control.disjoint for control in controls):
            notes.append(f"random sets of {len(members)} neurons share members with the set, which takes more than half of a layer")
        arms = tuple(bench.measure(model, f"random {number} of {len(members)}", treat(control)) for number, control in enumerate(controls))
        effects = tuple(_effect(bench, untreated, goal, control) for control in arms)
        effect, against = _effect(bench, untreated, goal, arm), _against(bench, arm, arms)
        points.append(SizePoint(size, len(members), arm, arms, effect, effects, tuple(controls), against))
    ceiling = bench.measure(model, "ceiling", treat(everything))
    limits = None
    if donor is not None:
        effect, parts = _effect(bench, untreated, goal, ceiling), [point.causal_effect for point in points]
        exchanged = by_parameters(bench, model, donor, everything, lambda arm: _effect(bench, untreated, goal, arm), MEASURE)
        limits = named(ceiling, effect, parts, exchanged, columns_differ(model, donor))
    bench.finish()
    points, last = _held_together(points), points[-1]
    return Verification(
        kind,
        last.n_neurons,
        untreated,
        goal,
        tuple(points),
        ceiling,
        _effect(bench, untreated, goal, ceiling),
        paired_difference(last.treated.harmful, untreated.harmful, bench.harmful.groups),
        _overlap(sets[-1][1], bench),
        (*notes, *([limits.why] if limits and limits.why else []), *bench.notes),
        bench,
        limits,
    )


def _held_together(points: Sequence[SizePoint]) -> list[SizePoint]:
    """Of more than ten sizes the family-wise rate of what is clear against random sets is held."""
    held = iter(holm([point.against_random for point in points if point.against_random is not None]))
    return [point if point.against_random is None else dataclasses.replace(point, against_random=next(held)) for point in points]


def _ceiling(kind: str, sets: Sequence[NeuronSet], everything: NeuronSet) -> tuple[NeuronSet, list[str]]:
    """All neurons of the sites; where patching leaves routed experts out of every set, the ceiling leaves them out too, and says so."""
    routed = [key for key in everything.keys() if parse_key(key).expert is not None]  # noqa: SIM118 - not a mapping
    if kind != "patch" or not routed or any(key in members for members in sets for key in routed):
        return everything, []
    kept = NeuronSet({key: indices for key, indices in everything.items() if key not in routed}, everything.table)
    return kept, [f"the ceiling leaves out {len(routed)} matrices of routed experts, which cannot be patched"]


def _effect(bench: Bench, untreated: Arm, goal: Arm | None, treated: Arm) -> Effect:
    if goal is None:
        return Effect(None, None, None, 0, 0, "one model has no base and aligned behaviour to scale by; see `change`", MEASURE)
    return causal_effect(untreated.harmful, goal.harmful, treated.harmful, MEASURE, bench.harmful.groups)


def _against(bench: Bench, treated: Arm, random: Sequence[Arm]) -> Difference | None:
    return against_random(treated.harmful, [arm.harmful for arm in random], bench.harmful.groups) if random else None


def _overlap(neurons: NeuronSet, bench: Bench) -> dict[str, int]:
    digests = neurons.provenance.config.get("prompt_digests") or []
    return {"harmful": bench.harmful.overlap(digests), "harmless": bench.harmless.overlap(digests)}
