"""Importance by its definition: zero a neuron's real parameters, run the sub-layer's stock modules again,
take the norm of the change.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch

from safety_neurons.model import LanguageModel
from safety_neurons.model.batches import collate, forward
from safety_neurons.model.hooks import around
from safety_neurons.neurons import parse_key


def _sub_layer(lm: LanguageModel, key: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The module to run again, and the one whose output is compared."""
    layer, parsed = lm.anatomy.layers[parse_key(key).layer], parse_key(key)
    if parsed.expert is not None or (parsed.shared and layer.experts is not None):
        return layer.experts.block, layer.experts.block
    if parsed.shared:
        return layer.shared.module, layer.shared.output_module
    part = layer.attention if parsed.site in "qkvo" else layer.mlp
    return part.module, part.places["o" if part is layer.attention else "down"].module


def _parameters(lm: LanguageModel, key: str) -> list[tuple[torch.Tensor, int, list[int]]]:
    """The tensors that hold the neurons of a site: tensor, axis, position of every neuron."""
    parsed = parse_key(key)
    if parsed.expert is not None:
        experts = lm.anatomy.layers[parsed.layer].experts
        down = parsed.site == "down"
        weight = getattr(experts.module, "down_proj" if down else "gate_up_proj")[parsed.expert]
        features = (
            list(range(experts.width))
            if down
            else torch.arange(2 * experts.width)[experts.index[parsed.site]].tolist()
        )
        found = [(weight, int(down) if not experts.transposed else int(not down), features)]
        if experts.has_bias and not down:
            found.append((experts.module.gate_up_proj_bias[parsed.expert], 0, features))
        return found
    place = lm.anatomy.places[key]
    base = place.projection.base
    features = torch.arange(place.features)
    features = (features if place.index is None else features[place.index]).tolist()
    rows = place.side == "output"
    found = [(base.weight, 0 if rows != place.transposed else 1, features)]
    if rows and base.bias is not None:
        found.append((base.bias, 0, features))
    return found


@torch.no_grad()
def brute_force(
    lm: LanguageModel, ids: list[int], keys: Iterable[str], stride: int = 1
) -> dict[str, torch.Tensor]:
    """Importance of every `stride`-th neuron of each key for one prompt."""
    keys = list(keys)
    calls: dict[Any, Any] = {}
    with ExitStack() as stack:
        for module in {_sub_layer(lm, key)[0] for key in keys}:
            stack.enter_context(
                around(
                    module, before=lambda args, kwargs, module=module: calls.update({module: (args, kwargs)})
                )
            )
        forward(lm.model, collate([ids], [0], pad_id=0))
    result = {}
    for key in keys:
        module, watched = _sub_layer(lm, key)
        seen: list[torch.Tensor] = []

        def keep(output: Any, seen: list[torch.Tensor] = seen) -> None:
            seen.append((output[0] if isinstance(output, tuple) else output).clone())

        def run(module: torch.nn.Module = module, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            args, kwargs = calls[module]
            module(*args, **kwargs)
            return seen.pop()

        parameters = _parameters(lm, key)
        with around(watched, after=keep):
            before = run()
            scores = []
            for number in range(0, len(parameters[0][2]), stride):
                rows = [tensor.select(axis, features[number]) for tensor, axis, features in parameters]
                kept = [row.clone() for row in rows]
                for row in rows:
                    row.zero_()
                scores.append(torch.linalg.vector_norm(run() - before))
                for row, value in zip(rows, kept, strict=True):
                    row.copy_(value)
        result[key] = torch.stack(scores)
    return result
