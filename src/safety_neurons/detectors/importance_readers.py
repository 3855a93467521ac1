"""Importance while the model runs: readers that turn what each layer shows into scores of every prompt, and keep nothing else.

Scores of a layer are computed inside the
forward pass, as soon as its o or down projection is reached.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safety_neurons.detectors.importance_attention import AttentionScorer, OutputFactors, scores_at_once
from safety_neurons.detectors.importance_experts import ExpertsReader
from safety_neurons.detectors.importance_mlp import MlpScorer
from safety_neurons.detectors.importance_published import published_attention, published_mlp
from safety_neurons.detectors.sublayers import input_scale
from safety_neurons.errors import UnsupportedModelError
from safety_neurons.model import LanguageModel
from safety_neurons.model.attention import AttentionCapture, AttentionPlan, AttentionStates, prove_attention, tolerance
from safety_neurons.model.hooks import around, reading
from safety_neurons.model.parts import AttentionAnatomy, LayerAnatomy, MlpAnatomy
from safety_neurons.model.passes import Batch, collate, forward

SHORT = 48
"""Tokens up to which prompts of one length are scored together."""
AT_ONCE = 32
"""How many at most."""


@dataclass(frozen=True)
class Options:
    """How importance is measured.

    Attributes:
        space: `output`, or `probability` for q and k as the paper writes them.
        as_published: what the public code computes instead.
        budget: bytes that a chunk of neurons may take.
    """

    space: str = "output"
    as_published: bool = False
    budget: int = 2**28


@dataclass
class ImportanceReaders:
    """Readers over some sites of a model.

    Use: `with readers.on():` around forward passes, `readers.start(batch)` before each of them, `readers.take()` after it.

    Attributes:
        lm: the model.
        keys: sites to score.
        options: how.
        plans: proved attention formulas by layer; made on a probe pass where they are needed and absent.
        factors: what is needed of o projections, by layer; made at the first prompt, so weights must stay as they are.
        norms: the same of down projections.
    """

    lm: LanguageModel
    keys: tuple[str, ...]
    options: Options = field(default_factory=Options)
    plans: dict[int, AttentionPlan] = field(default_factory=dict)
    factors: dict[str, OutputFactors] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    _lengths: list[int] = field(default_factory=list)
    _scores: list[dict[str, np.ndarray]] = field(default_factory=list)
    _experts: list[ExpertsReader] = field(default_factory=list)

    def start(self, batch: Batch) -> None:
        """Forget what an unfinished pass left, and note the lengths of the rows."""
        self._lengths = list(batch.lengths)
        self._scores = [{} for _ in self._lengths]
        for experts in self._experts:
            experts.start()

    def take(self) -> list[dict[str, np.ndarray]]:
        """Scores of every row of the pass that just ended, by key."""
        for experts in self._experts:
            experts.finish()
        scores, self._scores = self._scores, []
        return scores

    @contextmanager
    def on(self) -> Iterator[None]:
        """Readers on the model; the attention formulas are proved first.

        Raises:
            UnsupportedModelError: an attention formula that cannot be proved.
        """
        anatomy = self.lm.anatomy
        anatomy.check(self.keys)
        attention = [layer for layer in anatomy.layers if self._wanted(layer, "qkv")]
        self.plans.update(prove_layers(self.lm, [layer for layer in attention if layer.index not in self.plans]))
        self._experts.clear()
        with ExitStack() as stack:
            readers: dict[str, Callable[[Any], None]] = {}
            for layer in anatomy.layers:
                self._add(layer, readers, stack)
            stack.enter_context(reading(anatomy, readers))
            yield

    def _wanted(self, layer: LayerAnatomy, sites: Iterable[str], prefix: str = "") -> tuple[str, ...]:
        return tuple(site for site in sites if f"layers.{layer.index}.{prefix}{site}" in self.keys)

    def _add(self, layer: LayerAnatomy, readers: dict[str, Callable[[Any], None]], stack: ExitStack) -> None:
        if layer.attention is not None and (wanted := self._wanted(layer, "qkvo")):
            part = _AttentionReader(layer.attention, f"layers.{layer.index}", wanted, self.plans.get(layer.index), self)
            readers.update(part.readers())
            stack.enter_context(part.on())
        for mlp, prefix in ((layer.mlp, ""), (layer.shared, "shared_expert.")):
            if mlp is not None and (wanted := self._wanted(layer, ("gate", "up", "down"), prefix)):
                reader = _MlpReader(mlp, f"layers.{layer.index}.{prefix}".rstrip("."), wanted, self, layer)
                readers.update(reader.readers())
                stack.enter_context(reader.on())
        if layer.experts is not None:
            mine = [key for key in self.keys if key.startswith(f"layers.{layer.index}.experts.")]
            if mine:
                experts = ExpertsReader(layer.experts, mine, self.lengths, self.give)
                self._experts.append(experts)
                readers.update(experts.readers())

    def lengths(self) -> list[int]:
        """Tokens of the rows in the pass that runs."""
        return self._lengths

    def give(self, row: int, key: str, scores: Tensor) -> None:
        """Keep the scores of a row."""
        self._scores[row][key] = scores.detach().to("cpu", torch.float64).numpy()


def prove_layers(lm: LanguageModel, layers: list[LayerAnatomy], n_tokens: int = 12) -> dict[int, AttentionPlan]:
    """Attention formulas of layers, each proved on one probe pass over random tokens.

    Raises:
        UnsupportedModelError: a formula that no candidate reproduces.
    """
    found: dict[int, AttentionPlan] = {}
    if not layers:
        return found

    def prove(layer: LayerAnatomy, capture: AttentionCapture) -> None:
        part = layer.attention
        assert part is not None
        found[layer.index] = prove_attention(part.module, part.n_heads, part.n_kv_heads, part.head_dim, capture, f"layers.{layer.index}")

    captures = [_Capture(layer.attention, f"layers.{layer.index}", partial(prove, layer)) for layer in layers if layer.attention]
    ids = torch.randint(0, lm.n_ids, (n_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(lm.running())
        readers: dict[str, Callable[[Any], None]] = {}
        for capture in captures:
            stack.enter_context(capture.on())
            readers.update(capture.readers())
        stack.enter_context(reading(lm.anatomy, readers))
        forward(lm.model, collate([ids], [0], pad_id=lm.pad_id).to(lm.device))
    return found


class _Capture:
    """Collects what one layer's attention shows, and hands it on when the o projection is reached."""

    def __init__(self, part: AttentionAnatomy, key: str, then: Callable[[AttentionCapture], None]) -> None:
        self.part, self.key, self.then = part, key, then
        self.seen: dict[str, Any] = {}

    @contextmanager
    def on(self) -> Iterator[None]:
        """Hook for the arguments of the attention module."""
        with around(self.part.module, before=self._arguments):
            yield

    def readers(self) -> dict[str, Callable[[Any], None]]:
        """Readers of q, k, v and o."""
        readers: dict[str, Callable[[Any], None]] = {f"{self.key}.{site}": partial(self.seen.__setitem__, site) for site in "qkv"}
        readers[f"{self.key}.o"] = self._output
        return readers

    def unscaled(self, values: Tensor) -> Tensor:
        """What the o projection is given, before an (IA)³ scale, which belongs to the columns here."""
        scale = input_scale(self.part.places["o"])
        return values if scale is None else values / scale.to(values)

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen["arguments"] = {**_named(self.part.module, args), **kwargs}

    def _output(self, values: Tensor) -> None:
        seen = dict(self.seen)
        self.seen.clear()
        self.then(AttentionCapture(seen["q"], seen["k"], seen["v"], self.unscaled(values), seen["arguments"]))


def _named(module: torch.nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return dict(zip(names, args, strict=False))


class _AttentionReader:
    """Scores of the attention sites of one layer."""

    def __init__(
        self, part: AttentionAnatomy, key: str, wanted: tuple[str, ...], plan: AttentionPlan | None, owner: ImportanceReaders
    ) -> None:
        self.part, self.key, self.wanted, self.plan, self.owner = part, key, wanted, plan, owner
        self.capture = _Capture(part, key, self._score)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Hooks beside the readers."""
        with self.capture.on() if self.plan is not None else nullcontext():
            yield

    def readers(self) -> dict[str, Callable[[Any], None]]:
        """Readers of the sites; o alone needs no formula."""
        return self.capture.readers() if self.plan is not None else {f"{self.key}.o": self._columns}

    def factors(self, like: Tensor) -> OutputFactors:
        """Of the o projection, computed at the first prompt."""
        kept = self.owner.factors
        if self.key not in kept:
            place, dtype = self.part.places["o"], like.dtype
            scale = input_scale(place)

            def weight() -> Tensor:
                plain = place.weight().detach().to(dtype)
                return plain if scale is None else plain * scale.to(plain)

            kept[self.key] = OutputFactors(weight, self.part.n_heads, self.part.n_kv_heads)
        return kept[self.key]

    def _columns(self, values: Tensor) -> None:
        for row, length in enumerate(self.owner.lengths()):
            mixed = _working(self.capture.unscaled(values[row, :length]))
            norms = torch.linalg.vector_norm(mixed, dim=0)
            scores = mixed.abs().sum(0) if self.owner.options.as_published else norms * self.factors(mixed).column_norms
            self.owner.give(row, f"{self.key}.o", scores)

    def _score(self, capture: AttentionCapture) -> None:
        assert self.plan is not None
        options, together = self.owner.options, dict[int, list[tuple[int, AttentionStates]]]()
        for row, length in enumerate(self.owner.lengths()):
            states = self.plan.states(capture, row, length)
            error = self.plan.deviation(states, capture, row)
            if not bool(torch.isfinite(capture.o[row, :length]).all()):
                # The model's own numbers broke: the prompt counts as failed.
                self._give(row, {site: states.mixed.new_full((self.part.places[site].size,), torch.nan) for site in self.wanted})
                continue
            if torch.isfinite(states.mixed).all() and error > 4 * tolerance(capture.q.dtype):
                raise UnsupportedModelError(
                    f"{self.key}: the attention formula proved on the probe is {error:.1e} off on a prompt of {length} tokens; "
                    "leave q, k and v out with --sites"
                )
            if options.as_published:
                self._give(row, published_attention(self.plan, states, options.budget))
            elif length > SHORT:
                scorer = AttentionScorer(self.plan, states, self.factors(states.q), options.space, options.budget)
                self._give(row, {site: scorer.scores(site) for site in self.wanted})
            else:
                together.setdefault(length, []).append((row, states))
        for rows in together.values():
            for start in range(0, len(rows), AT_ONCE):
                self._score_together(rows[start : start + AT_ONCE])

    def _score_together(self, rows: list[tuple[int, AttentionStates]]) -> None:
        """Short prompts of one length."""
        assert self.plan is not None
        options, factors = self.owner.options, self.factors(rows[0][1].q)
        found = scores_at_once(self.plan, [states for _, states in rows], factors, self.wanted, options.space, options.budget)
        for (row, _), given in zip(rows, found, strict=True):
            self._give(row, given)

    def _give(self, row: int, given: Mapping[str, Tensor]) -> None:
        for site in self.wanted:
            self.owner.give(row, f"{self.key}.{site}", given[site])


class _MlpReader:
    """Scores of the sites of one dense feed-forward part (or of a shared expert)."""

    def __init__(self, part: MlpAnatomy, key: str, wanted: tuple[str, ...], owner: ImportanceReaders, layer: LayerAnatomy) -> None:
        self.part, self.key, self.wanted, self.owner = part, key, wanted, owner
        self.seen: dict[str, Tensor] = {}
        block = layer.experts.block if layer.experts is not None and "shared_expert" in key else None
        self.share = getattr(block, "shared_expert_gate", None)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Hooks beside the readers."""
        # The share of a shared expert comes from the block's own input, so it can be computed before the expert runs.
        with around(self.part.module, before=self._weigh) if self.share is not None else nullcontext():
            yield

    def _weigh(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self.share is not None
        fed = args[0] if args else next(iter(kwargs.values()))
        weight = torch.sigmoid(torch.nn.functional.linear(fed, self.share.weight, getattr(self.share, "bias", None)))
        lengths = self.owner.lengths()
        self.seen["share"] = weight if weight.ndim == 3 else weight.view(len(lengths), -1, 1)

    def readers(self) -> dict[str, Callable[[Any], None]]:
        """Readers of the sites that the scores need."""
        readers: dict[str, Callable[[Any], None]] = {f"{self.key}.down": self._score}
        for site in ("gate", "up"):
            if site in self.part.places and any(site in self.wanted for site in ("gate", "up")):
                readers[f"{self.key}.{site}"] = partial(self.seen.__setitem__, site)
        return readers

    def _score(self, values: Tensor) -> None:
        seen = dict(self.seen)
        self.seen.clear()
        for row, length in enumerate(self.owner.lengths()):
            states = {site: _working(part[row, :length]) for site, part in {**seen, "down": values}.items()}
            given = published_mlp(states) if self.owner.options.as_published else self._scores(states)
            for site in self.wanted:
                if site in given:
                    self.owner.give(row, f"{self.key}.{site}", given[site])

    def _scores(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        norms = self._column_norms(states["down"])
        scorer = MlpScorer(self.part.activation, input_scale(self.part.places["down"]), states.get("share"))
        up, gate = states.get("up"), states.get("gate")
        given: dict[str, Tensor] = {"down": scorer.down(states["down"], norms)}
        silent = not bool(self.part.activation(states["down"].new_zeros(1)).any())
        if up is not None:
            # What down reads is act(gate)·up (or act(up)), as the anatomy proved: it is all gone when the row is zero and act(0) is 0.
            given["up"] = given["down"] if silent or gate is not None else scorer.up(up, gate, up, norms)
        if gate is not None and up is not None:
            given["gate"] = given["down"] if silent else scorer.gate(up, gate, gate, norms)
        return given

    def _column_norms(self, like: Tensor) -> Tensor:
        kept = self.owner.norms
        if self.key not in kept:
            kept[self.key] = torch.linalg.vector_norm(self.part.places["down"].weight().detach(), dim=0, dtype=like.dtype)
        return kept[self.key]


def _working(values: Tensor) -> Tensor:
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


__all__ = ["ImportanceReaders", "Options", "prove_layers"]
