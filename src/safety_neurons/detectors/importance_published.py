"""What the public code of paper 1 computes, kept so that its results can be reproduced; nothing else in the package uses it."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from safety_neurons.detectors.importance_softmax import chunk_size
from safety_neurons.model.attention import AttentionPlan, AttentionStates

PUBLISHED_SITES = ("q", "k", "v", "o", "up", "down")
"""The public code has no score for gate."""


def published_mlp(states: Mapping[str, Float[Tensor, "token neuron"]]) -> dict[str, Float[Tensor, " neuron"]]:
    """One list for up and down: Σ over tokens of |output of the up projection|.

    Source: public code of paper 1, detection model files.
    Differs: not at all, on purpose; gate, activation function and the norm of the down column play no part there.
    """
    scores = states["up"].abs().sum(0)
    return {"up": scores, "down": scores}


def published_attention(plan: AttentionPlan, states: AttentionStates, budget: int) -> dict[str, Float[Tensor, " neuron"]]:
    """One list for q and k and one for v and o, both over the entries of the query heads.

    q: Σ of the squared difference of two softmaxes, of the logits and of the logits less the product of entry d of the rotated query and
    of the rotated key, which the public code leaves unscaled. v, o: Σ over tokens of |what the o projection reads|. Its use for k and v
    maps entry i of the query heads to row i // n; a row here scores the largest of the entries mapped to it.

    Source: public code of paper 1, detection model files.
    Differs: the causal mask is applied (two of its model files lose it), and the change is taken off before a soft-cap would be missed:
    it acts on the final logits, as there.
    """
    query = torch.stack([_heads_scores(plan, states, head, budget) for head in range(plan.n_heads)]).flatten()
    mixed = states.mixed.flatten(1).abs().sum(0)
    size = states.group_size
    rows = {name: values.unflatten(0, (-1, size)).amax(1) for name, values in (("k", query), ("v", mixed))}
    return {"q": query, "o": mixed, **rows}


def _heads_scores(plan: AttentionPlan, states: AttentionStates, head: int, budget: int) -> Tensor:
    before = states.log_probabilities[head]
    left = (states.query[:, head] / plan.scale).T[:, :, None]
    right = states.key[:, head // states.group_size].T[:, None, :]
    step = chunk_size(3 * before.numel() * before.element_size(), budget, before.device)
    parts = []
    for start in range(0, len(left), step):
        chunk = slice(start, start + step)
        after = torch.softmax(before - left[chunk] * right[chunk], -1)
        parts.append((after - before.exp()).square().sum((1, 2)))
    return torch.cat(parts)
