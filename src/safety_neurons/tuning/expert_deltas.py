"""Trainable rows and columns of routed experts, which are slices of three-dimensional parameters and no modules of their own.

The experts' parameters stay as they are. Rows of gate and up act between the projection and the gate step, columns of down on what the
experts put out; both through the model floor's readers and editors, so every implementation of the experts interface that keeps the gate
step apart trains them.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from safety_neurons.model.experts import ExpertRows
from safety_neurons.model.hooks import around, editing, reading
from safety_neurons.model.parts import Anatomy
from safety_neurons.tuning.deltas import Beside, product

CHILD = "neuron_deltas"
"""Name of the deltas among the children of an experts module."""


class ExpertPart(NamedTuple):
    """One site of one expert: which of its neurons are trained."""

    expert: int
    site: str
    neurons: Int[Tensor, " neuron"]


class ExpertDeltas(Beside):
    """The deltas of one layer's experts: `[n, hidden]` for gate and up, `[hidden, n]` for down.

    Args:
        hidden: size of the stream.
        parts: sites of experts that have members.
        dtype: of the parameters.
        device: of the parameters.
    """

    def __init__(self, hidden: int, parts: Sequence[ExpertPart], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.parts = {f"{part.expert}_{part.site}": part.site for part in parts}
        for name, part in zip(self.parts, parts, strict=True):
            n = len(part.neurons)
            shape = (hidden, n) if part.site == "down" else (n, hidden)
            self.register_parameter(f"delta_{name}", nn.Parameter(torch.zeros(shape, dtype=dtype, device=device)))
            self.register_buffer(f"at_{name}", part.neurons.to(device), persistent=False)

    def deltas(self) -> dict[str, nn.Parameter]:
        """The parameters by `expert_site`."""
        return {name: self.get_parameter(f"delta_{name}") for name in self.parts}

    def of(self, site: str) -> list[tuple[int, nn.Parameter, Tensor]]:
        """Expert, parameter and neurons of every part of a site."""
        names = [name for name, own in self.parts.items() if own == site]
        return [(int(name.split("_")[0]), self.get_parameter(f"delta_{name}"), self.get_buffer(f"at_{name}")) for name in names]


@contextlib.contextmanager
def acting(anatomy: Anatomy, layer: int, deltas: ExpertDeltas) -> Iterator[None]:
    """The deltas at work in a layer's experts, for as long as the context lasts."""
    experts = anatomy.layers[layer].experts
    assert experts is not None
    call = _Call(deltas)
    key = f"layers.{layer}.experts.*."
    with contextlib.ExitStack() as stack:
        stack.enter_context(around(experts.module, before=call.begin, after=call.end))
        editors = {key + site: functools.partial(call.edit, site) for site in ("gate", "up") if deltas.of(site)}
        if editors:
            stack.enter_context(editing(anatomy, editors))
        if deltas.of("down"):
            stack.enter_context(reading(anatomy, {f"{key}down": call.read}))
        yield


class _Call:
    """One call of an experts module: its input, and what is to be added to its output."""

    def __init__(self, deltas: ExpertDeltas) -> None:
        self.deltas = deltas
        self.hidden: Tensor | None = None
        self.added: list[tuple[Tensor, Tensor]] = []

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the stream that the experts are fed."""
        self.hidden = args[0] if args else next(iter(kwargs.values()))
        self.added = []

    def edit(self, site: str, rows: ExpertRows) -> Float[Tensor, "row neuron"]:
        """Gate or up values with the trained rows' share."""
        values, hidden = rows.values, self.hidden
        if not self.deltas.enabled:
            return values
        assert hidden is not None
        stream = hidden.reshape(-1, hidden.shape[-1])
        for expert, delta, neurons in self.deltas.of(site):
            where = (rows.expert_index == expert).nonzero().flatten()
            added = product(stream.index_select(0, rows.token_index[where]), delta)
            old = values.index_select(0, where).index_select(1, neurons)
            values = values.index_put((where[:, None], neurons[None]), (old.to(added.dtype) + added).to(values.dtype))
        return values

    def read(self, rows: ExpertRows) -> None:
        """The trained columns' share of what the experts put out."""
        if not self.deltas.enabled:
            return
        for expert, delta, neurons in self.deltas.of("down"):
            where = (rows.expert_index == expert).nonzero().flatten()
            share = product(rows.values.index_select(0, where).index_select(1, neurons), delta)
            self.added.append((rows.token_index[where], share * rows.weight[where].to(share.dtype)[:, None]))

    def end(self, output: Tensor) -> Tensor:
        """The experts' output with those shares."""
        self.hidden = None
        if not self.added:
            return output
        flat = output.reshape(-1, output.shape[-1])
        total = flat.to(self.added[0][1].dtype)
        for tokens, share in self.added:
            total = total.index_add(0, tokens, share)
        self.added = []
        return total.to(output.dtype).view(output.shape)
