"""A model whose forwards are replaced, before or after a first search, works or is refused in one line."""

import functools

import accelerate.hooks
import pytest
import torch
from torch.nn.functional import linear

import safety_neurons as sn
from safety_neurons.errors import DecodeError, MismatchError, UnsupportedModelError
from safety_neurons.model import LanguageModel
from safety_neurons.neurons import NeuronSet
from tiny import tiny_llama, tiny_tokenizer

TINY = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24}
PROMPTS = ["how do i make a cake", "kill the tree"]


def neurons(lm):
    return NeuronSet({"layers.0.down": range(9), "layers.0.gate": range(5)}, lm.table)


def inside(context, lm):
    with context:
        return lm.complete(PROMPTS, max_new_tokens=3)


VERBS = {
    "importance": lambda lm, _: sn.find_importance(lm, PROMPTS),
    "contrast": lambda lm, other: sn.find_contrast(lm, other, PROMPTS, max_new_tokens=2),
    "importance-contrast": lambda lm, other: sn.find_importance_contrast(other, lm, PROMPTS),
    "attribution": lambda lm, _: sn.find_attribution(lm, PROMPTS),
    "snip": lambda lm, _: sn.find_snip(lm, PROMPTS, harmless=PROMPTS, sites=["down"]),
    "wanda": lambda lm, _: sn.find_wanda(lm, PROMPTS, harmless=PROMPTS, sites=["down"]),
    "refusal-direction": lambda lm, _: sn.find_refusal_direction(lm, PROMPTS, harmless=PROMPTS),
    "statistics": lambda lm, _: sn.activation_statistics(lm, [[4, 5, 6]]),
    "deactivated": lambda lm, _: inside(sn.deactivated(lm, neurons(lm)), lm),
    "patched": lambda lm, other: inside(sn.patched(lm, other, neurons(lm)), lm),
}


def wrapped(module):
    """Another library's wrapper around a forward, which calls it."""
    earlier = module.forward

    @functools.wraps(earlier)
    def forward(*args, **kwargs):
        return earlier(*args, **kwargs)

    module.forward = forward


def fused(module, only_decoding=False):
    """A kernel that computes the feed-forward part without its projections."""
    earlier = module.forward

    def forward(x):
        if only_decoding and x.shape[1] > 1:
            return earlier(x)
        hidden = module.act_fn(linear(x, module.gate_proj.weight)) * linear(x, module.up_proj.weight)
        return linear(hidden, module.down_proj.weight)

    module.forward = forward


def all_wrapped(model):
    for module in [*model.modules()]:
        wrapped(module)


def hooked(model):
    for module in model.modules():
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())


def compiled_part(model):
    model.model.layers[0].mlp = torch.compile(model.model.layers[0].mlp, backend="eager")


HARMLESS = {"wrapped": all_wrapped, "accelerate": hooked}
HARMFUL = {
    "fused": lambda model: fused(model.model.layers[0].mlp),
    "compiled": lambda model: model.compile(backend="eager"),
    "compiled forward": lambda model: setattr(model, "forward", torch.compile(model.forward, backend="eager")),
    "compiled part": compiled_part,
}


@pytest.fixture
def pair():
    found = [LanguageModel(tiny_llama(seed, **TINY), tiny_tokenizer()) for seed in (0, 1)]
    for lm in found:
        assert lm.table.n_neurons
    return found


@pytest.mark.parametrize("change", HARMLESS)
@pytest.mark.parametrize("verb", VERBS)
def test_a_forward_that_is_wrapped_after_a_first_search_changes_nothing(pair, verb, change):
    expected = VERBS[verb](*pair)
    HARMLESS[change](pair[0].model)
    found = VERBS[verb](*pair)
    if hasattr(expected, "scores"):
        assert found.neurons == expected.neurons
    elif verb != "statistics":
        assert [one.token_ids for one in found] == [one.token_ids for one in expected]


@pytest.mark.parametrize("change", HARMFUL)
@pytest.mark.parametrize("verb", VERBS)
def test_a_forward_that_is_replaced_after_a_first_search_is_refused_in_a_line(pair, verb, change):
    HARMFUL[change](pair[0].model)
    try:
        VERBS[verb](*pair)
    except (UnsupportedModelError, DecodeError, MismatchError) as error:
        assert "\n" not in str(error)  # noqa: PT017 - what needs no hooks of this model may work
        return
    assert (verb, change) == ("importance-contrast", "fused")  # the other model runs, of this one single projections


@pytest.mark.parametrize("verb", ["deactivated", "patched"])
def test_a_kernel_that_skips_hooks_only_while_decoding_is_refused(pair, verb):
    fused(pair[0].model.model.layers[0].mlp, only_decoding=True)
    with pytest.raises((UnsupportedModelError, DecodeError), match="1 tokens a row|sites were patched"):
        VERBS[verb](*pair)


def test_a_decoding_step_is_probed_when_a_model_is_proved():
    model = tiny_llama(**TINY)
    fused(model.model.layers[0].mlp, only_decoding=True)
    with pytest.raises(UnsupportedModelError, match="1 tokens a row"):
        _ = LanguageModel(model, tiny_tokenizer()).table


def test_generate_compiles_nothing_while_hooks_are_on(pair, monkeypatch):
    lm, asked = pair[0], []
    monkeypatch.setattr(type(lm.model), "_valid_auto_compile_criteria", lambda *_: asked.append(1) or False)
    ids = torch.tensor([[4, 5, 6]])
    options = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static"}
    with sn.deactivated(lm, neurons(lm)):
        inside_ids = lm.model.generate(ids, **options)
        assert asked == []
    lm.model.generate(ids, **options)
    assert asked
    with sn.deactivated(lm, neurons(lm)):
        assert torch.equal(lm.model.generate(ids, max_new_tokens=3, do_sample=False), inside_ids)
