"""Exact importance of feed-forward neurons: the change of one hidden activation times the norm of its column of the down projection."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from safety_neurons.model.experts import ExpertRows, ExpertsAnatomy


@dataclass(frozen=True)
class MlpScorer:
    """Importance of one prompt's neurons in a dense feed-forward part.

    Attributes:
        activation: the part's activation function.
        scale: what the hidden activation is multiplied with before the down projection sees it ((IA)³); None for nothing.
        weight: what the part's output is multiplied with per token (gate of a shared expert); None for nothing.
    """

    activation: Callable[[Tensor], Tensor]
    scale: Float[Tensor, " neuron"] | None = None
    weight: Float[Tensor, "token one"] | None = None

    def down(self, hidden: Float[Tensor, "token neuron"], column_norms: Float[Tensor, " neuron"]) -> Float[Tensor, " neuron"]:
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
        return self._norms(self._scaled((self.activation(gate) - self.activation(gate - delta)) * up), column_norms)

    def _scaled(self, hidden: Tensor) -> Tensor:
        return hidden if self.scale is None else hidden * self.scale.to(hidden)

    def _norms(self, hidden: Tensor, column_norms: Tensor) -> Tensor:
        weighted = hidden if self.weight is None else hidden * self.weight.to(hidden)
        return torch.linalg.vector_norm(weighted, dim=0) * column_norms.to(weighted)


def expert_changes(
    experts: ExpertsAnatomy, gate: ExpertRows, up: ExpertRows, hidden: Float[Tensor, "row neuron"], sites: tuple[str, ...]
) -> dict[str, Float[Tensor, "row neuron"]]:
    """Change of the weighted hidden activation of every row by site, when the site's activation is zero.

    Gate and up pass through the model's own gate step, so that clamps and offsets count: the three sites differ where up is offset.
    """
    weight = gate.weight[:, None].to(hidden)
    changes = {}
    for site in sites:
        change = hidden
        if site != "down":
            left, right = (torch.zeros_like(part.values) if site == name else part.values for name, part in (("gate", gate), ("up", up)))
            change = hidden - experts.apply_gate(experts.fuse(left, right))
        changes[site] = change * weight
    return changes
