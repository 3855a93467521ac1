"""Edits that need no donor: fixed values, zero, noise, a multiple of the neuron's own activation."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from safety_neurons.errors import UsageError
from safety_neurons.interventions.rows import own_rows
from safety_neurons.interventions.targets import PerDevice, Subject, per_site

Edit = Callable[[Tensor], Tensor]
MODES = ("mean", "zero", "noise", "scale")


def editors(
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
