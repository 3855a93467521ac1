"""Fitting a guard on a model: features of unsafe and safe prompts, the pooling that does best, a calibrated classifier, its bindings."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool

from safety_neurons.errors import InputError, UsageError
from safety_neurons.guard.bindings import bindings_of
from safety_neurons.guard.classifier import Classifier
from safety_neurons.guard.features import Features, read_poolings
from safety_neurons.guard.fit_features import (
    PENALTIES,
    SHARES,
    Choice,
    Fitted,
    Readings,
    Values,
    best_penalty,
    fit_on_features,
    stratified_split,
    varying,
)
from safety_neurons.guard.guard import PROVISIONAL, Guard
from safety_neurons.guard.operating import TARGETS, check_probability
from safety_neurons.guard.pooling import Pooling
from safety_neurons.guard.requests import readings
from safety_neurons.model import BatchSize, LanguageModel, Progress, as_prompts
from safety_neurons.model.language_model import Texts
from safety_neurons.neurons import NeuronSet
from safety_neurons.prompts import Prompt, Prompts
from safety_neurons.prompts.readers import LOOK_ALIKES, Source
from safety_neurons.results import plain, rate

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
    other: tuple[Source, Source] | None = LOOK_ALIKES,
    seed: int = 0,
    batch_size: BatchSize = "auto",
    progress: Progress | None = None,
) -> Guard:
    """A guard on some neurons of a model, bound to it, and measured on requests from another source.

    Prompts are split by class into train, validation and calibration: the first fits the weights, the second chooses pooling and penalty,
    the third calibrates and sets the thresholds. Prompts in both lists, repeated ones, truncated ones and those that give NaN are left out
    and counted. Conversations of the third part are read in all the ways a verdict reads them, and the largest score counts.

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
        other: unsafe and safe requests from another source to measure on; by default the built-in look-alikes (an organism's own), None
            for none.
        seed: of the split and of the folds of calibration.
        batch_size: prompts a batch, or `auto`.
        progress: called with (batches done, in all, tokens).

    Raises:
        InputError: fewer than ten usable prompts of either kind, or features that are the same for all. UsageError: arguments out of range.
            NeuronError: an empty set, or one of another architecture.

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
    shared = [data.prompts[int(place)].group for place in usable]
    split = stratified_split(labels, seed=seed, shares=shares, groups=shared)
    check_varying(model, {found: features.values[usable] for found, features in read.items()})
    grouped = np.array(shared, object)
    choices = {found: best_penalty(features.values[usable], labels, split, penalties, grouped) for found, features in read.items()}
    chosen = min(choices, key=lambda found: (choices[found].rank, poolings.index(found)))
    held = [data.prompts[int(place)] for place in usable[split.calibration]]
    further = further_readings(model, held, neurons, chosen, batch_size)
    fitted = fit_on_features(
        read[chosen].values[usable],
        labels,
        calibration=calibration,
        fpr=fpr,
        targets=targets,
        penalties=[choices[chosen].penalty],
        split=split,
        seed=seed,
        readings={int(split.calibration[place]): values for place, values in further.items()},
        groups=shared,
    )
    said = [*read[chosen].notes, *data.notes, *notes, *_overlap(neurons, data), *fitted.notes]
    guard = _guard(model, neurons, chosen, fitted, data, read[chosen], usable, choices, said, seed)
    values = read[chosen].values[usable[split.calibration]]
    guard = with_conversations(guard, values, labels[split.calibration], fitted.probabilities, further)
    return warned(guard if other is None else measured_on(guard, *other, batch_size=batch_size))


def check_varying(model: LanguageModel, read: Mapping[Pooling, Values]) -> None:
    """Refuse features that are the same for every prompt.

    Raises:
        InputError: they are, in every pooling.
    """
    if not any(varying(values) for values in read.values()):
        raise InputError(
            f"these neurons of {model.name} do the same at every prompt ({', '.join(map(str, read))}), so nothing can be learned; "
            "expected features that differ between prompts: see what the template renders (--template), or take other neurons or pooling"
        )


def further_readings(
    model: LanguageModel, prompts: Sequence[Prompt], neurons: NeuronSet, pooling: Pooling, batch_size: BatchSize = "auto"
) -> dict[int, Readings]:
    """Features of the readings of conversations that are not the whole one, by place among the prompts; those with NaN are left out."""
    asked = [(place, way.prompt) for place, prompt in enumerate(prompts) if prompt.messages for way in readings(prompt)[1:]]
    if not asked:
        return {}
    found = read_poolings(model, model.encode([prompt for _, prompt in asked]), neurons, [pooling], batch_size=batch_size)[pooling]
    rows: dict[int, list[int]] = {}
    for row, (place, _) in enumerate(asked):
        if found.finite[row]:
            rows.setdefault(place, []).append(row)
    return {place: found.values[members] for place, members in rows.items()}


def with_conversations(
    guard: Guard, values: Values, unsafe: Bool[np.ndarray, " prompt"], chances: np.ndarray, further: Mapping[int, Readings]
) -> Guard:
    """The guard with what its threshold flags of the calibration conversations: read whole, and by the largest of their readings."""
    places = sorted(further)
    if not places:
        return guard
    labels, whole = unsafe[places], guard.probabilities(torch.from_numpy(values[places])).numpy() >= guard.threshold
    flagged = chances[places] >= guard.threshold
    told = {
        "fpr": rate(flagged[~labels]),
        "tpr": rate(flagged[labels]),
        "fpr_read_whole": rate(whole[~labels]),
        "tpr_read_whole": rate(whole[labels]),
    }
    return dataclasses.replace(guard, report={**guard.report, "conversations": plain(told)})


def measured_on(guard: Guard, unsafe: Source, safe: Source, *, batch_size: BatchSize = "auto") -> Guard:
    """The guard with what it flags of requests from another source than those it was fit on, at the threshold in force.

    Source: none; probes are known to learn the wording of their two lists, and XSTest (Röttger et al., NAACL 2024) shows what that costs.
    """
    lists = [guard.bound.prompts(source) for source in (unsafe, safe)]
    verdicts = [guard.score_batch(list(found), top=0, batch_size=batch_size) for found in lists]
    caught, wrong = (rate([one.flagged for one in told], found.groups) for told, found in zip(verdicts, lists, strict=True))
    seen = sum(found.overlap(guard.report.get("prompt_digests") or []) for found in lists)
    told = {"unsafe": lists[0].name, "safe": lists[1].name, "threshold": guard.threshold, "fpr": wrong, "tpr": caught}
    notes = [f"{seen} of the requests from another source are among those the guard was fit on"] if seen else []
    target = float(guard.report.get("fpr", 1.0))
    if wrong.low is not None and wrong.low > target:
        notes.append(
            f"of safe requests from another source ({lists[1].name}) it flags {wrong.value:.3f} [{wrong.low:.3f}, {wrong.high:.3f}], more "
            f"than the {target:g} it is set for: expect no less of yours, and set the threshold on them (guard recalibrate)"
        )
    return dataclasses.replace(guard, report={**guard.report, "other": plain(told)}, notes=tuple(dict.fromkeys([*guard.notes, *notes])))


def warned(guard: Guard) -> Guard:
    """The guard with what has to be said of its threshold: that it may stop nothing, that nobody measured it on traffic of the user's."""
    notes = [guard.why_idle] if guard.why_idle else []
    if not guard.confirmed:
        notes.append(
            "its false-positive rate is provisional until it was measured on your own traffic: guard recalibrate sets the threshold on "
            "safe requests of yours, guard evaluate measures it"
        )
    return dataclasses.replace(guard, notes=tuple(dict.fromkeys([*guard.notes, *notes])))


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
        f"{PROVISIONAL}fpr {fitted.fpr:g}",
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
    """What is kept of the calibration examples: histograms that later traffic is compared with, and their probabilities.

    Probability in 20 bins of equal width; distance (root mean square of the standardised features) in 20 bins of equally many examples,
    open at both ends. The probabilities, sorted, say what any threshold catches.
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
        "probabilities": {"safe": np.sort(probabilities[~unsafe]).tolist(), "unsafe": np.sort(probabilities[unsafe]).tolist()},
    }
