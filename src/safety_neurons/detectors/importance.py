"""Importance: how much a sub-layer's output changes when one neuron's parameters are zero, exactly, for every
neuron at once.

Scores of a layer are computed inside the forward pass, as soon as its o or down projection is reached;
nothing else is kept.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from safety_neurons.counting import numbered
from safety_neurons.detectors.importance_attention import (
    AttentionScorer,
    OutputFactors,
    chunk_size,
    scores_at_once,
)
from safety_neurons.detectors.methods import Importance
from safety_neurons.detectors.reading import Shown, input_scale, watching
from safety_neurons.detectors.runner import BatchSums, PromptCounts, Run, Scored
from safety_neurons.errors import InputError, UnsupportedModelError, UsageError
from safety_neurons.model import Encoded, LanguageModel
from safety_neurons.model.attention import AttentionPlan, AttentionStates, prove_attention, tolerance
from safety_neurons.model.batches import Batch, collate, forward
from safety_neurons.model.cost import memory_of
from safety_neurons.model.hooks import around, reading
from safety_neurons.model.language_model import said_of_reading
from safety_neurons.model.sites import AttentionAnatomy, ExpertRows, ExpertsAnatomy, LayerAnatomy, MlpAnatomy


@dataclass(frozen=True)
class MlpScorer:
    """Importance of one prompt's neurons in a dense feed-forward part.

    Attributes:
        activation: the part's activation function.
        scale: what the hidden activation is multiplied with before the down projection sees it ((IA)³); None
            for nothing.
        weight: what the part's output is multiplied with per token (gate of a shared expert); None for
            nothing.
    """

    activation: Callable[[Tensor], Tensor]
    scale: Float[Tensor, " neuron"] | None = None
    weight: Float[Tensor, "token one"] | None = None

    def down(
        self, hidden: Float[Tensor, "token neuron"], column_norms: Float[Tensor, " neuron"]
    ) -> Float[Tensor, " neuron"]:
        """‖hidden activation over tokens‖ · ‖change of the column‖."""
        return self._norms(hidden, column_norms)

    def up(
        self,
        up: Float[Tensor, "token neuron"],
        gate: Float[Tensor, "token neuron"] | None,
        delta: Float[Tensor, "token neuron"],
        column_norms: Float[Tensor, " neuron"],
    ) -> Float[Tensor, " neuron"]:
        """Rows of up, `delta` taken off their activation."""
        if gate is None:
            return self._norms(self._scaled(self.activation(up) - self.activation(up - delta)), column_norms)
        return self._norms(self._scaled(self.activation(gate) * delta), column_norms)

    def gate(
        self,
        up: Float[Tensor, "token neuron"],
        gate: Float[Tensor, "token neuron"],
        delta: Float[Tensor, "token neuron"],
        column_norms: Float[Tensor, " neuron"],
    ) -> Float[Tensor, " neuron"]:
        """Rows of gate, `delta` taken off their activation."""
        return self._norms(
            self._scaled((self.activation(gate) - self.activation(gate - delta)) * up), column_norms
        )

    def _scaled(self, hidden: Tensor) -> Tensor:
        return hidden if self.scale is None else hidden * self.scale.to(hidden)

    def _norms(self, hidden: Tensor, column_norms: Tensor) -> Tensor:
        weighted = hidden if self.weight is None else hidden * self.weight.to(hidden)
        return torch.linalg.vector_norm(weighted, dim=0) * column_norms.to(weighted)


def expert_changes(
    experts: ExpertsAnatomy,
    gate: ExpertRows,
    up: ExpertRows,
    hidden: Float[Tensor, "row neuron"],
    sites: tuple[str, ...],
) -> dict[str, Float[Tensor, "row neuron"]]:
    """Change of the weighted hidden activation of every row by site, when the site's activation is zero.

    Gate and up pass through the model's own gate step, so that clamps and offsets count: the three sites
    differ where up is offset.
    """
    weight = gate.weight[:, None].to(hidden)
    changes = {}
    for site in sites:
        change = hidden
        if site != "down":
            left, right = (
                torch.zeros_like(part.values) if site == name else part.values
                for name, part in (("gate", gate), ("up", up))
            )
            change = hidden - experts.apply_gate(experts.fuse(left, right))
        changes[site] = change * weight
    return changes


class ExpertsReader:
    """Scores of all wanted experts of one layer, from the rows of the gate step."""

    def __init__(
        self,
        experts: ExpertsAnatomy,
        keys: Iterable[str],
        lengths: Callable[[], list[int]],
        give: Callable[[int, str, Tensor], None],
    ) -> None:
        self.experts, self.keys, self.lengths, self.give = experts, set(keys), lengths, give
        self.sites = tuple(
            site for site in ("gate", "up", "down") if any(key.endswith(f".{site}") for key in self.keys)
        )
        self.seen: dict[str, ExpertRows] = {}
        self.sums: dict[str, Tensor] = {}
        self._norms: Tensor | None = None

    def readers(self) -> dict[str, Callable[[Any], None]]:
        """Readers of the rows of all experts."""
        name = f"layers.{self.experts.layer}.experts.*"
        return {
            f"{name}.gate": partial(self._note, "gate"),
            f"{name}.up": partial(self._note, "up"),
            f"{name}.down": self._score,
        }

    def start(self) -> None:
        """Forget what an unfinished pass left."""
        self.seen.clear()
        self.sums.clear()

    def finish(self) -> None:
        """Hand over the scores of the pass that just ended; an expert that no token was sent to scores 0."""
        batch = len(self.lengths())
        for site, squares in self.sums.items():
            norms = squares.unflatten(0, (batch, -1)).sqrt() * self._column_norms(squares)
            for row in range(batch):
                for expert in range(self.experts.n_experts):
                    if (key := self.experts.key(expert, site)) in self.keys:
                        self.give(row, key, norms[row, expert])
        self.start()

    def _note(self, site: str, rows: ExpertRows) -> None:
        self.seen[site] = rows

    def _score(self, rows: ExpertRows) -> None:
        lengths = torch.tensor(self.lengths(), device=rows.values.device)
        width = int(lengths.max())
        row, position = rows.token_index // width, rows.token_index % width
        real = position < lengths[row]
        slot = (row * self.experts.n_experts + rows.expert_index)[real]
        changes = expert_changes(self.experts, self.seen["gate"], self.seen["up"], rows.values, self.sites)
        for site, change in changes.items():
            squares = change[real].to(torch.float64).square()
            if site not in self.sums:
                self.sums[site] = squares.new_zeros(len(lengths) * self.experts.n_experts, squares.shape[1])
            self.sums[site].index_add_(0, slot, squares)

    def _column_norms(self, like: Tensor) -> Tensor:
        if self._norms is None:
            weights = (
                self.experts.weight(expert, "down").detach() for expert in range(self.experts.n_experts)
            )
            self._norms = torch.stack(
                [torch.linalg.vector_norm(weight, dim=0, dtype=like.dtype) for weight in weights]
            )
        return self._norms


def published_mlp(states: Mapping[str, Float[Tensor, "token neuron"]]) -> dict[str, Float[Tensor, " neuron"]]:
    """One list for up and down: Σ over tokens of |output of the up projection|.

    Source: public code of paper 1, detection model files. Differs: not at all, on purpose; gate, activation
    function and the norm of the down column play no part there.
    """
    scores = states["up"].abs().sum(0)
    return {"up": scores, "down": scores}


def published_attention(
    plan: AttentionPlan, states: AttentionStates, budget: int
) -> dict[str, Float[Tensor, " neuron"]]:
    """One list for q and k and one for v and o, both over the entries of the query heads.

    q: Σ of the squared difference of two softmaxes, of the logits and of the logits less the product of entry
        d of the rotated query and
    of the rotated key, which the public code leaves unscaled. v, o: Σ over tokens of |what the o projection
    reads|. Its use for k and v maps entry i of the query heads to row i // n; a row here scores the largest
    of the entries mapped to it.

    Source: public code of paper 1, detection model files. Differs: the causal mask is applied (two of its
    model files lose it), and the change is taken off before a soft-cap would be missed: it acts on the final
    logits, as there.
    """
    query = torch.stack([_heads_scores(plan, states, head, budget) for head in range(plan.n_heads)]).flatten()
    mixed = states.mixed.flatten(1).abs().sum(0)
    size = states.group_size
    rows = {name: values.unflatten(0, (-1, size)).amax(1) for name, values in (("k", query), ("v", mixed))}
    return {"q": query, "o": mixed, **rows}


def _heads_scores(plan: AttentionPlan, states: AttentionStates, head: int, budget: int) -> Tensor:
    before = states.log_probabilities[head]
    left = (states.query[:, head] / plan.scale).T[:, :, None]
    right = states.key[:, head // states.group_size].T[:, None, :]
    step = chunk_size(3 * before.numel() * before.element_size(), budget, before.device)
    parts = []
    for start in range(0, len(left), step):
        chunk = slice(start, start + step)
        after = torch.softmax(before - left[chunk] * right[chunk], -1)
        parts.append((after - before.exp()).square().sum((1, 2)))
    return torch.cat(parts)


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

    Use: `with readers.on():` around forward passes, `readers.start(batch)` before each of them,
    `readers.take()` after it.

    Attributes:
        lm: the model.
        keys: sites to score.
        options: how.
        plans: proved attention formulas by layer; made on a probe pass where they are needed and absent.
        factors: what is needed of o projections, by layer; made before the first pass, between whose
            activations it would lie otherwise, so weights must stay as they are.
        norms: the same of down projections.
    """

    lm: LanguageModel
    keys: tuple[str, ...]
    options: Options = field(default_factory=Options)
    plans: dict[int, AttentionPlan] = field(default_factory=dict)
    factors: dict[str, OutputFactors] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    _lengths: list[int] = field(default_factory=list)
    _scores: dict[str, np.ndarray] = field(default_factory=dict)
    _experts: list[ExpertsReader] = field(default_factory=list)

    def start(self, batch: Batch) -> None:
        """Forget what an unfinished pass left, and note the lengths of the rows.

        Room for the scores is made before the pass, in one piece: small arrays made between its activations
        would keep the C library from using their room again, layer by layer.
        """
        self._lengths = list(batch.lengths)
        ends = np.cumsum([0, *(self.lm.table.sizes[key] for key in self.keys)])
        room = np.full((len(self._lengths), ends[-1]), np.nan)
        self._scores = {
            key: room[:, start:end] for key, (start, end) in zip(self.keys, pairwise(ends), strict=True)
        }
        for experts in self._experts:
            experts.start()

    def take(self) -> dict[str, Float[np.ndarray, "row neuron"]]:
        """Scores of the pass that just ended, by key; NaN where a row was given none."""
        for experts in self._experts:
            experts.finish()
        scores, self._scores = self._scores, {}
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
        self.plans.update(
            prove_layers(self.lm, [layer for layer in attention if layer.index not in self.plans])
        )
        self._experts.clear()
        with ExitStack() as stack:
            readers: dict[str, Callable[[Any], None]] = {}
            for layer in anatomy.layers:
                self._add(layer, readers, stack)
            stack.enter_context(reading(anatomy, readers))
            yield

    @property
    def dtype(self) -> torch.dtype:
        """Type that scores are computed in."""
        return torch.float64 if self.lm.dtype is torch.float64 else torch.float32

    def _wanted(self, layer: LayerAnatomy, sites: Iterable[str], prefix: str = "") -> tuple[str, ...]:
        return tuple(site for site in sites if f"layers.{layer.index}.{prefix}{site}" in self.keys)

    def _add(self, layer: LayerAnatomy, readers: dict[str, Callable[[Any], None]], stack: ExitStack) -> None:
        if layer.attention is not None and (wanted := self._wanted(layer, "qkvo")):
            attention = _AttentionReader(
                layer.attention, f"layers.{layer.index}", wanted, self.plans.get(layer.index), self
            )
            attention.prepare()
            if attention.plan is None:
                readers[f"{attention.key}.o"] = attention.columns
            else:
                stack.enter_context(watching(self.lm, [layer], attention.score, inputs=False))
        for mlp, prefix in ((layer.mlp, ""), (layer.shared, "shared_expert.")):
            if mlp is not None and (wanted := self._wanted(layer, ("gate", "up", "down"), prefix)):
                reader = _MlpReader(mlp, f"layers.{layer.index}.{prefix}".rstrip("."), wanted, self, layer)
                if not self.options.as_published:  # which looks at no weight
                    reader.column_norms(self.dtype)
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
        self._scores[key][row] = scores.detach().to("cpu", torch.float64).numpy()


def prove_layers(lm: LanguageModel, layers: list[LayerAnatomy]) -> dict[int, AttentionPlan]:
    """Attention formulas of layers, each proved on one probe pass over random tokens.

    Raises:
        UnsupportedModelError: a formula that no candidate reproduces.
    """
    plans: dict[int, AttentionPlan] = {}
    if not layers:
        return plans

    def prove(layer: LayerAnatomy, shown: Shown) -> None:
        attention = layer.attention
        assert attention is not None
        name, heads = f"layers.{layer.index}", (attention.n_heads, attention.n_kv_heads, attention.head_dim)
        plans[layer.index] = prove_attention(attention.module, *heads, shown.unscaled(attention), name)

    ids = torch.randint(0, lm.n_ids, (12,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad(), lm.running(), watching(lm, layers, prove, inputs=False):
        forward(lm.model, collate([ids], [0], pad_id=lm.pad_id).to(lm.device))
    return plans


class _AttentionReader:
    """Scores of the attention sites of one layer."""

    def __init__(
        self,
        part: AttentionAnatomy,
        key: str,
        wanted: tuple[str, ...],
        plan: AttentionPlan | None,
        owner: ImportanceReaders,
    ) -> None:
        self.part, self.key, self.wanted, self.plan, self.owner = part, key, wanted, plan, owner

    def prepare(self) -> None:
        """Compute what the scores need of the o projection, and nothing of a prompt."""
        options = self.owner.options
        if options.as_published:
            return
        needed = {"o": "column_norms", "v": "value_gram"}
        if options.space == "output" and self.plan is not None:
            alone = self.part.n_heads == self.part.n_kv_heads
            for site, norm in (("q", self.plan.q_norm), ("k", self.plan.k_norm)):
                across = norm is not None and norm.across_heads
                needed[site] = (
                    "of_all" if across else "of_heads" if site == "q" and not alone else "of_groups"
                )
        for site in self.wanted:
            if site in needed:
                getattr(self.factors(), needed[site])

    def factors(self) -> OutputFactors:
        """Of the o projection."""
        factors = self.owner.factors
        if self.key not in factors:
            place, dtype = self.part.places["o"], self.owner.dtype
            scale = input_scale(place)

            def weight() -> Tensor:
                plain = place.weight().detach().to(dtype)
                return plain if scale is None else plain * scale.to(plain)

            factors[self.key] = OutputFactors(weight, self.part.n_heads, self.part.n_kv_heads)
        return factors[self.key]

    def columns(self, values: Tensor) -> None:
        """Score `o` alone, which needs no formula, from the input of its projection."""
        scale = input_scale(self.part.places["o"])
        values = values if scale is None else values / scale.to(values)
        for row, length in enumerate(self.owner.lengths()):
            mixed = _working(values[row, :length])
            norms = torch.linalg.vector_norm(mixed, dim=0)
            scores = (
                mixed.abs().sum(0) if self.owner.options.as_published else norms * self.factors().column_norms
            )
            self.owner.give(row, f"{self.key}.o", scores)

    def score(self, _: LayerAnatomy, shown: Shown) -> None:
        """Score the sites from what the layer's attention showed."""
        assert self.plan is not None
        capture = shown.unscaled(self.part)
        options, together = self.owner.options, dict[int, list[tuple[int, AttentionStates]]]()
        for row, length in enumerate(self.owner.lengths()):
            states = self.plan.states(capture, row, length)
            error = self.plan.deviation(states, capture, row)
            if not bool(torch.isfinite(capture.o[row, :length]).all()):
                # The model's own numbers broke: the prompt counts as failed.
                self._give(
                    row,
                    {
                        site: states.mixed.new_full((self.part.places[site].size,), torch.nan)
                        for site in self.wanted
                    },
                )
                continue
            if torch.isfinite(states.mixed).all() and error > 4 * tolerance(capture.q.dtype):
                raise UnsupportedModelError(
                    f"{self.key}: the attention formula proved on the probe is {error:.1e} off on a prompt "
                    f"of {length} tokens; leave q, k and v out with --sites"
                )
            if options.as_published:
                self._give(row, published_attention(self.plan, states, options.budget))
            elif length > SHORT:
                scorer = AttentionScorer(self.plan, states, self.factors(), options.space, options.budget)
                self._give(row, {site: scorer.scores(site) for site in self.wanted})
            else:
                together.setdefault(length, []).append((row, states))
        for rows in together.values():
            for start in range(0, len(rows), AT_ONCE):
                self._score_together(rows[start : start + AT_ONCE])

    def _score_together(self, rows: list[tuple[int, AttentionStates]]) -> None:
        """Short prompts of one length."""
        assert self.plan is not None
        options, factors = self.owner.options, self.factors()
        scores = scores_at_once(
            self.plan, [states for _, states in rows], factors, self.wanted, options.space, options.budget
        )
        for (row, _), given in zip(rows, scores, strict=True):
            self._give(row, given)

    def _give(self, row: int, given: Mapping[str, Tensor]) -> None:
        for site in self.wanted:
            self.owner.give(row, f"{self.key}.{site}", given[site])


class _MlpReader:
    """Scores of the sites of one dense feed-forward part (or of a shared expert)."""

    def __init__(
        self,
        part: MlpAnatomy,
        key: str,
        wanted: tuple[str, ...],
        owner: ImportanceReaders,
        layer: LayerAnatomy,
    ) -> None:
        self.part, self.key, self.wanted, self.owner = part, key, wanted, owner
        self.seen: dict[str, Tensor] = {}
        block = layer.experts.block if layer.experts is not None and "shared_expert" in key else None
        self.share = getattr(block, "shared_expert_gate", None)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Hooks beside the readers."""
        # The share of a shared expert comes from the block's own input, so it can be computed before the
        # expert runs.
        with around(self.part.module, before=self._weigh) if self.share is not None else nullcontext():
            yield

    def _weigh(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self.share is not None
        fed = args[0] if args else next(iter(kwargs.values()))
        weight = torch.sigmoid(
            torch.nn.functional.linear(fed, self.share.weight, getattr(self.share, "bias", None))
        )
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
        norms = self.column_norms(states["down"].dtype)
        scorer = MlpScorer(self.part.activation, input_scale(self.part.places["down"]), states.get("share"))
        up, gate = states.get("up"), states.get("gate")
        given: dict[str, Tensor] = {"down": scorer.down(states["down"], norms)}
        silent = not bool(self.part.activation(states["down"].new_zeros(1)).any())
        if up is not None:
            # What down reads is act(gate)·up (or act(up)), as the anatomy proved: it is all gone when the row
            # is zero and act(0) is 0.
            given["up"] = given["down"] if silent or gate is not None else scorer.up(up, gate, up, norms)
        if gate is not None and up is not None:
            given["gate"] = given["down"] if silent else scorer.gate(up, gate, gate, norms)
        return given

    def column_norms(self, dtype: torch.dtype) -> Tensor:
        """Of the down projection."""
        norms = self.owner.norms
        if self.key not in norms:
            norms[self.key] = torch.linalg.vector_norm(
                self.part.places["down"].weight().detach(), dim=0, dtype=dtype
            )
        return norms[self.key]


def _working(values: Tensor) -> Tensor:
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def score(method: Importance, run: Run) -> Scored:
    """The importance of every neuron, inside one forward pass a batch."""
    keys = _keys(method, run)
    fed, counts = _encoded(run)
    _refuse_pairs(run, keys, max(map(len, fed), default=0))
    with reading_by(method, run.aligned, keys, run.votes) as reduce:
        folded = run.fold(fed, reduce)
    counts = counts.without(len(folded.failed))
    return Scored({key: folded.sums[key] / counts.used for key in keys}, counts, folded.votes)


@contextmanager
def reading_by(
    method: Importance, model: LanguageModel, keys: Sequence[str] | None = None, votes: bool = False
) -> Iterator["_Reduce"]:
    """What every batch goes through, its readers on the model meanwhile.

    Args:
        method: how.
        model: which model.
        keys: sites to score; all that the method searches where None.
        votes: whether the scores of every prompt are wanted.
    """
    if keys is None:
        keys = tuple(model.table.select(sites=method.searched).sizes)
    options = Options(method.space, method.as_published, method.memory_budget * 2**20)
    readers = ImportanceReaders(model, tuple(keys), options)
    with torch.no_grad(), model.running(), readers.on():
        yield _Reduce(model, readers, votes)


@dataclass
class _Reduce:
    """One batch to sums over its prompts; leaves nothing behind when it raises."""

    model: LanguageModel
    readers: ImportanceReaders
    per_prompt: bool

    def __call__(self, batch: Batch) -> BatchSums:
        self.readers.start(batch)
        forward(self.model.model, batch)
        scores = self.readers.take()
        rows = range(len(batch) if self.per_prompt else 0)
        return BatchSums(
            {key: scores[key].sum(0) for key in self.readers.keys},
            [{key: values[row] for key, values in scores.items()} for row in rows],
        )


def _keys(method: Importance, run: Run) -> tuple[str, ...]:
    """Site keys to score; what has to be said about them is noted."""
    model, sites = run.aligned, method.searched
    keys = tuple(run.sizes)
    if method.as_published:
        run.notes.append("the public code has no score for gate; gate is left out")
        if any(".experts." in key for key in keys):
            raise UnsupportedModelError(
                "experts have no published score: leave --as-published out, or score q, k, v and o "
                "only (--sites q,k,v,o)"
            )
    refused = [key for key in model.anatomy.refused if key.rsplit(".", 1)[-1] in sites]
    if refused:
        why = model.anatomy.refused[refused[0]]
        run.notes.append(
            f"{numbered(len(refused), 'site')} of this model not scored, first {refused[0]}: {why}"
        )
    return keys


def _refuse_pairs(run: Run, keys: tuple[str, ...], longest: int) -> None:
    """Refuse prompts whose attention of all pairs of tokens, which q, k and v need head by head, would fill
    the memory: no smaller batch helps.

    Raises:
        UsageError: says what it would take, and what to do.
    """
    wanted = {key for key in keys if key.rpartition(".")[2] in ("q", "k", "v")}
    heads = [
        layer.attention.n_heads
        for layer in run.aligned.anatomy.layers
        if layer.attention is not None and wanted & {place.key for place in layer.attention.places.values()}
    ]
    need = 3 * max(heads, default=0) * longest**2 * max(run.aligned.dtype.itemsize, 4)
    room = memory_of(run.aligned.device)
    if room and need > room / 2:
        raise UsageError(
            f"a prompt of {longest:,} tokens: importance of q, k and v keeps the attention of all pairs of "
            f"tokens of a layer, {need / 1e9:,.2f} GB, and {run.aligned.device} has {room / 1e9:,.2f} GB; "
            "expected shorter prompts, or --sites o,gate,up,down"
        )


def _encoded(run: Run) -> tuple[list[list[int]], PromptCounts]:
    """Token ids of every prompt that has some."""
    read: list[Encoded] = []
    failed = 0
    why: Any = None
    for number in range(len(run.prompts)):
        try:
            read += run.aligned.encode(run.prompts[number : number + 1])
        except InputError as error:
            failed, why = failed + 1, why or error
    if failed:
        run.notes.append(
            f"{failed} of {len(run.prompts)} prompts could not be read and are not in the scores; the "
            f"first: {why}"
        )
    run.notes += said_of_reading(read)
    truncated = sum(one.truncated for one in read)
    return [one.ids for one in read], PromptCounts(len(read), failed, truncated)
