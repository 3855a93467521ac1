"""Likelihoods against a naive softmax, and directions read through final norm and output embedding against
the model's own head.
"""

import contextlib

import numpy as np
import pytest
import torch

from families import build
from safety_neurons.errors import InputError, UnsupportedModelError
from safety_neurons.model import (
    LanguageModel,
    batches,
    forward,
    kl_divergence,
    log_probabilities_of_next,
    token_divergences,
    token_log_probabilities,
    token_losses,
)
from safety_neurons.model.hooks import around
from safety_neurons.model.likelihood import final_norm, vocabulary_scores
from tiny import CHAT_TEMPLATE, tiny_llama, tiny_tokenizer

SEQUENCES = [[1, 5, 6, 7, 9], [1, 9], [1, 20, 21], [30]]


@pytest.fixture(scope="module")
def lm():
    return LanguageModel(tiny_llama().double(), tiny_tokenizer(CHAT_TEMPLATE))


def _reference(model, sequence):
    with torch.no_grad():
        return model(torch.tensor([sequence])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("batch_size", [1, 2, "auto"])
def test_log_probabilities_are_those_of_the_given_tokens(lm, batch_size):
    values = token_log_probabilities(lm, SEQUENCES, batch_size=batch_size)
    for sequence, row in zip(SEQUENCES, values, strict=True):
        expected = [
            float(_reference(lm.model, sequence)[place, token]) for place, token in enumerate(sequence[1:])
        ]
        np.testing.assert_allclose(row, expected, rtol=1e-12)


def test_spans_choose_tokens_and_are_checked(lm):
    every = token_log_probabilities(lm, SEQUENCES)
    some = token_log_probabilities(lm, SEQUENCES, [(3, 5), (1, 2), (1, 1), (1, 1)])
    np.testing.assert_array_equal(some[0], every[0][2:4])
    assert [len(row) for row in some] == [2, 1, 0, 0]
    with pytest.raises(InputError, match="span 0:2 of sequence 0"):
        token_log_probabilities(lm, SEQUENCES[:1], [(0, 2)])
    with pytest.raises(InputError, match="span 1:9"):
        token_log_probabilities(lm, SEQUENCES[:1], [(1, 9)])
    with pytest.raises(InputError, match="1 spans for 4"):
        token_log_probabilities(lm, SEQUENCES, [(1, 2)])


def test_losses_of_texts_give_the_perplexity(lm):
    losses = token_losses(lm, ["kill a tree", "help"])
    ids = lm.encode_texts(["kill a tree"])[0]
    expected = torch.nn.functional.cross_entropy(
        _reference(lm.model, ids)[:-1], torch.tensor(ids[1:]), reduction="sum"
    )
    assert losses.totals[0] == pytest.approx(float(expected), rel=1e-10)
    assert losses.counts == (3, 1)
    assert losses.n_tokens == 4
    assert losses.total == pytest.approx(sum(losses.totals))
    assert token_losses(lm, SEQUENCES).counts == (4, 1, 2, 0)
    assert token_losses(lm, ["help"]).counts == (1,)


def test_the_divergence_is_that_of_the_treated_distribution_and_zero_for_none(lm):
    scale = {lm.model.model.layers[0].mlp: lambda output: output * 0.5}
    with around(after=scale):
        treated = [_reference(lm.model, sequence) for sequence in SEQUENCES]
    values = token_divergences(lm, SEQUENCES, lambda: around(after=scale), batch_size=3)
    for sequence, row, after in zip(SEQUENCES, values, treated, strict=True):
        before = _reference(lm.model, sequence)
        np.testing.assert_allclose(row, (before.exp() * (before - after)).sum(-1), rtol=1e-9, atol=1e-12)
    assert kl_divergence(lm, SEQUENCES, contextlib.nullcontext) == pytest.approx(0, abs=1e-12)
    assert kl_divergence(lm, SEQUENCES, lambda: around(after=scale)) == pytest.approx(
        np.concatenate(values).mean()
    )
    assert kl_divergence(lm, [], contextlib.nullcontext) is None


def test_the_divergence_from_another_model_is_measured_too(lm):
    other = LanguageModel(tiny_llama(seed=1).double())
    row = token_divergences(lm, SEQUENCES[:1], other)[0]
    before, after = _reference(lm.model, SEQUENCES[0]), _reference(other.model, SEQUENCES[0])
    np.testing.assert_allclose(row, (before.exp() * (before - after)).sum(-1), rtol=1e-9)
    assert (row > 0).all()


def test_log_probabilities_carry_gradients_where_they_are_enabled(lm):
    (batch,) = batches(SEQUENCES, batch_size=4)
    logits = forward(lm.model, batch, with_logits=True)
    values, rows = log_probabilities_of_next(logits, batch)
    assert len(values) == len(rows) == 7
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert (gradient.flatten(0, 1)[rows].abs().sum(1) > 0).all()
    others = torch.ones(gradient.flatten(0, 1).shape[0], dtype=torch.bool)
    others[rows] = False
    assert (gradient.flatten(0, 1)[others] == 0).all()


NORMS = {
    "llama": "model.norm",
    "gpt2": "transformer.ln_f",
    "gpt_neox": "gpt_neox.final_layer_norm",
    "falcon": "transformer.ln_f",
}


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


def test_texts_that_are_cut_at_the_context_are_counted():
    lm, notes = LanguageModel(tiny_llama(max_position_embeddings=8), tiny_tokenizer()), []
    losses = token_losses(lm, ["kill a tree", "the house " * 9, "the water " * 4], notes=notes)
    assert losses.counts == (3, 7, 7)
    assert notes == ["2 of 3 texts are longer than 8 tokens: their end was left out"]
