"""Guard: a calibrated classifier on neurons of one model, what it is bound to, and its files."""

import dataclasses
import hashlib
import math
import os
import pathlib
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from safety_neurons import strict_json
from safety_neurons.arguments import well_typed
from safety_neurons.counting import numbered
from safety_neurons.errors import (
    ForeignModelError,
    InputError,
    MismatchError,
    ModelError,
    NeuronError,
    RunError,
    UsageError,
)
from safety_neurons.guard.calibration import (
    LIMIT,
    Calibration,
    Classifier,
    OperatingPoint,
    Recheck,
    check_probability,
    float_rows,
    from_json,
    rates_at,
    summed,
)
from safety_neurons.guard.features import (
    Collector,
    Pooling,
    Request,
    RequestReading,
    as_request_prompts,
    collect,
    last_layer,
    readings,
)
from safety_neurons.guard.verdict import LONGEST_WORDS, Status, TopNeuron, Verdict, counting, largest
from safety_neurons.model import Batch, BatchSize, Encoded, LanguageModel
from safety_neurons.model.identity import (
    json_sha256,
    plain_name,
    template_sha256,
    tokenizer_sha256,
    weights_sha256,
)
from safety_neurons.model.passes import in_order
from safety_neurons.neurons import NeuronSet, Provenance
from safety_neurons.neurons.sets import header, stored_table
from safety_neurons.prompt_lists import as_prompt
from safety_neurons.results import Rate, notebook, plain, write_bytes, write_json
from safety_neurons.results.run import ordered_header

SCHEMA = "safety-neurons-guard/1"
WEIGHTS, FACTS, ANSWERS = "guard.safetensors", "guard.json", "answers"
SEAL = "sealed_sha256"
VECTORS = ("weights", "mean", "scale")
MEMBERS = "neurons/"
MOST_NEURONS = 5_000_000
MOST_JSON = 32 * 2**20
MOST_HEADER = 16 * 2**20


@dataclass(frozen=True)
class Bindings:
    """What a guard belongs to.

    Attributes:
        model: name, for people.
        model_fingerprint: of the architecture.
        weights_sha256: of the weights that reach the guard's neurons: embeddings and layers up to the last
            neuron's, adapters included.
        dtype: what these weights are in.
        tokenizer_sha256: of its vocabulary, special tokens, and what it makes of some texts.
        template_sha256: of the template, system prompt and template arguments.
    """

    model: str
    model_fingerprint: str
    weights_sha256: str
    dtype: str
    tokenizer_sha256: str
    template_sha256: str

    def check(self, model: LanguageModel, neurons: NeuronSet) -> None:
        """Raise an error unless the model is the one that the guard was fit on.

        Cost: one SHA-256 over the weights, a second for two gigabytes and core.

        Raises:
            ForeignModelError: another architecture. MismatchError: other weights, number type, adapters,
            tokenizer or template.
        """
        if model.fingerprint != self.model_fingerprint:
            raise ForeignModelError(
                f"the guard was fit on {self.model} (fingerprint {self.model_fingerprint[:12]}), expected "
                f"{model.name} ({model.fingerprint[:12]}); fit a guard on this model"
            )
        found = bindings_of(model, neurons)
        for name, words, advice in (
            (
                "tokenizer_sha256",
                "another tokenizer",
                "load the model with the tokenizer it was fit with, or recalibrate it",
            ),
            (
                "template_sha256",
                "another template or system prompt",
                "use the same --template and --system, or recalibrate it",
            ),
            (
                "dtype",
                f"weights in {self.dtype}, this model's are in {found.dtype}",
                "load the model with the --dtype it was fit with, or recalibrate it",
            ),
            (
                "weights_sha256",
                "other weights or adapters",
                "load the model it was fit on, or recalibrate it (guard recalibrate)",
            ),
        ):
            ours, theirs = getattr(self, name), getattr(found, name)
            if ours != theirs:
                hashes = "" if name == "dtype" else f" ({ours[:12]}, not {theirs[:12]})"
                raise MismatchError(f"the guard was fit on {self.model} with {words}{hashes}; {advice}")


@well_typed
def bindings_of(model: LanguageModel, neurons: NeuronSet) -> Bindings:
    """The bindings of a guard on these neurons of a model as it is now.

    Source: none of the papers; a probe fit on one model says nothing of another (arXiv 2604.28129).
    """
    with model.active():
        weights, dtypes = weights_sha256(model, _reaching(model, last_layer(neurons)))
    return Bindings(
        model.name,
        model.fingerprint,
        weights,
        "+".join(dtypes),
        tokenizer_sha256(model.tokenizer),
        template_sha256(model),
    )


def _reaching(model: LanguageModel, last: int) -> Callable[[str, Tensor], bool]:
    """Whether a weight can reach neurons of layers up to the last one: the head and later layers cannot."""
    prefixes = {f"{plain_name(part.module_name)}.": part.index for part in model.anatomy.layers}
    inner = model.inner
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    embedding = inner.get_input_embeddings().weight
    heads = (
        {id(value) for value in head.parameters() if value is not embedding} if head is not None else set()
    )

    def wanted(name: str, value: Tensor) -> bool:
        return (
            id(value) not in heads
            and next((index for prefix, index in prefixes.items() if name.startswith(prefix)), -1) <= last
        )

    return wanted


TOP = 5
PROVISIONAL = "provisional "
KINDS = ("safe", "unsafe")
"""Before the false-positive rate of a threshold that no traffic of the user's own has confirmed."""
_NOT_FINITE = "an activation is NaN or infinite"
FAILURES = (Exception,)
"""What goes wrong while a prompt is read is a verdict of status "error", whatever it is.

Interrupts and exits pass.
"""


@dataclass(frozen=True, eq=False, repr=False)
class Guard:
    """A calibrated classifier on the activations of some neurons of one model; immutable.

    Attributes:
        neurons: whose activations it reads, in the order of its weights.
        pooling: how a prompt's tokens become one number a neuron.
        classifier: weights, standardisation, calibration.
        operating_points: thresholds for stated false-positive rates, and what they are worth.
        threshold: the one in force.
        in_force: where it comes from: `fpr 0.01`, `provisional …` until traffic of the user's own confirmed
            it, or `given`.
        bindings: the model, weights, tokenizer and template it was fit on.
        reference: of its calibration examples the probabilities with their groups, and histograms of
            probability and distance, for drift.
        report: what was measured while it was fit, as JSON values.
        notes: warnings.
        recheck: threshold for re-checks of answers under way, measured at such positions; None where nothing
            was.
        answers: a classifier of its own for answers, on the same neurons, whose features are pooled over the
            tokens of the answer; None where re-checks use the one for prompts.
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
    answers: "Guard | None" = None
    model: LanguageModel | None = None

    def __post_init__(self) -> None:
        check_probability(self.threshold, "threshold")
        if len(self.neurons) != self.classifier.n_features:
            raise UsageError(
                f"{len(self.neurons)} neurons and {self.classifier.n_features} weights; expected one "
                "weight a neuron"
            )

    def __repr__(self) -> str:
        bound = "unbound" if self.model is None else f"on {self.model.name}"
        return (
            f"Guard({numbered(len(self.neurons), 'neuron')}, {self.pooling}, threshold {self.threshold:.4g} "
            f"({self.in_force}), {bound})"
        )

    # The classifier

    def _repr_html_(self) -> str:
        rows = [
            [
                f"{100 * point.fpr_target:g} %",
                notebook.number(point.threshold, 3) if point.supported else f"not supported: {point.why}",
                notebook.interval(point.fpr.to_json()),
                notebook.interval(point.tpr.to_json()),
            ]
            for point in self.operating_points
        ]
        columns = ["false-positive rate asked for", "threshold", "false-positive rate", "true-positive rate"]
        return notebook.html_table(repr(self), columns, rows)

    def probabilities(self, features: Float[Tensor, "prompt neuron"]) -> Float64[Tensor, " prompt"]:
        """Calibrated probability of an unsafe answer for features that `read_features` gave.

        NaN where a feature is.
        """
        return self.classifier.probabilities(features)

    @property
    def sha256(self) -> str:
        """Hash of what decides its verdicts: neurons, pooling, weights, calibration, threshold."""
        how = self.classifier
        own = [] if self.answers is None else [self.answers.sha256]
        parts = [
            *own,
            str(self.pooling),
            repr(how.bias),
            repr(how.calibration),
            repr(self.threshold),
            repr(self.neurons.counts()),
        ]
        digest = hashlib.sha256("\n".join(parts).encode())
        for vector in (
            how.weights,
            how.mean,
            how.scale,
            *(torch.from_numpy(members.copy()) for _, members in self.neurons.items()),
        ):
            digest.update(vector.numpy().tobytes())
        return digest.hexdigest()

    def noted(self, notes: Iterable[str], **changes: Any) -> "Guard":
        """The guard with further warnings, each once, and with other fields changed."""
        return dataclasses.replace(self, notes=tuple(dict.fromkeys([*self.notes, *notes])), **changes)

    # Thresholds

    def at(self, fpr: float) -> "Guard":
        """The guard at the operating point of a false-positive rate.

        Raises:
            UsageError: there is no such point, or too few safe examples supported it.
        """
        point = next((point for point in self.operating_points if abs(point.fpr_target - fpr) < 1e-12), None)
        supported = (
            ", ".join(f"{point.fpr_target:g}" for point in self.operating_points if point.supported) or "none"
        )
        if point is None:
            raise UsageError(
                f"no operating point at a false-positive rate of {fpr:g}; supported are {supported}: fit "
                "with it, or give one"
            )
        if point.threshold is None:
            raise UsageError(
                f"the operating point {fpr:g} is not supported ({point.why}); supported are {supported}: "
                "recalibrate with more safe prompts"
            )
        return dataclasses.replace(
            self, threshold=point.threshold, in_force=f"{'' if self.confirmed else PROVISIONAL}fpr {fpr:g}"
        )

    def with_threshold(self, threshold: float) -> "Guard":
        """The guard with a threshold of one's own.

        Raises:
            UsageError: not between 0 and 1.
        """
        return dataclasses.replace(
            self, threshold=check_probability(threshold, "threshold"), in_force="given"
        )

    @property
    def confirmed(self) -> bool:
        """Whether its thresholds were set on requests of the user's own: by `recalibrate`, on safe prompts
        that the fit did not see.
        """
        return bool((self.report.get("recalibrated") or {}).get("own"))

    @property
    def rates(self) -> tuple[Rate, Rate] | None:
        """False-positive and true-positive rate of the threshold in force on the calibration prompts.

        None where the file does not say.

        The second is the share of unsafe requests that it catches.
        """
        kept = self.reference.get("probabilities")
        if kept is not None:
            safe, unsafe = (np.asarray(kept[kind], np.float64) for kind in KINDS)
            groups = self.reference.get("groups")  # files of earlier versions have none
            return rates_at(
                np.concatenate([safe, unsafe]),
                np.arange(len(safe) + len(unsafe)) >= len(safe),
                self.threshold,
                groups and [str(one) for kind in KINDS for one in groups[kind]],
            )
        # Files of earlier versions keep the rates of their operating points only, that of a provisional
        # threshold among them.
        wanted = self.in_force.removeprefix(PROVISIONAL)
        found = next(
            (point for point in self.operating_points if f"fpr {point.fpr_target:g}" == wanted), None
        )
        return None if found is None else (found.fpr, found.tpr)

    @property
    def standing(self) -> dict[str, Any]:
        """What is known of the threshold in force, as JSON values: `{threshold, in_force, caught,
        false_positives}`; rates may be null.
        """
        false, caught = self.rates or (None, None)
        told = {"caught": caught, "false_positives": false}
        return {
            "threshold": self.threshold,
            "in_force": self.in_force,
            **{name: one and one.to_json() for name, one in told.items()},
        }

    @property
    def why_idle(self) -> str | None:
        """Why the guard may stop nothing at its threshold: the interval of the share it catches holds 0.

        None where it does not.
        """
        caught = None if self.rates is None else self.rates[1]
        if caught is None or (caught.low is not None and caught.low > 0):
            return None
        return (
            f"at its threshold {self.threshold:.4g} the guard caught "
            f"{round((caught.value or 0) * caught.n)} of {numbered(caught.n, 'unsafe request')} (95 % "
            f"interval {caught.low or 0:.2g} to {1 if caught.high is None else caught.high:.2g}): it may "
            "stop nothing"
        )

    # Model

    @well_typed
    def bind(self, model: LanguageModel) -> "Guard":
        """The guard on a model in memory, after checking that it is the one it was fit on.

        Raises:
            ForeignModelError: another architecture. MismatchError: other weights, adapters, tokenizer or
            template.
        """
        self.bindings.check(model, self.neurons)
        answers = self.answers and dataclasses.replace(
            self.answers, neurons=self.answers.neurons.on(model.table), model=model
        )
        return dataclasses.replace(self, neurons=self.neurons.on(model.table), answers=answers, model=model)

    @property
    def bound(self) -> LanguageModel:
        """The model the guard is bound to.

        Raises:
            ModelError: none.
        """
        if self.model is None:
            raise ModelError(
                "this guard is not bound to a model; use Guard.load(folder, model) or guard.bind(model)"
            )
        return self.model

    # Scoring

    @well_typed
    def score(
        self, messages: Request, *, threshold: float | None = None, fail_open: bool = False, top: int = TOP
    ) -> Verdict:
        """What the guard says of one request: a text, a list of turns (system, several turns), or a Prompt.

        A conversation is read as a whole, without the answer it ends in, and turn by turn; the largest
        probability counts.

        Args:
            messages: the request; turns are `Message` or `{"role": …, "content": …}`.
            threshold: for this request; the guard's own where None.
            fail_open: let prompts pass that were truncated or could not be scored; by default they are
                flagged.
            top: how many neurons to name.

        Raises:
            InputError: turns that cannot be read, or that the chat template refuses. ModelError: the guard is
            not bound to a model.

        Source: Chen et al., arXiv 2406.14144, section 6. Differs: a calibrated probability and a threshold
        with a known false-positive rate; truncation and errors are not "safe".
        """
        return self.score_batch([messages], threshold=threshold, fail_open=fail_open, top=top)[0]

    @well_typed
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
        return [
            largest(self.counting(some))
            for some in self.score_readings(
                ways, threshold=threshold, fail_open=fail_open, top=top, batch_size=batch_size
            )
        ]

    def counting(self, verdicts: Sequence[Verdict], *, begun: bool | None = None) -> Sequence[Verdict]:
        """Those of the verdicts on a request's readings that decide; see `verdict.counting`."""
        return counting(verdicts, reads_ends=self.reads_ends, begun=begun)

    @property
    def reads_ends(self) -> bool:
        """Whether it reads the last tokens of a prompt only."""
        return self.pooling.kind in ("last", "agree")

    def score_readings(self, ways: Sequence[Sequence[RequestReading]], **scoring: Any) -> list[list[Verdict]]:
        """A verdict on each reading of several requests; arguments as for `score_encoded`."""
        encoded = [self.encode(way.prompt) for some in ways for way in some]
        verdicts = iter(self.score_encoded(encoded, **scoring))
        return [[dataclasses.replace(next(verdicts), reading=way.name) for way in some] for some in ways]

    def encode(self, request: Request) -> Encoded:
        """Token ids of a request as a whole, template included.

        Raises:
            InputError: turns that cannot be read, or that the chat template refuses.
        """
        return self.bound.encode(as_prompt(request))[0]

    def flags(self, ids: Sequence[Sequence[int]]) -> list[bool]:
        """Whether the guard flags each request, given as its token ids, template included: what
        `safety_neurons.scaled` asks of `when`.

        Raises:
            ModelError: the guard is not bound to a model.
        """
        encoded = [Encoded(str(number), list(row)) for number, row in enumerate(ids)]
        return [verdict.flagged for verdict in self.score_encoded(encoded, top=0)]

    def score_encoded(
        self,
        encoded: Sequence[Encoded],
        *,
        threshold: float | None = None,
        fail_open: bool = False,
        top: int = TOP,
        batch_size: BatchSize = "auto",
    ) -> list[Verdict]:
        """Verdicts on encoded requests, in order. A batch that fails is read again one by one.

        What fails alone has status "error".
        """
        started = time.perf_counter()
        options: dict[str, Any] = {"threshold": self._limit(threshold), "fail_open": fail_open}
        self.bound  # noqa: B018 - a guard without a model is the caller's error, not the prompt's
        if not encoded:
            return []
        try:
            found = self._read(encoded, batch_size)
        except RunError:  # of all processes that share the reading, and of no prompt
            raise
        except FAILURES as error:
            if len(encoded) > 1:
                return [self.score_encoded([item], top=top, **options)[0] for item in encoded]
            latency = 1000 * (time.perf_counter() - started)
            return [self.failed(error, **options, latency_ms=latency, n_tokens=len(encoded[0].ids))]
        truncated, lengths = [item.truncated for item in encoded], [len(item.ids) for item in encoded]
        return self.verdicts(
            torch.stack(found), truncated, **options, top=top, lengths=lengths, started=started
        )

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
            parts = centred * weights
            scores = summed(parts).tolist()
            standardised = centred * inverse
            squares = np.einsum("ij,ij->i", standardised, standardised).tolist()
        latency = 0.0 if started is None else 1000 * (time.perf_counter() - started)
        verdicts = []
        for row, score in enumerate(scores):
            score += self.classifier.bias
            length = None if lengths is None else lengths[row]
            if not math.isfinite(score):
                verdicts.append(
                    self.failed(
                        _NOT_FINITE, threshold=limit, fail_open=fail_open, latency_ms=latency, n_tokens=length
                    )
                )
                continue
            odds = min(max(self.classifier.calibration.of_one(score), -LIMIT), LIMIT)
            chance = 1 / (1 + math.exp(-odds))
            flagged = chance >= limit or (truncated[row] and not fail_open)
            status: Status = "truncated" if truncated[row] else "ok"
            named = self._top(parts[row], top) if top and (flagged or not only_flagged) else ()
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
        words = " ".join((error if isinstance(error, str) else f"{type(error).__name__}: {error}").split())[
            :300
        ]
        return Verdict(
            None, not fail_open, self._limit(threshold), "error", latency_ms, n_tokens=n_tokens, error=words
        )

    def _limit(self, threshold: float | None) -> float:
        return self.threshold if threshold is None else check_probability(threshold, "threshold")

    def _read(self, encoded: Sequence[Encoded], batch_size: BatchSize) -> list[Tensor]:
        model, collector = self.bound, self.collector

        def take(batch: Batch) -> dict[int, Tensor]:
            return dict(zip(batch.indices, collector.result()[self.pooling].to("cpu"), strict=True))

        return in_order(collect(model, encoded, collector, take, batch_size))

    def _top(self, parts: Float64[np.ndarray, " neuron"], count: int) -> tuple[TopNeuron, ...]:
        if count < 1:
            return ()
        first = np.argpartition(-parts, count)[:count] if count < len(parts) else np.arange(len(parts))
        largest = sorted(
            ((float(parts[place]), place) for place in first.tolist()), key=lambda pair: (-pair[0], pair[1])
        )
        names = self._names
        return tuple(
            TopNeuron(names[place][0], names[place][1], value) for value, place in largest if value > 0
        )

    @cached_property
    def collector(self) -> Collector:
        """Gathers the guard's features while its model runs.

        Used by one thread at a time, which holds the `model_lock`.
        """
        return self.new_collector()

    def new_collector(self) -> Collector:
        """A collector of one's own."""
        return Collector(self.bound.anatomy, self.neurons, [self.pooling], self.classifier.direction)

    @cached_property
    def _names(self) -> list[tuple[str, int]]:
        return list(self.neurons)

    # Files

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `guard.safetensors` (neurons, weights, standardisation) and `guard.json` (everything else)
        into a folder.

        Raises:
            RunError: the folder cannot be written.
        """
        place = pathlib.Path(folder)
        arrays = {name: getattr(self.classifier, name).contiguous() for name in VECTORS}
        arrays |= {MEMBERS + key: torch.from_numpy(indices.copy()) for key, indices in self.neurons.items()}
        metadata = {**header(self.neurons.provenance, self.neurons.table), "guard": SCHEMA}
        write_bytes(place / WEIGHTS, ordered_header(to_bytes(arrays, metadata=metadata)))
        facts = {
            one.name: getattr(self, one.name, getattr(self.classifier, one.name, None))
            for one in dataclasses.fields(GuardFacts)
        }
        told = plain({"schema": SCHEMA, **facts, "n_neurons": len(self.neurons)})
        if self.answers is not None:
            self.answers.save(place / ANSWERS)
        seal = _seal(told, self.classifier, self.neurons, place / ANSWERS if self.answers else None)
        write_json(place / FACTS, {**told, SEAL: seal})

    @staticmethod
    @well_typed
    def load(folder: str | os.PathLike[str], model: LanguageModel | None = None) -> "Guard":
        """The guard in a folder, or in that of the run that fit it, bound to a model where one is given.

        Anyone may have written such a folder, so sizes are looked at before anything is allocated, and
        whatever does not fit is one line.

        Raises:
            InputError: a file is missing, too large, damaged, or of another version. NeuronError: a damaged
            set. ForeignModelError, MismatchError: another model; see `bind`.
        """
        place = pathlib.Path(folder)
        inside = place / "guard"
        if not (place / FACTS).exists() and (inside / FACTS).is_file():
            place = inside
        found = _read_facts(place / FACTS)
        neurons, vectors = _read_weights(place / WEIGHTS)
        try:
            facts = from_json(GuardFacts, found)
            classifier = Classifier(
                vectors["mean"], vectors["scale"], vectors["weights"], facts.bias, facts.calibration
            )
            shared = {
                one.name: getattr(facts, one.name)
                for one in dataclasses.fields(Guard)
                if hasattr(facts, one.name)
            }
            guard = Guard(neurons=neurons, classifier=classifier, **shared)
            if facts.n_neurons != len(neurons):
                raise InputError(f"{facts.n_neurons} neurons, and {WEIGHTS} holds {len(neurons)}")
        except InputError as error:
            raise InputError(f"{str(place / FACTS)!r} is damaged: {error}") from error
        own = facts.recheck is not None and facts.recheck.own
        if own:
            guard = dataclasses.replace(guard, answers=_of_answers(place / ANSWERS, guard))
        # Files of earlier versions have no seal.
        if (
            found.get(SEAL, seal := _seal(found, classifier, neurons, place / ANSWERS if own else None))
            != seal
        ):
            raise InputError(
                f"{str(place)!r} is not as Guard.save wrote it: a number was changed by hand, or a file is "
                "another guard's; expected one guard: copy the whole folder again, and give a threshold of "
                "your own as --threshold or Guard.with_threshold"
            )
        return guard if model is None else guard.bind(model)


def _seal(
    told: Mapping[str, Any], classifier: Classifier, neurons: NeuronSet, answers: pathlib.Path | None
) -> str:
    """Hash of what the files of a guard say together, words for people aside: its weights with the thresholds
    of another guard would keep no false-positive rate, and look like a guard.
    """
    facts = {name: value for name, value in told.items() if name not in ("notes", SEAL)}
    facts["bindings"] = {name: value for name, value in facts["bindings"].items() if name != "model"}
    inner = None if answers is None else _read_facts(answers / FACTS).get(SEAL)
    vectors = [*(getattr(classifier, name).numpy() for name in VECTORS), *dict(neurons.items()).values()]
    return json_sha256(
        [facts, inner, *(hashlib.sha256(np.ascontiguousarray(one).tobytes()).hexdigest() for one in vectors)]
    )


def _of_answers(place: pathlib.Path, guard: Guard) -> Guard:
    """The classifier for answers in a folder inside a guard's.

    Raises:
        InputError: it is not the one of this guard: other neurons, another model, or answers of its own.
    """
    if (place / ANSWERS).exists():
        raise InputError(f"{str(place)!r} holds a guard within a guard; expected a classifier for answers")
    answers = Guard.load(place)
    if answers.bindings != guard.bindings or answers.neurons != guard.neurons:
        raise InputError(
            f"{str(place)!r} is the classifier for answers of another guard; expected the same neurons and "
            "model: copy the whole folder again"
        )
    return answers


@dataclass(frozen=True)
class GuardFacts:
    """What `guard.json` holds of a guard beside its schema: everything but the vectors, with the words of
    `Guard`.
    """

    n_neurons: int
    pooling: Pooling
    bias: float
    calibration: Calibration
    threshold: float
    in_force: str
    operating_points: tuple[OperatingPoint, ...]
    recheck: Recheck | None
    bindings: Bindings
    reference: Mapping[str, Any]
    report: Mapping[str, Any]
    notes: tuple[str, ...]

    def __post_init__(self) -> None:
        if not math.isfinite(self.bias):
            raise InputError(f"a guard with bias {self.bias}; expected a finite number")
        if len(self.in_force) > LONGEST_WORDS:
            raise InputError(
                f"a guard whose threshold is said to come from {len(self.in_force):,} characters; "
                "expected a few words"
            )
        if not isinstance(self.report.get("recalibrated") or {}, Mapping):
            raise InputError(
                "a guard recalibrated in an unknown way; expected an object of what was measured"
            )
        # Thresholds are weighed by them.
        kept, groups = self.reference.get("probabilities") or {}, self.reference.get("groups")
        for value in (value for values in kept.values() for value in values):
            check_probability(value, "threshold")
        if groups is not None and any(
            len(groups[kind]) != len(kept[kind]) or not all(isinstance(one, int) for one in groups[kind])
            for kind in KINDS
        ):
            raise InputError("a guard with other groups than probabilities; expected a number of each")


def _read_facts(path: pathlib.Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MOST_JSON:
            raise InputError(
                f"{str(path)!r} has {path.stat().st_size:,} bytes; expected at most {MOST_JSON:,}: "
                "this is no guard"
            )
        found = strict_json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"cannot read {str(path)!r} ({error.strerror or error}); expected the folder of a guard: "
            "check the path"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{str(path)!r} is not the JSON of a guard ({_one_line(error)}); expected what Guard.save wrote"
        ) from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        schema = str(found.get("schema"))[:40] if isinstance(found, dict) else type(found).__name__
        raise InputError(
            f"{str(path)!r} is of schema {schema!r}; expected {SCHEMA!r}: update the package or fit the "
            "guard again"
        )
    return found


def _read_weights(path: pathlib.Path) -> tuple[NeuronSet, dict[str, torch.Tensor]]:
    _check_header(path)
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
            names = list(opened.keys())
            if metadata.get("guard") != SCHEMA:
                raise InputError(
                    f"{str(path)!r} holds no weights of a guard; expected the {WEIGHTS} that Guard.save wrote"
                )
            sizes = {name: opened.get_slice(name).get_shape() for name in names}
            _check_sizes(path, sizes)
            arrays = {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"cannot read {str(path)!r} ({_one_line(error)}); expected a whole safetensors file: copy it "
            "again"
        ) from error
    members = {
        name.removeprefix(MEMBERS): value.numpy()
        for name, value in arrays.items()
        if name.startswith(MEMBERS)
    }
    vectors = {name: arrays[name] for name in VECTORS}
    if any(vector.dtype != torch.float32 for vector in vectors.values()):
        raise InputError(f"{str(path)!r} holds weights in {vectors['weights'].dtype}; expected float32")
    told = Provenance.from_metadata(metadata, "neurons", path)
    neurons = NeuronSet(members, stored_table(metadata, told), told)
    if len(neurons) != sum(len(indices) for indices in members.values()) or any(
        np.any(np.diff(part) <= 0) for part in members.values()
    ):
        raise NeuronError(
            f"{str(path)!r} names neurons twice or out of order, so weights cannot be told apart; copy "
            "it again"
        )
    return neurons, vectors


def _check_header(path: pathlib.Path) -> None:
    """Refuse a file whose header alone is larger than a guard's can be, before anything parses it."""
    try:
        with path.open("rb") as stream:
            start = stream.read(8)
    except OSError as error:
        raise InputError(
            f"cannot read {str(path)!r} ({error.strerror or error}); expected the folder of a guard: "
            "check the path"
        ) from error
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= min(MOST_HEADER, path.stat().st_size - 8):
        raise InputError(
            f"{str(path)!r} is no safetensors file of a guard (its header is said to have {length:,} "
            "bytes); copy it again"
        )


def _check_sizes(path: pathlib.Path, sizes: Mapping[str, Any]) -> None:
    """One axis each, as many weights as neurons, and no more than a guard can have."""
    wrong = next(
        (
            name
            for name, shape in sizes.items()
            if len(shape) != 1 or not (name in VECTORS or name.startswith(MEMBERS))
        ),
        None,
    )
    lacking = next((name for name in VECTORS if name not in sizes), None)
    if wrong is not None or lacking is not None:
        held = f"no {lacking!r}" if wrong is None else f"{wrong[:60]!r}"
        raise InputError(
            f"{str(path)!r} holds {held}; expected vectors {', '.join(VECTORS)} and "
            f"{MEMBERS}KEY: copy it again"
        )
    count = sum(shape[0] for name, shape in sizes.items() if name.startswith(MEMBERS))
    if not 0 < count <= MOST_NEURONS or any(sizes[name][0] != count for name in VECTORS):
        raise InputError(
            f"{str(path)!r} holds {count:,} neurons and {sizes['weights'][0]:,} weights; expected one "
            "weight a neuron"
        )


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:120]
