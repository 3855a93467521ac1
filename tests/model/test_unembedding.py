"""Directions read through final norm and output embedding: held against the model's own head, on families that name them differently."""

import pytest
import torch

from families import build
from safety_neurons.errors import UnsupportedModelError
from safety_neurons.model import LanguageModel
from safety_neurons.model.likelihood import final_norm, vocabulary_scores
from tiny import tiny_tokenizer

NORMS = {"llama": "model.norm", "gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm", "falcon": "transformer.ln_f"}
NORMS |= {"opt": "model.decoder.final_layer_norm", "olmo2": "model.norm", "mixtral": "model.norm"}


@pytest.mark.parametrize("family", NORMS)
def test_the_final_norm_is_found_by_what_it_does(family):
    model = build(family).float().eval()
    lm = LanguageModel(model, tiny_tokenizer())
    norm = final_norm(lm)
    assert norm is model.get_submodule(NORMS[family])
    directions = torch.randn(3, lm.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        head = model.get_output_embeddings()
        logits = head(norm(directions)) - head(norm(torch.zeros_like(directions)))
    scores = vocabulary_scores(lm, directions)
    torch.testing.assert_close(scores, logits - logits.mean(1, keepdim=True))
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["gpt2", "phi"])
def test_biases_of_norm_and_head_are_no_words_of_a_direction(family):
    model = build(family).float().eval()
    generator = torch.Generator().manual_seed(0)
    lm = LanguageModel(model, tiny_tokenizer())
    directions = torch.randn(3, lm.config.hidden_size, generator=generator)
    norm, head = final_norm(lm), model.get_output_embeddings()
    for module in (norm, head):
        if module.bias is not None:
            with torch.no_grad():
                module.bias.zero_()
    bare = vocabulary_scores(lm, directions)
    for module in (norm, head):
        if module.bias is not None:
            with torch.no_grad():
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator) * 5)
    scores = vocabulary_scores(lm, directions)
    torch.testing.assert_close(scores, bare, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(vocabulary_scores(lm, -directions), -scores, atol=1e-4, rtol=1e-4)


def test_more_than_a_norm_behind_the_last_layer_is_refused():
    model = build("llama")
    inner = model.model.norm
    model.model.norm = torch.nn.Sequential(inner, torch.nn.Linear(32, 32, bias=False))
    with pytest.raises(UnsupportedModelError, match="more than one norm"):
        final_norm(LanguageModel(model, tiny_tokenizer()))
