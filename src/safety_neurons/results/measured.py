"""The JSON of verify, compare and analyze progressive, as `run.json` holds it under `result`."""

from typing import Any, NotRequired, TypedDict

from safety_neurons.results.records import DifferenceRecord, EffectRecord, EstimateRecord


class LengthRecord(TypedDict):
    """Answers to harmful requests cut at a number of tokens."""

    tokens: int
    harmful_refused: EstimateRecord
    harmful_complied: EstimateRecord
    cut_off: int
    """Answers that go on behind the cut."""


class ArmRecord(TypedDict):
    """What was measured of one model, treated or not."""

    name: str
    harmful_refused: EstimateRecord
    harmful_complied: EstimateRecord
    """Answers that do harm, by the judge of harm; by the built-in one, that go along."""
    harmless_refused: EstimateRecord
    perplexity: float | None
    divergence: float | None
    """KL(untreated ‖ treated) per token, in nats."""
    harmful_broken: EstimateRecord | None
    """Answers to harmful requests that are none: nothing to judge, or words that repeat themselves."""
    harm_judge: str
    """Name and version of the judge of harm."""
    repetition: EstimateRecord | None
    """Mean share of repeated sequences of four words in the answers."""
    perplexity_interval: EstimateRecord | None
    """The perplexity with its interval over texts."""
    cut_off: int
    """Answers to harmful and harmless requests that were cut at the limit of tokens."""
    lengths: list[LengthRecord]
    """The length curve; empty where none was asked for."""


class LossRecord(TypedDict):
    """What became of the harmful requests that a model refuses, while neurons are off: shares of a whole."""

    refused: EstimateRecord
    """Refused still."""
    harm: EstimateRecord
    """Answered with harm."""
    broken: EstimateRecord
    """Nothing to judge, or words that repeat themselves."""
    neither: EstimateRecord
    """Answered without harm."""
    more_broken: DifferenceRecord
    """Broken answers to all harmful requests, off minus as it is, paired."""
    sound: DifferenceRecord
    """Refusals lost, paired, where a broken answer counts as no change."""
    breaks: str | None
    """How the model is broken, so that lost refusals say nothing."""


class ControlRecord(TypedDict):
    """How a random set was drawn."""

    seed: int
    number: int
    n_neurons: int
    n_units: int
    disjoint: bool
    like: NotRequired[str]
    """The set whose make-up it has, where there are several."""


class CeilingRecord(TypedDict):
    """All neurons of the sites, under the name they deserve."""

    ceiling_called: str
    ceiling_why: str | None
    ceiling_by_parameters: ArmRecord | None
    ceiling_by_parameters_effect: EffectRecord


class SizeRecord(TypedDict):
    """One set size of a sweep."""

    size: float
    """Share of the scored neurons."""
    n_neurons: int
    treated: ArmRecord
    random: list[ArmRecord]
    random_sets: list[ControlRecord]
    causal_effect: EffectRecord
    random_effects: list[EffectRecord]
    change: DifferenceRecord
    """Refusals of harmful requests, treated minus untreated, paired."""
    change_against_random: DifferenceRecord | None
    loss: LossRecord | None
    """Of a set that is off."""


class VerificationRecord(TypedDict):
    """verify; where several sizes were measured, single entries are of the largest.

    Of a pair the keys of `CeilingRecord` too.
    """

    kind: str
    n_neurons: int
    untreated: ArmRecord
    aligned: ArmRecord | None
    treated: ArmRecord
    random: list[ArmRecord]
    random_sets: list[ControlRecord]
    ceiling: ArmRecord
    causal_effect: EffectRecord
    ceiling_effect: EffectRecord
    change: DifferenceRecord
    harm_change: DifferenceRecord
    """The same of answers that do harm."""
    change_against_random: DifferenceRecord | None
    sizes: list[SizeRecord]
    max_new_tokens: int
    """Longest answer, in tokens."""
    overlap_with_find_prompts: dict[str, int]
    notes: list[str]
    ceiling_called: NotRequired[str]
    ceiling_why: NotRequired[str | None]
    ceiling_by_parameters: NotRequired[ArmRecord | None]
    ceiling_by_parameters_effect: NotRequired[EffectRecord]


class TwoSidedRecord(TypedDict):
    """verify both."""

    patch: VerificationRecord
    deactivate: VerificationRecord
    n_neurons: int
    max_new_tokens: int
    overlap_with_find_prompts: dict[str, int]
    notes: list[str]


class DoseRecord(TypedDict):
    """One factor of a dose curve."""

    factor: float
    treated: ArmRecord
    change: DifferenceRecord
    """Refusals of harmful requests, scaled minus untreated, paired."""
    harm_change: DifferenceRecord
    change_against_random: DifferenceRecord | None
    """Refusals, the set scaled minus random sets scaled."""
    harm_change_against_random: DifferenceRecord | None
    """The same of answers that do harm."""
    random: list[ArmRecord]


class ScalingRecord(TypedDict):
    """verify scale."""

    n_neurons: int
    condition: str | None
    """The guard on whose word neurons are scaled; None for every request."""
    flagged: dict[str, EstimateRecord] | None
    """By kind of request the share that the guard flags."""
    max_new_tokens: int
    untreated: ArmRecord
    doses: list[DoseRecord]
    random_sets: list[ControlRecord]
    overlap_with_find_prompts: dict[str, int]
    notes: list[str]


class StepRecord(ArmRecord):
    """One point of a curve."""

    order: str
    step: str
    """What was switched off last."""
    layers: list[int]
    n_neurons: int
    change: DifferenceRecord


class CurveRecord(TypedDict):
    """One order of switching off."""

    order: str
    points: list[StepRecord]
    neurons_for_half: int | None


class ProgressiveRecord(TypedDict):
    """analyze progressive; `random` has by kind of order the mean and the range at every step."""

    n_neurons: int
    untreated: ArmRecord
    curves: list[CurveRecord]
    random: dict[str, list[dict[str, Any]]]


class MethodRecord(TypedDict):
    """One row of a comparison."""

    method: str
    n_neurons: int
    n_units: int
    recall: float | None
    causal_effect: EffectRecord
    harmful_refused: EstimateRecord
    harmful_complied: EstimateRecord
    harmless_refused: EstimateRecord
    complied_off: EstimateRecord
    """Answers of the aligned model that do harm while the set is off."""
    necessity: DifferenceRecord
    loss: LossRecord
    """What came in the place of the refusals."""
    perplexity_off: EstimateRecord | None
    """Of general text, with the set off."""
    against_random: DifferenceRecord | None
    necessity_against_random: DifferenceRecord | None
    behind: DifferenceRecord | None
    """What the method that restores most does more, over the same requests."""
    necessity_behind: DifferenceRecord | None
    seconds: float
    control: ControlRecord | None
    """Of a random set."""


class AgreementRecord(TypedDict):
    """Jaccard index of two methods' units, beside that of two random sets."""

    methods: list[str]
    jaccard: float
    chance: float


class ComparisonRecord(CeilingRecord):
    """compare, on one pair of models."""

    budget: int
    n_units: int
    sites: list[str]
    max_new_tokens: int
    """Longest answer, in tokens."""
    untreated: ArmRecord
    aligned: ArmRecord
    ceiling_effect: EffectRecord
    methods: list[MethodRecord]
    truth: MethodRecord | None
    """The planted truth as a set, where it is known."""
    agreement: list[AgreementRecord]


class EntryRecord(ComparisonRecord):
    """A comparison on one organism at one budget."""

    organism: str
    kind: str
    share: float
    group: str


class StandingRecord(TypedDict):
    """One method's numbers of one measure in one group of organisms."""

    method: str
    group: str
    measure: str
    mean: float | None
    worst: float | None
    by_organism: dict[str, float | None]


class LeaderRecord(TypedDict):
    """The methods whose mean is the best of a group, and those that come next."""

    group: str
    measure: str
    methods: list[str]
    mean: float
    next: list[str]
    ahead: DifferenceRecord | None
    """The first minus the next, over the organisms of both."""


class RankingRecord(TypedDict):
    """compare, over organisms; `measures` says what each measure is."""

    organisms: list[EntryRecord]
    ranking: list[StandingRecord]
    leaders: list[LeaderRecord]
    measures: dict[str, str]
