"""Importance of a sub-layer's neurons, and their importance against another model's parameters, for one prompt.

`o` and `down` activations are taken before an (IA)³ scale here, and the scale is put into the column: their product is the same, and a
change of scale is a change of parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from safety_neurons.detectors.importance_attention import AttentionScorer, OutputFactors
from safety_neurons.detectors.importance_mlp import MlpScorer
from safety_neurons.model.attention import AttentionPlan, AttentionStates
from safety_neurons.model.parts import AttentionAnatomy, MlpAnatomy


@dataclass(frozen=True)
class Columns:
    """Columns of one projection in the aligned model (`mine`) and their difference to the base model's (`change`).

    Neurons that are swapped together (the columns that one v row feeds; one column alone for `down`) form a group; what is kept is the
    table of inner products of each group's `[mine, change]` columns.
    """

    products: Float[Tensor, "unit pair pair"]
    norms: Float[Tensor, " neuron"]

    @staticmethod
    def of(mine: Float[Tensor, "out neuron"], theirs: Float[Tensor, "out neuron"], n_kv_heads: int = 0, group: int = 1) -> "Columns":
        """From both models' columns; for `o` with its key-value heads and the query heads of each."""
        change = mine - theirs.to(mine)
        both = torch.stack([mine, change])
        if n_kv_heads:
            both = both.unflatten(2, (n_kv_heads, group, -1)).permute(2, 4, 1, 0, 3).flatten(0, 1)
        else:
            both = both.permute(2, 1, 0)[..., None]
        flat = both.flatten(2)
        return Columns(flat.transpose(1, 2) @ flat, torch.linalg.vector_norm(mine, dim=0))

    def norms_of(self, moved: Float[Tensor, "token unit member"], stayed: Float[Tensor, "token unit member"]) -> Float[Tensor, " unit"]:
        """‖Σ over members of moved·mine + stayed·change‖ over tokens: what swapping activation and column together does."""
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
        """Against the other model's parameters, whose activations on the same input are given; a v row is swapped with its o columns."""
        states, scorer, found = self.states, self.scorer, {}
        if "q" in sites:
            found["q"] = _moved(scorer, "q", self._asking(states.q - q.to(states.q).unflatten(-1, states.q.shape[1:])))
        if "k" in sites:
            found["k"] = _moved(scorer, "k", states.k - k.to(states.k).unflatten(-1, states.k.shape[1:]))
        if "v" in sites or "o" in sites:
            theirs = v.to(states.v).unflatten(-1, states.v.shape[1:])
            unit = columns.norms_of(self._passed(states.v - theirs), self._passed(theirs))
            found["v"] = unit
            found["o"] = unit.unflatten(0, states.v.shape[1:])[:, None].expand(-1, states.group_size, -1).flatten()
        return {site: found[site] for site in sites}

    def _passed(self, values: Float[Tensor, "token group dim"]) -> Float[Tensor, "counted unit member"]:
        """What the heads of each group pass on of a value, at the counted positions."""
        probabilities = self.states.probabilities[:, self.counted].unflatten(0, (values.shape[1], -1))
        return torch.einsum("grmn,ngd->mgdr", probabilities, values).flatten(1, 2)


def _moved(scorer: AttentionScorer, site: str, delta: Float[Tensor, "token head dim"]) -> Float[Tensor, " neuron"]:
    """Scores of rows that put out `delta` less; exactly 0 where nothing moves, and not computed where nothing moves at all."""
    moves = delta.flatten(1).ne(0).any(0)
    return scorer.scores(site, delta).masked_fill(~moves, 0.0) if bool(moves.any()) else delta.new_zeros(moves.shape)


@dataclass(frozen=True)
class MlpPart:
    """One dense feed-forward part on one prompt, at the positions that count; `gate` is None without a gate."""

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
        return self.part.activation(self.up) if self.gate is None else self.part.activation(self.gate) * self.up

    def importance(self, norms: Float[Tensor, " neuron"]) -> dict[str, Float[Tensor, " neuron"]]:
        """Against zero; `norms` are the columns'."""
        scorer = MlpScorer(self.part.activation)
        found = {"down": scorer.down(self.hidden, norms), "up": scorer.up(self.up, self.gate, self.up, norms)}
        if self.gate is not None:
            found["gate"] = scorer.gate(self.up, self.gate, self.gate, norms)
        return found

    def swapped(self, other: "MlpPart", columns: Columns) -> dict[str, Float[Tensor, " neuron"]]:
        """Against the other model's parameters, on the same input: gate row, up row and down column of one index together."""
        mine, theirs = self.hidden, other.hidden
        unit = columns.norms_of((mine - theirs)[..., None], theirs[..., None])
        return dict.fromkeys(("up", "down") if self.gate is None else ("gate", "up", "down"), unit)


def attention_columns(part: AttentionAnatomy, mine: Tensor, theirs: Tensor) -> Columns:
    """Columns of an o projection, grouped by the v row that feeds them."""
    return Columns.of(mine, theirs, part.n_kv_heads, part.n_heads // part.n_kv_heads)
