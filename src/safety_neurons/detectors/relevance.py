"""Relevance propagation: the gradient of the explained score with every nonlinearity replaced by the line
that runs through 0 and the point at which the model is.

The forward pass is the model's own, bit for bit. What differs is what gradients flow through: norms with
their scale held, a feed-forward part rebuilt from its own gate and up activations, and no attention pattern.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from safety_neurons.detectors.attribution import ScoredRow, mask_gradients, of_texts
from safety_neurons.detectors.methods import Relp
from safety_neurons.detectors.reading import input_scale
from safety_neurons.detectors.runner import Run, Scored
from safety_neurons.errors import UnsupportedModelError
from safety_neurons.model import LanguageModel, hooks
from safety_neurons.model.attention import NormFormula, norm_candidates
from safety_neurons.model.batches import Batch
from safety_neurons.model.sites import Anatomy, MlpAnatomy


def score(method: Relp, run: Run) -> Scored:
    """Activation times relevance rule of every neuron."""
    model = run.aligned
    norms = norms_of(model)
    slopes = {key: slope_at_zero(part) for key, part in feed_forward_parts(model.anatomy).items()}

    def gradients(batch: Batch, rows: Sequence[ScoredRow]) -> dict[str, Tensor]:
        rules = partial(propagating, model.anatomy, norms, slopes)
        return mask_gradients(model, batch, rows, run.sizes, mask=1.0, editing=rules)[0]

    return of_texts(method, run, gradients)


@contextmanager
def propagating(
    anatomy: Anatomy,
    norms: Mapping[nn.Module, NormFormula],
    slopes: Mapping[str, float],
    editors: Mapping[str, hooks.Editor],
) -> Iterator[None]:
    """The rules of relevance in place of gradients for a block, beside editors of activations.

    Args:
        anatomy: of the model that will run, every part of it known.
        norms: `norms_of` the model.
        slopes: slope at 0 of the activation function, by the key of `down`.
        editors: of any sites; those of `q` and `k` have no gradient.
    """
    rules = dict(editors)
    for layer in anatomy.layers:
        assert layer.attention is not None
        for site in ("q", "k"):
            key = layer.attention.places[site].key
            rules[key] = partial(_constant, editors.get(key))
    for key, part in feed_forward_parts(anatomy).items():
        rules |= _LinearProduct(part, slopes[key], editors).rules()
    forwards = {module: _linear_norm(module.forward, formula) for module, formula in norms.items()}
    with hooks.with_forwards(forwards), hooks.editing(anatomy, rules):
        yield


def _constant(editor: hooks.Editor | None, values: Tensor) -> Tensor:
    return (values if editor is None else editor(values)).detach()


def with_gradient_of(value: Tensor, line: Tensor) -> Tensor:
    """`value`, bit for bit, with the gradient of `line`."""
    return value.detach() + (line - line.detach()).to(value.dtype)


def _linear_norm(own: Callable[..., Tensor], formula: NormFormula) -> Callable[..., Tensor]:
    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            value = own(hidden, *args, **kwargs)
        wide = hidden if hidden.dtype == torch.float64 else hidden.float()
        rows = wide.reshape(-1, 1, wide.shape[-1])
        return with_gradient_of(value, formula.held(rows).reshape(wide.shape))

    return forward


class _LinearProduct:
    """What `down` is given, as a product of lines: act(gate)·up, or act(up) without a gate.

    Args:
        part: the feed-forward part.
        slope: of its activation function at 0.
        editors: of its sites; what is rebuilt is made of what they return.
    """

    def __init__(self, part: MlpAnatomy, slope: float, editors: Mapping[str, hooks.Editor]) -> None:
        self.part, self.slope, self.editors = part, slope, editors
        self.scale = input_scale(part.places["down"])
        self.seen: dict[str, Tensor] = {}

    def rules(self) -> dict[str, hooks.Editor]:
        """One editor a site."""
        first = ("gate", "up") if self.part.gated else ("up",)
        kept = {self.part.places[site].key: partial(self._keep, site) for site in first}
        return {**kept, self.part.places["down"].key: self._rebuild}

    def _edited(self, site: str, values: Tensor) -> Tensor:
        editor = self.editors.get(self.part.places[site].key)
        return values if editor is None else editor(values)

    def _keep(self, site: str, values: Tensor) -> Tensor:
        self.seen[site] = self._edited(site, values)
        return self.seen[site]

    def _rebuild(self, values: Tensor) -> Tensor:
        up = self.seen.pop("up")
        line = self._line(self.seen.pop("gate") if self.part.gated else up)
        if self.part.gated:
            line = (line * up.detach() + line.detach() * up) / 2
        return self._edited(
            "down", with_gradient_of(values, line if self.scale is None else line * self.scale)
        )

    def _line(self, fed: Float[Tensor, "batch token neuron"]) -> Float[Tensor, "batch token neuron"]:
        """act(x) as x times a constant."""
        with torch.no_grad():
            small = fed.abs() < torch.finfo(fed.dtype).tiny ** 0.5
            secant = self.part.activation(fed) / torch.where(small, torch.ones_like(fed), fed)
        return fed * torch.where(small, torch.full_like(fed, self.slope), secant)


def slope_at_zero(part: MlpAnatomy) -> float:
    """The derivative of the activation function at 0.

    Raises:
        UnsupportedModelError: the function is not 0 there, so that no line through 0 is its value.
    """
    with torch.enable_grad():
        at = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        value = part.activation(at)
        there = float(value.detach())
        if abs(there) > 1e-9:
            raise UnsupportedModelError(
                f"{part.module_name}: the activation function is {there:.3g} at 0, 0 was expected, or "
                "relevance would come from nowhere; use attribution"
            )
        return float(torch.autograd.grad(value.sum(), at)[0])


def feed_forward_parts(anatomy: Anatomy) -> dict[str, MlpAnatomy]:
    """The dense feed-forward part of every layer, by the key of its `down` site."""
    return {layer.mlp.places["down"].key: layer.mlp for layer in anatomy.layers if layer.mlp is not None}


def norms_of(lm: LanguageModel) -> dict[nn.Module, NormFormula]:
    """The formula of every norm of the model, of its text decoder where it has other parts.

    Every module there that is no projection, embedding or head and has parameters or an epsilon must be one,
    or relevance would pass through something unknown.

    Raises:
        UnsupportedModelError: such a module is no known norm; or a layer has routed experts, an output gate,
            or a part that is not known.
    """
    anatomy = lm.anatomy
    _check_parts(anatomy)
    inner: Any = lm.inner
    known = {id(inside) for place in anatomy.places.values() for inside in place.module.modules()}
    known |= {id(module) for module in (inner.get_input_embeddings(), inner.get_output_embeddings())}
    text = inner if inner.config.get_text_config(decoder=True) is inner.config else inner.get_decoder()
    formulas = {}
    for name, module in text.named_modules():
        if list(module.children()) or id(module) in known or isinstance(module, nn.Embedding):
            continue
        epsilon = any(getattr(module, eps, None) for eps in ("variance_epsilon", "eps", "epsilon"))
        parameters = list(module.parameters())
        if not parameters and not epsilon:
            continue
        width = parameters[0].numel() if parameters else int(inner.config.get_text_config().hidden_size)
        formula = next(norm_candidates(module, 1, width), None)
        if formula is None:
            raise UnsupportedModelError(
                f"relp: {name} ({type(module).__name__}) of this {anatomy.architecture} is no known norm, "
                "projection or embedding, so no relevance can pass through it; use attribution"
            )
        formulas[module] = formula
    return formulas


def _check_parts(anatomy: Anatomy) -> None:
    reasons = {key: f"{key}: {reason}" for key, reason in anatomy.refused.items()}
    for layer in anatomy.layers:
        if layer.experts is not None or layer.shared is not None:
            reasons[""] = f"layer {layer.index} has routed experts"
        elif layer.attention is None or layer.mlp is None:
            reasons[""] = f"layer {layer.index} has a part that is no attention and no feed-forward part"
        elif layer.attention.gate is not None:
            reasons[""] = f"the attention of layer {layer.index} has an output gate"
    if reasons:
        raise UnsupportedModelError(
            f"relp has rules for dense layers of attention and feed-forward, this {anatomy.architecture} has "
            f"others: {next(iter(reasons.values()))}; use attribution"
        )
