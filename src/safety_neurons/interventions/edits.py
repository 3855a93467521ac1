"""Deactivate neurons (act as if their parameters were zero), and the constant edits of patching: mean, zero, noise, scale."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from safety_neurons.errors import UsageError
from safety_neurons.interventions.targets import PerDevice, Subject, active, indices, own_rows, per_site
from safety_neurons.model.hooks import editing, evaluating
from safety_neurons.model.sites import ExpertRows
from safety_neurons.neurons import NeuronSet

Edit = Callable[[Tensor], Tensor]

MODES = ("mean", "zero", "noise", "scale")


def constant_editors(
    subject: Subject, chosen: Mapping[str, Int[Tensor, " neuron"]], mode: str, alpha: float, values: Any, seed: int
) -> dict[str, Callable[[Tensor], Tensor]]:
    """One edit per site.

    Args:
        subject: The model.
        chosen: The neurons, one sorted index tensor per key.
        mode: `mean` (set to `values`), `zero`, `noise` (add `alpha` × `values` × a standard normal draw), `scale` (multiply by `alpha`).
        alpha: The factor of `noise` and `scale`.
        values: Means, or standard deviations for `noise`: one number, or per key one per neuron of the site or per chosen neuron.
        seed: Seed of the noise; draws depend on it, on the batch and on the order of passes, and on nothing outside.

    Raises:
        UsageError: A mode that does not exist, or one whose values are missing.
    """
    if mode not in MODES:
        raise UsageError(f"mode {mode!r} arrived; choose donor, {', '.join(MODES)}")
    if mode in ("mean", "noise") and values is None:
        raise UsageError(f"mode {mode!r} needs values ({'means' if mode == 'mean' else 'standard deviations'} per neuron); pass values=…")
    sizes = subject.anatomy.table.sizes
    draws = _Draws(seed)
    found: dict[str, Edit] = {}
    for key, index in chosen.items():
        given = None if values is None or mode in ("zero", "scale") else per_site(values, key, index, sizes[key])
        found[key] = _edit(subject, PerDevice(index, sizes[key]), _change(mode, alpha, given, draws))
    return found


def _change(mode: str, alpha: float, given: Tensor | None, draws: "_Draws") -> Edit:
    """The new values of the chosen columns, from their own."""
    if mode == "scale":
        return lambda own: own * alpha
    if mode == "zero" or given is None:
        return torch.zeros_like
    if mode == "mean":
        return lambda own: given.to(own).expand_as(own)
    return lambda own: own + alpha * given.to(own) * draws.like(own)


def _edit(subject: Subject, index: PerDevice, change: Edit) -> Edit:
    def edit(activation: Float[Tensor, "batch token neuron"]) -> Float[Tensor, "batch token neuron"]:
        edited = index.copied(activation, change(index.taken(activation)))
        own = own_rows(subject, activation)
        return edited if own is None else torch.where(own, edited, activation)

    return edit


class _Draws:
    """Standard normal draws from a generator of one's own, the same on every device."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def like(self, values: Tensor) -> Tensor:
        return torch.randn(values.shape, generator=self._generator, dtype=torch.float32).to(values)


@contextlib.contextmanager
def deactivated(model: Any, *neuron_sets: NeuronSet | Mapping[str, Any]) -> Iterator[Any]:
    """Runs the model as if the parameters of some neurons were zero, inside a ``with`` block.

    The activation of every chosen neuron is set to zero at every token, which gives the logits of a model whose weight row (``q k v gate
    up``, with its bias entry) or weight column (``o down``) is zero; the share that an applied adapter adds to it is zero as well. Values
    are filled in by index and never multiplied by a mask, so an infinite or undefined activation is silenced too. ``generate`` with its
    key-value cache, plain forward passes and `LanguageModel.complete` all act this way, in evaluation mode (no dropout); leaving the block
    restores the model bit for bit, modes included.

    Source: Zhao et al., ICLR 2025, section 2 (deactivation of a neuron).
    Differs: weights are not written; activations are masked, so quantised and shared weights work and nothing has to be restored.

    Args:
        model: A `LanguageModel` or a Hugging Face model.
        *neuron_sets: Sets to deactivate together (their union). Contexts may be nested.

    Yields:
        The model that was passed in.

    Raises:
        ForeignModelError: A set was found on another architecture.
        NeuronError: An index outside the model's sites.
    """
    subject = Subject.of(model)
    chosen = indices(subject.anatomy, *neuron_sets)
    with evaluating(subject.model), active(subject), contextlib.ExitStack() as stack:
        if chosen:
            sizes = subject.anatomy.table.sizes
            editors = {key: _silencer(PerDevice(index, sizes[key]), subject) for key, index in chosen.items()}
            stack.enter_context(editing(subject.anatomy, editors))
        yield model


def _silencer(index: PerDevice, subject: Subject) -> Callable[[Any], Tensor]:
    def silence(activation: Float[Tensor, "batch token neuron"] | ExpertRows) -> Float[Tensor, "*rows neuron"]:
        values = activation.values if isinstance(activation, ExpertRows) else activation
        silenced = values.index_fill(-1, index.on(values.device), 0)
        own = own_rows(subject, activation)
        return silenced if own is None else torch.where(own, silenced, values)

    return silence
