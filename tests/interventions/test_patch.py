import copy

import pytest
import torch
from naive import (
    alone,
    full,
    generated,
    greedy,
    lm,
    no_hooks,
    patched_logits,
    positions,
    shared_pair,
    some,
)

from families import build, random_ids, sibling
from safety_neurons.errors import (
    DecodeError,
    ForeignModelError,
    MismatchError,
    NeuronError,
    UnsupportedModelError,
    UsageError,
)
from safety_neurons.interventions import patched
from safety_neurons.interventions.patch import can_stack
from safety_neurons.interventions.targets import Subject
from safety_neurons.model import LanguageModel, token_losses
from safety_neurons.model.decoding import Decoding, cut
from safety_neurons.model.hooks import around
from safety_neurons.model.language_model import generate
from safety_neurons.neurons import NeuronSet
from tiny import tiny_llama, tiny_tokenizer

FAMILIES = ["llama", "gpt2", "gpt_neox", "phi3", "qwen3", "gemma2", "bloom", "opt", "falcon", "mistral"]
STEPS = 6


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of 7, 4 and 2 tokens, padded on the left."""
    ids, mask = random_ids((3, 7)), torch.ones(3, 7, dtype=torch.long)
    mask[1, :3], mask[2, :5] = 0, 0
    return ids.masked_fill(mask == 0, 0), mask


def pair_of(family: str) -> tuple[LanguageModel, LanguageModel]:
    base = build(family)
    return lm(base), lm(sibling(base))


def assert_same(output: object, expected: tuple[torch.Tensor, torch.Tensor], tolerance: float = 2e-5) -> None:
    ids, scores = expected
    assert torch.equal(output.sequences, ids)
    assert (torch.stack(output.logits) - scores).abs().max() <= tolerance * scores.abs().max().clamp(min=1)


def assert_alike(output: object, expected: object) -> None:
    """The same tokens of two generations, and logits within what summation order may change."""
    assert torch.equal(output.sequences, expected.sequences)
    assert (torch.stack(output.logits) - torch.stack(expected.logits)).abs().max() <= 2e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_two_models_generate_what_rerunning_both_on_the_whole_text_gives(
    family: str, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    base, donor = pair_of(family)
    neurons = some(base)
    expected = greedy(lambda ids, mask: patched_logits(base, donor, neurons, ids, mask), *batch, STEPS)
    with patched(base, donor, neurons):
        assert_same(generated(base, *batch, STEPS), expected)
    plain = greedy(lambda ids, mask: full(base, ids, mask), *batch, STEPS)
    assert (plain[1] - expected[1]).abs().max() > 1e-2  # the patch does something


@pytest.mark.parametrize("kind", ["ia3", "ia3-down", "lora"])
def test_two_views_of_one_model_generate_what_two_models_do(
    kind: str, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    base, donor = shared_pair(kind)
    neurons = some(base)
    apart = alone(base), alone(donor)
    expected = greedy(lambda ids, mask: patched_logits(*apart, neurons, ids, mask), *batch, STEPS)
    assert can_stack(Subject.of(base), Subject.of(donor))
    with patched(base, donor, neurons):
        assert_same(generated(base, *batch, STEPS), expected)
    with patched(*apart, neurons):
        assert_same(generated(apart[0], *batch, STEPS), expected)


@pytest.mark.parametrize("kind", ["ia3", "lora"])
def test_adapters_that_cannot_be_stacked_are_switched_between_two_passes(
    kind: str, batch: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, donor = shared_pair(kind)
    neurons = some(base)
    with patched(base, donor, neurons):
        stacked = generated(base, *batch, STEPS)
    monkeypatch.setattr("safety_neurons.interventions.patch.can_stack", lambda *_: False)
    with patched(base, donor, neurons):
        switched = generated(base, *batch, STEPS)
    assert_alike(stacked, switched)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_plain_pass_and_one_without_cache_are_patched_too(
    family: str, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    base, donor = pair_of(family)
    neurons = some(base)
    expected = patched_logits(base, donor, neurons, *batch)
    with patched(base, donor, neurons), torch.no_grad():
        ids, mask = batch
        cached = base.model(input_ids=ids, attention_mask=mask, position_ids=positions(mask))
        assert (cached.logits - expected).abs().max() <= 2e-5
        assert (full(base, ids, mask) - expected).abs().max() <= 2e-5
        more, held = random_ids((3, 1), seed=5), cached.past_key_values
        longer = torch.cat([mask, mask.new_ones(3, 1)], -1)
        step = base.model(
            input_ids=more,
            attention_mask=longer,
            position_ids=positions(longer)[:, -1:],
            past_key_values=held,
        )
    whole = patched_logits(base, donor, neurons, torch.cat([ids, more], -1), longer)
    assert (step.logits[:, -1] - whole[:, -1]).abs().max() <= 2e-5


@pytest.mark.parametrize("kind", ["ia3", "lora"])
def test_a_pass_of_a_shared_pair_gives_the_patched_half_alone(
    kind: str, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    base, donor = shared_pair(kind)
    neurons = some(base)
    expected = patched_logits(alone(base), alone(donor), neurons, *batch)
    with patched(base, donor, neurons), torch.no_grad():
        output = base.model(
            input_ids=batch[0],
            attention_mask=batch[1],
            position_ids=positions(batch[1]),
            output_hidden_states=True,
            labels=batch[0],
        )
    assert output.logits.shape == expected.shape
    assert {tuple(hidden.shape) for hidden in output.hidden_states} == {(3, 7, 32)}
    assert (output.logits - expected).abs().max() <= 2e-5
    assert output.loss.isfinite()


def test_the_donor_is_never_influenced_by_the_patch(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    base, donor = shared_pair("lora")
    seen: list[torch.Tensor] = []
    body = Subject.of(base).body
    last = body.norm.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    with patched(base, donor, some(base, 1.0, sites=("gate", "v", "o"))):
        full(base, *batch)
    last.remove()
    apart = alone(donor)
    kept: list[torch.Tensor] = []
    handle = Subject.of(apart).body.norm.register_forward_hook(
        lambda module, args, output: kept.append(output)
    )
    full(apart, *batch)
    handle.remove()
    real = batch[1].bool()
    assert (seen[-1][3:][real] - kept[-1][real]).abs().max() <= 1e-4
    assert (seen[-1][:3][real] - kept[-1][real]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["ia3", "lora"])
def test_no_neuron_is_the_base_bit_for_bit(kind: str, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    base, donor = shared_pair(kind)
    expected = generated(alone(base), *batch, STEPS)
    with patched(base, donor, {}):
        output = generated(base, *batch, STEPS)
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(torch.stack(output.logits), torch.stack(expected.logits))


def test_all_neurons_of_a_pair_by_activation_scales_is_the_aligned_model(
    batch: tuple[torch.Tensor, torch.Tensor],
) -> None:
    base, donor = shared_pair("ia3-down")
    expected = generated(alone(donor), *batch, STEPS)
    with patched(base, donor, some(base, 1.0, sites=("down",))):
        output = generated(base, *batch, STEPS)
    assert_alike(output, expected)


@pytest.mark.parametrize("share", [0.05, 1.0])
@pytest.mark.parametrize("family", ["llama", "phi3", "bloom"])
def test_a_model_patched_with_itself_is_unchanged(
    family: str, share: float, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    base = lm(build(family))
    expected = generated(base, *batch, STEPS)
    for donor in (base, lm(copy.deepcopy(base.model))):
        with patched(base, donor, some(base, share)):
            output = generated(base, *batch, STEPS)
        assert_alike(output, expected)


@pytest.mark.parametrize("shared", [True, False])
def test_batch_and_padding_change_no_token(shared: bool, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    base, donor = shared_pair("ia3") if shared else pair_of("llama")
    ids, mask = batch
    with patched(base, donor, some(base)):
        together = generated(base, ids, mask, STEPS).sequences
        for row in range(3):
            width = int(mask[row].sum())
            single = generated(
                base, ids[row : row + 1, -width:], mask[row : row + 1, -width:], STEPS
            ).sequences
            assert torch.equal(single[0, width:], together[row, 7:])


def test_patching_the_last_layer_leaves_the_cache_as_it_is(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    base, donor = pair_of("llama")
    plain = generated(base, *batch, 1).past_key_values
    for neurons, same in (
        (some(base, sites=("down",)).only(layers=range(1, 2)), True),
        (some(base, sites=("down",)), False),
    ):
        with patched(base, donor, neurons):
            cache = generated(base, *batch, 1).past_key_values
        held = [layer.keys for layer in cache.layers]
        assert torch.equal(held[0], plain.layers[0].keys)
        assert torch.equal(held[1], plain.layers[1].keys) is same
        assert type(cache) is type(plain)


@pytest.mark.parametrize("kind", ["two models", "ia3", "lora"])
def test_sampling_draws_from_the_patched_distribution(
    kind: str, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    base, donor = pair_of("llama") if kind == "two models" else shared_pair(kind)
    apart = (base, donor) if kind == "two models" else (alone(base), alone(donor))
    neurons = some(base)
    ids, mask = batch
    torch.manual_seed(11)
    for _ in range(STEPS):
        chances = patched_logits(*apart, neurons, ids, mask)[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(chances, 1)], -1)
        mask = torch.cat([mask, mask.new_ones(3, 1)], -1)
    torch.manual_seed(11)
    with patched(base, donor, neurons):
        output = generated(base, *batch, STEPS, do_sample=True, top_k=0, top_p=1.0, temperature=1.0)
    assert torch.equal(output.sequences, ids)


@pytest.mark.parametrize("kind", ["two models", "lora"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_beam_search_with_caches_is_beam_search_without_any(
    kind: str, family: str, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    if kind == "lora" and family == "gpt2":
        pytest.skip("one shared pair is enough")
    base, donor = pair_of(family) if kind == "two models" else shared_pair(kind)
    neurons = some(base)
    with patched(base, donor, neurons):
        cached = generated(base, *batch, STEPS, num_beams=3, output_scores=True)
        whole = generated(base, *batch, STEPS, num_beams=3, use_cache=False, output_scores=True)
    plain = generated(base, *batch, STEPS, num_beams=3, output_scores=True)
    assert torch.equal(cached.sequences, whole.sequences)
    assert (cached.sequences_scores - whole.sequences_scores).abs().max() <= 1e-5
    assert not torch.equal(cached.sequences_scores, plain.sequences_scores)


@pytest.mark.parametrize("kind", ["two models", "ia3"])
def test_assisted_decoding_gives_the_tokens_of_greedy_search(kind: str) -> None:
    base, donor = pair_of("llama") if kind == "two models" else shared_pair(kind)
    ids = random_ids((1, 6))
    ids = torch.cat([ids, ids, ids[:, :3]], -1)
    mask = torch.ones_like(ids)
    ends = {
        "eos_token_id": 2
    }  # transformers 4.57 looks up no prompt without one; `min_new_tokens` keeps it from ending here
    with patched(base, donor, some(base)):
        expected = generated(base, ids, mask, 12, **ends).sequences
        assert torch.equal(
            generated(base, ids, mask, 12, prompt_lookup_num_tokens=3, **ends).sequences, expected
        )


def test_streaming_yields_the_tokens_of_greedy_search() -> None:
    from transformers.generation.streamers import BaseStreamer

    class Keeper(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    base, donor = shared_pair("ia3")
    ids, keeper = random_ids((1, 6)), Keeper()
    with patched(base, donor, some(base)):
        expected = generated(base, ids, torch.ones_like(ids), STEPS).sequences
        generated(base, ids, torch.ones_like(ids), STEPS, streamer=keeper)
    assert keeper.tokens == [*expected[0].tolist(), -1]


@pytest.mark.parametrize("kind", ["two models", "ia3"])
def test_rows_that_ended_early_are_padded_and_do_not_disturb_the_others(
    kind: str, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    base, donor = pair_of("llama") if kind == "two models" else shared_pair(kind)
    with patched(base, donor, some(base)):
        free = generated(base, *batch, STEPS).sequences[:, 7:]
        end = int(free[0, 1])
        output = generated(base, *batch, STEPS, eos_token_id=end, min_new_tokens=None).sequences[:, 7:]
    for row, expected in zip(output.tolist(), free.tolist(), strict=True):
        stop = expected.index(end) + 1 if end in expected else len(expected)
        assert row[:stop] == expected[:stop][: len(row)]
        assert set(row[stop:]) <= {0}


@pytest.mark.parametrize("kind", ["two models", "lora"])
def test_rows_that_have_ended_leave_a_patched_batch_and_its_donors(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, donor = pair_of("llama") if kind == "two models" else shared_pair(kind)
    asked = [random_ids((1, 3 + row % 3), seed=row)[0].tolist() for row in range(8)]
    monkeypatch.setattr(base, "eos_ids", ())
    with patched(base, donor, some(base)):
        whole = [generate(base, [one], Decoding(8))[0].token_ids for one in asked]
        ends = {whole[row][place] for row, place in ((0, 2), (1, 4), (2, 1))}
        monkeypatch.setattr(base, "eos_ids", tuple(ends))
        rows: list[int] = []
        with around(base.inner.get_input_embeddings(), before=lambda args, _: rows.append(len(args[0]))):
            together = generate(base, asked, Decoding(8), batch_size=8)
    assert together == {row: cut(ids, ends, base.pad_id, 0) for row, ids in enumerate(whole)}
    assert min(rows) < max(rows)


def makes_streams() -> bool:
    """Whether torch has streams here: a build for GPUs has none where there is no GPU."""
    try:
        torch.Stream()
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("kind", ["two models", "ia3"])
@pytest.mark.parametrize("implementation", ["static", "offloaded"])
def test_a_cache_that_cannot_be_followed_is_refused(
    kind: str, implementation: str, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    if implementation == "offloaded" and not makes_streams():
        pytest.skip("this build of torch makes no stream on this machine, so no cache is off-loaded")
    base, donor = pair_of("llama") if kind == "two models" else shared_pair(kind)
    with patched(base, donor, some(base)), pytest.raises(DecodeError, match="cannot follow"):
        generated(base, *batch, STEPS, cache_implementation=implementation)
    assert no_hooks(base.model)


@pytest.mark.parametrize("kind", ["two models", "ia3"])
def test_a_cache_the_donor_has_not_seen_is_refused(
    kind: str, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    base, donor = pair_of("llama") if kind == "two models" else shared_pair(kind)
    ids, mask = batch
    with torch.no_grad():
        cache = base.model(input_ids=ids, attention_mask=mask).past_key_values
        longer = torch.cat([mask, mask.new_ones(3, 1)], -1)
        with patched(base, donor, some(base)), pytest.raises(DecodeError, match="has not seen"):
            base.model(input_ids=ids[:, -1:], attention_mask=longer, past_key_values=cache)


def test_a_cache_that_lost_step_with_the_donors_is_refused(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    base, donor = pair_of("llama")
    ids, mask = batch
    with torch.no_grad(), patched(base, donor, some(base)):
        cache = base.model(input_ids=ids, attention_mask=mask).past_key_values
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :-1], layer.values[:, :, :-1]
        with pytest.raises(DecodeError, match="its donor"):
            base.model(input_ids=ids[:, -1:], attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("kind", ["two models", "ia3", "lora"])
def test_everything_is_put_back_also_after_an_exception(
    kind: str, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    base, donor = pair_of("llama") if kind == "two models" else shared_pair(kind)
    base.model.train()
    base.model.eval()

    def state() -> list[object]:
        found: list[object] = [(name, p.requires_grad) for name, p in base.model.named_parameters()]
        for name, module in base.model.named_modules():
            found.append(
                (name, module.training, "forward" in vars(module), getattr(module, "_disable_adapters", None))
            )
            found.append(list(module.active_adapters) if hasattr(module, "base_layer") else None)
        return found

    before, expected = state(), generated(base, *batch, 2)

    def explode(ids: torch.Tensor, scores: torch.Tensor) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), patched(base, donor, some(base)):
        generated(base, *batch, STEPS, stopping_criteria=[explode])
    assert state() == before
    assert no_hooks(base.model)
    assert no_hooks(donor.model)
    assert torch.equal(torch.stack(generated(base, *batch, 2).logits), torch.stack(expected.logits))


def test_bad_requests_are_refused_in_one_line(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    base, donor = pair_of("llama")
    other = lm(build("llama", intermediate_size=40))
    larger = lm(build("llama", vocab_size=100))
    neurons = some(base)
    mixtral = lm(build("mixtral"))
    routed = next(key for key in mixtral.table.keys if ".experts." in key)
    for error, arguments in [
        (MismatchError, (base, other, neurons)),
        (MismatchError, (base, larger, neurons)),
        (ForeignModelError, (base, donor, some(other))),
        (NeuronError, (base, donor, {"layers.0.down": [4800]})),
        (UsageError, (base, None, neurons)),
        (UnsupportedModelError, (mixtral, mixtral, {routed: [0]})),
    ]:
        with pytest.raises(error) as caught, patched(*arguments):
            pass
        assert "\n" not in str(caught.value)
    with (
        patched(base, donor, neurons),
        pytest.raises(UsageError, match="already"),
        patched(base, donor, neurons),
    ):
        pass


def test_models_with_tokenizers_of_their_own_are_refused() -> None:
    base = LanguageModel(tiny_llama(), tiny_tokenizer())
    other = tiny_tokenizer()
    other.add_tokens(["bread-knife"])
    neurons = some(base)
    with patched(base, LanguageModel(tiny_llama(1), tiny_tokenizer()), neurons):
        pass
    with (
        pytest.raises(MismatchError, match="1 tokens differ, 'bread-knife' among them"),
        patched(base, LanguageModel(tiny_llama(1), other), neurons),
    ):
        pass


@pytest.mark.parametrize("shared", [True, False])
def test_sampled_completions_under_a_patch_repeat_with_their_seed_and_leave_the_global_one_alone(
    shared: bool,
) -> None:
    bare = shared_pair("ia3") if shared else pair_of("llama")
    base, donor = (LanguageModel(one.model, tiny_tokenizer(), adapters=one.adapters) for one in bare)
    asked = ["how do i kill", "tell me"]
    before = torch.get_rng_state()
    with patched(base, donor, some(base)):
        first, again, other = (
            base.complete(asked, sample=True, seed=seed, max_new_tokens=8) for seed in (3, 3, 4)
        )
    plain = base.complete(asked, sample=True, seed=3, max_new_tokens=8)
    assert torch.equal(torch.get_rng_state(), before)
    assert first == again
    assert [one.token_ids for one in first] != [one.token_ids for one in other]
    assert [one.token_ids for one in first] != [one.token_ids for one in plain]


@pytest.mark.parametrize("stacked", [True, False])
def test_asking_the_donor_inside_the_context_is_refused(
    stacked: bool, batch: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, donor = shared_pair("ia3")
    if not stacked:
        monkeypatch.setattr("safety_neurons.interventions.patch.can_stack", lambda *_: False)
    with (
        patched(base, donor, some(base)),
        donor.active(),
        pytest.raises(DecodeError, match="leave the context"),
    ):
        generated(donor, *batch, 2)


def test_a_pair_can_be_patched_both_ways_one_after_the_other(
    batch: tuple[torch.Tensor, torch.Tensor],
) -> None:
    base, donor = shared_pair("ia3")
    neurons = NeuronSet({"layers.0.down": range(10)}, base.table)
    apart = alone(base), alone(donor)
    for one, other, ones, others in ((base, donor, *apart), (donor, base, *apart[::-1])):
        expected = greedy(lambda ids, mask: patched_logits(ones, others, neurons, ids, mask), *batch, 3)  # noqa: B023
        with patched(one, other, neurons):
            assert_same(generated(one, *batch, 3), expected)


@pytest.mark.parametrize("shared", [True, False])
def test_teacher_forced_losses_under_all_neurons_are_the_donors(shared: bool) -> None:
    views = shared_pair("ia3-down")
    base, donor = views if shared else (alone(views[0]), alone(views[1]))
    texts = [random_ids((9,), seed=1).tolist(), random_ids((4,), seed=2).tolist()]
    expected, plain = token_losses(donor, texts), token_losses(base, texts)
    with patched(base, donor, some(base, 1.0, sites=("down",))):
        losses = token_losses(base, texts)
    assert losses.total == pytest.approx(expected.total, abs=1e-4)
    assert losses.total != pytest.approx(plain.total, abs=1e-2)
