"""Records: numbers with their intervals, the one decision "clear", and the JSON of results as `run.json`
holds it under `result`.

A dataclass that derives from `Recorded` is written field by field; what it is called there stands in its
metadata where it is not the field's own name. The types below say which keys that gives, for who reads them:
terminal, notebook, report and users' own tools.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, NotRequired, TypedDict, TypeVar, cast

import numpy as np

from safety_neurons.errors import InputError
from safety_neurons.results import notebook

RecordT = TypeVar("RecordT")
_RESERVED = frozenset(
    {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}
)
_LONGEST_NAME = 200


def plain(value: Any) -> Any:
    """The value as JSON values: records by their fields, numpy as numbers and lists, paths as text, NaN and
    infinity as null.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value  # First, because a file of completions holds little else.
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, (list, tuple, range)):
        return [plain(item) for item in value]
    if hasattr(value, "to_json") and not isinstance(value, type):
        return plain(value.to_json())
    if callable(getattr(value, "record", None)) and not isinstance(value, type):
        return plain(value.record())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {entry.name: plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item) for item in value)
    return str(value)


def plain_name(name: object, what: str) -> str:
    """A name out of a file that is to become the name of a file or folder: a name, never a path.

    Raises:
        InputError: empty, too long, with a separator, a drive, a control character or a leading dot, or
        reserved by a system.
    """
    text = str(name)
    fits = (
        0 < len(text.encode(errors="replace")) <= _LONGEST_NAME
        and text == text.strip()
        and not text.startswith(".")
    )
    if (
        not fits
        or re.search(r'[\x00-\x1f\x7f-\x9f/\\:*?"<>|\ud800-\udfff]', text)
        or text.split(".")[0].lower() in _RESERVED
    ):
        raise InputError(
            f"{what} {text[:60]!r} is not a plain name; expected letters, digits, '-', '_' and '.', "
            "without folders: rename it"
        )
    return text


def called(key: str | None) -> dict[str, str | None]:
    """Metadata of a field: the key it is written under, None where it is left out."""
    return {"key": key}


class Recorded(Generic[RecordT]):
    """A dataclass that is written as JSON by its fields."""

    ALSO: ClassVar[tuple[str, ...]] = ()
    """Properties that are written like fields, behind them."""

    def record(self) -> RecordT:
        """As JSON values."""
        keys = {one.name: one.metadata.get("key", one.name) for one in dataclasses.fields(cast(Any, self))}
        keys |= {name: name for name in self.ALSO}
        return cast(
            RecordT, {key: plain(getattr(self, name)) for name, key in keys.items() if key is not None}
        )


class RunRecord(TypedDict):
    """`run.json`."""

    schema: str
    verb: str
    status: str
    """`running` or `finished`."""
    arguments: dict[str, Any]
    inputs: dict[str, dict[str, str]]
    """By argument the hashes of the files it names."""
    versions: dict[str, str]
    seeds: dict[str, Any]
    hashes: dict[str, str]
    device: str | None
    timings: dict[str, Any]
    files: list[str]
    """Of the run, relative to its folder."""
    result: NotRequired[Any]
    """What the verb gave: one of the records below."""
    paths: NotRequired[list[list[str | int]]]
    """Where in the result paths are."""
    notes: NotRequired[list[str]]


class CompletionRecord(TypedDict):
    """One line of `completions.jsonl`."""

    prompt_id: str
    prompt: str
    completion: str
    token_ids: list[int]
    finish_reason: str
    """`stop`, `length` or `failed`."""
    arm: str
    seed: int
    verdicts: dict[str, Any]
    """By judge."""
    meta: NotRequired[dict[str, Any]]


# Numbers


class EstimateRecord(TypedDict):
    """A number with its 95 % interval."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    """Prompts (or pairs, or texts) it rests on."""
    unscored: int
    """Prompts left out; never counted as 0."""
    why: NotRequired[str]
    """What keeps it from being defined, bounded or clear."""
    by_seed: NotRequired[list[float | None]]
    lowest: NotRequired[float | None]
    highest: NotRequired[float | None]
    """Over seeds."""


class DifferenceRecord(EstimateRecord):
    """A mean of paired differences."""

    p: float | None
    p_holm: NotRequired[float]
    """Held against all comparisons of a table of more than ten."""
    clear: bool


class EffectRecord(EstimateRecord):
    """A causal effect: the share of the difference between two models that a treatment restores."""

    measure: str


class McNemarRecord(TypedDict):
    """The exact test on yes and no under two treatments."""

    first_only: int
    second_only: int
    p: float | None
    n: int
    unscored: int


class KappaRecord(TypedDict):
    """How far two judges agree; rows of `table` are the first judge's no and yes, columns the second's."""

    first: str
    second: str
    kappa: EstimateRecord
    same: EstimateRecord
    table: list[list[int]]


EstimateT = TypeVar("EstimateT", bound="Estimate")
LEVEL = 0.05
"""1 − the nominal coverage of every interval."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval.

    `value` is None where it is undefined, the ends where nothing bounds them; `why` says why.
    """

    value: float | None
    low: float | None
    """Lower end of the 95 % interval."""
    high: float | None
    """Upper end of the 95 % interval."""
    n: int
    """Prompts (or pairs, or texts) it rests on."""
    unscored: int = 0
    """Prompts that could not be scored: left out and never counted as 0."""
    why: str | None = None
    """What keeps the number from being defined, bounded or shown as clear."""

    SIGNED: ClassVar[bool] = False
    """Whether it is shown with its sign."""

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def to_json(self) -> EstimateRecord:
        """`{value, low, high, n, unscored}`, and what else is known of the number.

        Over seeds the lowest and the highest of them.
        """
        written = {
            name: value for name, value in vars(self).items() if name in _BASIC or value not in (None, ())
        }
        if by_seed := written.get("by_seed"):
            known = [value for value in by_seed if value is not None]
            written |= {
                "by_seed": list(by_seed),
                "lowest": min(known, default=None),
                "highest": max(known, default=None),
            }
        return cast(EstimateRecord, written)

    @classmethod
    def from_json(cls: type[EstimateT], found: Mapping[str, Any]) -> EstimateT:
        """The estimate that `to_json` wrote; other keys are left alone.

        Raises:
            KeyError, TypeError: one of the basic five is missing or no number, or this is no object.
        """
        more = [field.name for field in dataclasses.fields(cls)[len(_BASIC) :] if field.name in found]
        values: dict[str, Any] = {name: found[name] for name in (*_BASIC, *more)}
        wrong = next(
            (
                name
                for name in _BASIC
                if not isinstance(found[name], int | float | None) or isinstance(found[name], bool)
            ),
            None,
        )
        if wrong is not None:
            raise TypeError(f"{wrong} {str(found[wrong])[:20]!r}; expected a number")
        typed: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**typed)

    def __str__(self) -> str:
        return f"{self._shown()}, n {self.n}, unscored {self.unscored}".translate(notebook.KEYBOARD)

    def _shown(self) -> str:
        """The number and its interval, or why there is none."""
        shown = notebook.interval(self.to_json(), signed=self.SIGNED)
        return f"{shown}: {self.why}" if self.value is None and self.why else shown


_BASIC = ("value", "low", "high", "n", "unscored")
COMPARED = {*_BASIC, "p", "clear"}
"""By which a difference is known among JSON values."""


@dataclasses.dataclass(frozen=True)
class Rate(Estimate):
    """A mean over scored outcomes."""

    by_seed: tuple[float | None, ...] = ()
    """The mean of every seed, where there are several."""

    def _repr_html_(self) -> str:
        shown = self._shown()
        return notebook.html_table(
            "Rate", ["value, 95 % interval", "n", "unscored"], [[shown, self.n, self.unscored]]
        )


@dataclasses.dataclass(frozen=True)
class Effect(Estimate):
    """A causal effect: the share of the difference between two models that a treatment restores."""

    measure: str = "refused"
    """The score whose difference is explained."""

    def _shown(self) -> str:
        return super()._shown() + (f" of the difference in {self.measure}" if self.value is not None else "")

    def _repr_html_(self) -> str:
        shown = super()._shown()
        columns = ["share of the difference, 95 % interval", "n", "unscored"]
        return notebook.html_table(
            f"Causal effect on {self.measure}", columns, [[shown, self.n, self.unscored]]
        )


@dataclasses.dataclass(frozen=True)
class Difference(Estimate):
    """A mean of paired differences."""

    SIGNED = True
    p: float | None = None
    """Two-sided p-value of no difference; of yes and no under two treatments McNemar's exact one."""
    p_holm: float | None = None
    """The same held against all comparisons of a table of more than ten."""
    by_seed: tuple[float | None, ...] = ()
    """The difference of every seed, where there are several."""

    @property
    def clear(self) -> bool:
        """What this project calls clearly more (or clearly less, where the value is below 0).

        The interval excludes 0, the exact or calibrated test rejects (over a table of more than ten by Holm),
        and there are prompts, random sets and seeds enough to say so. The interval is made to hold 0 where
        the test does not reject, so that the two never contradict.
        """
        p = self.p if self.p_holm is None else self.p_holm
        return self.why is None and p is not None and p <= LEVEL and self.excludes_zero

    def _repr_html_(self) -> str:
        shown = self._shown()
        columns = ["difference, 95 % interval", "clear", "pairs", "left out"]
        return notebook.html_table(
            "Paired difference", columns, [[shown, clear_word(self.to_json()), self.n, self.unscored]]
        )

    def to_json(self) -> DifferenceRecord:
        """`{value, low, high, n, unscored, clear, p}`, and what else is known of the difference."""
        return {**super().to_json(), "p": self.p, "clear": self.clear}


def is_clear(record: Mapping[str, Any] | None) -> bool:
    """Whether a difference read back from JSON is clear; one written without the decision is not."""
    return bool(record and record.get("clear"))


def stands_out(record: Mapping[str, Any], chance: Mapping[str, Any]) -> bool:
    """Whether a difference is clear, its interval lies outside the range that chance has, and no more than
    one in twenty of random ones and itself is as large, which takes nineteen.

    Of no range, whether it is clear.
    """
    if not is_clear(record) or chance.get("low") is None:
        return is_clear(record)
    among = record.get("p_among_random")
    outside = record["low"] > chance["high"] or record["high"] < chance["low"]
    return bool(outside and (among is None or among <= LEVEL))


def clear_word(record: Mapping[str, Any] | None) -> str:
    """`clear`, `not clear`, or why nothing can be said, of a difference as JSON values."""
    if record is None:
        return "not compared"
    return "clear" if is_clear(record) else str(record.get("why") or "not clear")


@dataclasses.dataclass(frozen=True)
class McNemar:
    """Prompts on which two treatments disagree, and how likely a split this uneven is where neither is
    better.
    """

    first_only: int
    """Prompts with outcome 1 under the first treatment and 0 under the second."""
    second_only: int
    """The other way round."""
    p: float | None
    """Two-sided exact p-value; 1 where they never disagree, None where no prompt is scored under both."""
    n: int
    """Prompts scored under both."""
    unscored: int = 0
    """Prompts left out."""

    def __str__(self) -> str:
        shown = "undefined" if self.p is None else f"p {self.p:.2g}"
        return f"{self.first_only} against {self.second_only} of {self.n}, {shown}"

    def to_json(self) -> McNemarRecord:
        """`{first_only, second_only, p, n, unscored}`."""
        return cast(McNemarRecord, dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Agreement(Recorded[KappaRecord]):
    """How far two judges agree beyond chance.

    Differs from a plain rate in that `kappa` is 0 where they agree as often as chance would have it, and 1
    where they always do.
    """

    first: str
    second: str
    kappa: Rate
    """Cohen's κ and its 95 % interval; `None` where both judges gave one and the same verdict throughout."""
    same: Rate
    """Share of completions with the same verdict."""
    table: tuple[tuple[int, int], tuple[int, int]]
    """Counts: rows are the first judge's no and yes, columns the second's."""

    def __str__(self) -> str:
        return f"κ {self.kappa} ({self.first}, {self.second})"

    def _repr_html_(self) -> str:
        kappa, same = (notebook.interval(each.to_json()) for each in (self.kappa, self.same))
        columns = ["judges", "Cohen’s κ", "same verdict", "n"]
        return notebook.html_table(
            "Agreement beyond chance", columns, [[f"{self.first}, {self.second}", kappa, same, self.kappa.n]]
        )


# Sets beside chance


class ChanceRecord(TypedDict):
    """A number of sets or scores beside what unrelated ones give."""

    value: float | None
    expected: NotRequired[float]
    low: NotRequired[float]
    high: NotRequired[float]
    """The range that holds 95 % of random draws."""
    verdict: NotRequired[str]
    """`more`, `fewer` or `as chance`."""
    matched: NotRequired["ChanceRecord"]
    """Beside unrelated ones with as many members in every matrix."""
    n: NotRequired[int]
    why: NotRequired[str]
    """Of a number that does not exist."""


class SharedRecord(TypedDict):
    """What two sets over the same candidates share."""

    sizes: list[int]
    candidates: int
    shared: ChanceRecord
    jaccard: ChanceRecord
    overlap_coefficient: ChanceRecord
    corrected: float | None
    p_at_least: dict[str, float]


class SetPairRecord(SharedRecord):
    """Two sets held against one another."""

    names: list[str]
    outside: list[int]
    """Members of each that the other search did not look at."""
    units: SharedRecord
    spearman: ChanceRecord
    """Rank agreement over all candidates."""
    spearman_union: ChanceRecord
    """Rank agreement over the union of the two sets."""


# evaluate


class JudgedRecord(TypedDict):
    """What one judge says of one suite."""

    name: str
    """The name it was asked for by."""
    harm_is: str
    """`harmful`, or `complied` of a judge of refusals."""
    harm: NotRequired[EstimateRecord]
    refused: NotRequired[EstimateRecord]
    over_refusal: NotRequired[EstimateRecord]
    score: NotRequired[EstimateRecord]
    """Mean of the number that a judge gives, such as the cost of a cost model."""
    by_seed: NotRequired[dict[str, list[float | None]]]
    noise_floor: NotRequired[dict[str, float | None]]
    """By measure the largest difference between two seeds of one model."""


class SliceRecord(TypedDict):
    """The prompts of one category, language or attack."""

    value: str
    n: int
    judges: dict[str, dict[str, EstimateRecord]]


class SuiteRecord(TypedDict):
    """One suite's requests of one kind."""

    suite: str
    kind: str
    n: int
    cut_off: int
    """Answers, of all seeds, that were cut at the limit of tokens."""
    judges: dict[str, JudgedRecord]
    by: dict[str, list[SliceRecord]]


class TaskRecord(EstimateRecord):
    """One task of capability."""

    task: str
    metric: str
    higher_is_better: bool
    details: dict[str, Any]


class CutRecord(TypedDict):
    """By judge harm and refusal over all harmful suites, with answers cut at a number of tokens."""

    tokens: int
    harm: dict[str, EstimateRecord]
    refused: dict[str, EstimateRecord]
    cut_off: int
    """Answers that go on behind the cut."""


class EvaluatedArmRecord(TypedDict):
    """One model on all suites and tasks; `harm` and `over_refusal` by judge over all suites together."""

    name: str
    harm: dict[str, EstimateRecord]
    over_refusal: dict[str, EstimateRecord]
    suites: list[SuiteRecord]
    lengths: list[CutRecord]
    """The length curve; empty where none was asked for."""
    capability: list[TaskRecord]


class SuiteChangeRecord(TypedDict):
    """One measure of one suite by one judge, under two treatments."""

    suite: str
    kind: str
    judge: str
    measure: str
    before: EstimateRecord
    after: EstimateRecord
    difference: DifferenceRecord
    mcnemar: McNemarRecord | None
    noise_floor: float | None
    above_noise: bool | None


class TaskChangeRecord(TypedDict):
    """One task under two treatments: the share of the first value that is lost, and its interval."""

    task: str
    metric: str
    before: EstimateRecord
    after: EstimateRecord
    drop: float | None
    drop_low: float | None
    drop_high: float | None
    n: int
    mcnemar: McNemarRecord | None


class JudgesRecord(KappaRecord):
    """How far two judges of an evaluation agree on one kind of requests."""

    kind: str
    measure: str


class GateRecord(TypedDict):
    """Whether thresholds are met, and a line for each that is not."""

    passed: bool
    missed: list[str]


class EvaluationRecord(TypedDict):
    """evaluate."""

    model: str
    treatment: str | None
    max_new_tokens: int
    """Longest answer, in tokens."""
    untreated: EvaluatedArmRecord | None
    treated: EvaluatedArmRecord | None
    baseline: EvaluatedArmRecord | None
    changes: list[SuiteChangeRecord]
    capability_changes: list[TaskChangeRecord]
    agreement: list[JudgesRecord]
    gate: GateRecord | None
    notes: list[str]


# Guard


class AreaRecord(EstimateRecord):
    """An area under the ROC curve; of several random sets their mean, lowest and highest."""

    sets: NotRequired[list[float]]


class GuardSliceRecord(TypedDict):
    """A slice of the requests a guard is held against, with the area of every classifier on it."""

    value: str
    n_unsafe: int
    n_safe: int
    against: str | None
    """What a slice of one kind is held against."""
    flagged_unsafe: EstimateRecord
    flagged_safe: EstimateRecord
    auroc: dict[str, AreaRecord]
    difference: dict[str, DifferenceRecord]
    """From the classifier that all are compared with."""
    look_alikes: NotRequired["GuardSliceRecord"]
    tpr_at_fpr: NotRequired[dict[str, dict[str, EstimateRecord]]]
    """Of what was left out of fitting, by false-positive rate and classifier."""


class GuardMeasures(TypedDict):
    """What a classifier does on the requests as written; of random sets the means."""

    average_precision: EstimateRecord
    macro_f1: EstimateRecord
    """Where a probability of one half or more is called unsafe."""
    tpr_at_fpr: dict[str, EstimateRecord]
    expected_calibration_error: float


class GuardClassifierRecord(GuardMeasures):
    """A classifier by name, beside the one that all are compared with."""

    name: str
    auroc: AreaRecord
    difference: NotRequired[DifferenceRecord]


class ReliabilityRecord(TypedDict):
    """A bin of a reliability diagram: mean probability, and the share of unsafe requests with its
    interval.
    """

    probability: float
    unsafe: float | None
    low: float | None
    high: float | None
    n: int


class HistogramRecord(TypedDict):
    """Counts between edges."""

    edges: list[float]
    safe: list[int]
    unsafe: list[int]


class GuardCurvesRecord(TypedDict):
    """Curves of every classifier, of random sets the first, and the histogram of the reference's
    probabilities.
    """

    roc: dict[str, list[tuple[float, float]]]
    precision_recall: dict[str, list[tuple[float, float]]]
    reliability: dict[str, list[ReliabilityRecord]]
    histogram: HistogramRecord


class GuardEvaluationRecord(GuardMeasures):
    """guard evaluate: the guard on the requests as written, and the tables beside it."""

    auroc: AreaRecord
    macro_f1_in_force: EstimateRecord
    """Where what the guard flags at its threshold is called unsafe, truncated requests too."""
    n_neurons: int
    pooling: str
    threshold: float
    in_force: str
    n_unsafe: int
    n_safe: int
    flagged_unsafe: EstimateRecord
    flagged_safe: EstimateRecord
    compared: str
    baselines: list[GuardClassifierRecord]
    tables: dict[str, list[GuardSliceRecord]]
    over_refusal: list[GuardSliceRecord]
    attacks: list[GuardSliceRecord]
    perturbations: list[GuardSliceRecord]
    lengths: list[GuardSliceRecord]
    leave_out: dict[str, list[GuardSliceRecord]]


class GuardWorthRecord(GuardEvaluationRecord):
    """A guard's evaluation with its curves and warnings."""

    curves: GuardCurvesRecord
    notes: list[str]


class GuardRatesRecord(TypedDict):
    """Unsafe outputs without and with the guard, the share cut, and the safe requests it does not answer."""

    before: EstimateRecord
    after: EstimateRecord
    cut: EstimateRecord
    blocked: EstimateRecord


class GuardLanguageRecord(GuardRatesRecord):
    """The same for one language."""

    language: str


class GuardOutputsRecord(GuardRatesRecord):
    """What was written with and without the guard, as a judge sees it."""

    judge: str
    change: DifferenceRecord
    asked: EstimateRecord
    written: EstimateRecord
    changed: int
    refused_by_model: int
    by: list[GuardLanguageRecord]


class GuardStoppedRecord(TypedDict):
    """Labelled answers that a guard's classifier for answers stops, and how well it tells them apart."""

    source: str
    auroc: EstimateRecord
    stopped_unsafe: EstimateRecord
    stopped_safe: EstimateRecord


class GuardAnswersRecord(GuardStoppedRecord):
    """The same of all sources together, and of each."""

    every: int
    threshold: float
    by: list[GuardStoppedRecord]


class GuardSettingRecord(TypedDict):
    """Areas of a set of neurons and of random ones in one setting, and their paired difference."""

    setting: str
    auroc: float
    random: list[float]
    difference: DifferenceRecord


class GuardCountRecord(GuardSettingRecord):
    """The same of so many neurons by one method."""

    method: str
    count: int


# doctor


class CheckRecord(TypedDict):
    """One experiment on a model; `passed` is None where it only informs."""

    check: str
    passed: bool | None
    measured: str | float
    allowed: str | float | None


class ExaminationRecord(TypedDict):
    """doctor."""

    model: str
    healthy: bool
    checks: list[CheckRecord]
