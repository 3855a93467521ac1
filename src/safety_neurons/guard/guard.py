"""Guard: a calibrated classifier on neurons of one model, and what it says of prompts before the model answers them."""

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from safety_neurons.errors import ModelError, SafetyNeuronsError, UsageError
from safety_neurons.guard.bindings import Bindings
from safety_neurons.guard.calibration import Calibration
from safety_neurons.guard.classifier import Classifier
from safety_neurons.guard.features import Collector, model_lock
from safety_neurons.guard.operating import OperatingPoint, check_probability
from safety_neurons.guard.pooling import Pooling
from safety_neurons.guard.rechecks import Recheck
from safety_neurons.guard.requests import Request, as_prompt
from safety_neurons.guard.verdicts import Status, TopNeuron, Verdict
from safety_neurons.model import Batch, BatchSize, Encoded, LanguageModel, run_batches
from safety_neurons.neurons import NeuronSet, parse_key
from safety_neurons.results import notebook

TOP = 5
FAILURES = (SafetyNeuronsError, RuntimeError, MemoryError, ValueError, TypeError, LookupError)
"""What may go wrong while a prompt is read, and is then a verdict of status "error" rather than an exception."""


@dataclass(frozen=True, eq=False, repr=False)
class Guard:
    """A calibrated classifier on the activations of some neurons of one model; immutable.

    Attributes:
        neurons: whose activations it reads, in the order of its weights.
        pooling: how a prompt's tokens become one number a neuron.
        classifier: weights, standardisation, calibration.
        operating_points: thresholds for stated false-positive rates, and what they are worth.
        threshold: the one in force.
        in_force: where it comes from: `fpr 0.01`, `provisional …`, or `given`.
        bindings: the model, weights, tokenizer and template it was fit on.
        reference: histograms of the probability and of the distance of its calibration examples, for drift.
        report: what was measured while it was fit, as JSON values.
        notes: what had to be said.
        recheck: threshold for re-checks of answers under way, measured at such positions; None where nothing was.
        model: the model it is bound to; None for a guard that was only looked into.
    """

    neurons: NeuronSet
    pooling: Pooling
    classifier: Classifier
    operating_points: tuple[OperatingPoint, ...]
    threshold: float
    in_force: str
    bindings: Bindings
    reference: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    recheck: Recheck | None = None
    model: LanguageModel | None = None

    def __post_init__(self) -> None:
        check_probability(self.threshold, "threshold")
        if len(self.neurons) != self.classifier.n_features:
            raise UsageError(f"{len(self.neurons)} neurons and {self.classifier.n_features} weights; expected one weight a neuron")

    def __repr__(self) -> str:
        bound = "unbound" if self.model is None else f"on {self.model.name}"
        return f"Guard({len(self.neurons):,} neurons, {self.pooling}, threshold {self.threshold:.4g} ({self.in_force}), {bound})"

    # The classifier

    def _repr_html_(self) -> str:
        rows = [
            [
                f"{100 * point.fpr_target:g} %",
                notebook.number(point.threshold, 3) if point.supported else f"not supported: {point.why}",
                notebook.interval(point.fpr.value, point.fpr.low, point.fpr.high),
                notebook.interval(point.tpr.value, point.tpr.low, point.tpr.high),
            ]
            for point in self.operating_points
        ]
        columns = ["false-positive rate asked for", "threshold", "false-positive rate", "true-positive rate"]
        return notebook.html_table(repr(self), columns, rows)

    @property
    def weights(self) -> Float[Tensor, " neuron"]:
        """Weights of the standardised features."""
        return self.classifier.weights

    @property
    def bias(self) -> float:
        """Log odds of the mean prompt, before calibration."""
        return self.classifier.bias

    @property
    def mean(self) -> Float[Tensor, " neuron"]:
        """Mean of each feature where the guard was fit."""
        return self.classifier.mean

    @property
    def scale(self) -> Float[Tensor, " neuron"]:
        """Standard deviation there."""
        return self.classifier.scale

    @property
    def calibration(self) -> Calibration:
        """From log odds to calibrated log odds."""
        return self.classifier.calibration

    def probabilities(self, features: Float[Tensor, "prompt neuron"]) -> Float64[Tensor, " prompt"]:
        """Calibrated probability of an unsafe answer for features that `read_features` gave; NaN where a feature is."""
        return self.classifier.probabilities(features)

    # Thresholds

    def at(self, fpr: float) -> "Guard":
        """The guard at the operating point of a false-positive rate.

        Raises:
            UsageError: there is no such point, or too few safe examples supported it.
        """
        point = next((point for point in self.operating_points if abs(point.fpr_target - fpr) < 1e-12), None)
        supported = ", ".join(f"{point.fpr_target:g}" for point in self.operating_points if point.supported) or "none"
        if point is None:
            raise UsageError(f"no operating point at a false-positive rate of {fpr:g}; supported are {supported}: fit with it, or give one")
        if point.threshold is None:
            raise UsageError(
                f"the operating point {fpr:g} is not supported ({point.why}); supported are {supported}: recalibrate with more safe prompts"
            )
        return dataclasses.replace(self, threshold=point.threshold, in_force=f"fpr {point.fpr_target:g}")

    def with_threshold(self, threshold: float) -> "Guard":
        """The guard with a threshold of one's own.

        Raises:
            UsageError: not between 0 and 1.
        """
        return dataclasses.replace(self, threshold=check_probability(threshold, "threshold"), in_force="given")

    # Model

    def bind(self, model: LanguageModel) -> "Guard":
        """The guard on a model in memory, after checking that it is the one it was fit on.

        Raises:
            ForeignModelError: another architecture. MismatchError: other weights, adapters, tokenizer or template.
        """
        self.bindings.check(model, self.neurons)
        return dataclasses.replace(self, neurons=self.neurons.on(model.table), model=model)

    @property
    def bound(self) -> LanguageModel:
        """The model the guard is bound to.

        Raises:
            ModelError: none.
        """
        if self.model is None:
            raise ModelError("this guard is not bound to a model; use Guard.load(folder, model) or guard.bind(model)")
        return self.model

    # Scoring

    def score(self, messages: Request, *, threshold: float | None = None, fail_open: bool = False, top: int = TOP) -> Verdict:
        """What the guard says of one request: a text, a list of turns (system, several turns), or a Prompt.

        Args:
            messages: the request; turns are `Message` or `{"role": …, "content": …}`.
            threshold: for this request; the guard's own where None.
            fail_open: let prompts pass that were truncated or could not be scored; by default they are flagged.
            top: how many neurons to name.

        Raises:
            InputError: turns that cannot be read, or that the chat template refuses. ModelError: the guard is not bound to a model.

        Source: Chen et al., arXiv 2406.14144, section 6.
        Differs: a calibrated probability and a threshold with a known false-positive rate; truncation and errors are not "safe".
        """
        return self.score_batch([messages], threshold=threshold, fail_open=fail_open, top=top)[0]

    def score_batch(
        self,
        requests: Sequence[Request],
        *,
        threshold: float | None = None,
        fail_open: bool = False,
        top: int = TOP,
        batch_size: BatchSize = "auto",
    ) -> list[Verdict]:
        """What the guard says of several requests, in order; see `score`."""
        encoded = [self.encode(request) for request in requests]
        return self.score_encoded(encoded, threshold=threshold, fail_open=fail_open, top=top, batch_size=batch_size)

    def encode(self, request: Request) -> Encoded:
        """Token ids of a request, template included.

        Raises:
            InputError: turns that cannot be read, or that the chat template refuses.
        """
        return self.bound.encode(as_prompt(request))[0]

    def score_encoded(
        self,
        encoded: Sequence[Encoded],
        *,
        threshold: float | None = None,
        fail_open: bool = False,
        top: int = TOP,
        batch_size: BatchSize = "auto",
    ) -> list[Verdict]:
        """Verdicts on encoded requests, in order. A batch that fails is read again one by one; what fails alone has status "error"."""
        started = time.perf_counter()
        options: dict[str, Any] = {"threshold": threshold, "fail_open": fail_open}
        self._limit(threshold)
        self.bound  # noqa: B018 - a guard without a model is the caller's error, not the prompt's
        try:
            found = self._read(encoded, batch_size) if encoded else []
        except FAILURES as error:
            if len(encoded) == 1:
                latency = 1000 * (time.perf_counter() - started)
                return [dataclasses.replace(self.failed(error, **options), latency_ms=latency, n_tokens=len(encoded[0].ids))]
            return [self.score_encoded([item], top=top, **options)[0] for item in encoded]
        verdicts = self.verdicts(torch.stack(found), [item.truncated for item in encoded], top=top, **options) if found else []
        latency = 1000 * (time.perf_counter() - started)
        return [
            dataclasses.replace(verdict, latency_ms=latency, n_tokens=len(item.ids))
            for verdict, item in zip(verdicts, encoded, strict=True)
        ]

    def verdicts(
        self,
        features: Float[Tensor, "prompt neuron"],
        truncated: Sequence[bool],
        *,
        threshold: float | None = None,
        fail_open: bool = False,
        top: int = TOP,
    ) -> list[Verdict]:
        """Verdicts on features; a prompt whose features are not numbers has status "error"."""
        limit = self._limit(threshold)
        features = features.to("cpu", torch.float64)
        odds = self.classifier.log_odds(features)
        chances = odds.sigmoid().tolist()
        standardised = self.classifier.standardised(features)
        distances = standardised.square().mean(1).sqrt().tolist()
        finite = features.isfinite().all(1).logical_and(odds.isfinite()).tolist()
        named = self._top(standardised, min(top, len(self.neurons)))
        verdicts = []
        for row, chance in enumerate(chances):
            if not finite[row]:
                verdicts.append(self.failed("an activation is NaN or infinite", threshold=threshold, fail_open=fail_open))
                continue
            flagged = chance >= limit or (truncated[row] and not fail_open)
            status: Status = "truncated" if truncated[row] else "ok"
            verdicts.append(Verdict(chance, flagged, limit, status, 0.0, named[row], float(odds[row]), distances[row]))
        return verdicts

    def failed(self, error: BaseException | str, *, threshold: float | None = None, fail_open: bool = False) -> Verdict:
        """The verdict where there is none: flagged, unless told to fail open."""
        words = " ".join((error if isinstance(error, str) else f"{type(error).__name__}: {error}").split())[:300]
        return Verdict(None, not fail_open, self._limit(threshold), "error", error=words)

    def _limit(self, threshold: float | None) -> float:
        return self.threshold if threshold is None else check_probability(threshold, "threshold")

    def _read(self, encoded: Sequence[Encoded], batch_size: BatchSize) -> list[Tensor]:
        model, collector = self.bound, Collector(self.neurons, [self.pooling])
        found: list[Any] = [None] * len(encoded)

        def keep(batch: Batch) -> None:
            for index, values in zip(batch.indices, collector.result()[self.pooling].to("cpu"), strict=True):
                found[index] = values

        with model_lock(model), collector.on(model):
            run_batches(
                model,
                [item.ids for item in encoded],
                keep,
                batch_size,
                before=lambda batch: collector.start(batch.attention_mask),
                last_layer=max(parse_key(key).layer for key in self.neurons.keys()),  # noqa: SIM118 - not a mapping
            )
        return found

    def _top(self, standardised: Float64[Tensor, "prompt neuron"], count: int) -> list[tuple[TopNeuron, ...]]:
        if count < 1:
            return [()] * len(standardised)
        parts = (standardised * self.classifier.weights.double()).nan_to_num(0.0)
        largest = parts.topk(count, dim=1)
        names = self._names
        return [
            tuple(TopNeuron(names[place][0], names[place][1], value) for place, value in zip(places, values, strict=True) if value > 0)
            for places, values in zip(largest.indices.tolist(), largest.values.tolist(), strict=True)
        ]

    @property
    def _names(self) -> list[tuple[str, int]]:
        known = self.__dict__.get("_names_once")
        if known is None:
            known = list(self.neurons)
            self.__dict__["_names_once"] = known
        return known

    # Files

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `guard.safetensors` (neurons, weights, standardisation) and `guard.json` (everything else) into a folder.

        Raises:
            RunError: the folder cannot be written.
        """
        from safety_neurons.guard.files import save

        save(self, folder)

    @staticmethod
    def load(folder: str | os.PathLike[str], model: LanguageModel | None = None) -> "Guard":
        """The guard in a folder, bound to a model where one is given.

        Raises:
            InputError: missing, damaged, or not a guard. ForeignModelError, MismatchError: another model; see `bind`.
        """
        from safety_neurons.guard.files import load

        guard = load(folder)
        return guard if model is None else guard.bind(model)
