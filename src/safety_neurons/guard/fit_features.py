"""Fitting on features, whatever they are features of: split, choose, fit, calibrate, set operating points. No model is needed."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int

from safety_neurons.errors import InputError, UsageError
from safety_neurons.guard.calibration import expected_calibration_error, fit_calibration, log_loss
from safety_neurons.guard.classifier import Classifier
from safety_neurons.guard.operating import TARGETS, OperatingPoint, operating_points, threshold_for
from safety_neurons.results import Rate, auroc
from safety_neurons.results.estimates import GroupLabels, clusters_of

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Inverse strengths of the L2 penalty that are tried."""
SHARES = (0.5, 0.2, 0.3)
LEAST = 10
"""Examples of either kind that are needed."""
_CONSTANT = 1e-6

Values = Float[np.ndarray, "prompt feature"]
Labels = Bool[np.ndarray, " prompt"]
Readings = Float[np.ndarray, "_ feature"]
"""Features of the further readings of one conversation."""


@dataclass(frozen=True)
class Split:
    """Which examples the weights are fit on, which choose among fits, and which calibrate and set thresholds.

    Attributes:
        train: indices.
        validation: indices.
        calibration: indices.
    """

    train: Int[np.ndarray, " train"]
    validation: Int[np.ndarray, " validation"]
    calibration: Int[np.ndarray, " calibration"]


def stratified_split(labels: Labels, *, seed: int = 0, shares: Sequence[float] = SHARES, groups: GroupLabels = None) -> Split:
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
        raise UsageError(f"shares {tuple(shares)}; expected three positive numbers that sum to 1: train, validation, calibration")
    check_classes(labels)
    generator = np.random.default_rng(seed)
    clusters = clusters_of(groups, len(labels))
    numbers, first = np.unique(clusters, return_index=True)
    kind = np.where(np.isin(numbers, clusters[labels]), np.where(np.isin(numbers, clusters[~labels]), 2, 0), 1)
    part_of = np.zeros(len(numbers), np.int64)
    for each in np.unique(kind):
        drawn = generator.permutation(np.flatnonzero(kind == each)[np.argsort(first[kind == each])])
        sizes = np.bincount(np.searchsorted(numbers, clusters), minlength=len(numbers))[drawn]
        cuts = np.cumsum([round(shares[0] * sizes.sum()), max(1, round(shares[1] * sizes.sum()))])
        part_of[drawn] = np.searchsorted(cuts, np.cumsum(sizes) - sizes, side="right")
    own = part_of[np.searchsorted(numbers, clusters)]
    parts = [np.flatnonzero(own == place) for place in range(3)]
    lacking = [
        name for name, part in zip(("train", "validation", "calibration"), parts, strict=True) if len(set(labels[part].tolist())) < 2
    ]
    if lacking and len(numbers) < len(labels):
        raise InputError(
            f"{len(numbers)} groups among {len(labels)} examples leave the {lacking[0]} part without one class; expected more groups of "
            "either kind, or none"
        )
    return Split(*parts)


def check_classes(labels: Labels) -> None:
    """Raise an error unless there are enough examples of both kinds."""
    n_unsafe = int(labels.sum())
    for count, word in ((n_unsafe, "unsafe"), (len(labels) - n_unsafe, "safe")):
        if count < LEAST:
            raise InputError(f"{count} {word} examples among {len(labels)}; expected at least {LEAST} of either kind to fit a guard")


@dataclass(frozen=True, eq=False)
class Fitted:
    """A classifier with what is known of it.

    Attributes:
        classifier: calibrated.
        operating_points: for the false-positive rates asked for.
        threshold: the one in force: that of the wanted false-positive rate, provisional where too few safe examples support it.
        fpr: the false-positive rate that was wanted.
        penalty: the inverse strength of the L2 penalty that was chosen.
        validation_auroc: of the chosen penalty, on the split that chose it.
        auroc: on the calibration split, which chose nothing.
        calibration_error: expected calibration error there; in sample for the calibration's own few numbers.
        log_losses: cross-validated log loss of each calibration that was tried.
        split: who was in which part.
        probabilities: calibrated, of the calibration split, in its order.
        notes: what had to be said.
    """

    classifier: Classifier
    operating_points: tuple[OperatingPoint, ...]
    threshold: float
    fpr: float
    penalty: float
    validation_auroc: Rate
    auroc: Rate
    calibration_error: float
    log_losses: Mapping[str, float]
    split: Split
    probabilities: Float[np.ndarray, " example"]
    notes: tuple[str, ...] = ()


def fit_on_features(
    values: Values,
    labels: Labels,
    *,
    calibration: str = "auto",
    fpr: float = 0.01,
    targets: Sequence[float] = TARGETS,
    penalties: Sequence[float] = PENALTIES,
    split: Split | None = None,
    seed: int = 0,
    readings: Mapping[int, Readings] | None = None,
    groups: GroupLabels = None,
) -> Fitted:
    """A calibrated linear classifier on any features: neurons, a residual stream, word counts.

    Weights are fit on the train split for every penalty, the validation split chooses among them (AUROC, then log loss), the chosen
    penalty is fit again on both, and the calibration split calibrates and sets thresholds. Classes are weighted to count alike.

    Args:
        values: one row an example; finite.
        labels: which examples are unsafe.
        calibration: `auto`, `temperature` or `isotonic`.
        fpr: the false-positive rate whose threshold is in force.
        targets: further false-positive rates to set operating points for.
        penalties: inverse strengths of the L2 penalty to choose from.
        split: who is in which part, so that other features are compared on the same; drawn from the seed where None.
        seed: of everything random.
        readings: of calibration examples that are read in several ways the features of the further ones, by example; the largest score
            counts, as it does in a verdict.
        groups: what examples share.

    Raises:
        InputError: NaN or infinity, fewer than ten examples of a class. UsageError: arguments out of range.

    Source: Chen et al., arXiv 2406.14144, section 6 (logistic regression on safety neurons).
    Differs: standardised, with a chosen penalty, calibrated, and with thresholds from safe examples that nothing was fit on.
    """
    if values.ndim != 2 or len(values) != len(labels) or not values.shape[1]:
        raise InputError(f"features of shape {values.shape} and {len(labels)} labels; expected one row of at least one feature per label")
    if not np.isfinite(values).all():
        raise InputError(f"{int((~np.isfinite(values).all(1)).sum())} examples hold NaN or infinity; leave them out before fitting")
    parts = split or stratified_split(labels, seed=seed, groups=groups)
    shared = None if groups is None else np.array(groups, object)
    choice = best_penalty(values, labels, parts, penalties, shared)
    both = np.sort(np.concatenate([parts.train, parts.validation]))
    notes = list(choice.notes)
    plain = regression(values[both], labels[both], choice.penalty, notes)
    held, unsafe = torch.from_numpy(np.ascontiguousarray(values[parts.calibration])), labels[parts.calibration]
    scores = largest_scores(plain, held, [(readings or {}).get(int(example)) for example in parts.calibration])
    calibrated, losses = fit_calibration(scores, unsafe, calibration, seed)
    classifier = replace(plain, calibration=calibrated)
    probabilities = classifier.chances(torch.from_numpy(scores)).numpy()
    held_groups = None if shared is None else shared[parts.calibration].tolist()
    points = operating_points(probabilities, unsafe, sorted({*targets, fpr}, reverse=True), held_groups)
    active = next(point for point in points if point.fpr_target == fpr)
    threshold = active.threshold if active.threshold is not None else threshold_for(probabilities, unsafe, fpr)
    if not active.supported:
        notes.append(f"the threshold for a false-positive rate of {fpr:g} is provisional: {active.why}")
    return Fitted(
        classifier,
        points,
        threshold,
        fpr,
        choice.penalty,
        choice.auroc,
        auroc(scores, unsafe, held_groups),
        expected_calibration_error(probabilities, unsafe),
        losses,
        parts,
        probabilities,
        tuple(dict.fromkeys(notes)),
    )


def largest_scores(classifier: Classifier, values: torch.Tensor, readings: Iterable[Readings | None]) -> Float64[np.ndarray, " prompt"]:
    """Scores of prompts, each the largest over its readings: that of the prompt as a whole and those of further ones, where it has some."""
    scores = classifier.scores(values).numpy()
    for place, more in enumerate(readings):
        if more is not None and len(more):
            scores[place] = max(scores[place], float(classifier.scores(torch.from_numpy(more)).max()))
    return scores


def varying(values: Values) -> bool:
    """Whether any feature differs between examples by more than rounding."""
    wide = values.astype(np.float64)
    return bool(len(wide)) and bool((np.ptp(wide, axis=0) > _CONSTANT * np.abs(wide).max(0)).any())


@dataclass(frozen=True)
class Choice:
    """The penalty that did best on the validation split.

    Attributes:
        penalty: inverse strength.
        auroc: on the validation split.
        loss: log loss there.
        notes: what had to be said of any fit.
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
    values: Values, labels: Labels, split: Split, penalties: Sequence[float] = PENALTIES, shared: np.ndarray | None = None
) -> Choice:
    """The penalty with the largest AUROC on the validation split, the smallest log loss among equals."""
    unsafe, held = labels[split.validation], torch.from_numpy(np.ascontiguousarray(values[split.validation]))
    choices, notes = [], list[str]()
    groups = None if shared is None else shared[split.validation].tolist()
    for penalty in penalties:
        scores = regression(values[split.train], labels[split.train], penalty, notes).scores(held).numpy()
        choices.append(Choice(penalty, auroc(scores, unsafe, groups), log_loss(scores, unsafe)))
    return replace(min(choices, key=lambda choice: choice.rank), notes=tuple(dict.fromkeys(notes)))


def regression(values: Values, labels: Labels, penalty: float, notes: list[str] | None = None) -> Classifier:
    """Logistic regression with an L2 penalty on standardised features, classes weighted to count alike; not calibrated."""
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
        raise InputError(f"logistic regression on {values.shape} features gave NaN; expected activations of an ordinary size")
    return Classifier(torch.from_numpy(mean), torch.from_numpy(scale), torch.from_numpy(weights), bias)
