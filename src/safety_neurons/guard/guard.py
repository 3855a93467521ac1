"""Guard: a calibrated classifier on neurons of one model, and what it says of prompts before the model answers them."""

import dataclasses
import hashlib
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from safety_neurons.errors import ModelError, UsageError
from safety_neurons.guard.bindings import Bindings
from safety_neurons.guard.calibration import Calibration
from safety_neurons.guard.classifier import LIMIT, Classifier, float_rows
from safety_neurons.guard.features import Collector, model_lock
from safety_neurons.guard.operating import OperatingPoint, check_probability, rates_at
from safety_neurons.guard.pooling import Pooling
from safety_neurons.guard.rechecks import Recheck
from safety_neurons.guard.requests import Request, as_prompt, as_request_prompts, readings
from safety_neurons.guard.verdicts import Status, TopNeuron, Verdict, largest
from safety_neurons.model import Batch, BatchSize, Encoded, LanguageModel, run_batches
from safety_neurons.neurons import NeuronSet, parse_key
from safety_neurons.results import Rate, notebook

TOP = 5
PROVISIONAL = "provisional "
"""Before the false-positive rate of a threshold that no traffic of the user's own has confirmed."""
_NOT_FINITE = "an activation is NaN or infinite"
FAILURES = (Exception,)
"""What goes wrong while a prompt is read is a verdict of status "error", whatever it is; interrupts and exits pass."""


@dataclass(frozen=True, eq=False, repr=False)
class Guard:
    """A calibrated classifier on the activations of some neurons of one model; immutable.

    Attributes:
        neurons: whose activations it reads, in the order of its weights.
        pooling: how a prompt's tokens become one number a neuron.
        classifier: weights, standardisation, calibration.
        operating_points: thresholds for stated false-positive rates, and what they are worth.
        threshold: the one in force.
        in_force: where it comes from: `fpr 0.01`, `provisional …` until traffic of the user's own confirmed it, or `given`.
        bindings: the model, weights, tokenizer and template it was fit on.
        reference: of its calibration examples the probabilities, and histograms of probability and distance, for drift.
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

    @property
    def sha256(self) -> str:
        """Hash of what decides its verdicts: neurons, pooling, weights, calibration, threshold."""
        parts = [str(self.pooling), repr(self.bias), repr(self.calibration), repr(self.threshold), repr(self.neurons.counts())]
        digest = hashlib.sha256("\n".join(parts).encode())
        for vector in (self.weights, self.mean, self.scale, *(torch.from_numpy(members.copy()) for _, members in self.neurons.items())):
            digest.update(vector.numpy().tobytes())
        return digest.hexdigest()

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
        return dataclasses.replace(self, threshold=point.threshold, in_force=f"{'' if self.confirmed else PROVISIONAL}fpr {fpr:g}")

    def with_threshold(self, threshold: float) -> "Guard":
        """The guard with a threshold of one's own.

        Raises:
            UsageError: not between 0 and 1.
        """
        return dataclasses.replace(self, threshold=check_probability(threshold, "threshold"), in_force="given")

    @property
    def confirmed(self) -> bool:
        """Whether its thresholds were set on requests of the user's own: by `recalibrate`, on safe prompts that the fit did not see."""
        return bool((self.report.get("recalibrated") or {}).get("own"))

    @property
    def rates(self) -> tuple[Rate, Rate] | None:
        """False-positive and true-positive rate of the threshold in force on the calibration prompts; None where the file does not say.

        The second is the share of unsafe requests that it catches.
        """
        kept = self.reference.get("probabilities")
        if kept is not None:
            safe, unsafe = (np.asarray(kept[word], np.float64) for word in ("safe", "unsafe"))
            return rates_at(np.concatenate([safe, unsafe]), np.arange(len(safe) + len(unsafe)) >= len(safe), self.threshold)
        # Files of earlier versions keep the rates of their operating points only, that of a provisional threshold among them.
        wanted = self.in_force.removeprefix(PROVISIONAL)
        found = next((point for point in self.operating_points if f"fpr {point.fpr_target:g}" == wanted), None)
        return None if found is None else (found.fpr, found.tpr)

    @property
    def standing(self) -> dict[str, Any]:
        """What is known of the threshold in force, as JSON values: `{threshold, in_force, caught, false_positives}`; rates may be null."""
        false, caught = self.rates or (None, None)
        told = {"caught": caught, "false_positives": false}
        return {"threshold": self.threshold, "in_force": self.in_force, **{name: one and one.to_json() for name, one in told.items()}}

    @property
    def why_idle(self) -> str | None:
        """Why the guard may stop nothing at its threshold: the interval of the share it catches holds 0. None where it does not."""
        caught = None if self.rates is None else self.rates[1]
        if caught is None or (caught.low is not None and caught.low > 0):
            return None
        return (
            f"at its threshold {self.threshold:.4g} the guard caught {round((caught.value or 0) * caught.n)} of {caught.n} unsafe requests "
            f"(95 % interval {caught.low or 0:.2g} to {1 if caught.high is None else caught.high:.2g}): it may stop nothing"
        )

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

        A conversation is read as a whole, without the answer it ends in, and turn by turn; the largest probability counts.

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
        ways = [readings(prompt) for prompt in as_request_prompts(requests)]
        encoded = [self.encode(way.prompt) for some in ways for way in some]
        found = iter(self.score_encoded(encoded, threshold=threshold, fail_open=fail_open, top=top, batch_size=batch_size))
        return [largest([dataclasses.replace(next(found), reading=way.name) for way in some]) for some in ways]

    def encode(self, request: Request) -> Encoded:
        """Token ids of a request as a whole, template included.

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
        options: dict[str, Any] = {"threshold": self._limit(threshold), "fail_open": fail_open}
        self.bound  # noqa: B018 - a guard without a model is the caller's error, not the prompt's
        if not encoded:
            return []
        try:
            found = self._read(encoded, batch_size)
        except FAILURES as error:
            if len(encoded) > 1:
                return [self.score_encoded([item], top=top, **options)[0] for item in encoded]
            latency = 1000 * (time.perf_counter() - started)
            return [self.failed(error, **options, latency_ms=latency, n_tokens=len(encoded[0].ids))]
        truncated, lengths = [item.truncated for item in encoded], [len(item.ids) for item in encoded]
        return self.verdicts(torch.stack(found), truncated, **options, top=top, lengths=lengths, started=started)

    def verdicts(
        self,
        features: Float[Tensor, "prompt neuron"],
        truncated: Sequence[bool],
        *,
        threshold: float | None = None,
        fail_open: bool = False,
        top: int = TOP,
        only_flagged: bool = False,
        lengths: Sequence[int] | None = None,
        started: float | None = None,
    ) -> list[Verdict]:
        """Verdicts on features; a prompt whose features are not numbers has status "error".

        Args:
            features: that `read_features` or a pass under way gave.
            truncated: which prompts were not read whole.
            threshold: for these; the guard's own where None.
            fail_open: let prompts pass that were truncated or could not be scored.
            top: how many neurons to name.
            only_flagged: name them for flagged prompts only.
            lengths: tokens of each prompt.
            started: reading of `time.perf_counter` that latencies count from.
        """
        limit = self._limit(threshold)
        mean, inverse, weights = self.classifier.wide
        with np.errstate(invalid="ignore", over="ignore"):
            centred = float_rows(features) - mean
            scores = (centred @ weights).tolist()
            standardised = centred * inverse
            squares = np.einsum("ij,ij->i", standardised, standardised).tolist()
        latency = 0.0 if started is None else 1000 * (time.perf_counter() - started)
        verdicts = []
        for row, score in enumerate(scores):
            score += self.bias
            length = None if lengths is None else lengths[row]
            if not math.isfinite(score):
                verdicts.append(self.failed(_NOT_FINITE, threshold=limit, fail_open=fail_open, latency_ms=latency, n_tokens=length))
                continue
            odds = min(max(self.calibration.of_one(score), -LIMIT), LIMIT)
            chance = 1 / (1 + math.exp(-odds))
            flagged = chance >= limit or (truncated[row] and not fail_open)
            status: Status = "truncated" if truncated[row] else "ok"
            named = self._top(centred[row] * weights, top) if top and (flagged or not only_flagged) else ()
            distance = math.sqrt(squares[row] / len(mean))
            verdicts.append(Verdict(chance, flagged, limit, status, latency, named, odds, distance, length))
        return verdicts

    def failed(
        self,
        error: BaseException | str,
        *,
        threshold: float | None = None,
        fail_open: bool = False,
        latency_ms: float = 0.0,
        n_tokens: int | None = None,
    ) -> Verdict:
        """The verdict where there is none: flagged, unless told to fail open."""
        words = " ".join((error if isinstance(error, str) else f"{type(error).__name__}: {error}").split())[:300]
        return Verdict(None, not fail_open, self._limit(threshold), "error", latency_ms, n_tokens=n_tokens, error=words)

    def _limit(self, threshold: float | None) -> float:
        return self.threshold if threshold is None else check_probability(threshold, "threshold")

    def _read(self, encoded: Sequence[Encoded], batch_size: BatchSize) -> list[Tensor]:
        model, collector = self.bound, self.collector
        found: list[Any] = [None] * len(encoded)

        def keep(batch: Batch) -> None:
            for index, values in zip(batch.indices, collector.result()[self.pooling].to("cpu"), strict=True):
                found[index] = values

        with model_lock(model), collector:
            run_batches(
                model,
                [item.ids for item in encoded],
                keep,
                batch_size,
                before=lambda batch: collector.start(batch.attention_mask),
                last_layer=max(parse_key(key).layer for key in self.neurons.keys()),  # noqa: SIM118 - not a mapping
            )
        return found

    def _top(self, parts: Float64[np.ndarray, " neuron"], count: int) -> tuple[TopNeuron, ...]:
        if count < 1:
            return ()
        first = np.argpartition(-parts, count)[:count] if count < len(parts) else np.arange(len(parts))
        largest = sorted(((float(parts[place]), place) for place in first.tolist()), key=lambda pair: (-pair[0], pair[1]))
        names = self._names
        return tuple(TopNeuron(names[place][0], names[place][1], value) for value, place in largest if value > 0)

    @cached_property
    def collector(self) -> Collector:
        """Gathers the guard's features while its model runs; used by one thread at a time, which holds the `model_lock`."""
        return Collector(self.bound.anatomy, self.neurons, [self.pooling])

    @cached_property
    def _names(self) -> list[tuple[str, int]]:
        return list(self.neurons)

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
