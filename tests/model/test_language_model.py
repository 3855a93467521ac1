import copy

import pytest
import torch

from safety_neurons.errors import ModelError
from safety_neurons.model import LanguageModel, run_batches, token_losses
from safety_neurons.model.hooks import around
from safety_neurons.prompts import Prompt, Prompts
from tiny import CHAT_TEMPLATE, tiny_llama, tiny_tokenizer


def _everything(model, tokenizer):
    """All that a caller could find changed: weights, modes, hooks, attributes, configurations, the tokenizer."""
    modules = [
        (name, module.training, sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]
    weights = {name: (value.clone(), value.requires_grad, value.grad) for name, value in model.named_parameters()}
    settings = copy.deepcopy((model.config.to_dict(), model.generation_config.to_dict(), tokenizer.init_kwargs, tokenizer.chat_template))
    return modules, weights, settings, tokenizer.backend_tokenizer.to_str(), len(tokenizer)


def _same(before, after):
    assert before[0] == after[0]
    for name, (value, wanted, grad) in before[1].items():
        assert torch.equal(value, after[1][name][0]), name
        assert (wanted, grad) == after[1][name][1:]
    assert before[2:] == after[2:]


@pytest.mark.parametrize("training", [False, True])
def test_nothing_of_the_callers_is_left_changed_also_after_an_exception(training):
    model, tokenizer = tiny_llama().train(training), tiny_tokenizer(CHAT_TEMPLATE, pad=False)
    model.generation_config.update(do_sample=True, temperature=0.3)
    before = _everything(model, tokenizer)
    lm = LanguageModel(model, tokenizer)
    lm.complete(["help", "kill a tree"], max_new_tokens=3)
    lm.complete(["help"], max_new_tokens=3, sample=True)
    token_losses(lm, ["kill a tree"])
    _ = lm.table
    run_batches(lm, [[1, 5, 6]], len, last_layer=0)
    _same(before, _everything(model, tokenizer))

    def fail(*_):
        raise RuntimeError("in the middle")

    with around(before={model.model.layers[1]: fail}):
        for call in (lambda: lm.complete(["help"], max_new_tokens=3), lambda: run_batches(lm, [[1, 5]], len)):
            with pytest.raises(RuntimeError, match="in the middle"):
                call()
    _same(before, _everything(model, tokenizer))


def test_a_model_in_memory_is_described_by_its_parts():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    lm = LanguageModel(model, tokenizer, name="mine")
    assert lm.model is model
    assert lm.inner is model
    assert (lm.name, lm.dtype, lm.device, lm.max_length, lm.n_ids) == ("mine", torch.float32, torch.device("cpu"), 128, 96)
    assert (lm.pad_id, lm.bos_id, lm.eos_ids) == (0, 1, (2,))
    assert lm.folder is None
    assert "mine" in repr(lm)
    with lm.active():
        pass


def test_the_anatomy_is_found_and_proved_once():
    lm = LanguageModel(tiny_llama())
    assert lm.anatomy is lm.anatomy
    assert lm.table.n_neurons == 2 * (32 + 16 + 16 + 32 + 3 * 48)
    assert lm.fingerprint == LanguageModel(tiny_llama(seed=1)).fingerprint
    assert lm.fingerprint != LanguageModel(tiny_llama(intermediate_size=40)).fingerprint


def test_prompts_may_be_texts_records_or_lists():
    lm = LanguageModel(tiny_llama(), tiny_tokenizer())
    ids = lm.encode("kill")[0].ids
    for prompts in (["kill"], Prompt("a", "kill"), [Prompt("a", "kill")], Prompts.from_list(["kill"])):
        assert lm.encode(prompts)[0].ids == ids
    assert lm.encode(Prompt("a", "kill"))[0].prompt_id == "a"


def test_something_that_is_no_language_model_is_refused():
    with pytest.raises(ModelError, match="expected a causal language model"):
        LanguageModel(torch.nn.Linear(2, 2))
