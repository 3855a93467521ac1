"""What a run needs, from the shapes of its models alone: memory, arithmetic, time and disk.

Nothing is loaded. Memory is what the run adds to the process; time is the number of floating-point operations
divided by the rate at which this machine runs a layer of the model, or a method on it, measured for a moment.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from safety_neurons.counting import numbered
from safety_neurons.model.batches import BatchSize, plan, token_budget
from safety_neurons.model.decoding import SHARED
from safety_neurons.model.language_model import CACHE_BYTES, WIDEST, LanguageModel
from safety_neurons.model.outline import Outline
from safety_neurons.model.pace import Reading, ReadingPace, Throughput, attended_in
from safety_neurons.model.passes import LOGIT_BYTES, LOGITS_AT_ONCE
from safety_neurons.model.proof import ROWS_AT_ONCE, TOKENS
from safety_neurons.model.sites import AttentionAnatomy, LayerAnatomy
from safety_neurons.neurons import MLP_SITES
from safety_neurons.prompt_lists import Prompts

CHUNK = 2**24
"""Bytes of what exact importance computes at once on a CPU, intermediate results included."""


@dataclass(frozen=True)
class Work:
    """Sequences that are read, and answered or trained on.

    Attributes:
        what: In a few words.
        lengths: Tokens of every sequence, without what is written.
        passes: How often a model reads each, a backward pass counted as two.
        models: How many models read it.
        new_tokens: Longest answer; 0 where none is written.
        answers: How often each is answered, over all arms and samples.
        together: Of these, how many in the same batches.
        shared: Tokens that all begin with, which a batch reads once for each of these.
        logits: Whether the logits of every token are needed.
        backward: Whether gradients are taken, so that what all layers computed is kept.
        exact: Of exact importance of every neuron, computed in the pass: the tokens of a short prompt, and
            how many of these are scored together; None where it is not computed.
        neurons: Neurons that are searched.
        active: Of these, how many a token passes: routed experts by the share of the tokens they get.
        statistics: float64 numbers that are kept for each of them.
        kept: Bytes of activations at all of them that a batch may keep; 0 where none are kept.
        trained: Entries of weights that are trained.
        reading: What a batch goes through, where operations alone do not tell its time.
        layers: Numbers of the layers that a method works on; None for all. Every pass runs all layers, while
            what is computed beside it is of these, and gradients end at the first of them.
        searches: How many searches it is of, each of which does once what is done once.
    """

    what: str
    lengths: tuple[int, ...] = field(repr=False)
    passes: float | int = 1
    models: int = 1
    new_tokens: int = 0
    answers: float | int = 0
    together: int = 1
    shared: int = 0
    logits: bool = False
    backward: bool = False
    exact: tuple[int, int] | None = None
    neurons: int = 0
    active: float | int = 0
    statistics: int = 0
    kept: int = 0
    trained: int = 0
    reading: Reading | None = field(default=None, repr=False)
    layers: tuple[int, ...] | None = None
    searches: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of all sequences, once."""
        return sum(self.lengths)

    @property
    def written(self) -> int:
        """Tokens that are written at most."""
        return round(len(self.lengths) * self.new_tokens * self.answers)


@dataclass(frozen=True)
class CostEstimate:
    """Needs of a run; bytes and seconds.

    Attributes:
        parameters: Of the first model, tied ones once.
        active_parameters: Those that a token passes.
        neurons: Neurons of the first model.
        weights_bytes: Weights of all models, a shared base once.
        tokenizer_bytes: Tokenizers of all models on the processor.
        probe_bytes: The passes that prove where the neurons are, before anything else.
        activations_bytes: Largest batch while it is fed (a rough upper figure: attention, feed-forward and
            readers of one layer), or all layers where gradients are taken.
        cache_bytes: Keys and values of the largest batch while it is completed; 0 where nothing is generated.
        logits_bytes: Logits: of one token a sequence while answers are written, of every token only where
            losses are measured; 0 where none are needed.
        statistics_bytes: Sums over all neurons, in float64, and numbers of every neuron and prompt of a
            batch.
        disk_bytes: Files of the finished run.
        working_disk_bytes: Partial state beside them while it runs.
        flops: Floating-point operations of all passes.
        flops_per_second: Measured rate of this machine, on the widest batch.
        start_seconds: Python, its libraries and the configuration, where the plan took them too; 0 otherwise.
        loading_seconds: Reading and hashing the weights.
        proof_seconds: The passes that prove where the neurons are.
        work_seconds: Operations divided by the rates of the widest batch, of one decoding step and of what
            methods do.
        prompts: Number of prompts.
        tokens: Tokens that are fed, as often as they are.
        new_tokens: Tokens that are generated at most.
        batches: Batches of one pass over all prompts.
        truncated: Prompts that do not fit the context.
        device: Where the first model is.
        dtype: What it computes in.
        device_bytes: Memory of that device; 0 where it is not known.
        steps: What is done, with its share of the operations, in order.
        notes: What makes a number less certain.
    """

    parameters: int
    active_parameters: int
    neurons: int
    weights_bytes: int
    probe_bytes: int
    activations_bytes: int
    cache_bytes: int
    logits_bytes: int
    statistics_bytes: int
    disk_bytes: int
    working_disk_bytes: int
    flops: float
    flops_per_second: float
    loading_seconds: float
    proof_seconds: float
    work_seconds: float
    prompts: int
    tokens: int
    new_tokens: int
    batches: int
    truncated: int
    device: str
    dtype: str
    device_bytes: int = 0
    steps: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    start_seconds: float = 0.0
    tokenizer_bytes: int = 0

    @property
    def seconds(self) -> float:
        """The whole time."""
        return self.start_seconds + self.loading_seconds + self.proof_seconds + self.work_seconds

    @property
    def memory_bytes(self) -> int:
        """The most that is in memory at once, beside Python and its libraries."""
        passes = self.activations_bytes + self.cache_bytes + self.logits_bytes
        held = self.weights_bytes + self.tokenizer_bytes
        return held + max(self.probe_bytes, passes + self.statistics_bytes)

    @property
    def fits(self) -> bool | None:
        """Whether the device has so much memory; None where that is not known."""
        return self.memory_bytes <= self.device_bytes if self.device_bytes else None

    def __str__(self) -> str:
        active = (
            "" if self.active_parameters == self.parameters else f", {_count(self.active_parameters)} a token"
        )
        parts = [
            f"weights {_size(self.weights_bytes)}",
            f"tokenizer {_size(self.tokenizer_bytes)}",
            f"activations {_size(self.activations_bytes)}",
            f"cache {_size(self.cache_bytes)}",
            f"logits {_size(self.logits_bytes)}",
            f"statistics {_size(self.statistics_bytes)}",
            f"or, before, probe passes {_size(self.probe_bytes)}",
        ]
        cut = f"; {numbered(self.truncated, 'prompt')} longer than the context" if self.truncated else ""
        room = {
            None: "",
            True: f"; it has {_size(self.device_bytes)}",
            False: f"; it has {_size(self.device_bytes)}: too little; expected a larger device, several "
            "with --device-map auto, or --quantize 4bit",
        }[self.fits]
        partial = (
            f", and {_size(self.working_disk_bytes)} of partial state while it runs"
            if self.working_disk_bytes
            else ""
        )
        spent = [
            f"{name} {_duration(seconds)}"
            for name, seconds in (
                ("start", self.start_seconds),
                ("weights", self.loading_seconds),
                ("probe passes", self.proof_seconds),
                ("work", self.work_seconds),
            )
        ]
        lines = [
            f"{_count(self.parameters)} parameters{active}, {numbered(self.neurons, 'neuron')}",
            f"{numbered(self.prompts, 'prompt')}, {numbered(self.tokens, 'token')} to feed, up to "
            f"{self.new_tokens:,} to generate, {numbered(self.batches, 'batch', 'batches')}{cut}",
            *(f"  {step}" for step in self.steps),
            f"memory about {_size(self.memory_bytes)} on {self.device} in {self.dtype} "
            f"({', '.join(parts)}){room}",
            f"time about {_duration(self.seconds)} ({', '.join(spent)}; {self.flops / 1e12:,.3g} TFLOP; the "
            f"widest batch runs at {self.flops_per_second / 1e9:,.3g} GFLOP/s, measured)",
            f"disk about {_size(self.disk_bytes)}{partial}",
            *self.notes,
        ]
        return "\n".join(lines)


def estimate(
    models: Sequence[LanguageModel],
    prompts: Prompts,
    *,
    max_new_tokens: int = 0,
    batch_size: BatchSize = "auto",
) -> CostEstimate:
    """Estimates a `find` over prompts with models in memory, without running it.

    Args:
        models: The models of the run, one or a pair.
        prompts: The prompts.
        max_new_tokens: Longest completion, 0 where nothing is generated.
        batch_size: Rows of a batch, or `auto`.
    """
    made = [Outline.of(lm) for lm in models]
    tensors = {id(one): one for lm in models for one in (*lm.model.parameters(), *lm.model.buffers())}
    weights = sum(one.numel() * one.element_size() for one in tensors.values())
    lengths, truncated = made[0].lengths(prompts, max_new_tokens)
    neurons = made[0].table.n_neurons
    read = tuple(length + max_new_tokens for length in lengths)
    works = [Work("read", read, models=len(models), neurons=neurons, statistics=3 * len(models))]
    if max_new_tokens:
        works.insert(0, Work("write", tuple(lengths), passes=0, new_tokens=max_new_tokens, answers=1))
    disk = 8 * neurons + 16 * max_new_tokens * len(lengths)
    return cost(made[0], works, weights, disk, batch_size=batch_size, truncated=truncated)


def cost(
    outline: Outline,
    works: Sequence[Work],
    weights: int,
    disk: int,
    *,
    batch_size: BatchSize = "auto",
    truncated: int = 0,
    hashed: int = 0,
    notes: Sequence[str] = (),
) -> CostEstimate:
    """The needs of a run that does these works one after the other.

    Args:
        outline: The model that reads and writes; all models of a run have its shape.
        works: What is done.
        weights: Bytes of the weights of all models in memory.
        disk: Bytes of the files of the finished run.
        batch_size: Rows of a batch, or `auto`.
        truncated: Prompts that do not fit the context.
        hashed: Bytes of weights that are read and hashed, each as often as it is.
        notes: What makes a number less certain.
    """
    sizes = [_sizes(outline, work, batch_size) for work in works]
    peak = max(sizes, key=lambda one: one.total, default=_Sizes())
    counted = [_operations(outline, work, one) for work, one in zip(works, sizes, strict=True)]
    probing = _probe_tokens(outline) * max((work.models for work in works), default=1)
    at_probe = probing * (2 * outline.decoder_parameters + 2 * outline.n_ids * outline.hidden / TOKENS)
    flops = at_probe + sum(read + written for read, written in counted)
    widest = max(sizes, key=lambda one: one.rows * one.width, default=_Sizes())
    rate = Throughput(outline)
    many = rate(widest.rows, widest.width)
    seconds = 0.0
    for work, one, (read, written) in zip(works, sizes, counted, strict=True):
        own = _own_pace(outline, work, one, rate)
        if own is None:
            seconds += read / many
        else:
            mine = _layers_of(outline, work)
            others = [layer for layer in outline.anatomy.layers if layer not in mine]
            passed = work.passes * work.models * _passed(outline, others, work.lengths)
            seconds += passed / many + (read - passed) / own.rate
            seconds += own.once * len(mine) * work.searches
        seconds += written / rate(one.rows, 1, one.width) if written else 0.0
    working = max((8 * work.statistics * work.neurons for work in works), default=0)
    return CostEstimate(
        parameters=outline.n_parameters,
        active_parameters=outline.active_parameters,
        neurons=outline.table.n_neurons,
        weights_bytes=weights,
        tokenizer_bytes=outline.tokenizer_bytes,
        probe_bytes=_probe_bytes(outline),
        activations_bytes=peak.activations,
        cache_bytes=peak.cache,
        logits_bytes=peak.logits,
        statistics_bytes=peak.statistics,
        disk_bytes=disk,
        working_disk_bytes=working,
        flops=flops,
        flops_per_second=many,
        loading_seconds=hashed / rate.hashed() if hashed else 0.0,
        proof_seconds=at_probe / rate(min(ROWS_AT_ONCE, _probe_keys(outline)), TOKENS),
        work_seconds=seconds,
        prompts=max((len(work.lengths) for work in works), default=0),
        tokens=round(sum(work.tokens * work.passes * work.models for work in works)),
        new_tokens=sum(work.written for work in works),
        batches=max((one.batches for one in sizes), default=0),
        truncated=truncated,
        device=str(outline.device),
        dtype=outline.dtype + ("" if outline.quantize == "none" else f", weights in {outline.quantize}"),
        device_bytes=memory_of(outline.device),
        steps=tuple(
            _said(work, read + written, flops) for work, (read, written) in zip(works, counted, strict=True)
        ),
        notes=tuple(dict.fromkeys((*outline.notes, *notes, *rate.notes))),
    )


def _said(work: Work, flops: float, whole: float) -> str:
    times = f"{work.passes * work.models:g} × " if work.passes * work.models not in (0, 1) else ""
    read = f"{times}{numbered(work.tokens, 'token')} read" if work.passes else ""
    written = f"up to {numbered(work.written, 'token')} written" if work.written else ""
    return (
        f"{work.what}: {numbered(len(work.lengths), 'text')}, {', '.join(filter(None, (read, written)))} "
        f"({flops / whole:.0%} of the arithmetic)"
    )


@dataclass(frozen=True)
class _Sizes:
    """Bytes of a work beside the weights, and the shape of its largest batch."""

    activations: int = 0
    cache: int = 0
    logits: int = 0
    statistics: int = 0
    rows: int = 1
    width: int = 1
    batches: int = 0
    lengths: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        return self.activations + self.cache + self.logits + self.statistics


def _sizes(outline: Outline, work: Work, batch_size: BatchSize) -> _Sizes:
    """Of the largest batch of a work."""
    full = [length + work.new_tokens for length in work.lengths for _ in range(work.together)]
    if not full:
        return _Sizes()
    budget = token_budget(outline.device)
    if work.new_tokens and outline.device.type == "cpu":
        budget = max(budget, min(WIDEST, CACHE_BYTES // max(1, cache_width(outline) * outline.itemsize)))
    if work.logits:
        budget = max(1, min(budget, LOGIT_BYTES // (4 * outline.n_ids)))
    token = work.active * max(outline.itemsize, 4)
    if work.kept:
        budget = max(1, min(budget, int(work.kept // max(1, token))))
    groups = plan(full, batch_size, budget)
    group = max(groups, key=lambda one: len(one) * max(full[index] for index in one))
    rows, width = len(group), max(full[index] for index in group)
    prompt = max(full[index] for index in group) - work.new_tokens
    size, neurons = outline.itemsize, work.neurons
    fed = rows * (prompt if work.new_tokens else width)
    layers = len(outline.anatomy.layers) - len(_ahead(outline, work)) if work.backward else 1
    activations = layers * fed * layer_width(outline) * size
    padded = len({full[index] for index in group}) > 1
    activations += rows * prompt**2 * (1 + size) if padded else 0
    activations += min(work.kept, round(fed * token))
    statistics = 8 * work.statistics * neurons
    if work.exact is not None:
        activations += _exact_bytes(outline, work)
        statistics += 8 * rows * neurons
    cache = rows * width * cache_width(outline) * size * work.models if work.new_tokens else 0
    logits = rows * outline.n_ids * (size + 4) if work.new_tokens else 0
    if work.logits:
        entries = fed * outline.n_ids
        of_chunk = 2 * max(size, 4) * min(entries, LOGITS_AT_ONCE)  # looked at a part at a time
        logits = 2 * entries * (size + 4) if work.backward else entries * size + of_chunk
    statistics += work.trained * 4 * 4
    lengths = tuple(full[index] for index in group)
    return _Sizes(activations, cache, logits, statistics, rows, width, len(groups), lengths)


def _layers_of(outline: Outline, work: Work) -> list[LayerAnatomy]:
    """The layers that a method works on."""
    return [layer for layer in outline.anatomy.layers if work.layers is None or layer.index in work.layers]


def _ahead(outline: Outline, work: Work) -> list[LayerAnatomy]:
    """The layers before these, which no gradient reaches."""
    first = min((layer.index for layer in _layers_of(outline, work)), default=0)
    return [layer for layer in outline.anatomy.layers if layer.index < first]


def _passed(outline: Outline, layers: Sequence[LayerAnatomy], lengths: Sequence[int]) -> float:
    """Operations of one pass of sequences through some layers."""
    return math.fsum(
        2 * outline.passed_in(layer) * sum(lengths)
        + sum(length * attended_in(outline, layer, length) for length in lengths)
        for layer in layers
    )


def _own_pace(outline: Outline, work: Work, sizes: _Sizes, rate: Throughput) -> ReadingPace | None:
    """Of what a batch of a work goes through, where it has one of its own."""
    if work.reading is None or not sizes.lengths:
        return None

    def operations(layer: LayerAnatomy, length: int) -> float:
        plain = _passed(outline, [layer], [length])
        return plain + (_exact_in(layer, length) if work.exact is not None else 0.0)

    return rate.of_reading(work.reading, sizes.lengths, operations)


def _operations(outline: Outline, work: Work, sizes: _Sizes) -> tuple[float, float]:
    """Floating-point operations of reading, and of writing."""
    head = 2 * outline.n_ids * outline.hidden
    once = math.fsum(_forward(outline, length) for length in work.lengths)
    read = once * work.passes * work.models
    if work.backward:  # forward once, back twice
        back = 2 / 3 * work.passes * work.models
        read -= back * _passed(outline, _ahead(outline, work), work.lengths)
    if work.logits or work.backward:
        read += head * work.tokens * work.passes * work.models
    if work.exact is not None:
        scored = _layers_of(outline, work)
        read += sum(_exact_in(layer, length) for length in work.lengths for layer in scored)
    again = len(work.lengths) * work.answers - sizes.batches * work.together
    spared = _forward(outline, work.shared) * max(0, again) if work.shared >= SHARED else 0.0
    prompts = once * work.answers - spared if work.new_tokens else 0.0
    if work.kept:  # sites are read in several passes where one batch's activations do not fit
        token = work.active * max(outline.itemsize, 4)
        read *= max(1, math.ceil(sizes.rows * sizes.width * token / work.kept))
    written = 0.0
    for length in work.lengths if work.new_tokens else ():
        middle = length + work.new_tokens / 2
        step = 2 * outline.decoder_parameters + head + _attended(outline, middle) * 2
        written += work.new_tokens * work.answers * step
    return read + prompts * work.models, written * work.models


def _forward(outline: Outline, length: int) -> float:
    """Operations of one pass over one sequence, without the head."""
    return length * (2 * outline.decoder_parameters + _attended(outline, length))


def _attentions(outline: Outline) -> Iterator[AttentionAnatomy]:
    """The attention of every layer that has one."""
    for layer in outline.anatomy.layers:
        if layer.attention is not None:
            yield layer.attention


def _attended(outline: Outline, length: float | int) -> float:
    """Operations a token of scores and mixtures of all layers, half of the keys being hidden on average."""
    return sum(attended_in(outline, layer, length) for layer in outline.anatomy.layers)


def _exact_in(layer: LayerAnatomy, length: int) -> float:
    """Of exact importance beside the pass, in one layer: for each row of q and k new softmaxes of its heads,
    their mixtures of values, and the norm of what the output projection makes of them.
    """
    if (part := layer.attention) is None:
        return 0.0
    return 2.0 * part.n_heads * part.head_dim**2 * (length**2 + 2 * length * part.head_dim)


def _exact_bytes(outline: Outline, work: Work) -> int:
    """Of exact importance: factors of every output projection, which stay, and the scores of attention of
    one long prompt or of several short ones at one layer.
    """
    assert work.exact is not None
    (short, together), longest = work.exact, max(work.lengths)
    factors = states = 0
    wide = max(outline.itemsize, 4)
    for part in (layer.attention for layer in _layers_of(outline, work)):
        if part is None:
            continue
        mixed = part.n_heads * part.head_dim
        factors += wide * (mixed**2 // part.n_kv_heads + part.n_heads * part.head_dim**2)
        at_once = together if longest <= short else 1
        states = max(states, 3 * wide * at_once * part.n_heads * longest**2)
    return factors + states + (CHUNK if outline.device.type == "cpu" else 2**28)


def layer_width(outline: Outline) -> int:
    """Numbers a token needs at the widest point of a pass: residual streams, and inputs and outputs of all
    sites of one layer, of the experts that a token passes.
    """
    widest = 0
    for layer in outline.anatomy.layers:
        dense = sum(place.size for part in layer.parts for place in part.places.values())
        routed = 0
        if layer.experts is not None:
            passed = outline.anatomy.experts_per_token(layer.index) or 1
            routed = passed * (len(MLP_SITES) * layer.experts.width + outline.hidden)
        widest = max(widest, dense + routed)
    return 4 * outline.hidden + 2 * widest


def cache_width(outline: Outline) -> int:
    """Numbers that keys and values of a token take in all layers."""
    return sum(
        part.places[site].size for part in _attentions(outline) for site in "kv" if site in part.places
    )


def _probe_keys(outline: Outline) -> int:
    routed = sum(len(MLP_SITES) for layer in outline.anatomy.layers if layer.experts is not None)
    return len(outline.anatomy.places) + routed


def _probe_tokens(outline: Outline) -> int:
    """Tokens of the passes that prove the anatomy, the first guess of every layout being right: two rows for
    the order of tokens, attention (of one token), feed-forward parts, projections, experts and a decoding
    step; three rows a layer beside one for queries in a fused projection; and one row a site without it, two
    rows beside every 64.
    """
    keys, layers = _probe_keys(outline), outline.anatomy.layers
    fused = sum(part.layout is not None or part.gate is not None for part in _attentions(outline))
    whole = 4 + any(layer.experts is not None for layer in layers)
    rows = 2 * whole + (1 + 3 * fused if fused else 0) + keys + 2 * math.ceil(keys / ROWS_AT_ONCE)
    return 2 * any(_attentions(outline)) + TOKENS * rows


def _probe_bytes(outline: Outline) -> int:
    """Of these passes: the logits of one token a row, and a layer's activations; or those of all sites."""
    rows = min(_probe_keys(outline), ROWS_AT_ONCE) + 2
    effect = rows * outline.n_ids * outline.itemsize + rows * TOKENS * layer_width(outline) * outline.itemsize
    return max(effect, 2 * TOKENS * (outline.n_ids + sum(outline.table.sizes.values())) * outline.itemsize)


def memory_of(device: torch.device) -> int:
    """Bytes of a device; 0 where it does not tell."""
    if device.type == "cuda":
        return sum(
            torch.cuda.get_device_properties(number).total_memory
            for number in range(torch.cuda.device_count())
        )
    names = getattr(os, "sysconf_names", {})
    if device.type == "cpu" and "SC_PHYS_PAGES" in names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0


def _count(number: int) -> str:
    value = float(number)
    for unit in ("", " k", " M"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:,.1f} B"


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
