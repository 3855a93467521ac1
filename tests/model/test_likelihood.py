import contextlib

import numpy as np
import pytest
import torch

from safety_neurons.errors import InputError
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
        expected = [float(_reference(lm.model, sequence)[place, token]) for place, token in enumerate(sequence[1:])]
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
    expected = torch.nn.functional.cross_entropy(_reference(lm.model, ids)[:-1], torch.tensor(ids[1:]), reduction="sum")
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
    assert kl_divergence(lm, SEQUENCES, lambda: around(after=scale)) == pytest.approx(np.concatenate(values).mean())
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
