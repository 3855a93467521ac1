"""Hooks come on, do what they say, and come off.

A model whose forwards are replaced, before or after a first search, works or is refused in one line.
"""

import functools

import accelerate.hooks
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import safety_neurons as sn
from families import build, random_ids
from safety_neurons.errors import DecodeError, MismatchError, UnsupportedModelError
from safety_neurons.model import LanguageModel
from safety_neurons.model.anatomy import resolve
from safety_neurons.model.batches import has_hooks
from safety_neurons.model.hooks import around, editing, reading, with_forwards
from safety_neurons.model.proof import prove
from safety_neurons.model.sites import Anatomy
from safety_neurons.neurons import NeuronSet
from tiny import tiny_llama, tiny_tokenizer


@pytest.fixture(autouse=True)
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.compile` compiles in these tests."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)


@pytest.fixture
def anatomy() -> Anatomy:
    return resolve(build("phi3"))


def hooks_on(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@torch.no_grad()
def run(anatomy: Anatomy, rows: int = 2) -> Tensor:
    return anatomy.model(input_ids=random_ids((rows, 5))).logits


def test_hooks_come_off_when_the_block_a_reader_or_an_editor_raises(anatomy: Anatomy) -> None:
    def fail(values: Tensor) -> Tensor:
        raise KeyError("in the middle")

    clean = run(anatomy)
    keys = list(anatomy.places)
    for context in (reading(anatomy, dict.fromkeys(keys, fail)), editing(anatomy, dict.fromkeys(keys, fail))):
        with pytest.raises(KeyError, match="in the middle"), context:
            run(anatomy)
        assert hooks_on(anatomy.model) == 0
    with pytest.raises(ZeroDivisionError), editing(anatomy, dict.fromkeys(keys, torch.zeros_like)):
        _ = 1 / 0
    assert hooks_on(anatomy.model) == 0
    assert torch.equal(run(anatomy), clean)


def test_hooks_come_off_when_putting_them_on_fails_half_way(anatomy: Anatomy) -> None:
    good = anatomy.layers[0].attention.places["o"].module
    with pytest.raises(AttributeError), around(before={good: print, "no module": print}):
        pass
    with (
        pytest.raises(UnsupportedModelError, match=r"layers\.9\.down was asked"),
        reading(anatomy, {"layers.0.o": print, "layers.9.down": print}),
    ):
        pass
    assert hooks_on(anatomy.model) == 0


def test_fused_sites_share_one_hook_and_each_edit_lands_in_its_own_features(anatomy: Anatomy) -> None:
    sites = [f"layers.0.{site}" for site in "qkv"]
    fused = anatomy.place("layers.0.q").module
    output: list[Tensor] = []
    with editing(
        anatomy,
        {key: (lambda values, number=number: values * 0 + number) for number, key in enumerate(sites)},
    ):
        assert len(fused._forward_hooks) == 1
        with around(fused, after=lambda values: output.append(values)):
            run(anatomy)
    assert output[0][0, 0].tolist() == [0.0] * 32 + [1.0] * 16 + [2.0] * 16


def test_reading_is_a_view_where_the_features_are_evenly_spaced(anatomy: Anatomy) -> None:
    output: list[Tensor] = []
    seen: list[Tensor] = []
    with (
        reading(anatomy, {"layers.0.k": seen.append}),
        around(anatomy.place("layers.0.k").module, after=lambda values: output.append(values)),
    ):
        run(anatomy)
    assert seen[0].untyped_storage().data_ptr() == output[0].untyped_storage().data_ptr()


def test_editing_leaves_the_tensors_of_the_model_alone(anatomy: Anatomy) -> None:
    before: list[Tensor] = []
    place = anatomy.place("layers.0.v")
    with (
        around(place.module, after=lambda values: before.extend((values, values.clone()))),
        editing(anatomy, {place.key: torch.zeros_like}),
    ):
        run(anatomy)
    assert torch.equal(before[0], before[1])


def test_edits_nest_in_the_order_of_their_contexts(anatomy: Anatomy) -> None:
    key = "layers.0.down"
    seen: list[Tensor] = []
    with (
        editing(anatomy, {key: torch.zeros_like}),
        editing(anatomy, {key: lambda values: values + 3}),
        reading(anatomy, {key: seen.append}),
    ):
        run(anatomy)
    assert torch.equal(seen[0], torch.full_like(seen[0], 3))


def test_gradients_flow_through_edits() -> None:
    anatomy = resolve(build("llama"))
    mask = torch.ones(48, requires_grad=True)
    with editing(anatomy, {"layers.0.down": lambda values: values * mask}):
        anatomy.model(input_ids=random_ids((1, 4))).logits.square().sum().backward()
    assert mask.grad is not None
    assert bool(mask.grad.abs().min() > 0)


def test_sites_are_read_at_every_step_of_a_generation_with_a_cache(anatomy: Anatomy) -> None:
    shapes: list[tuple[int, ...]] = []
    with reading(anatomy, {"layers.1.q": lambda values: shapes.append(tuple(values.shape))}) as firings:
        anatomy.model.generate(random_ids((2, 5)), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert shapes == [(2, 5, 32), (2, 1, 32), (2, 1, 32), (2, 1, 32)]
    assert firings.passes == firings.counts["layers.1.q"] == 4


def test_a_site_that_never_comes_by_is_an_error(anatomy: Anatomy) -> None:
    layer = anatomy.layers[1].mlp.module
    replaced = {layer: lambda hidden: hidden}
    with (
        pytest.raises(
            UnsupportedModelError, match=r"layers\.1\.down never came by in pass 1, 5 tokens a row"
        ),
        reading(anatomy, {"layers.1.down": print}),
        with_forwards(replaced),
    ):
        run(anatomy)
    with (
        pytest.raises(UnsupportedModelError, match=r"layers\.1\.up never came by"),
        editing(anatomy, {"layers.1.up": torch.zeros_like, "layers.0.up": torch.zeros_like}),
        with_forwards(replaced),
    ):
        run(anatomy)


def replaced_forward(module, function):
    module.forward = function
    return module


def replayed(model):
    """What a captured step does: the last output again, without running a module."""
    earlier, kept = model.forward, {}

    def forward(*args, **kwargs):
        ids = kwargs["input_ids"]
        if ids.shape[1] > 1 or "output" not in kept:
            kept["output"] = earlier(*args, **kwargs)
        return kept["output"]

    forward.__module__ = "torch.cuda.graphs"
    model.forward = forward


def unhooked_call(layers):
    """A parent that calls the forwards of its layers and not the layers."""
    for layer in layers:
        layer.__class__ = type(
            layer.__class__.__name__, (layer.__class__,), {"__call__": layer.__class__.forward}
        )


SWALLOWED = {
    "a layer by a kernel": (
        lambda model: replaced_forward(model.model.layers[1], lambda hidden_states, **_: hidden_states),
        r"layers\.1\.down never came by .*: model\.layers\.1 runs \S+<lambda> in the place of its forward",
    ),
    "a projection by its parent": (
        lambda model: fused(model.model.layers[1].mlp, only_decoding=True),
        r"layers\.1\.down never came by in pass 2, 1 tokens a row .*: model\.layers\.1\.mlp runs ",
    ),
    "a decoding step by a graph": (replayed, "never came by .*: the model replays a CUDA graph"),
    "a step of the decoder": (
        lambda model: replayed(model.model),
        "never came by .*: model replays a CUDA graph",
    ),
}


@pytest.mark.parametrize("case", SWALLOWED)
@pytest.mark.parametrize("act", [reading, editing])
def test_a_hook_that_is_swallowed_in_one_pass_of_many_is_refused_by_the_name_of_what_did_it(act, case):
    swallow, said = SWALLOWED[case]
    model = tiny_llama(hidden_size=16, intermediate_size=24)
    anatomy = resolve(model)
    swallow(model)
    function = (lambda _: None) if act is reading else torch.clone
    with (
        pytest.raises(UnsupportedModelError, match=said) as refused,
        act(anatomy, {"layers.1.down": function}),
    ):
        model.generate(torch.tensor([[4, 5, 6]]), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert "\n" not in str(refused.value)
    assert hooks_on(model) == 0


def test_layers_that_are_called_past_their_hooks_show_their_sites_and_are_refused_for_what_is_at_their_ends():
    model = tiny_llama(hidden_size=16, intermediate_size=24)
    anatomy, seen = resolve(model), []
    unhooked_call(model.model.layers[1:])
    ids = torch.tensor([[4, 5, 6]])
    with reading(anatomy, {"layers.1.down": seen.append}):
        model(input_ids=ids)
    assert len(seen) == 1
    ends = dict.fromkeys((layer.module for layer in anatomy.layers), seen.append)
    with (
        pytest.raises(UnsupportedModelError, match="1 of 2 modules ran without their hooks"),
        around(after=ends, each=True),
    ):
        model(input_ids=ids)


def test_a_projection_that_runs_twice_in_a_pass_is_refused():
    model = tiny_llama(hidden_size=16, intermediate_size=24)
    anatomy, mlp = resolve(model), model.model.layers[0].mlp
    replaced_forward(mlp, lambda x: (mlp.down_proj(mlp.up_proj(x)), mlp.down_proj(mlp.up_proj(x)))[1])
    with (
        pytest.raises(UnsupportedModelError, match=r"layers\.0\.down came by 2 times in pass 1, 3 tokens"),
        reading(anatomy, {"layers.0.down": print}),
    ):
        model(input_ids=torch.tensor([[4, 5, 6]]))


@pytest.mark.parametrize("part", ["layers.0", "layers.0.mlp", "layers.1.mlp.down_proj"])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_part_is_refused_by_its_name(part, in_place):
    model = tiny_llama(hidden_size=16, intermediate_size=24)
    anatomy = resolve(model)
    if in_place:
        model.model.get_submodule(part).compile(backend="eager")
    else:
        model.model.set_submodule(part, torch.compile(model.model.get_submodule(part), backend="eager"))
    with (
        pytest.raises(UnsupportedModelError, match=rf"compiled model arrived \(model\.{part}"),
        reading(anatomy, {"layers.0.down": print}),
    ):
        pass


def test_counting_hooks_do_not_make_a_pass_of_the_decoder_one_of_the_whole_model(anatomy):
    with reading(anatomy, {"layers.0.down": lambda _: None}):
        assert hooks_on(anatomy.model) > 0
        assert not has_hooks(anatomy.model)
    with around(anatomy.model, after=lambda _: None):
        assert has_hooks(anatomy.model)


def test_a_compiled_model_is_refused(anatomy: Anatomy) -> None:
    with pytest.raises(UnsupportedModelError, match="pass model._orig_mod"):
        resolve(torch.compile(anatomy.model, backend="eager"))
    anatomy.model.model._compiled_call_impl = lambda *args, **kwargs: None
    with (
        pytest.raises(UnsupportedModelError, match="compiled model arrived"),
        reading(anatomy, {"layers.0.q": print}),
    ):
        pass


def test_around_sees_the_keywords_of_an_attention_and_may_change_what_goes_in_and_out(
    anatomy: Anatomy,
) -> None:
    attention = anatomy.layers[0].attention.module
    names: list[str] = []

    def before(args, kwargs):
        names.extend(kwargs)
        return args, {**kwargs, "hidden_states": torch.zeros_like(kwargs["hidden_states"])}

    seen: list[Tensor] = []
    with around(attention, before=before), reading(anatomy, {"layers.0.q": seen.append}):
        run(anatomy)
    assert {"position_embeddings", "attention_mask"} <= set(names)
    assert not seen[0].any()
    with around(anatomy.model.lm_head, after=lambda logits: logits * 0):
        assert not run(anatomy).any()


def test_a_stand_in_for_a_forward_goes_away_again(anatomy: Anatomy) -> None:
    clean = run(anatomy)
    module = anatomy.layers[0].mlp.module
    with with_forwards({module: lambda hidden: hidden * 0}):
        assert not torch.equal(run(anatomy), clean)
        with with_forwards({module: lambda hidden: hidden}):
            pass
        assert "forward" in module.__dict__
    assert "forward" not in module.__dict__
    assert torch.equal(run(anatomy), clean)


def test_experts_hooks_nest_and_come_off() -> None:
    anatomy = prove(resolve(build("mixtral")))
    clean = run(anatomy)
    rows = []
    key = "layers.0.experts.*.down"
    with editing(anatomy, {key: lambda rows: rows.values * 0}), reading(anatomy, {key: rows.append}):
        assert not torch.equal(run(anatomy), clean)
    assert not rows[0].values.any()
    assert not any("_apply_gate" in module.__dict__ for module in anatomy.model.modules())
    assert hooks_on(anatomy.model) == 0
    assert torch.equal(run(anatomy), clean)


def test_experts_whose_gate_step_is_bypassed_are_an_error() -> None:
    anatomy = prove(resolve(build("mixtral")))
    anatomy.model.set_experts_implementation("eager")
    with (
        pytest.raises(UnsupportedModelError, match=r"layers\.0\.experts\.1\.down never came by"),
        reading(anatomy, {"layers.0.experts.1.down": print}),
    ):
        run(anatomy)


def test_an_empty_set_of_readers_puts_nothing_on(anatomy: Anatomy) -> None:
    with reading(anatomy, {}), editing(anatomy, {}):
        assert hooks_on(anatomy.model) == 0


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
    "compiled forward": lambda model: setattr(
        model, "forward", torch.compile(model.forward, backend="eager")
    ),
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
        # What comes before the refusal runs as it is written: to compile it takes seconds.
        with torch.compiler.set_stance("force_eager"):
            VERBS[verb](*pair)
    except (UnsupportedModelError, DecodeError, MismatchError) as error:
        assert "\n" not in str(error)  # noqa: PT017 - what needs no hooks of this model may work
        return
    assert (verb, change) == (
        "importance-contrast",
        "fused",
    )  # the other model runs, of this one single projections


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
