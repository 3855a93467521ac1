"""Prompts at the edges, in every detector: of a single token, and longer than the context."""

import pytest
from test_not_a_number import FINDERS, HARMLESS, marked_model

from safety_neurons.model import LanguageModel
from tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def pair():
    found = []
    for noise in (5, 6):
        lm = marked_model(0, noise)
        lm.model.config.max_position_embeddings = 40
        found.append(LanguageModel(lm.model, tiny_tokenizer(adds_bos=False), template="none"))
    return found


@pytest.mark.parametrize("name", FINDERS)
def test_a_prompt_of_a_single_token_is_scored(pair, name):
    assert [len(row.ids) for row in pair[0].encode(["water", "house"])] == [1, 1]
    found = FINDERS[name](*pair, ["water", "house"])
    assert found.prompts.used + found.prompts.failed == 2
    assert found.prompts.used >= 1


@pytest.mark.parametrize("name", FINDERS)
def test_a_prompt_longer_than_the_context_is_counted_truncated(pair, name):
    found = FINDERS[name](*pair, [*HARMLESS, "tell me about the red house " * 10])
    assert found.prompts.truncated == 1
    assert found.prompts.used + found.prompts.failed == 4
