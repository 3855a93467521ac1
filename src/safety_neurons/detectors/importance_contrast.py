"""Importance-contrast: importance of the aligned model's neurons against the base model's parameters instead of against zero."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from safety_neurons.detectors import swap_attribution
from safety_neurons.detectors.importance_attention import OutputFactors
from safety_neurons.detectors.importance_readers import prove_layers
from safety_neurons.detectors.methods import ImportanceContrast
from safety_neurons.detectors.runner import Run, Scored
from safety_neurons.detectors.streaming import Folded, Part, to_numpy
from safety_neurons.detectors.sublayers import Shown, columns, under, watching
from safety_neurons.detectors.swapping import AttentionPart, Columns, MlpPart, attention_columns
from safety_neurons.detectors.text import Span, texts_of
from safety_neurons.errors import UnsupportedModelError
from safety_neurons.model import LanguageModel
from safety_neurons.model.attention import AttentionPlan
from safety_neurons.model.parts import LayerAnatomy
from safety_neurons.model.passes import Batch, forward
from safety_neurons.neurons import ATTENTION_SITES, MLP_SITES, parse_key

SMALL = 1e-3
"""Share of the site's mean importance that keeps `relative` from dividing by zero."""


def score(method: ImportanceContrast, run: Run) -> Scored:
    """How much every neuron's sub-layer changes when its parameters are the base model's, or another of the comparisons."""
    comparison = Comparison(run.base, run.aligned, run.sizes, method.compare)
    comparison.check()
    if method.compare == "swap-attribution":
        return swap_attribution.score(method, run)
    text = texts_of(method, run)
    values, folded = comparison.run(run, text.spans)
    tokens = text.n_tokens - sum(text.spans[index].n_tokens for index in folded.failed)
    return Scored(values, text.counts.without(len(folded.failed)), folded.votes, {"tokens": tokens})


Each = list[dict[str, np.ndarray]]
"""Scores of every prompt, by site key."""


@dataclass
class Comparison:
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
                    f"{key}: importance-contrast is defined for attention and dense feed-forward parts only; use --sites q,k,v,o here"
                )

    def run(self, run: Run, spans: Sequence[Span]) -> tuple[dict[str, np.ndarray], Folded]:
        """Mean over prompts of the scores, and what became of the prompts."""

        def reduce(batch: Batch) -> Part:
            mine, theirs = self.scores(batch, [spans[index] for index in batch.indices])
            part = Part({f"mine/{key}": np.sum([row[key] for row in mine], axis=0) for key in self.sizes})
            if theirs:
                part.sums |= {f"theirs/{key}": np.sum([row[key] for row in theirs], axis=0) for key in self.sizes}
            if run.votes:
                part.scores = [self.combined(row, theirs[number] if theirs else None) for number, row in enumerate(mine)]
            return part

        with torch.no_grad():
            self._prove()
            folded = run.fold([span.ids for span in spans], reduce)
        used = len(spans) - len(folded.failed)
        mine = {key: folded.sums[f"mine/{key}"] / used for key in self.sizes}
        theirs = {key: folded.sums[f"theirs/{key}"] / used for key in self.sizes} if self.compare != "swap" else None
        return self.combined(mine, theirs), folded

    def combined(self, mine: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray] | None) -> dict[str, np.ndarray]:
        """The score from the aligned model's numbers and, but for `swap`, the base model's."""
        if theirs is None:
            return dict(mine)
        if self.compare == "relative":
            return {key: (a - theirs[key]) / np.maximum(a + theirs[key] + SMALL * a.mean(), 1e-300) for key, a in mine.items()}
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

    def _give(self, into: dict[str, np.ndarray], layer: LayerAnatomy, given: Mapping[str, Tensor], among: Sequence[str]) -> None:
        into.update({f"layers.{layer.index}.{site}": to_numpy(given[site]) for site in self.wanted(layer, among)})

    def _attention(
        self, lm: LanguageModel, layer: LayerAnatomy, shown: Shown, spans: Sequence[Span], other: Each
    ) -> list[dict[str, Tensor]]:
        anatomy, found = layer.attention, []
        assert anatomy is not None
        capture = shown.capture
        swap = self.compare == "swap"
        theirs = under(self.base, anatomy, shown) if swap or other else {}
        for row, span in enumerate(spans):
            length = len(span.ids)
            made = self._attention_part(lm, layer, shown, row, span)
            if swap:
                columns_ = self._column_pairs(layer, "o")
                base_rows = {site: theirs[site][row, :length] for site in "qkv"}
                found.append(made.swapped(**base_rows, columns=columns_, sites=self.wanted(layer, ATTENTION_SITES)))
                continue
            found.append(made.importance())
            if other:
                fed = Shown(shown.inputs, {**theirs, "o": capture.o}, shown.arguments)
                self._give(other[row], layer, self._attention_part(self.base, layer, fed, row, span).importance(), ATTENTION_SITES)
        return found

    def _attention_part(self, lm: LanguageModel, layer: LayerAnatomy, shown: Shown, row: int, span: Span) -> AttentionPart:
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

    def _mlp(self, lm: LanguageModel, layer: LayerAnatomy, shown: Shown, spans: Sequence[Span], other: Each) -> list[dict[str, Tensor]]:
        anatomy, found = layer.mlp, []
        assert anatomy is not None
        swap = self.compare == "swap"
        theirs = under(self.base, anatomy, shown) if swap or other else {}
        for row, span in enumerate(spans):
            made = MlpPart.of(anatomy, shown.activations, row, span.start, span.stop)
            if swap:
                found.append(made.swapped(MlpPart.of(anatomy, theirs, row, span.start, span.stop), self._column_pairs(layer, "down")))
                continue
            found.append(made.importance(self._column_norms(lm, layer)))
            if other:
                fed = MlpPart.of(anatomy, theirs, row, span.start, span.stop)
                self._give(other[row], layer, fed.importance(self._column_norms(self.base, layer)), MLP_SITES)
        return found

    def _column_pairs(self, layer: LayerAnatomy, site: str) -> Columns:
        key = f"layers.{layer.index}.{site}"
        if key not in self._columns:
            mine, theirs = columns(self.aligned, key), columns(self.base, key)
            attention = layer.attention if site == "o" else None
            self._columns[key] = attention_columns(attention, mine, theirs) if attention is not None else Columns.of(mine, theirs)
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
            self._plans[self._side(lm)] = prove_layers(lm, [layer for layer in lm.anatomy.layers if layer.index in attending])
