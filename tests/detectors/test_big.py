"""Vocabularies of 262k, prompts of 32k tokens, 128 experts, several shards: nothing grows that need not."""

import pathlib
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from families import build
from safety_neurons.detectors import find_contrast, find_importance
from safety_neurons.errors import UsageError
from safety_neurons.guard.features import read_features
from safety_neurons.interventions import deactivated
from safety_neurons.model import LanguageModel, as_prompts, load
from safety_neurons.neurons import NeuronSet
from tiny import CHAT_TEMPLATE, WORDS, tiny_llama, tiny_llama_folder, tiny_tokenizer

VOCABULARY = 262_144
TOKENS = 32_768


class Largest(TorchDispatchMode):
    """The most bytes that one tensor made in the block holds; views count as what they show."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0
        self.made = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, torch.Tensor) and one.untyped_storage().nbytes() > self.size:
                self.size, self.made = one.untyped_storage().nbytes(), str(func)
        return result


def words(count: int) -> str:
    return " ".join(WORDS[number % len(WORDS)] for number in range(count))


def test_a_vocabulary_of_262k_costs_no_logits_of_whole_prompts() -> None:
    model = LanguageModel(tiny_llama(vocab_size=VOCABULARY, hidden_size=8), tiny_tokenizer())
    weights, logits = 4 * 8 * VOCABULARY, 4 * 100 * VOCABULARY
    with Largest() as largest:
        found = find_importance(model, [words(100), words(99)], count=4)
        find_contrast(model, model, [words(100)], positions="prompt", count=4)
        read_features(model, as_prompts([words(100)]), found.neurons)
    assert weights <= largest.size < 3 * weights < logits, largest.made


def test_prompts_of_32k_tokens_give_no_matrix_of_all_pairs_of_tokens() -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "max_position_embeddings": TOKENS,
    }
    model = LanguageModel(tiny_llama(**sizes), tiny_tokenizer())
    text = [words(TOKENS - 3)]
    assert model.anatomy.table.n_neurons
    with Largest() as largest:
        found = find_importance(model, text, sites="o,gate,up,down", count=4)
        find_contrast(model, model, text, positions="prompt", count=4)
        read_features(model, as_prompts(text), found.neurons)
    assert largest.size <= 4 * 16 * TOKENS * 8, largest.made  # a few numbers a token; a bool a pair were 1 GB


def test_exact_importance_of_q_and_k_says_what_pairs_of_tokens_would_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("safety_neurons.detectors.importance.memory_of", lambda _: 10**6)
    model = LanguageModel(tiny_llama(), tiny_tokenizer())
    assert len(find_importance(model, [words(60)], sites="o,gate,up,down", count=4).neurons) == 4
    assert len(find_importance(model, [words(20)], count=4).neurons) == 4
    with pytest.raises(
        UsageError, match=r"prompt of 123 tokens: .* expected .*sites o,gate,up,down"
    ) as error:
        find_importance(model, [words(120)], count=4)
    assert "\n" not in str(error.value)


def test_128_experts_are_searched_and_switched_off() -> None:
    model = LanguageModel(build("qwen3_moe", num_experts=128, num_experts_per_tok=8), tiny_tokenizer())
    found = find_importance(model, [words(9), words(12)], count=40)
    assert len({key for key in found.scores.keys() if ".experts." in key}) == 128 * 3  # noqa: SIM118
    assert len(found.neurons) == 40
    chosen = NeuronSet({f"layers.1.experts.{number}.down": [0, 3] for number in range(128)}, model.table)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        before = model.model(ids).logits
        with deactivated(model, chosen):
            assert not torch.equal(model.model(ids).logits, before)
        assert torch.equal(model.model(ids).logits, before)


def test_tied_weights_in_several_shards_are_read_as_one_file_is(tmp_path: pathlib.Path) -> None:
    whole = tiny_llama_folder(tmp_path / "whole", tie_word_embeddings=True)
    sharded = tmp_path / "sharded"
    tiny_llama(tie_word_embeddings=True).save_pretrained(sharded, max_shard_size="20KB")
    tiny_tokenizer(CHAT_TEMPLATE).save_pretrained(sharded)
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    assert (sharded / "model.safetensors.index.json").is_file()
    one, several = load(whole), load(sharded)
    assert several.inner.get_output_embeddings().weight is several.inner.get_input_embeddings().weight
    ours, theirs = (find_importance(model, [words(9)], count=9) for model in (one, several))
    assert all((ours.neurons[key] == members).all() for key, members in theirs.neurons.items())
    assert len(ours.neurons) == len(theirs.neurons) == 9
