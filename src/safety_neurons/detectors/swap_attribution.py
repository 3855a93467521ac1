"""What swapping a unit's parameters does to the refusal, to first order along the path from the base's parameters to the aligned model's.

The swap of importance-contrast moves a sub-layer; whether that matters downstream it cannot tell. Here the same swap is made soft, unit by
unit, and differentiated: `base + m·(aligned − base)` for the parameters of every searched unit, `m` going from 0 to 1.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from safety_neurons.detectors.attribution import ScoredRow, attribute, frozen, mean_of, midpoints_of, own_completions, score_rows, spread
from safety_neurons.detectors.methods import ImportanceContrast, SwapAttribution
from safety_neurons.detectors.runner import Run, Scored
from safety_neurons.detectors.sublayers import projected
from safety_neurons.model import LanguageModel
from safety_neurons.model.batches import Batch, forward
from safety_neurons.model.hooks import around
from safety_neurons.model.sites import AttentionAnatomy, LayerAnatomy, SitePlace
from safety_neurons.neurons import MLP_SITES, parse_key

Masks = dict[str, Float[Tensor, "batch unit"]]


def score(_: SwapAttribution | ImportanceContrast, run: Run) -> Scored:
    """Gradient of the refusal's log-odds with respect to a soft swap of every unit's parameters, averaged along the path."""
    units, counts = own_completions(run)
    swap, steps = SoftSwap(run.base, run.aligned, run.sizes), midpoints_of(SwapAttribution.MIDPOINTS)

    def gradients(batch: Batch, rows: Sequence[ScoredRow]) -> dict[str, Tensor]:
        return swap.gradients(batch, rows, steps)

    values, folded = attribute(run, run.aligned, [parting(rows) for rows in units], gradients)
    return Scored(values, counts.without(len(folded.failed)), folded.votes)


def parting(rows: Sequence[ScoredRow]) -> list[ScoredRow]:
    """The rows of one prompt cut behind the first token at which its refusal and its compliance differ, which alone is scored.

    Later tokens say how a refusal or a compliance goes on, not whether there is one. Texts of which one begins with the other are cut at
    their last common token, where they cancel.
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
    """Both models as one whose searched units have the parameters `base + m·(aligned − base)`; all else is the aligned model's.

    Attributes:
        base, aligned: the models; they may be adapters on one base.
        sizes: neurons of every searched site key.
    """

    base: LanguageModel
    aligned: LanguageModel
    sizes: Mapping[str, int]
    _inputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    _busy: bool = False

    def gradients(self, batch: Batch, rows: Sequence[ScoredRow], steps: Sequence[float]) -> dict[str, Float[Tensor, "batch neuron"]]:
        """Derivative of each row's score with respect to that row's mask, mean over the steps; a unit's neurons share it."""
        return mean_of([self.at(batch, rows, step)[0] for step in steps])

    def at(self, batch: Batch, rows: Sequence[ScoredRow], step: float) -> tuple[dict[str, Float[Tensor, "batch neuron"]], Tensor]:
        """One forward and one backward pass with all masks at `step`: gradients by site key, and the rows' scores."""
        found, scores = self.slopes(batch, rows, step)
        return {key: self._of_site(key, found) for key in self.sizes}, scores

    def slopes(self, batch: Batch, rows: Sequence[ScoredRow], step: float | Mapping[str, Tensor]) -> tuple[Masks, Tensor]:
        """The same by name of a mask; `step` is one number, or by name a number for each of its units."""
        wide = torch.float64 if self.aligned.dtype == torch.float64 else torch.float32
        device, shapes = batch.input_ids.device, {name: (len(rows), size) for name, size in self.sizes_of_masks.items()}
        masks = {name: spread(step, name, shape).to(device, wide).requires_grad_() for name, shape in shapes.items()}
        with frozen(self.aligned.model), frozen(self.base.model), self.aligned.running(), torch.enable_grad(), self.swapping(masks):
            logits = forward(self.aligned.model, batch, with_logits=True)
            assert logits is not None
            scores = score_rows(logits, batch, rows)
            found = dict(zip(masks, torch.autograd.grad(scores.sum(), list(masks.values())), strict=True))
        return found, scores.detach()

    @property
    def sizes_of_masks(self) -> dict[str, int]:
        """Units behind every mask: `q` and `k` rows alone, `v` rows with the `o` columns they feed, feed-forward units whole."""
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
            with around(before=before, after=after):
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

    def _leaving(self, module: nn.Module, places: Sequence[tuple[SitePlace, Tensor]]) -> Callable[[Tensor], Tensor | None]:
        def leave(output: Tensor) -> Tensor | None:
            if self._busy:
                return None
            fed, place = self._inputs.pop(module), places[0][0]
            theirs = self._base_output(place, fed).to(output)
            if place.side == "input":  # linear: aligned(m·x) + base(x) − base(m·x)
                return output + (theirs - self._base_output(place, _scaled(fed, places[0][1])).to(output))
            features = torch.ones(len(places[0][1]), output.shape[-1], dtype=places[0][1].dtype, device=output.device)
            for each, mask in places:
                features[:, slice(None) if each.index is None else each.index] = mask.to(output.device)
            return theirs + _scaled(output - theirs, features)

        return leave

    def _base_output(self, place: SitePlace, fed: Tensor) -> Tensor:
        """What the base model's projection puts out; it may be the same module under other adapters, so that our hooks must rest."""
        self._busy = True
        try:
            with self.base.active():
                return projected(self.base.anatomy.place(place.key), fed)
        finally:
            self._busy = False

    def _of_site(self, key: str, found: Masks) -> Tensor:
        parsed = parse_key(key)
        layer = next(layer for layer in self.layers if layer.index == parsed.layer)
        gradient = found[mask_name(layer, parsed.site)]
        return self._columns(layer, gradient) if parsed.site == "o" else gradient

    def _columns(self, layer: LayerAnatomy, values: Float[Tensor, "batch value"]) -> Float[Tensor, "batch column"]:
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
    """The same as one row, since both tokens are told by the same position: log p(refusal's token) − log p(compliance's)."""
    refusal, compliance = parting(rows)
    return replace(refusal, weight=1.0, rival=compliance.ids[-1])


def mask_name(layer: LayerAnatomy, site: str) -> str:
    """The mask that a site's neurons follow."""
    if site in MLP_SITES:
        return f"layers.{layer.index}.mlp"
    return f"layers.{layer.index}.{'v' if site == 'o' else site}"


def _scaled(values: Tensor, mask: Float[Tensor, "batch feature"]) -> Tensor:
    """Features times their row's mask, in the mask's type on the way; `values` may have batch and tokens flattened."""
    rows = values.reshape(len(mask), -1, values.shape[-1])
    return (rows.to(mask) * mask[:, None]).to(values).reshape(values.shape)
