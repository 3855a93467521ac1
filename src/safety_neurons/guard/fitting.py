"""Fitting a guard on a model: features of unsafe and safe prompts, the pooling that does best, a calibrated classifier, its bindings."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool

from safety_neurons.errors import InputError, UsageError
from safety_neurons.guard.bindings import bindings_of
from safety_neurons.guard.classifier import Classifier
from safety_neurons.guard.features import Features, read_poolings
from safety_neurons.guard.fit_features import PENALTIES, SHARES, Choice, Fitted, best_penalty, fit_on_features, stratified_split
from safety_neurons.guard.guard import Guard
from safety_neurons.guard.operating import TARGETS, check_probability
from safety_neurons.guard.pooling import Pooling
from safety_neurons.model import BatchSize, LanguageModel, Progress, as_prompts
from safety_neurons.model.language_model import Texts
from safety_neurons.neurons import NeuronSet
from safety_neurons.prompts import Prompt, Prompts
from safety_neurons.results import plain

AUTO = (Pooling("last"), Pooling("mean"), Pooling("max", 4), Pooling("max", 16))
"""Poolings that are tried where the choice is left to validation; the first of equals is taken."""
BINS = 20


def fit_guard(
    model: LanguageModel,
    neurons: NeuronSet,
    unsafe: Texts,
    safe: Texts,
    *,
    pooling: Pooling | str = "auto",
    window: int | None = None,
    calibration: str = "auto",
    fpr: float = 0.01,
    targets: Sequence[float] = TARGETS,
    shares: Sequence[float] = SHARES,
    penalties: Sequence[float] = PENALTIES,
    seed: int = 0,
    batch_size: BatchSize = "auto",
    progress: Progress | None = None,
) -> Guard:
    """A guard on some neurons of a model, bound to it.

    Prompts are split by class into train, validation and calibration: the first fits the weights, the second chooses pooling and penalty,
    the third calibrates and sets the thresholds. Prompts in both lists, repeated ones, truncated ones and those that give NaN are left out
    and counted.

    Args:
        model: that will be guarded.
        neurons: whose activations to read, found on this architecture.
        unsafe: prompts that the guard is to flag (what the model would answer unsafely, or harmful requests).
        safe: prompts that it is to let pass.
        pooling: `last`, `mean`, `max`, or `auto` for what does best on the validation split: last token, mean, and the largest mean over
            windows of 4 and of 16 tokens.
        window: tokens of a window of `max`.
        calibration: `temperature`, `isotonic`, or `auto`.
        fpr: false-positive rate of the threshold in force.
        targets: false-positive rates to store operating points for, where enough safe prompts support them.
        shares: of train, validation and calibration.
        penalties: inverse strengths of the L2 penalty to choose from.
        seed: of the split and of the folds of calibration.
        batch_size: prompts a batch, or `auto`.
        progress: called with (batches done, in all, tokens).

    Raises:
        InputError: fewer than ten usable prompts of either kind. UsageError: arguments out of range. NeuronError: an empty set, or one of
            another architecture.

    Source: Chen et al., arXiv 2406.14144, section 6.
    Differs: standardised features, pooling and penalty chosen by validation, calibration, operating points, bindings.
    """
    check_probability(fpr, "false-positive rate")
    data = labelled(as_prompts(unsafe), as_prompts(safe))
    poolings = AUTO if pooling == "auto" else (Pooling.of(pooling, window),)
    if pooling == "auto" and window is not None:
        raise UsageError(f"a window of {window} tokens with pooling 'auto', which tries its own; name pooling 'max'")
    read = read_poolings(model, model.encode(data.prompts), neurons, poolings, batch_size=batch_size, progress=progress)
    usable, notes = _usable(read)
    labels = data.labels[usable]
    split = stratified_split(labels, seed=seed, shares=shares)
    choices = {found: best_penalty(features.values[usable], labels, split, penalties) for found, features in read.items()}
    chosen = min(choices, key=lambda found: (choices[found].rank, poolings.index(found)))
    fitted = fit_on_features(
        read[chosen].values[usable],
        labels,
        calibration=calibration,
        fpr=fpr,
        targets=targets,
        penalties=[choices[chosen].penalty],
        split=split,
        seed=seed,
    )
    said = [*read[chosen].notes, *data.notes, *notes, *_overlap(neurons, data), *fitted.notes]
    return _guard(model, neurons, chosen, fitted, data, read[chosen], usable, choices, said, seed)


@dataclasses.dataclass(frozen=True)
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
        fresh = {_identity(prompt): prompt for prompt in reversed(list(prompts)) if _identity(prompt) not in both}
        ours = [prompt for prompt in prompts if fresh.get(_identity(prompt)) is prompt]
        repeated = len(prompts) - len(ours) - sum(_identity(prompt) in both for prompt in prompts)
        if repeated:
            notes.append(f"{repeated} {word} prompts are repeats of others: each was used once")
        if not ours:
            raise InputError(f"all {len(prompts)} {word} prompts are in the other list too; expected two different lists")
        kept += ours
        labels += [label] * len(ours)
    if both:
        notes.append(f"{len(both)} prompts are both unsafe and safe: left out")
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
        notes.append(f"{int((~finite).sum())} prompts gave NaN or infinity: left out")
    if features[0].truncated.any():
        notes.append(f"{int(features[0].truncated.sum())} truncated prompts were left out of the fit")
    return np.flatnonzero(usable), notes


def _overlap(neurons: NeuronSet, data: Labelled) -> list[str]:
    digests = neurons.provenance.config.get("prompt_digests") or []
    shared = data.prompts.overlap(digests)
    return [f"{shared} of the {len(data.prompts)} prompts are among those the neurons were found on"] if shared else []


def _guard(
    model: LanguageModel,
    neurons: NeuronSet,
    pooling: Pooling,
    fitted: Fitted,
    data: Labelled,
    features: Features,
    usable: np.ndarray,
    choices: dict[Pooling, Choice],
    notes: Sequence[str],
    seed: int,
) -> Guard:
    labels = data.labels[usable]
    supported = next(point.supported for point in fitted.operating_points if point.fpr_target == fitted.fpr)
    held = usable[fitted.split.calibration]
    report = {
        **_report(fitted, labels),
        "prompts": {"unsafe": int(labels.sum()), "safe": int((~labels).sum()), "left_out": len(data.labels) - len(usable)},
        "prompts_sha256": data.prompts.sha256,
        "prompt_digests": data.prompts.digests,
        "poolings": [
            {"pooling": str(found), "auroc": choice.auroc, "log_loss": choice.loss, "penalty": choice.penalty}
            for found, choice in choices.items()
        ],
        "seed": seed,
    }
    return Guard(
        neurons.on(model.table),
        pooling,
        fitted.classifier,
        fitted.operating_points,
        fitted.threshold,
        f"fpr {fitted.fpr:g}" if supported else f"provisional fpr {fitted.fpr:g}",
        bindings_of(model, neurons),
        histograms(fitted.classifier, features.values[held], fitted.probabilities, data.labels[held]),
        plain(report),
        tuple(dict.fromkeys(notes)),
        None,
        model,
    )


def _report(fitted: Fitted, labels: np.ndarray) -> dict[str, Any]:
    split = fitted.split
    return {
        "auroc": fitted.auroc,
        "validation_auroc": fitted.validation_auroc,
        "expected_calibration_error": fitted.calibration_error,
        "log_losses": dict(fitted.log_losses),
        "penalty": fitted.penalty,
        "fpr": fitted.fpr,
        "split": {
            name: {"unsafe": int(labels[part].sum()), "safe": int((~labels[part]).sum())}
            for name, part in (("train", split.train), ("validation", split.validation), ("calibration", split.calibration))
        },
    }


def histograms(
    classifier: Classifier, values: np.ndarray, probabilities: np.ndarray, unsafe: Bool[np.ndarray, " prompt"]
) -> dict[str, Any]:
    """Histograms of calibration examples, which later traffic is compared with.

    Probability in 20 bins of equal width; distance (root mean square of the standardised features) in 20 bins of equally many examples,
    open at both ends.
    """
    edges = np.linspace(0, 1, BINS + 1)
    distances = classifier.standardised(torch.from_numpy(np.ascontiguousarray(values))).square().mean(1).sqrt().numpy()
    inner = np.unique(np.quantile(distances, np.linspace(0, 1, BINS + 1)[1:-1]))
    return {
        "p_unsafe": {
            "edges": edges.tolist(),
            "safe": np.histogram(probabilities[~unsafe], edges)[0].tolist(),
            "unsafe": np.histogram(probabilities[unsafe], edges)[0].tolist(),
        },
        "distance": {
            "edges": inner.tolist(),
            "counts": np.bincount(np.searchsorted(inner, distances, side="right"), minlength=len(inner) + 1).tolist(),
        },
    }
