"""Calibrate a fitted guard again, for an updated model or for checks of its answers."""

import dataclasses
import math
from typing import Any

import numpy as np
import torch

from safety_neurons.errors import ForeignModelError, InputError, UsageError
from safety_neurons.guard.calibration import (
    EXAMPLES,
    Recheck,
    check_probability,
    rates_at,
    threshold_for,
)
from safety_neurons.guard.features import read_poolings
from safety_neurons.guard.fit import (
    CalibrationSettings,
    calibrate,
    check_classes,
    check_varying,
    counted,
    further_readings,
    histograms,
    labelled,
    largest_scores,
    warned,
    with_conversations,
)
from safety_neurons.guard.guard import PROVISIONAL, Guard, bindings_of
from safety_neurons.model import BatchSize, Encoded, LanguageModel, Progress, as_prompts
from safety_neurons.model.language_model import Texts
from safety_neurons.prompt_lists.readers import PREFIX
from safety_neurons.results import plain


def recalibrate(
    guard: Guard,
    model: LanguageModel,
    unsafe: Texts,
    safe: Texts,
    *,
    batch_size: BatchSize = "auto",
    progress: Progress | None = None,
    **settings: Any,
) -> Guard:
    """The guard for an updated model: neurons and weights kept, calibration, operating points and bindings
    anew.

    All prompts calibrate, none fits, so as many safe prompts support smaller false-positive rates than in a
    fit. Where there are enough and they are the user's own (not built in, none of them fit on), the
    false-positive rate is provisional no longer. A note says how the AUROC moved; where it fell, fit again.
    Thresholds of re-checks are dropped.

    Args:
        guard: fit on this architecture.
        model: updated weights, adapters, tokenizer, template or number type.
        unsafe: prompts that the guard was not fit on, as `safe`.
        safe: to let pass.
        batch_size: prompts a batch, or `auto`.
        progress: called with (batches done, in all, tokens).
        **settings: those of `CalibrationSettings`: `calibration`, `seed`, and `fpr`, the one of the fit where
            it is None or not given.

    Raises:
        ForeignModelError: another architecture. InputError: fewer than ten usable prompts of either kind.

    Source: none; the guard of a model must not judge another one with the old one's thresholds.
    """
    if model.fingerprint != guard.bindings.model_fingerprint:
        raise ForeignModelError(
            f"the guard was fit on {guard.bindings.model}, {model.name} has another architecture; fit a "
            "guard on it"
        )
    if settings.get("fpr") is None:
        settings["fpr"] = guard.report.get("fpr", CalibrationSettings.fpr)
    how = CalibrationSettings(**settings)
    safe_prompts = as_prompts(safe)
    data, neurons = labelled(as_prompts(unsafe), safe_prompts), guard.neurons.on(model.table, [model.name])
    encoded = model.encode(data.prompts)
    features = read_poolings(
        model, encoded, neurons, [guard.pooling], batch_size=batch_size, progress=progress
    )[guard.pooling]
    usable = features.usable
    labels, values = data.labels[usable], torch.from_numpy(features.values[usable])
    check_classes(labels)
    check_varying(model, {guard.pooling: features.values[usable]})
    further = further_readings(
        model,
        [data.prompts[int(place)] for place in np.flatnonzero(usable)],
        neurons,
        guard.pooling,
        batch_size,
    )
    scores = largest_scores(guard.classifier, values, map(further.get, range(len(values))))
    shared = [data.prompts[int(place)].group for place in np.flatnonzero(usable)]
    found = calibrate(
        guard.classifier, scores, labels, how, [one.fpr_target for one in guard.operating_points], shared
    )
    seen = data.prompts.overlap(guard.report.get("prompt_digests") or [])
    own = not found.notes and not seen and not safe_prompts.name.startswith(PREFIX)
    measured = {
        "own": own,
        "auroc": found.auroc,
        "auroc_before": guard.report.get("auroc"),
        "log_losses": found.log_losses,
        "bindings_before": guard.bindings,
        "expected_calibration_error": found.calibration_error,
        "prompts": {**counted(labels), "left_out": int((~usable).sum())},
    }
    notes = [
        *features.notes,
        *data.notes,
        *_said(guard, found.auroc.value, len(data.prompts), seen, int((~usable).sum())),
    ]
    notes += found.notes
    again = dataclasses.replace(
        guard,
        neurons=neurons,
        classifier=found.classifier,
        operating_points=found.operating_points,
        threshold=found.threshold,
        in_force=f"{'' if own else PROVISIONAL}fpr {how.fpr:g}",
        bindings=bindings_of(model, neurons),
        reference=histograms(found.classifier, features.values[usable], found.probabilities, labels),
        report=plain(
            {**guard.report, "recalibrated": measured, "fpr": how.fpr, "other": None, "conversations": None}
        ),
        notes=tuple(dict.fromkeys(notes)),
        recheck=None,
        model=model,
    )
    return warned(with_conversations(again, features.values[usable], labels, found.probabilities, further))


def _said(guard: Guard, area: float | None, prompts: int, seen: int, left_out: int) -> list[str]:
    """How far the ranking moved, and what weakens the new numbers."""
    before = (guard.report.get("auroc") or {}).get("value")
    notes = [f"{left_out} prompts were truncated or gave NaN: left out"] if left_out else []
    if area is not None and before is not None:
        notes.append(f"AUROC {area:.3f} on this model, {before:.3f} where the guard was fit")
    if seen:
        notes.append(
            f"{seen} of the {prompts} prompts are among those the guard was fit on: rates on them flatter"
        )
    if guard.recheck is not None:
        notes.append("the threshold of re-checks was dropped: measure it on this model")
    return notes


def calibrate_recheck(
    guard: Guard,
    safe: Texts,
    unsafe: Texts | None = None,
    *,
    every: int = 16,
    max_new_tokens: int = 64,
    fpr: float = 0.01,
    batch_size: BatchSize = "auto",
    progress: Progress | None = None,
) -> Guard:
    """The guard with a threshold for re-checks: the model answers safe prompts greedily, and the classifier
    reads its answers under way.

    The classifier was fit on prompts. What it says at generated positions is the same formula on other text,
    so it is no calibrated probability there; the threshold is set on it all the same, such that at most the
    wanted share of *answers* to safe prompts is stopped, over all checks of an answer together.

    Args:
        guard: bound to its model.
        safe: prompts whose answers must not be stopped.
        unsafe: prompts whose answers should be, to measure what the checks catch; optional.
        every: tokens between checks.
        max_new_tokens: longest answer; longer ones have more checks, so a guarded model refuses them.
        fpr: share of the answers to safe prompts that may be stopped.
        batch_size: rows, or `auto`.
        progress: called with (batches done, in all, tokens) while answers are read.

    Raises:
        UsageError: numbers out of range. InputError: no safe prompts.

    Source: none of the papers re-checks; false-positive rates per answer as in `threshold_for`.
    """
    if every < 1 or max_new_tokens < every:
        raise UsageError(
            f"re-checks every {every} of at most {max_new_tokens} tokens; expected at least 1 and no "
            "longer than the answer"
        )
    check_probability(fpr, "false-positive rate")
    chances, labels = [], []
    for prompts, label in ((safe, False), (unsafe, True)):
        if prompts is not None:
            found = _largest_checks(guard, prompts, every, max_new_tokens, batch_size, progress)
            chances.append(found)
            labels.append(np.full(len(found), label))
    p, is_unsafe = np.concatenate(chances), np.concatenate(labels)
    needed, n_safe = math.ceil(EXAMPLES / fpr), int((~is_unsafe).sum())
    if not n_safe:
        raise InputError(
            "no answer to a safe prompt could be read; expected safe prompts that fit the context"
        )
    threshold = threshold_for(p, is_unsafe, fpr)
    why = (
        ""
        if n_safe >= needed
        else f"{n_safe:,} answers to safe prompts, {needed:,} are needed ({EXAMPLES} / {fpr:g})"
    )
    measured, caught = rates_at(p, is_unsafe, threshold)
    notes = [f"the threshold of re-checks is provisional: {why}"] if why else []
    recheck = Recheck(every, max_new_tokens, threshold, fpr, measured, caught, not why, why)
    return guard.noted(notes, recheck=recheck)


def _largest_checks(
    guard: Guard,
    prompts: Texts,
    every: int,
    max_new_tokens: int,
    batch_size: BatchSize,
    progress: Progress | None,
) -> np.ndarray:
    """The largest probability over the checks of each answer; 0 for one that ends before the first."""
    model = guard.bound
    asked = as_prompts(prompts)
    encoded = model.encode(asked, reserve=max_new_tokens)
    answers = model.complete(asked, max_new_tokens=max_new_tokens, batch_size=batch_size)
    largest = np.zeros(len(asked))
    checks: list[Encoded] = []
    owners: list[int] = []
    for number, (item, answer) in enumerate(zip(encoded, answers, strict=True)):
        # A check reads tokens once the model is fed them, and the last one of an answer that is cut off never
        # is.
        for length in range(every, len(answer.token_ids) + (answer.finish_reason == "stop"), every):
            checks.append(Encoded(item.prompt_id, [*item.ids, *answer.token_ids[:length]]))
            owners.append(number)
    if checks:
        read = read_poolings(
            model, checks, guard.neurons, [guard.pooling], batch_size=batch_size, progress=progress
        )[guard.pooling]
        chances = guard.probabilities(torch.from_numpy(read.values)).nan_to_num(1.0).numpy()
        np.maximum.at(largest, np.array(owners), chances)
    return largest[[not item.truncated for item in encoded]]
