"""Calibrate a fitted guard again, for an updated model."""

import dataclasses
from typing import Any

import numpy as np
import torch

from safety_neurons.arguments import well_typed
from safety_neurons.counting import numbered
from safety_neurons.errors import ForeignModelError
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
    said_of_parts,
    warned,
    with_conversations,
)
from safety_neurons.guard.guard import PROVISIONAL, Guard, bindings_of
from safety_neurons.model import BatchSize, LanguageModel, Progress, as_prompts
from safety_neurons.model.language_model import Texts
from safety_neurons.prompt_lists.readers import PREFIX
from safety_neurons.results import plain


@well_typed
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
    Re-checks, and the classifier for answers, are dropped.

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
    direction, pooling = guard.classifier.direction, guard.pooling
    reading: dict[str, Any] = {"direction": direction, "batch_size": batch_size, "progress": progress}
    features = read_poolings(model, encoded, neurons, [pooling], **reading)[pooling]
    usable = features.usable
    labels, values = data.labels[usable], torch.from_numpy(features.values[usable])
    check_classes(labels)
    check_varying(model, {pooling: features.values[usable]})
    kept = [data.prompts[int(place)] for place in np.flatnonzero(usable)]
    further, unread = further_readings(model, kept, neurons, pooling, batch_size, direction)
    scores = largest_scores(guard.classifier, values, map(further.get, range(len(values))))
    shared = [data.prompts.groups[int(place)] for place in np.flatnonzero(usable)]
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
        *said_of_parts(unread),
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
        reference=histograms(found.classifier, features.values[usable], found.probabilities, labels, shared),
        report=plain(
            {**guard.report, "recalibrated": measured, "fpr": how.fpr, "other": None, "conversations": None}
        ),
        notes=tuple(dict.fromkeys(notes)),
        recheck=None,
        answers=None,
        model=model,
    )
    again = with_conversations(again, features.values[usable], labels, found.probabilities, further, shared)
    return warned(again)


def _said(guard: Guard, area: float | None, prompts: int, seen: int, left_out: int) -> list[str]:
    """How far the ranking moved, and what weakens the new numbers."""
    before = (guard.report.get("auroc") or {}).get("value")
    notes = [f"left out: {numbered(left_out, 'prompt')}, truncated or with NaN"] if left_out else []
    if area is not None and before is not None:
        notes.append(f"AUROC {area:.3f} on this model, {before:.3f} where the guard was fit")
    if seen:
        notes.append(
            f"{seen} of the {prompts} prompts are among those the guard was fit on: rates on them flatter"
        )
    if guard.recheck is not None:
        notes.append("re-checks of answers were dropped: fit them on this model (guard fit --recheck-every)")
    return notes
