"""Score neurons of the aligned model against the base model's parameters: swapped one by one, or softly to
first order.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from safety_neurons.detectors.attribution import (
    Mean,
    PathMean,
    ScoredRow,
    attribute,
    midpoints_of,
    own_completions,
    score_rows,
    spread,
)
from safety_neurons.detectors.importance import MlpScorer, prove_layers
from safety_neurons.detectors.importance_attention import AttentionScorer, OutputFactors
from safety_neurons.detectors.methods import ImportanceContrast, SwapAttribution
from safety_neurons.detectors.reading import Shown, columns, projected, under, watching
from safety_neurons.detectors.runner import BatchSums, Folded, Run, Scored, to_numpy
from safety_neurons.detectors.text import Span, texts_of
from safety_neurons.errors import UnsupportedModelError
from safety_neurons.model import LanguageModel
from safety_neurons.model.attention import AttentionPlan, AttentionStates
from safety_neurons.model.batches import Batch, forward, frozen
from safety_neurons.model.hooks import around
from safety_neurons.model.sites import AttentionAnatomy, LayerAnatomy, MlpAnatomy, SitePlace
from safety_neurons.neurons import ATTENTION_SITES, MLP_SITES, parse_key


@dataclass(frozen=True)
class Columns:
    """Columns of one projection in the aligned model (`mine`) and their difference to the base model's
    (`change`).

    Neurons that are swapped together (the columns that one v row feeds; one column alone for `down`) form a
    group; what is kept is the table of inner products of each group's `[mine, change]` columns.
    """

    products: Float[Tensor, "unit pair pair"]
    norms: Float[Tensor, " neuron"]

    @staticmethod
    def of(
        mine: Float[Tensor, "out neuron"],
        theirs: Float[Tensor, "out neuron"],
        n_kv_heads: int = 0,
        group: int = 1,
    ) -> "Columns":
        """From both models' columns; for `o` with its key-value heads and the query heads of each."""
        change = mine - theirs.to(mine)
        both = torch.stack([mine, change])
        if n_kv_heads:
            both = both.unflatten(2, (n_kv_heads, group, -1)).permute(2, 4, 1, 0, 3).flatten(0, 1)
        else:
            both = both.permute(2, 1, 0)[..., None]
        flat = both.flatten(2)
        return Columns(flat.transpose(1, 2) @ flat, torch.linalg.vector_norm(mine, dim=0))

    def norms_of(
        self, moved: Float[Tensor, "token unit member"], stayed: Float[Tensor, "token unit member"]
    ) -> Float[Tensor, " unit"]:
        """‖Σ over members of moved·mine + stayed·change‖ over tokens: what swapping activation and column
        together does.
        """
        both = torch.cat([moved, stayed], -1)
        summed = both.permute(1, 2, 0) @ both.transpose(0, 1)
        return (summed * self.products.to(both)).sum((1, 2)).clamp(min=0).sqrt()


@dataclass(frozen=True)
class AttentionPart:
    """One layer's attention on one prompt.

    Attributes:
        plan: the proved formula.
        states: everything between the projections.
        counted: positions whose output counts.
        factors: of the o projection.
    """

    plan: AttentionPlan
    states: AttentionStates
    counted: Bool[Tensor, " token"]
    factors: OutputFactors

    @property
    def scorer(self) -> AttentionScorer:
        """For the output at the counted positions: other queries attend to nothing and ask nothing."""
        hidden = ~self.counted
        masked = replace(
            self.states,
            query=self.states.query.masked_fill(hidden[:, None, None], 0.0),
            probabilities=self.states.probabilities.masked_fill(hidden[None, :, None], 0.0),
            mixed=self.states.mixed.masked_fill(hidden[:, None, None], 0.0),
        )
        return AttentionScorer(self.plan, masked, self.factors)

    def _asking(self, delta: Float[Tensor, "token head dim"]) -> Tensor:
        return delta.masked_fill(~self.counted[:, None, None], 0.0)

    def importance(self) -> dict[str, Float[Tensor, " neuron"]]:
        """Against zero."""
        scorer = self.scorer
        return {
            "q": scorer.scores("q", self._asking(self.states.q)),
            "k": scorer.scores("k"),
            "v": scorer.scores("v"),
            "o": scorer.scores("o"),
        }

    def swapped(
        self,
        q: Float[Tensor, "token query"],
        k: Float[Tensor, "token key"],
        v: Float[Tensor, "token value"],
        columns: Columns,
        sites: tuple[str, ...] = ("q", "k", "v", "o"),
    ) -> dict[str, Float[Tensor, " neuron"]]:
        """Against the other model's parameters, whose activations on the same input are given.

        A v row is swapped with its o columns.
        """
        states, scorer, scores = self.states, self.scorer, {}
        if "q" in sites:
            scores["q"] = _moved(
                scorer, "q", self._asking(states.q - q.to(states.q).unflatten(-1, states.q.shape[1:]))
            )
        if "k" in sites:
            scores["k"] = _moved(scorer, "k", states.k - k.to(states.k).unflatten(-1, states.k.shape[1:]))
        if "v" in sites or "o" in sites:
            theirs = v.to(states.v).unflatten(-1, states.v.shape[1:])
            unit = columns.norms_of(self._passed(states.v - theirs), self._passed(theirs))
            scores["v"] = unit
            scores["o"] = (
                unit.unflatten(0, states.v.shape[1:])[:, None].expand(-1, states.group_size, -1).flatten()
            )
        return {site: scores[site] for site in sites}

    def _passed(self, values: Float[Tensor, "token group dim"]) -> Float[Tensor, "counted unit member"]:
        """What the heads of each group pass on of a value, at the counted positions."""
        probabilities = self.states.probabilities[:, self.counted].unflatten(0, (values.shape[1], -1))
        passed = torch.einsum("grmn,ngd->mgdr", probabilities, values)
        if self.states.gate is not None:
            gate = self.states.gate[self.counted].unflatten(1, (values.shape[1], -1))
            passed = passed * gate.transpose(2, 3)
        return passed.flatten(1, 2)


def _moved(
    scorer: AttentionScorer, site: str, delta: Float[Tensor, "token head dim"]
) -> Float[Tensor, " neuron"]:
    """Scores of rows that put out `delta` less.

    Exactly 0 where nothing moves, and not computed where nothing moves at all.
    """
    moves = delta.flatten(1).ne(0).any(0)
    return (
        scorer.scores(site, delta).masked_fill(~moves, 0.0)
        if bool(moves.any())
        else delta.new_zeros(moves.shape)
    )


@dataclass(frozen=True)
class MlpPart:
    """One dense feed-forward part on one prompt, at the positions that count.

    `gate` is None without a gate.
    """

    part: MlpAnatomy
    up: Float[Tensor, "token neuron"]
    gate: Float[Tensor, "token neuron"] | None

    @staticmethod
    def of(part: MlpAnatomy, seen: Mapping[str, Tensor], row: int, start: int, stop: int) -> "MlpPart":
        """One row of a batch, from position `start` up to `stop`, in float32 or wider."""
        up = seen["up"][row, start:stop]
        wide = torch.float64 if up.dtype == torch.float64 else torch.float32
        return MlpPart(part, up.to(wide), seen["gate"][row, start:stop].to(wide) if part.gated else None)

    @property
    def hidden(self) -> Float[Tensor, "token neuron"]:
        """What meets the columns."""
        return (
            self.part.activation(self.up) if self.gate is None else self.part.activation(self.gate) * self.up
        )

    def importance(self, norms: Float[Tensor, " neuron"]) -> dict[str, Float[Tensor, " neuron"]]:
        """Against zero; `norms` are the columns'."""
        scorer = MlpScorer(self.part.activation)
        scores = {
            "down": scorer.down(self.hidden, norms),
            "up": scorer.up(self.up, self.gate, self.up, norms),
        }
        if self.gate is not None:
            scores["gate"] = scorer.gate(self.up, self.gate, self.gate, norms)
        return scores

    def swapped(self, other: "MlpPart", columns: Columns) -> dict[str, Float[Tensor, " neuron"]]:
        """Against the other model's parameters, on the same input: gate row, up row and down column of one
        index together.
        """
        mine, theirs = self.hidden, other.hidden
        unit = columns.norms_of((mine - theirs)[..., None], theirs[..., None])
        return dict.fromkeys(("up", "down") if self.gate is None else ("gate", "up", "down"), unit)


def attention_columns(part: AttentionAnatomy, mine: Tensor, theirs: Tensor) -> Columns:
    """Columns of an o projection, grouped by the v row that feeds them."""
    return Columns.of(mine, theirs, part.n_kv_heads, part.n_heads // part.n_kv_heads)


SMALL = 1e-3
"""Share of the site's mean importance that keeps `relative` from dividing by zero."""


def score(method: ImportanceContrast, run: Run) -> Scored:
    """How much every neuron's sub-layer changes when its parameters are the base model's, or another of the
    comparisons.
    """
    comparison = SwapComparison(run.base, run.aligned, run.sizes, method.compare)
    comparison.check()
    if method.compare == "swap-attribution":
        return score_swap_attribution(method, run)
    text = texts_of(method, run)
    values, folded = comparison.run(run, text.spans)
    tokens = text.n_tokens - sum(text.spans[index].n_tokens for index in folded.failed)
    return Scored(values, text.counts.without(len(folded.failed)), folded.votes, {"tokens": tokens})


Each = list[dict[str, np.ndarray]]
"""Scores of every prompt, by site key."""


@dataclass
class SwapComparison:
    """Scores of every prompt, from passes of one or both models.

    Attributes:
        base: whose parameters are put in.
        aligned: whose stream is fed.
        sizes: neurons of every site key that is searched.
        compare: as `methods.ImportanceContrast` names it.
    """

    base: LanguageModel
    aligned: LanguageModel
    sizes: Mapping[str, int]
    compare: str = "swap"
    _factors: dict[tuple[str, int], OutputFactors] = field(default_factory=dict)
    _columns: dict[str, Columns] = field(default_factory=dict)
    _norms: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    _plans: dict[str, dict[int, AttentionPlan]] = field(default_factory=dict)

    @property
    def layers(self) -> list[LayerAnatomy]:
        """Layers with a searched site, in the aligned model."""
        wanted = {parse_key(key).layer for key in self.sizes}
        return [layer for layer in self.aligned.anatomy.layers if layer.index in wanted]

    def wanted(self, layer: LayerAnatomy, among: Sequence[str]) -> tuple[str, ...]:
        """The searched sites of a sub-layer."""
        return tuple(site for site in among if f"layers.{layer.index}.{site}" in self.sizes)

    def check(self) -> None:
        """Raise an error that names the first searched site for which the comparison is not defined."""
        for key in self.sizes:
            if parse_key(key).expert is not None or parse_key(key).shared:
                raise UnsupportedModelError(
                    f"{key}: importance-contrast is defined for attention and dense feed-forward parts "
                    "only; use --sites q,k,v,o here"
                )

    def run(self, run: Run, spans: Sequence[Span]) -> tuple[dict[str, np.ndarray], Folded]:
        """Mean over prompts of the scores, and what became of the prompts."""

        def reduce(batch: Batch) -> BatchSums:
            mine, theirs = self.scores(batch, [spans[index] for index in batch.indices])
            added = BatchSums(
                {f"mine/{key}": np.sum([row[key] for row in mine], axis=0) for key in self.sizes}
            )
            if theirs:
                added.sums |= {
                    f"theirs/{key}": np.sum([row[key] for row in theirs], axis=0) for key in self.sizes
                }
            if run.votes:
                added.scores = [
                    self.combined(row, theirs[number] if theirs else None) for number, row in enumerate(mine)
                ]
            return added

        with torch.no_grad():
            self._prove()
            folded = run.fold([span.ids for span in spans], reduce)
        used = len(spans) - len(folded.failed)
        mine = {key: folded.sums[f"mine/{key}"] / used for key in self.sizes}
        theirs = (
            {key: folded.sums[f"theirs/{key}"] / used for key in self.sizes}
            if self.compare != "swap"
            else None
        )
        return self.combined(mine, theirs), folded

    def combined(
        self, mine: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray] | None
    ) -> dict[str, np.ndarray]:
        """The score from the aligned model's numbers and, but for `swap`, the base model's."""
        if theirs is None:
            return dict(mine)
        if self.compare == "relative":
            return {
                key: (a - theirs[key]) / np.maximum(a + theirs[key] + SMALL * a.mean(), 1e-300)
                for key, a in mine.items()
            }
        return {key: a - theirs[key] for key, a in mine.items()}

    def scores(self, batch: Batch, spans: Sequence[Span]) -> tuple[Each, Each]:
        """Scores of every row: swapped, or importance in the aligned and in the base model."""
        mine: Each = [{} for _ in spans]
        theirs: Each = [] if self.compare == "swap" else [{} for _ in spans]
        self._pass(self.aligned, batch, spans, mine, theirs if self.compare == "same-input" else [])
        if self.compare in ("absolute", "relative"):
            self._pass(self.base, batch, spans, theirs, [])
        return mine, theirs

    def _pass(self, lm: LanguageModel, batch: Batch, spans: Sequence[Span], into: Each, other: Each) -> None:
        """One forward pass of one model; `other` gets the base model's importance on the same input."""
        layers = [layer for layer in lm.anatomy.layers if layer.index in {one.index for one in self.layers}]

        def attention(layer: LayerAnatomy, shown: Shown) -> None:
            for row, given in enumerate(self._attention(lm, layer, shown, spans, other)):
                self._give(into[row], layer, given, ATTENTION_SITES)

        def mlp(layer: LayerAnatomy, shown: Shown) -> None:
            for row, given in enumerate(self._mlp(lm, layer, shown, spans, other)):
                self._give(into[row], layer, given, MLP_SITES)

        attend = [layer for layer in layers if self.wanted(layer, ATTENTION_SITES)]
        feed = [layer for layer in layers if self.wanted(layer, MLP_SITES)]
        with lm.running(), watching(lm, attend, attention, None), watching(lm, feed, None, mlp):
            forward(lm.model, batch.to(lm.device))

    def _give(
        self,
        into: dict[str, np.ndarray],
        layer: LayerAnatomy,
        given: Mapping[str, Tensor],
        among: Sequence[str],
    ) -> None:
        into.update(
            {f"layers.{layer.index}.{site}": to_numpy(given[site]) for site in self.wanted(layer, among)}
        )

    def _attention(
        self, lm: LanguageModel, layer: LayerAnatomy, shown: Shown, spans: Sequence[Span], other: Each
    ) -> list[dict[str, Tensor]]:
        anatomy, scores = layer.attention, []
        assert anatomy is not None
        capture = shown.capture
        swap = self.compare == "swap"
        theirs = under(self.base, anatomy, shown) if swap or other else {}
        for row, span in enumerate(spans):
            length = len(span.ids)
            prompt = self._attention_part(lm, layer, shown, row, span)
            if swap:
                columns_ = self._column_pairs(layer, "o")
                base_rows = {site: theirs[site][row, :length] for site in "qkv"}
                scores.append(
                    prompt.swapped(**base_rows, columns=columns_, sites=self.wanted(layer, ATTENTION_SITES))
                )
                continue
            scores.append(prompt.importance())
            if other:
                fed = Shown(shown.inputs, {**theirs, "o": capture.o}, shown.arguments)
                self._give(
                    other[row],
                    layer,
                    self._attention_part(self.base, layer, fed, row, span).importance(),
                    ATTENTION_SITES,
                )
        return scores

    def _attention_part(
        self, lm: LanguageModel, layer: LayerAnatomy, shown: Shown, row: int, span: Span
    ) -> AttentionPart:
        anatomy = layer.attention
        assert anatomy is not None
        states = self._plans[self._side(lm)][layer.index].states(shown.capture, row, len(span.ids))
        name = (self._side(lm), layer.index)
        if name not in self._factors:
            weight = columns(lm, f"layers.{layer.index}.o").to(states.q)
            self._factors[name] = OutputFactors(weight, anatomy.n_heads, anatomy.n_kv_heads)
        counted = torch.zeros(len(span.ids), dtype=torch.bool, device=states.q.device)
        counted[span.start : span.stop] = True
        return AttentionPart(self._plans[self._side(lm)][layer.index], states, counted, self._factors[name])

    def _mlp(
        self, lm: LanguageModel, layer: LayerAnatomy, shown: Shown, spans: Sequence[Span], other: Each
    ) -> list[dict[str, Tensor]]:
        anatomy, scores = layer.mlp, []
        assert anatomy is not None
        swap = self.compare == "swap"
        theirs = under(self.base, anatomy, shown) if swap or other else {}
        for row, span in enumerate(spans):
            prompt = MlpPart.of(anatomy, shown.activations, row, span.start, span.stop)
            if swap:
                scores.append(
                    prompt.swapped(
                        MlpPart.of(anatomy, theirs, row, span.start, span.stop),
                        self._column_pairs(layer, "down"),
                    )
                )
                continue
            scores.append(prompt.importance(self._column_norms(lm, layer)))
            if other:
                fed = MlpPart.of(anatomy, theirs, row, span.start, span.stop)
                self._give(other[row], layer, fed.importance(self._column_norms(self.base, layer)), MLP_SITES)
        return scores

    def _column_pairs(self, layer: LayerAnatomy, site: str) -> Columns:
        key = f"layers.{layer.index}.{site}"
        if key not in self._columns:
            mine, theirs = columns(self.aligned, key), columns(self.base, key)
            attention = layer.attention if site == "o" else None
            self._columns[key] = (
                attention_columns(attention, mine, theirs)
                if attention is not None
                else Columns.of(mine, theirs)
            )
        return self._columns[key]

    def _column_norms(self, lm: LanguageModel, layer: LayerAnatomy) -> Tensor:
        name = (self._side(lm), f"layers.{layer.index}.down")
        if name not in self._norms:
            self._norms[name] = torch.linalg.vector_norm(columns(lm, name[1]), dim=0)
        return self._norms[name]

    def _side(self, lm: LanguageModel) -> str:
        return "aligned" if lm is self.aligned else "base"

    def _prove(self) -> None:
        """The attention formulas of the models that run, or whose parameters run, on probe passes."""
        attending = {layer.index for layer in self.layers if self.wanted(layer, ATTENTION_SITES)}
        for lm in (self.aligned,) if self.compare == "swap" else (self.aligned, self.base):
            self._plans[self._side(lm)] = prove_layers(
                lm, [layer for layer in lm.anatomy.layers if layer.index in attending]
            )


Masks = dict[str, Float[Tensor, "batch unit"]]


def score_swap_attribution(_: SwapAttribution | ImportanceContrast, run: Run) -> Scored:
    """Gradient of the refusal's log-odds with respect to a soft swap of every unit's parameters, averaged
    along the path.
    """
    units, counts = own_completions(run)
    swap, points = SoftSwap(run.base, run.aligned, run.sizes), midpoints_of(SwapAttribution.MIDPOINTS)
    path = PathMean.of(run, points)

    def gradients(batch: Batch, rows: Sequence[ScoredRow]) -> dict[str, Tensor]:
        return swap.gradients(batch, rows, path.mean)

    values, folded = attribute(run, run.aligned, [[contested(rows)] for rows in units], gradients, path)
    return Scored(values, counts.without(len(folded.failed)), folded.votes)


def parting(rows: Sequence[ScoredRow]) -> list[ScoredRow]:
    """The rows of one prompt cut behind the first token at which its refusal and its compliance differ, which
    alone is scored.

    Later tokens say how a refusal or a compliance goes on, not whether there is one. Texts of which one
    begins with the other are cut at their last common token, where they cancel.
    """
    refusal, compliance = rows
    start = refusal.start
    common = 0
    for mine, theirs in zip(refusal.ids[start:-1], compliance.ids[start:-1], strict=False):
        if mine != theirs:
            break
        common += 1
    return [replace(row, ids=row.ids[: start + common + 1], start=start + common) for row in rows]


@dataclass
class SoftSwap:
    """Both models as one whose searched units have the parameters `base + m·(aligned − base)`.

    All else is the aligned model's.

    Attributes:
        base, aligned: the models; they may be adapters on one base.
        sizes: neurons of every searched site key.
    """

    base: LanguageModel
    aligned: LanguageModel
    sizes: Mapping[str, int]
    _inputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    _busy: bool = False

    def gradients(
        self, batch: Batch, rows: Sequence[ScoredRow], mean: Mean
    ) -> dict[str, Float[Tensor, "batch neuron"]]:
        """Derivative of each row's score with respect to that row's mask, averaged by `mean` along the path.

        A unit's neurons share it.
        """
        return mean(lambda step: self.at(batch, rows, step)[0])

    def at(
        self, batch: Batch, rows: Sequence[ScoredRow], step: float
    ) -> tuple[dict[str, Float[Tensor, "batch neuron"]], Tensor]:
        """One forward and one backward pass with all masks at `step`: gradients by site key, and the rows'
        scores.
        """
        slopes, scores = self.slopes(batch, rows, step)
        return {key: self._of_site(key, slopes) for key in self.sizes}, scores

    def slopes(
        self, batch: Batch, rows: Sequence[ScoredRow], step: float | Mapping[str, Tensor]
    ) -> tuple[Masks, Tensor]:
        """The same by name of a mask; `step` is one number, or by name a number for each of its units."""
        wide = torch.float64 if self.aligned.dtype == torch.float64 else torch.float32
        device, shapes = (
            batch.input_ids.device,
            {name: (len(rows), size) for name, size in self.sizes_of_masks.items()},
        )
        masks = {
            name: spread(step, name, shape).to(device, wide).requires_grad_()
            for name, shape in shapes.items()
        }
        with (
            frozen(self.aligned.model),
            frozen(self.base.model),
            self.aligned.running(),
            torch.enable_grad(),
            self.swapping(masks),
        ):
            logits = forward(self.aligned.model, batch, with_logits=True)
            assert logits is not None
            scores = score_rows(logits, batch, rows)
            slopes = dict(zip(masks, torch.autograd.grad(scores.sum(), list(masks.values())), strict=True))
        return slopes, scores.detach()

    @property
    def sizes_of_masks(self) -> dict[str, int]:
        """Units behind every mask: `q` and `k` rows alone, `v` rows with the `o` columns they feed,
        feed-forward units whole.
        """
        sizes = {}
        for layer in self.layers:
            for site in (site for site in "qkvo" if f"layers.{layer.index}.{site}" in self.sizes):
                named = "v" if site == "o" else site
                sizes[mask_name(layer, site)] = self._places(layer.attention, named).size
            if any(f"layers.{layer.index}.{site}" in self.sizes for site in MLP_SITES):
                sizes[mask_name(layer, "down")] = self._places(layer.mlp, "down").size
        return sizes

    @property
    def layers(self) -> list[LayerAnatomy]:
        """Layers with a searched site, in the aligned model."""
        wanted = {parse_key(key).layer for key in self.sizes}
        return [layer for layer in self.aligned.anatomy.layers if layer.index in wanted]

    @contextlib.contextmanager
    def swapping(self, masks: Masks) -> Iterator[None]:
        """The aligned model runs with its units' parameters at `masks` for a block."""
        by_module: dict[nn.Module, list[tuple[SitePlace, Tensor]]] = {}
        for layer in self.layers:
            for part in (layer.attention, layer.mlp):
                for site, place in part.places.items() if part is not None else ():
                    if mask_name(layer, site) in masks:
                        mask = masks[mask_name(layer, site)]
                        mask = self._columns(layer, mask) if site == "o" else mask
                        by_module.setdefault(place.module, []).append((place, mask))
        before = {module: self._entering(module, places) for module, places in by_module.items()}
        after = {module: self._leaving(module, places) for module, places in by_module.items()}
        try:
            with around(before=before, after=after, each=True):
                yield
        finally:
            self._inputs.clear()

    def _entering(self, module: nn.Module, places: Sequence[tuple[SitePlace, Tensor]]) -> Callable[..., Any]:
        def enter(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._busy:
                return None
            fed = self._inputs[module] = args[0] if args else next(iter(kwargs.values()))
            if places[0][0].side == "output":
                return None
            masked = _scaled(fed, places[0][1])
            return ((masked, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): masked})

        return enter

    def _leaving(
        self, module: nn.Module, places: Sequence[tuple[SitePlace, Tensor]]
    ) -> Callable[[Tensor], Tensor | None]:
        def leave(output: Tensor) -> Tensor | None:
            if self._busy:
                return None
            fed, place = self._inputs.pop(module), places[0][0]
            theirs = self._base_output(place, fed).to(output)
            if place.side == "input":  # linear: aligned(m·x) + base(x) − base(m·x)
                return output + (theirs - self._base_output(place, _scaled(fed, places[0][1])).to(output))
            features = torch.ones(
                len(places[0][1]), output.shape[-1], dtype=places[0][1].dtype, device=output.device
            )
            for each, mask in places:
                features[:, slice(None) if each.index is None else each.index] = mask.to(output.device)
            return theirs + _scaled(output - theirs, features)

        return leave

    def _base_output(self, place: SitePlace, fed: Tensor) -> Tensor:
        """What the base model's projection puts out.

        It may be the same module under other adapters, so that our hooks must rest.
        """
        self._busy = True
        try:
            with self.base.active():
                return projected(self.base.anatomy.place(place.key), fed)
        finally:
            self._busy = False

    def _of_site(self, key: str, slopes: Masks) -> Tensor:
        parsed = parse_key(key)
        layer = next(layer for layer in self.layers if layer.index == parsed.layer)
        gradient = slopes[mask_name(layer, parsed.site)]
        return self._columns(layer, gradient) if parsed.site == "o" else gradient

    def _columns(
        self, layer: LayerAnatomy, values: Float[Tensor, "batch value"]
    ) -> Float[Tensor, "batch column"]:
        """Of every `o` column, what its `v` row has."""
        attention = layer.attention
        assert isinstance(attention, AttentionAnatomy)
        heads = values.unflatten(1, (attention.n_kv_heads, 1, -1))
        return heads.expand(-1, -1, attention.n_heads // attention.n_kv_heads, -1).flatten(1)

    @staticmethod
    def _places(part: Any, site: str) -> SitePlace:
        place: SitePlace = part.places[site]
        return place


def contested(rows: Sequence[ScoredRow]) -> ScoredRow:
    """The same as one row, since both tokens are told by the same position: log p(refusal's token) − log
    p(compliance's). It halves the work.
    """
    refusal, compliance = parting(rows)
    return replace(refusal, weight=1.0, rival=compliance.ids[-1])


def mask_name(layer: LayerAnatomy, site: str) -> str:
    """The mask that a site's neurons follow."""
    if site in MLP_SITES:
        return f"layers.{layer.index}.mlp"
    return f"layers.{layer.index}.{'v' if site == 'o' else site}"


def _scaled(values: Tensor, mask: Float[Tensor, "batch feature"]) -> Tensor:
    """Features times their row's mask, in the mask's type on the way.

    `values` may have batch and tokens flattened.
    """
    rows = values.reshape(len(mask), -1, values.shape[-1])
    return (rows.to(mask) * mask[:, None]).to(values).reshape(values.shape)
