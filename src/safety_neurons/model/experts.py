"""Experts kept as three-dimensional parameters: where the neurons of each expert are, found through transformers' experts interface.

Every implementation of the interface that keeps the gate step apart calls `experts._apply_gate(gate_up)`, with one row for each pair of a
token and an expert chosen for it, and feeds what it returns to the experts' down projections. So the argument holds the gate and up neurons
of the row's expert, and the value its down neurons. Which row is which pair follows from the routing that the experts module is given.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from safety_neurons.errors import UnsupportedModelError
from safety_neurons.model.layouts import Index, Layout, split_gate_up, take

FUSED, DOWN = "gate_up_proj", "down_proj"


@dataclass(frozen=True)
class ExpertRows:
    """Activations of one site of one expert (or of all experts of a layer) in one forward pass.

    Attributes:
        values: one row for each token routed to the expert. A view where possible; never write into it.
        token_index: the row's token, counted over the flattened batch (`row * tokens + position`).
        weight: the router weight with which the row's output is added to the token's stream.
        expert_index: the row's expert.
    """

    values: Float[Tensor, "row neuron"]
    token_index: Int[Tensor, " row"]
    weight: Float[Tensor, " row"]
    expert_index: Int[Tensor, " row"]

    def __len__(self) -> int:
        return self.values.shape[0]


@dataclass(frozen=True)
class Routing:
    """Which row of the gate step is which pair of token and expert, in one call of an experts module."""

    token_index: Int[Tensor, " row"]
    weight: Float[Tensor, " row"]
    expert_index: Int[Tensor, " row"]


@dataclass(frozen=True)
class ExpertsAnatomy:
    """The routed experts of one layer.

    Attributes:
        layer: number of the layer.
        module_name: path of the experts module in the model.
        module: the module whose `_apply_gate` separates the projections; it is called with (hidden, chosen experts, router weights).
        block: the mixture-of-experts block around it, whose output the importance of an expert neuron is measured on.
        n_experts: experts of the layer.
        width: neurons of each site of one expert.
        hidden: size of the residual stream.
        transposed: whether the parameters are `[expert, in, out]`.
        layout: how gate and up share one projection.
    """

    layer: int
    module_name: str
    module: nn.Module
    block: nn.Module
    n_experts: int
    width: int
    hidden: int
    transposed: bool
    layout: Layout

    @property
    def index(self) -> dict[str, Index]:
        """Columns of the gate step's argument that are the gate and the up neurons."""
        return split_gate_up(self.layout, self.width)

    @property
    def has_bias(self) -> bool:
        """Whether the projections have bias entries."""
        return getattr(self.module, f"{FUSED}_bias", None) is not None

    @property
    def implementation(self) -> str:
        """Name of the implementation of the experts interface in force ("eager" for the model's own loop)."""
        config = getattr(self.module, "config", None)
        return str(getattr(config, "_experts_implementation", None) or "eager")

    def key(self, expert: int, site: str) -> str:
        """Key of one site of one expert."""
        return f"layers.{self.layer}.experts.{expert}.{site}"

    def weight(self, expert: int, site: str) -> Float[Tensor, "out features"]:
        """Weights of one expert's site: `[n, hidden]` for gate and up, `[hidden, n]` for down (a view of the model's parameter)."""
        whole = _parameter(self, DOWN if site == "down" else FUSED)[expert]
        whole = whole.T if self.transposed else whole
        return whole if site == "down" else take(whole, self.index[site], 0)

    def bias(self, expert: int, site: str) -> Float[Tensor, " neuron"] | None:
        """Bias entries of the neurons of one expert's site; None where there are none, and for down."""
        if site == "down" or not self.has_bias:
            return None
        return take(getattr(self.module, f"{FUSED}_bias")[expert], self.index[site])

    def output_bias(self, expert: int) -> Float[Tensor, " hidden"] | None:
        """Bias of one expert's down projection, None where there is none."""
        return getattr(self.module, f"{DOWN}_bias")[expert] if self.has_bias else None

    def apply_gate(self, gate_up: Float[Tensor, "row fused"]) -> Float[Tensor, "row neuron"]:
        """The gate step itself: what the model makes of gate and up values, clamps and offsets included."""
        kind: Any = type(self.module)
        return kind._apply_gate(self.module, gate_up)

    def fuse(self, gate: Float[Tensor, "row neuron"], up: Float[Tensor, "row neuron"]) -> Float[Tensor, "row fused"]:
        """Gate and up values in the order in which the gate step takes them."""
        fused = gate.new_empty((*gate.shape[:-1], 2 * self.width))
        for site, values in (("gate", gate), ("up", up)):
            fused[..., self.index[site]] = values
        return fused

    def routing(self, chosen: Int[Tensor, "token choice"], weights: Float[Tensor, "token choice"]) -> Routing:
        """The pair that each row of the gate step is, as the implementation in force orders them.

        Raises:
            UnsupportedModelError: the implementation does not hold the gate step apart.
        """
        choices = chosen.shape[-1]
        experts, shares = chosen.reshape(-1), weights.reshape(-1)
        if self.implementation == "batched_mm":
            order = torch.arange(experts.numel(), device=experts.device)
        elif self.implementation == "grouped_mm":
            experts, order = torch.sort(experts)
            shares = shares[order]
        elif self.implementation == "eager":
            # The loop takes experts in turn and the rows of one expert by choice, then by token.
            by_choice = chosen.T.reshape(-1)
            experts, order = torch.sort(by_choice, stable=True)
            tokens = order % chosen.shape[0]
            return Routing(tokens, weights.T.reshape(-1)[order], experts)
        else:
            raise self.unsupported(f"experts implementation {self.implementation!r} hides the gate step")
        return Routing(order // choices, shares, experts)

    def unsupported(self, why: str) -> UnsupportedModelError:
        """The error that says which layer, why, and what to do."""
        return UnsupportedModelError(
            f"layers.{self.layer}.experts: {why}; expected 'grouped_mm' or 'batched_mm': "
            "call model.set_experts_implementation('grouped_mm')"
        )


def _parameter(experts: ExpertsAnatomy, name: str) -> Tensor:
    value = getattr(experts.module, name)
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim != 3 or value.element_size() < 2:
        raise UnsupportedModelError(
            f"layers.{experts.layer}.experts: {name} is quantised ({type(value).__name__}), three axes of floating numbers were expected; "
            "load the model dequantised"
        )
    return value


def is_experts(module: nn.Module) -> bool:
    """Whether a module keeps its experts as three-dimensional parameters behind the experts interface."""
    return getattr(getattr(module, DOWN, None), "ndim", 0) == 3 and callable(getattr(module, "_apply_gate", None))


def describe_experts(layer: int, name: str, module: nn.Module, block: nn.Module, layout: Layout | None = None) -> ExpertsAnatomy:
    """The anatomy of an experts module, from the shapes of its parameters and the facts the interface states.

    Raises:
        UnsupportedModelError: experts without a gate, or shared out over several devices.
    """
    facts: Any = module
    if not getattr(facts, "has_gate", True) or not hasattr(facts, FUSED):
        raise UnsupportedModelError(
            f"layers.{layer}.experts: experts without a gate ({type(module).__name__}) were found, a {FUSED} parameter was expected; "
            "use a model whose experts have one"
        )
    if getattr(facts, "has_post_expert_norm", False) or getattr(facts, "_is_expert_parallel", False):
        raise UnsupportedModelError(
            f"layers.{layer}.experts: {type(module).__name__} has a norm after each expert or is shared out over devices; "
            "plain experts on one device were expected"
        )
    transposed = bool(getattr(facts, "is_transposed", False))
    n_experts, *sizes = getattr(facts, DOWN).shape
    width, hidden = sizes if transposed else sizes[::-1]
    if layout is None:
        layout = Layout.CONTIGUOUS if getattr(facts, "is_concatenated", True) else Layout.ALTERNATING
    return ExpertsAnatomy(layer, name, module, block, int(n_experts), int(width), int(hidden), transposed, layout)
