"""What a direction of the residual stream says to the vocabulary: the model's final norm and output embedding."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from safety_neurons.errors import UnsupportedModelError
from safety_neurons.model.hooks import After, Before, around
from safety_neurons.model.language_model import LanguageModel
from safety_neurons.model.passes import decoder_of


def final_norm(lm: LanguageModel) -> nn.Module | None:
    """The module between the last layer and the output embedding; None where there is none.

    It is found by what it does, not by its name: in one pass its input is the last layer's output, and its output is what the decoder
    gives.

    Raises:
        UnsupportedModelError: something else stands between the two.
    """
    decoder = decoder_of(lm.model)
    last = lm.anatomy.layers[-1].module
    layers = {id(module) for layer in lm.anatomy.layers for module in layer.module.modules()}
    candidates = [module for module in decoder.modules() if id(module) not in layers and not list(module.children())]
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    entered: dict[nn.Module, Tensor] = {}
    streams: list[Tensor] = []

    def enter(module: nn.Module) -> Before:
        def note(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = next(iter([*args, *kwargs.values()]), None)
            if isinstance(given, Tensor):
                entered[module] = given

        return note

    def leave(module: nn.Module) -> After:
        def note(output: Any) -> None:
            if module in entered and isinstance(output, Tensor):
                seen[module] = (entered[module], output)

        return note

    before = {module: enter(module) for module in candidates}
    after: dict[nn.Module, After] = {module: leave(module) for module in candidates}
    after[last] = lambda output: streams.append(output[0] if isinstance(output, tuple) else output)
    with lm.running(), torch.no_grad(), around(before=before, after=after):
        ids = torch.arange(2, device=lm.device)[None] % lm.n_ids
        given = decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, return_dict=True).last_hidden_state
    if torch.equal(given, streams[-1]):
        return None
    for module, (fed, output) in seen.items():
        if fed.shape == given.shape and torch.equal(fed, streams[-1]) and torch.equal(output, given):
            return module
    raise UnsupportedModelError(
        f"between the last layer of this {type(lm.inner).__name__} and its output embedding stands more than one norm; "
        "expected a final norm alone: directions cannot be read through it"
    )


def vocabulary_scores(lm: LanguageModel, directions: Float[Tensor, "direction hidden"]) -> Float[Tensor, "direction vocab"]:
    """Logits of each direction behind the final norm, less what no direction at all gives and less their mean over the vocabulary.

    The first is what biases of the norm and of the embedding say by themselves, the second is what no probability feels. The norm brings
    every direction to one size: scores rank the tokens of a direction, and do not say which of two directions is the larger.

    Args:
        lm: the model.
        directions: in the residual stream, such as columns of `down`.

    Returns:
        float32; positive where the token becomes likelier as the direction is added; of the opposite direction, the opposite.

    Source: Chen et al., NeurIPS 2025, section 5.3 (unembedding of the final norm of a neuron's output direction).
    Differs: biases and the mean over the vocabulary are taken out; a cap on logits is left out, which keeps their order.
    """
    norm = final_norm(lm)
    head = lm.inner.get_output_embeddings()
    with lm.running(), torch.no_grad():
        hidden = directions.to(lm.device, lm.dtype)
        hidden = torch.cat([hidden, torch.zeros_like(hidden[:1])])
        logits = head(hidden if norm is None else norm(hidden)).float()
    added = logits[:-1] - logits[-1]
    return added - added.mean(-1, keepdim=True)
