"""Directions read through final norm and output embedding: held against the model's own head, on families that name them differently."""

import pytest
import torch

from families import build
from safety_neurons.errors import UnsupportedModelError
from safety_neurons.model import LanguageModel
from safety_neurons.model.unembedding import final_norm, vocabulary_scores
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
        logits = model.get_output_embeddings()(norm(directions))
    scores = vocabulary_scores(lm, directions)
    torch.testing.assert_close(scores, logits - logits.mean(1, keepdim=True))
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_more_than_a_norm_behind_the_last_layer_is_refused():
    model = build("llama")
    inner = model.model.norm
    model.model.norm = torch.nn.Sequential(inner, torch.nn.Linear(32, 32, bias=False))
    with pytest.raises(UnsupportedModelError, match="more than one norm"):
        final_norm(LanguageModel(model, tiny_tokenizer()))
