import dataclasses
import json

from safety_neurons.model import LanguageModel, estimate
from safety_neurons.prompts import Prompts
from tiny import CHAT_TEMPLATE, tiny_llama, tiny_tokenizer

PROMPTS = Prompts.from_list(["kill a tree", "help", "tell me about the water"])


def test_an_estimate_adds_up_what_can_be_counted():
    model = tiny_llama()
    lm = LanguageModel(model, tiny_tokenizer(CHAT_TEMPLATE))
    plan = estimate([lm], PROMPTS, max_new_tokens=4, batch_size=1)
    assert plan.weights_bytes == sum(4 * parameter.numel() for parameter in model.parameters()) + sum(
        buffer.numel() * buffer.element_size() for buffer in model.buffers()
    )
    assert (plan.prompts, plan.batches, plan.new_tokens, plan.truncated) == (3, 3, 12, 0)
    assert plan.tokens == sum(len(item.ids) for item in lm.encode(PROMPTS)) + 12
    assert plan.cache_bytes == 4 * 2 * 2 * 16 * (max(len(item.ids) for item in lm.encode(PROMPTS)) + 4)
    assert plan.statistics_bytes == 8 * 3 * lm.table.n_neurons
    assert plan.seconds > 0
    assert plan.memory_bytes > plan.weights_bytes
    json.dumps(dataclasses.asdict(plan))


def test_views_of_one_model_count_their_weights_once_and_two_models_twice():
    model, tokenizer = tiny_llama(), tiny_tokenizer(CHAT_TEMPLATE)
    one = LanguageModel(model, tokenizer)
    single = estimate([one], PROMPTS)
    assert estimate([one, LanguageModel(model, tokenizer)], PROMPTS).weights_bytes == single.weights_bytes
    assert estimate([one, LanguageModel(tiny_llama(seed=1), tokenizer)], PROMPTS).weights_bytes == 2 * single.weights_bytes
    assert single.cache_bytes == single.new_tokens == 0


def test_an_estimate_reads_as_a_few_lines():
    lm = LanguageModel(tiny_llama(max_position_embeddings=8), tiny_tokenizer(CHAT_TEMPLATE))
    text = str(estimate([lm], Prompts.from_list(["kill " * 20])))
    assert "1 prompts" in text
    assert "1 prompts longer than the context" in text
    assert "memory about" in text
    assert "float32" in text
    assert "disk about" in text
