"""Perplexity and divergence against a recomputation with nothing but the model."""

import contextlib
import math

import pytest
import torch

from safety_neurons.capability import divergence, perplexity
from safety_neurons.capability.measures import measure_divergence, measure_perplexity
from safety_neurons.interventions import deactivated
from safety_neurons.model import LanguageModel
from safety_neurons.neurons import NeuronSet
from safety_neurons.prompt_lists import Prompt, Prompts
from tiny import CHAT_TEMPLATE, tiny_llama, tiny_tokenizer

TEXTS = ["the cake is red and the house is small .", "the tree is green .", "grow"]


@pytest.fixture(scope="module")
def model():
    return LanguageModel(tiny_llama(), tiny_tokenizer(CHAT_TEMPLATE))


@pytest.fixture(scope="module")
def neurons(model):
    return NeuronSet({"layers.0.down": list(range(20)), "layers.1.v": [0, 3]}, model.table)


@torch.no_grad()
def logits(model, ids):
    return model.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


@pytest.mark.parametrize("treated", [False, True])
def test_perplexity_is_the_exponential_of_the_mean_loss_per_token(treated, model, neurons):
    def treatment():
        return deactivated(model, neurons) if treated else contextlib.nullcontext()

    losses = []
    with treatment():
        for text in TEXTS:
            ids = model.tokenizer(text)["input_ids"]
            scores = logits(model, ids)
            losses += [-float(scores[place, token]) for place, token in enumerate(ids[1:])]
    expected = math.exp(sum(losses) / len(losses))
    for size in (1, 3, "auto"):
        assert perplexity(model, Prompts.from_list(TEXTS), treatment, batch_size=size) == pytest.approx(
            expected, rel=1e-5
        )


def test_divergence_is_the_mean_kl_from_untreated_to_treated_per_prompt_token(model, neurons):
    prompts = Prompts.from_list(TEXTS)
    total, count = 0.0, 0
    for encoded in model.encode(prompts):
        plain = logits(model, encoded.ids)
        with deactivated(model, neurons):
            treated = logits(model, encoded.ids)
        total += float((plain.exp() * (plain - treated)).sum())
        count += len(encoded.ids)
    for size in (1, 3):
        found = divergence(model, prompts, lambda: deactivated(model, neurons), batch_size=size)
        assert found == pytest.approx(total / count, rel=1e-4)
    assert found > 0


def test_nothing_done_diverges_by_nothing(model):
    assert divergence(model, Prompts.from_list(TEXTS), contextlib.nullcontext) == pytest.approx(0, abs=1e-9)


def test_text_without_a_token_to_predict_has_no_perplexity():
    model = LanguageModel(tiny_llama(), tiny_tokenizer(CHAT_TEMPLATE, adds_bos=False))
    assert perplexity(model, Prompts.from_list(["cake"])) is None


def test_texts_of_one_group_are_one_in_the_intervals_of_a_measurement(model):
    alike = [*TEXTS, *(f"{text} ." for text in TEXTS)]
    texts = [Prompt(str(place), text, group=f"{place % 3}") for place, text in enumerate(alike)]
    alone = Prompts.from_list([prompt.text for prompt in texts])
    grouped, single = measure_perplexity(model, Prompts(texts)), measure_perplexity(model, alone)
    assert grouped.rate.value == pytest.approx(single.rate.value)
    assert grouped.rate.high > single.rate.high  # six texts, of which three are nearly the others
    for found in (grouped, measure_divergence(model, Prompts(texts), contextlib.nullcontext)):
        assert found.groups == tuple(prompt.group for prompt in texts)
