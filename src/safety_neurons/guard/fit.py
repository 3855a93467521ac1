"""Fit a guard on labelled prompts: pooling, penalty, calibration and thresholds for stated false-positive
rates.
"""

import dataclasses
import math
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int

from safety_neurons.arguments import well_typed
from safety_neurons.counting import numbered
from safety_neurons.errors import InputError, UsageError
from safety_neurons.guard.calibration import (
    TARGETS,
    Classifier,
    OperatingPoint,
    check_probability,
    expected_calibration_error,
    fit_calibration,
    log_loss,
    operating_points,
    rates_at,
    threshold_for,
)
from safety_neurons.guard.features import Features, Pooling, read_poolings, read_tokens, readings
from safety_neurons.guard.guard import PROVISIONAL, Guard, bindings_of
from safety_neurons.guard.verdict import said_of_unread
from safety_neurons.model import BatchSize, Encoded, LanguageModel, Progress, as_prompts
from safety_neurons.model.language_model import Texts
from safety_neurons.neurons import NeuronSet
from safety_neurons.prompt_lists import Prompt, Prompts
from safety_neurons.prompt_lists.readers import LOOK_ALIKES, Source
from safety_neurons.results import Rate, auroc, plain, rate
from safety_neurons.results.estimates import GroupLabels, clusters_of

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Inverse strengths of the L2 penalty that are tried."""
SHARES = (0.5, 0.2, 0.3)
LEAST = 10
"""Examples of either kind that are needed."""
AUTO = (Pooling("last"), Pooling("mean"), Pooling("max", 4), Pooling("max", 16))
"""Poolings that are tried where the choice is left to validation; the first of equals is taken."""
BINS = 20
_CONSTANT = 1e-6

Values = Float[np.ndarray, "prompt feature"]
Labels = Bool[np.ndarray, " prompt"]
Readings = Float[np.ndarray, "_ feature"]
"""Features of the further readings of one conversation, or of the tokens of one text."""


@dataclass(frozen=True)
class CalibrationSettings:
    """How the scores of a guard become probabilities, and what its threshold is chosen for."""

    calibration: str = "auto"
    """`temperature`, `isotonic`, or `auto`."""
    fpr: float = 0.01
    """False-positive rate of the threshold in force."""
    seed: int = 0
    """Of the folds that choose the calibration, and of the split of a fit."""

    def __post_init__(self) -> None:
        check_probability(self.fpr, "false-positive rate")


@well_typed
@dataclass(frozen=True)
class FitSettings(CalibrationSettings):
    """How a guard is fit."""

    pooling: Pooling | str = "auto"
    """`last`, `mean`, `max`, `agree`, or `auto` for what does best on the validation split: last token, mean,
    and the largest mean over windows of 4 and of 16 tokens."""
    window: int | None = None
    """Tokens of a window of `max`, and of `agree`."""
    agree: int | None = None
    """Tokens of the window of `agree` that have to reach the threshold; half of it where None."""
    targets: Sequence[float] = TARGETS
    """False-positive rates to store operating points for, where enough safe prompts support them."""
    shares: Sequence[float] = SHARES
    """Of train, validation and calibration."""
    penalties: Sequence[float] = PENALTIES
    """Inverse strengths of the L2 penalty to choose from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pooling == "auto" and self.window is not None:
            raise UsageError(
                f"a window of {self.window} tokens with pooling 'auto', which tries its own; name "
                "pooling 'max' or 'agree'"
            )
        if self.pooling != "agree" and self.agree is not None:
            raise UsageError(
                f"{self.agree} tokens that agree with pooling {self.pooling!r}; expected 'agree'"
            )

    @property
    def poolings(self) -> tuple[Pooling, ...]:
        """Those that are tried; the first of equals is taken."""
        return AUTO if self.pooling == "auto" else (Pooling.of(self.pooling, self.window, self.agree),)


@dataclass(frozen=True)
class Split:
    """Which examples the weights are fit on, which choose among fits, and which calibrate and set thresholds,
    by index.
    """

    train: Int[np.ndarray, " train"]
    validation: Int[np.ndarray, " validation"]
    calibration: Int[np.ndarray, " calibration"]


@well_typed
def stratified_split(
    labels: Labels, *, seed: int = 0, shares: Sequence[float] = SHARES, groups: GroupLabels = None
) -> Split:
    """A split that gives each part its share of either class; what shares a group stays together.

    Args:
        labels: which examples are unsafe.
        seed: of the draw.
        shares: of train, validation and calibration.
        groups: what examples share.

    Raises:
        InputError: fewer than ten examples of a class, or groups so large that a part is left with one class.
        UsageError: shares that do not sum to 1.

    Source: none of the papers, which fit and choose on the same prompts.
    """
    if len(shares) != 3 or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-9:
        raise UsageError(
            f"shares {tuple(shares)}; expected three positive numbers that sum to 1: train, validation, "
            "calibration"
        )
    check_classes(labels)
    generator = np.random.default_rng(seed)
    clusters = clusters_of(groups, len(labels))
    numbers, first = np.unique(clusters, return_index=True)
    kind = np.where(
        np.isin(numbers, clusters[labels]), np.where(np.isin(numbers, clusters[~labels]), 2, 0), 1
    )
    part_of = np.zeros(len(numbers), np.int64)
    for each in np.unique(kind):
        drawn = generator.permutation(np.flatnonzero(kind == each)[np.argsort(first[kind == each])])
        sizes = np.bincount(np.searchsorted(numbers, clusters), minlength=len(numbers))[drawn]
        cuts = np.cumsum([round(shares[0] * sizes.sum()), max(1, round(shares[1] * sizes.sum()))])
        part_of[drawn] = np.searchsorted(cuts, np.cumsum(sizes) - sizes, side="right")
    own = part_of[np.searchsorted(numbers, clusters)]
    parts = [np.flatnonzero(own == place) for place in range(3)]
    lacking = [
        name
        for name, part in zip(("train", "validation", "calibration"), parts, strict=True)
        if len(set(labels[part].tolist())) < 2
    ]
    if lacking and len(numbers) < len(labels):
        raise InputError(
            f"{len(numbers)} groups among {len(labels)} examples leave the {lacking[0]} part without one "
            "class; expected more groups of either kind, or none"
        )
    return Split(*parts)


def check_classes(labels: Labels, what: str = "requests", do: str = "give more of them") -> None:
    """Raise an error unless there are enough examples of both kinds; it says what they are and what to do."""
    n_unsafe = int(labels.sum())
    for count, word in ((n_unsafe, "unsafe"), (len(labels) - n_unsafe, "safe")):
        if count < LEAST:
            raise InputError(
                f"{count} {word} {what} among {len(labels)}; expected at least {LEAST} of either kind to fit "
                f"on: {do}"
            )


@dataclass(frozen=True, eq=False)
class CalibratedClassifier:
    """A calibrated classifier with what is known of it on the examples that calibrated it.

    Attributes:
        classifier: calibrated.
        operating_points: for the false-positive rates asked for.
        threshold: the one in force: that of the wanted false-positive rate, provisional where too few safe
            examples support it.
        fpr: the false-positive rate that was wanted.
        auroc: on the examples, which chose nothing.
        calibration_error: expected calibration error there; in sample for the calibration's own few numbers.
        log_losses: cross-validated log loss of each calibration that was tried.
        probabilities: calibrated, of the examples, in their order.
        notes: warnings.
    """

    classifier: Classifier
    operating_points: tuple[OperatingPoint, ...]
    threshold: float
    fpr: float
    auroc: Rate
    calibration_error: float
    log_losses: Mapping[str, float]
    probabilities: Float[np.ndarray, " example"]
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Fitted(CalibratedClassifier):
    """A classifier that was fit and calibrated.

    Attributes:
        penalty: the inverse strength of the L2 penalty that was chosen.
        validation_auroc: of the chosen penalty, on the split that chose it.
        split: who was in which part; the calibration part calibrated.
    """

    penalty: float
    validation_auroc: Rate
    split: Split


@well_typed
def fit_on_features(
    values: Values,
    labels: Labels,
    *,
    split: Split | None = None,
    readings: Mapping[int, Readings] | None = None,
    groups: GroupLabels = None,
    agreed: "AgreedFit | None" = None,
    **settings: Any,
) -> Fitted:
    """A calibrated linear classifier on any features: neurons, a residual stream, word counts.

    Weights are fit on the train split for every penalty, the validation split chooses among them (AUROC, then
    log loss), the chosen penalty is fit again on both, and the calibration split calibrates and sets
    thresholds. Classes are weighted to count alike.

    Args:
        values: one row an example; finite.
        labels: which examples are unsafe.
        split: who is in which part, so that other features are compared on the same; drawn from the seed
            where None.
        readings: of calibration examples that are read in several ways the features of the further ones, by
            example; the largest score counts, as it does in a verdict.
        groups: what examples share.
        agreed: the classifier that chose the token of each example: it is calibrated, and nothing is fit.
        **settings: those of `FitSettings`.

    Raises:
        InputError: NaN or infinity, fewer than ten examples of a class. UsageError: arguments out of range.

    Source: Chen et al., arXiv 2406.14144, section 6 (logistic regression on safety neurons). Differs:
    standardised, with a chosen penalty, calibrated, and with thresholds from safe examples that nothing was
    fit on.
    """
    how = FitSettings(**settings)
    if values.ndim != 2 or len(values) != len(labels) or not values.shape[1]:
        raise InputError(
            f"features of shape {values.shape} and {len(labels)} labels; expected one row of at least "
            "one feature per label"
        )
    if not np.isfinite(values).all():
        raise InputError(
            f"{int((~np.isfinite(values).all(1)).sum())} examples hold NaN or infinity; leave them out "
            "before fitting"
        )
    parts = split or stratified_split(labels, seed=how.seed, shares=how.shares, groups=groups)
    shared = None if groups is None else np.array(groups, object)
    choice = agreed.choice if agreed else best_penalty(values, labels, parts, how.penalties, shared)
    both = np.sort(np.concatenate([parts.train, parts.validation]))
    notes = list(choice.notes)
    uncalibrated = (
        agreed.classifier if agreed else regression(values[both], labels[both], choice.penalty, notes)
    )
    held, unsafe = (
        torch.from_numpy(np.ascontiguousarray(values[parts.calibration])),
        labels[parts.calibration],
    )
    scores = largest_scores(
        uncalibrated, held, [(readings or {}).get(int(example)) for example in parts.calibration]
    )
    held_groups = None if shared is None else shared[parts.calibration].tolist()
    calibrated = calibrate(uncalibrated, scores, unsafe, how, how.targets, held_groups)
    return Fitted(
        **{**vars(calibrated), "notes": tuple(dict.fromkeys([*notes, *calibrated.notes]))},
        penalty=choice.penalty,
        validation_auroc=choice.auroc,
        split=parts,
    )


def calibrate(
    classifier: Classifier,
    scores: Float64[np.ndarray, " prompt"],
    unsafe: Labels,
    how: CalibrationSettings,
    targets: Iterable[float],
    groups: GroupLabels = None,
) -> CalibratedClassifier:
    """A classifier calibrated on scores of examples that it was not fit on, and its thresholds, which are set
    on the same.
    """
    calibration, losses = fit_calibration(scores, unsafe, how.calibration, how.seed)
    calibrated = dataclasses.replace(classifier, calibration=calibration)
    probabilities = calibrated.chances(torch.from_numpy(scores)).numpy()
    points, threshold, notes = thresholds(probabilities, unsafe, how.fpr, targets, groups)
    error = expected_calibration_error(probabilities, unsafe)
    return CalibratedClassifier(
        calibrated,
        points,
        threshold,
        how.fpr,
        auroc(scores, unsafe, groups),
        error,
        losses,
        probabilities,
        tuple(notes),
    )


def thresholds(
    probabilities: Float64[np.ndarray, " prompt"],
    unsafe: Labels,
    fpr: float,
    targets: Iterable[float],
    groups: GroupLabels = None,
) -> tuple[tuple[OperatingPoint, ...], float, list[str]]:
    """Operating points, the threshold of the wanted false-positive rate, and what weakens it: too few safe
    examples make it provisional.
    """
    points = operating_points(probabilities, unsafe, sorted({*targets, fpr}, reverse=True), groups)
    active = next(point for point in points if point.fpr_target == fpr)
    if active.threshold is not None:
        return points, active.threshold, []
    note = f"the threshold for a false-positive rate of {fpr:g} is provisional: {active.why}"
    return points, threshold_for(probabilities, unsafe, fpr, groups), [note]


def largest_scores(
    classifier: Classifier,
    values: torch.Tensor,
    readings: Iterable[Readings | None],
    begun: Collection[int] = (),
) -> Float64[np.ndarray, " prompt"]:
    """Scores of prompts, each the largest over its readings: that of the prompt as a whole and those of
    further ones, where it has some.

    `begun`: places of the prompts whose whole does not count beside the others; see `Guard.counting`.
    """
    scores = classifier.scores(values).numpy()
    for place, more in enumerate(readings):
        if more is not None and len(more):
            further = float(classifier.scores(torch.from_numpy(more)).max())
            scores[place] = further if place in begun else max(scores[place], further)
    return scores


def varying(values: Values) -> bool:
    """Whether any feature differs between examples by more than rounding."""
    wide = values.astype(np.float64)
    return bool(len(wide)) and bool((np.ptp(wide, axis=0) > _CONSTANT * np.abs(wide).max(0)).any())


@dataclass(frozen=True)
class PenaltyChoice:
    """The penalty that did best on the validation split.

    Attributes:
        penalty: inverse strength.
        auroc: on the validation split.
        loss: log loss there.
        notes: warnings of any fit.
    """

    penalty: float
    auroc: Rate
    loss: float
    notes: tuple[str, ...] = field(default=())

    @property
    def rank(self) -> tuple[float, float]:
        """Sorts better choices first: the larger area, then the smaller loss."""
        return (-round(self.auroc.value or 0.0, 6), self.loss)


def best_penalty(
    values: Values,
    labels: Labels,
    split: Split,
    penalties: Sequence[float] = PENALTIES,
    shared: np.ndarray | None = None,
) -> PenaltyChoice:
    """The penalty with the largest AUROC on the validation split, the smallest log loss among equals."""
    unsafe, held = labels[split.validation], torch.from_numpy(np.ascontiguousarray(values[split.validation]))
    choices, notes = [], list[str]()
    groups = None if shared is None else shared[split.validation].tolist()
    for penalty in penalties:
        scores = regression(values[split.train], labels[split.train], penalty, notes).scores(held).numpy()
        choices.append(PenaltyChoice(penalty, auroc(scores, unsafe, groups), log_loss(scores, unsafe)))
    return dataclasses.replace(
        min(choices, key=lambda choice: choice.rank), notes=tuple(dict.fromkeys(notes))
    )


@dataclass(frozen=True, eq=False)
class AgreedFit:
    """A classifier of tokens, of which several have to agree.

    Attributes:
        choice: its penalty.
        classifier: not calibrated.
    """

    choice: PenaltyChoice
    classifier: Classifier


def fit_agreeing(
    tokens: Sequence[Readings],
    labels: Labels,
    split: Split,
    agree: int,
    penalties: Sequence[float] = PENALTIES,
    groups: GroupLabels = None,
) -> AgreedFit:
    """A classifier fit on single tokens, each labelled as the text it is of.

    The penalty is the one under which the `agree`-th highest token of a text tells the validation split apart
    best; it is fit again on train and validation.

    Args:
        tokens: of every text the activations at its last tokens.
        labels: which texts are unsafe.
        split: of the texts.
        agree: tokens that have to agree.
        penalties: to choose from.
        groups: what texts share.
    """
    notes: list[str] = []

    def fitted(texts: Int[np.ndarray, " text"], penalty: float) -> Classifier:
        counts = [len(tokens[text]) for text in texts]
        rows = np.concatenate([tokens[text] for text in texts])
        return regression(rows, np.repeat(labels[texts], counts), penalty, notes)

    unsafe, choices = labels[split.validation], []
    shared = None if groups is None else np.array(groups, object)[split.validation].tolist()
    for penalty in penalties:
        classifier = fitted(split.train, penalty)
        scores = np.array(
            [
                np.sort(classifier.scores(torch.from_numpy(tokens[text])).numpy())[
                    -min(agree, len(tokens[text]))
                ]
                for text in split.validation
            ]
        )
        choices.append(PenaltyChoice(penalty, auroc(scores, unsafe, shared), log_loss(scores, unsafe)))
    best = min(choices, key=lambda choice: choice.rank)
    both = np.sort(np.concatenate([split.train, split.validation]))
    classifier = fitted(both, best.penalty)
    return AgreedFit(dataclasses.replace(best, notes=tuple(dict.fromkeys(notes))), classifier)


def regression(values: Values, labels: Labels, penalty: float, notes: list[str] | None = None) -> Classifier:
    """Logistic regression with an L2 penalty on standardised features, classes weighted to count alike.

    Not calibrated.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    wide = values.astype(np.float64)
    mean, scale = wide.mean(0).astype(np.float32), wide.std(0).astype(np.float32)
    constant = scale <= _CONSTANT * np.maximum(np.abs(wide).max(0), 1e-30)
    scale = np.where(constant, np.float32(1), scale)
    standardised = np.where(constant, 0.0, (wide - mean) / scale)
    model: Any = LogisticRegression(C=penalty, class_weight="balanced", max_iter=2000, tol=1e-6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(standardised, labels)
    if notes is not None and any(issubclass(item.category, ConvergenceWarning) for item in caught):
        notes.append(f"logistic regression with C = {penalty:g} did not converge in 2,000 steps")
    weights = np.where(constant, 0.0, model.coef_[0]).astype(np.float32)
    bias = float(model.intercept_[0])
    if not math.isfinite(bias) or not np.isfinite(weights).all():
        raise InputError(
            f"logistic regression on {values.shape} features gave NaN; expected activations of an "
            "ordinary size"
        )
    return Classifier(torch.from_numpy(mean), torch.from_numpy(scale), torch.from_numpy(weights), bias)


@well_typed
def fit_guard(
    model: LanguageModel,
    neurons: NeuronSet,
    unsafe: Texts,
    safe: Texts,
    *,
    other: tuple[Source, Source] | None = LOOK_ALIKES,
    batch_size: BatchSize = "auto",
    progress: Progress | None = None,
    **settings: Any,
) -> Guard:
    """A guard on some neurons of a model, bound to it, and measured on requests from another source.

    Prompts are split by class into train, validation and calibration: the first fits the weights, the second
    chooses pooling and penalty, the third calibrates and sets the thresholds. Prompts in both lists, repeated
    ones, truncated ones and those that give NaN are left out and counted. Conversations of the third part are
    read in all the ways a verdict reads them, and the largest score counts.

    Args:
        model: that will be guarded.
        neurons: whose activations to read, found on this architecture.
        unsafe: prompts that the guard is to flag (what the model would answer unsafely, or harmful requests).
        safe: prompts that it is to let pass.
        other: unsafe and safe requests from another source to measure on; by default the built-in look-alikes
            (an organism's own), None for none.
        batch_size: prompts a batch, or `auto`.
        progress: called with (batches done, in all, tokens).
        **settings: those of `FitSettings`: `pooling`, `window`, `calibration`, `fpr`, `targets`, `shares`,
            `penalties`, `seed`.

    Raises:
        InputError: fewer than ten usable prompts of either kind, or features that are the same for all.
            UsageError: arguments out of range. NeuronError: an empty set, or one of another architecture.

    Source: Chen et al., arXiv 2406.14144, section 6. Differs: standardised features, pooling and penalty
    chosen by validation, calibration, operating points, bindings.
    """
    how = FitSettings(**settings)
    data = labelled(as_prompts(unsafe), as_prompts(safe))
    encoded = model.encode(data.prompts)
    reading: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    agreed = _agreed(model, encoded, neurons, data, how, reading) if how.poolings[0].agree else None
    direction = agreed.classifier.direction if agreed else None
    read = read_poolings(model, encoded, neurons, how.poolings, direction=direction, **reading)
    usable, notes = _usable(read)
    labels = data.labels[usable]
    shared = [data.prompts.groups[int(index)] for index in usable]
    split = stratified_split(labels, seed=how.seed, shares=how.shares, groups=shared)
    held = split.calibration
    held_groups = [shared[int(place)] for place in held]
    check_varying(model, {pooling: features.values[usable] for pooling, features in read.items()})
    choices = {
        pooling: agreed.choice
        if agreed
        else best_penalty(features.values[usable], labels, split, how.penalties, np.array(shared, object))
        for pooling, features in read.items()
    }
    chosen = min(choices, key=lambda pooling: (choices[pooling].rank, how.poolings.index(pooling)))
    values = read[chosen].values[usable]
    further, unread = further_readings(
        model, [data.prompts[int(index)] for index in usable[held]], neurons, chosen, batch_size, direction
    )
    notes += said_of_parts(unread)
    readings = {int(held[place]): rows for place, rows in further.items()}
    settings |= {"penalties": [choices[chosen].penalty]}
    fitted = fit_on_features(
        values, labels, split=split, readings=readings, groups=shared, agreed=agreed, **settings
    )
    tried = [
        {"pooling": str(pooling), "auroc": choice.auroc, "log_loss": choice.loss, "penalty": choice.penalty}
        for pooling, choice in choices.items()
    ]
    guard = Guard(
        neurons=neurons.on(model.table),
        pooling=chosen,
        classifier=fitted.classifier,
        operating_points=fitted.operating_points,
        threshold=fitted.threshold,
        in_force=f"{PROVISIONAL}fpr {fitted.fpr:g}",
        bindings=bindings_of(model, neurons),
        reference=histograms(
            fitted.classifier, values[held], fitted.probabilities, labels[held], held_groups
        ),
        report=plain({**_report(fitted, data, usable), "poolings": tried, "seed": how.seed}),
        notes=tuple(
            dict.fromkeys([*read[chosen].notes, *data.notes, *notes, *_overlap(neurons, data), *fitted.notes])
        ),
        model=model,
    )
    guard = with_conversations(guard, values[held], labels[held], fitted.probabilities, further, held_groups)
    return warned(guard if other is None else measured_on(guard, *other, batch_size=batch_size))


def _agreed(
    model: LanguageModel,
    encoded: Sequence[Encoded],
    neurons: NeuronSet,
    data: "Labelled",
    how: FitSettings,
    reading: Mapping[str, Any],
) -> AgreedFit:
    """The classifier that the tokens of a prompt have to agree with, fit on the split that calibrates it."""
    (pooling,) = how.poolings
    tokens: dict[int, Readings] = {}
    read_tokens(model, encoded, neurons, pooling.window, tokens.__setitem__, **reading)
    usable = [
        number
        for number, item in enumerate(encoded)
        if not item.truncated and np.isfinite(tokens[number]).all()
    ]
    labels, groups = data.labels[usable], [data.prompts.groups[number] for number in usable]
    split = stratified_split(labels, seed=how.seed, shares=how.shares, groups=groups)
    return fit_agreeing(
        [tokens[number] for number in usable], labels, split, pooling.agree, how.penalties, groups
    )


def check_varying(model: LanguageModel, read: Mapping[Pooling, Values]) -> None:
    """Refuse features that are the same for every prompt.

    Raises:
        InputError: they are, in every pooling.
    """
    if not any(varying(values) for values in read.values()):
        raise InputError(
            f"these neurons of {model.name} do the same at every prompt ({', '.join(map(str, read))}), so "
            "nothing can be learned; expected features that differ between prompts: see what the template "
            "renders (--template), or take other neurons or pooling"
        )


def further_readings(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    neurons: NeuronSet,
    pooling: Pooling,
    batch_size: BatchSize = "auto",
    direction: torch.Tensor | None = None,
) -> tuple[dict[int, Readings], set[int]]:
    """Features of the readings of conversations that are not the whole one, by place among the prompts; and
    the places of those with a reading that gave NaN or infinity, which is left out.
    """
    asked = [
        (place, way.prompt)
        for place, prompt in enumerate(prompts)
        if prompt.messages
        for way in readings(prompt)[1:]
    ]
    if not asked:
        return {}, set()
    encoded = model.encode([prompt for _, prompt in asked])
    found = read_poolings(model, encoded, neurons, [pooling], direction=direction, batch_size=batch_size)[
        pooling
    ]
    rows: dict[int, list[int]] = {}
    unread = set[int]()
    for row, (place, _) in enumerate(asked):
        if found.finite[row]:
            rows.setdefault(place, []).append(row)
        else:
            unread.add(place)
    return {place: found.values[members] for place, members in rows.items()}, unread


def said_of_parts(unread: Collection[int]) -> list[str]:
    """How many conversations count by those of their readings that gave numbers."""
    return (
        [
            f"{numbered(len(unread), 'conversation has', 'conversations have')} a reading that gave NaN or "
            "infinity: the others count"
        ]
        if unread
        else []
    )


def with_conversations(
    guard: Guard,
    values: Values,
    unsafe: Bool[np.ndarray, " prompt"],
    chances: np.ndarray,
    further: Mapping[int, Readings],
    groups: Sequence[str | None],
) -> Guard:
    """The guard with what its threshold flags of the calibration conversations: read whole, and by the
    largest of their readings.
    """
    places = sorted(further)
    if not places:
        return guard
    labels, shared = unsafe[places], [groups[place] for place in places]
    whole = guard.probabilities(torch.from_numpy(values[places])).numpy()
    fpr, tpr = rates_at(chances[places], labels, guard.threshold, shared)
    fpr_whole, tpr_whole = rates_at(whole, labels, guard.threshold, shared)
    told = {"fpr": fpr, "tpr": tpr, "fpr_read_whole": fpr_whole, "tpr_read_whole": tpr_whole}
    return dataclasses.replace(guard, report={**guard.report, "conversations": plain(told)})


def measured_on(guard: Guard, unsafe: Source, safe: Source, *, batch_size: BatchSize = "auto") -> Guard:
    """The guard with what it flags of requests from another source than those it was fit on, at the threshold
    in force.

    Source: none; probes are known to learn the wording of their two lists, and XSTest (Röttger et al., NAACL
    2024) shows what that costs.
    """
    lists = [guard.bound.prompts(source) for source in (unsafe, safe)]
    verdicts = [guard.score_batch(list(found), top=0, batch_size=batch_size) for found in lists]
    caught, wrong = (
        rate([one.told for one in told], found.groups) for told, found in zip(verdicts, lists, strict=True)
    )
    seen = sum(found.overlap(guard.report.get("prompt_digests") or []) for found in lists)
    told = {
        "unsafe": lists[0].name,
        "safe": lists[1].name,
        "threshold": guard.threshold,
        "fpr": wrong,
        "tpr": caught,
    }
    notes = said_of_unread([*verdicts[0], *verdicts[1]], "requests from another source")
    notes += (
        [f"{seen} of the requests from another source are among those the guard was fit on"] if seen else []
    )
    target = float(guard.report.get("fpr", 1.0))
    if wrong.low is not None and wrong.low > target:
        notes.append(
            f"of safe requests from another source ({lists[1].name}) it flags {wrong.value:.3f} "
            f"[{wrong.low:.3f}, {wrong.high:.3f}], more than the {target:g} it is set for: expect no less "
            "of yours, and set the threshold on them (guard recalibrate)"
        )
    return guard.noted(notes, report={**guard.report, "other": plain(told)})


def warned(guard: Guard) -> Guard:
    """The guard with what has to be said of its threshold: that it may stop nothing, that nobody measured it
    on traffic of the user's.
    """
    notes = [guard.why_idle] if guard.why_idle else []
    if not guard.confirmed:
        notes.append(
            "its false-positive rate is provisional until it was measured on your own traffic: guard "
            "recalibrate sets the threshold on safe requests of yours, guard evaluate measures it"
        )
    return guard.noted(notes)


@dataclass(frozen=True)
class Labelled:
    """Prompts with their labels, each once.

    Attributes:
        prompts: unsafe ones first.
        labels: which are unsafe.
        notes: what was left out.
    """

    prompts: Prompts
    labels: Bool[np.ndarray, " prompt"]
    notes: tuple[str, ...] = ()


def labelled(unsafe: Prompts, safe: Prompts) -> Labelled:
    """Both lists as one; what is in both is left out, repeats (case and spaces aside) count once.

    Raises:
        InputError: nothing is left of a list.
    """
    for prompts, word in ((unsafe, "unsafe"), (safe, "safe")):
        if not len(prompts):
            raise InputError(f"no {word} prompts; expected prompts of both kinds to fit a guard")
    both = set(map(_identity, unsafe)) & set(map(_identity, safe))
    kept: list[Prompt] = []
    labels: list[bool] = []
    notes = [*unsafe.notes, *safe.notes]
    for prompts, label, word in ((unsafe, True, "unsafe"), (safe, False, "safe")):
        fresh = {
            _identity(prompt): prompt for prompt in reversed(list(prompts)) if _identity(prompt) not in both
        }
        ours = [prompt for prompt in prompts if fresh.get(_identity(prompt)) is prompt]
        repeated = len(prompts) - len(ours) - sum(_identity(prompt) in both for prompt in prompts)
        if repeated:
            notes.append(
                f"{numbered(repeated, f'{word} prompt repeats', f'{word} prompts repeat')} others: "
                "each was used once"
            )
        if not ours:
            raise InputError(
                f"all {len(prompts)} {word} prompts are in the other list too; expected two different lists"
            )
        kept += ours
        labels += [label] * len(ours)
    if both:
        notes.append(f"{numbered(len(both), 'prompt is', 'prompts are')} both unsafe and safe: left out")
    return Labelled(Prompts(kept, f"{unsafe.name} and {safe.name}"), np.array(labels), tuple(notes))


def _identity(prompt: Prompt) -> str:
    """What makes two prompts the same: all turns, whatever their case and spaces."""
    turns = [f"{turn.role}\x1e{turn.content}" for turn in prompt.messages] or [f"user\x1e{prompt.text}"]
    return " ".join("\x1f".join(turns).casefold().split())


def _usable(read: dict[Pooling, Features]) -> tuple[np.ndarray, list[str]]:
    features = list(read.values())
    finite = np.logical_and.reduce([one.finite for one in features])
    usable = finite & ~features[0].truncated
    notes = []
    if not finite.all():
        notes.append(f"{numbered(int((~finite).sum()), 'prompt')} gave NaN or infinity: left out")
    if features[0].truncated.any():
        notes.append(f"left out of the fit: {numbered(int(features[0].truncated.sum()), 'truncated prompt')}")
    return np.flatnonzero(usable), notes


def _overlap(neurons: NeuronSet, data: Labelled) -> list[str]:
    digests = neurons.provenance.config.get("prompt_digests") or []
    shared = data.prompts.overlap(digests)
    return (
        [f"{shared} of the {len(data.prompts)} prompts are among those the neurons were found on"]
        if shared
        else []
    )


def _report(fitted: Fitted, data: Labelled, usable: Int[np.ndarray, " usable"]) -> dict[str, Any]:
    labels, split = data.labels[usable], fitted.split
    return {
        "auroc": fitted.auroc,
        "validation_auroc": fitted.validation_auroc,
        "expected_calibration_error": fitted.calibration_error,
        "log_losses": dict(fitted.log_losses),
        "penalty": fitted.penalty,
        "fpr": fitted.fpr,
        "split": {
            name: counted(labels[getattr(split, name)]) for name in ("train", "validation", "calibration")
        },
        "prompts": {**counted(labels), "left_out": len(data.labels) - len(usable)},
        "prompts_sha256": data.prompts.sha256,
        "prompt_digests": data.prompts.digests,
    }


def counted(labels: Labels) -> dict[str, int]:
    """How many of either label."""
    return {"unsafe": int(labels.sum()), "safe": int((~labels).sum())}


def histograms(
    classifier: Classifier,
    values: np.ndarray,
    probabilities: np.ndarray,
    unsafe: Bool[np.ndarray, " prompt"],
    groups: Sequence[str | None],
) -> dict[str, Any]:
    """What is kept of the calibration examples: histograms that later traffic is compared with, and their
    probabilities with the groups they are of.

    Probability in 20 bins of equal width; distance (root mean square of the standardised features) in 20 bins
    of equally many examples, open at both ends. The probabilities, sorted, say what any threshold catches,
    and their groups, numbered, how far that can be relied on.
    """
    edges = np.linspace(0, 1, BINS + 1)
    distances = (
        classifier.standardised(torch.from_numpy(np.ascontiguousarray(values)))
        .square()
        .mean(1)
        .sqrt()
        .numpy()
    )
    inner = np.unique(np.quantile(distances, np.linspace(0, 1, BINS + 1)[1:-1]))
    rising, clusters = np.argsort(probabilities, kind="stable"), clusters_of(groups, len(unsafe))
    sorted_by = {"safe": rising[~unsafe[rising]], "unsafe": rising[unsafe[rising]]}
    return {
        "p_unsafe": {
            "edges": edges.tolist(),
            "safe": np.histogram(probabilities[~unsafe], edges)[0].tolist(),
            "unsafe": np.histogram(probabilities[unsafe], edges)[0].tolist(),
        },
        "distance": {
            "edges": inner.tolist(),
            "counts": np.bincount(
                np.searchsorted(inner, distances, side="right"), minlength=len(inner) + 1
            ).tolist(),
        },
        "probabilities": {kind: probabilities[order].tolist() for kind, order in sorted_by.items()},
        "groups": {kind: clusters[order].tolist() for kind, order in sorted_by.items()},
    }
