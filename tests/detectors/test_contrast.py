import dataclasses

import numpy as np
import peft
import pytest
import torch
from twins import PROMPTS, adapted, model, separate, untouched

from families import build
from safety_neurons.detectors import contrast as module
from safety_neurons.detectors import find_contrast
from safety_neurons.detectors.text import cut_at_end, span
from safety_neurons.errors import InputError, MismatchError, NumericalError, RunError, UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.prompt_lists import Prompts
from safety_neurons.results import Checkpoint, Completion, Completions
from tiny import tiny_tokenizer

ALL = ("q", "k", "v", "o", "gate", "up", "down")


def naive(pair, positions, max_new_tokens=8):
    """Stock PEFT and transformers, one prompt at a time, no cache, everything kept: the mean square of the
    difference.
    """
    peft_model, kept = pair.base.model, {}

    def hidden(adapters, ids):
        peft_model.base_model.set_adapter(list(adapters))
        seen = {}
        hooks = [
            layer.mlp.down_proj.base_layer.register_forward_pre_hook(
                lambda _, args, i=i: seen.__setitem__(i, args[0][0])
            )
            for i, layer in enumerate(peft_model.get_base_model().model.layers)
        ]
        with torch.no_grad():
            logits = peft_model(input_ids=torch.tensor([ids])).logits[0]
        for hook in hooks:
            hook.remove()
        return seen, logits

    for prompt in PROMPTS:
        ids = pair.base.encode([prompt])[0].ids
        new = []
        while len(new) < max_new_tokens:
            token = int(hidden(pair.base.adapters, ids + new)[1][-1].argmax())
            if token in pair.base.eos_ids:
                break
            new.append(token)
        start, stop = {
            "completion": (len(ids), len(ids) + len(new)),
            "completion-predicting": (len(ids) - 1, len(ids) + len(new) - 1),
            "prompt": (0, len(ids)),
            "prompt-last": (len(ids) - 1, len(ids)),
        }[positions]
        first, second = hidden(pair.base.adapters, ids + new)[0], hidden(pair.aligned.adapters, ids + new)[0]
        for layer in first:
            kept.setdefault(layer, []).append((first[layer] - second[layer])[start:stop].double())
    return {
        f"layers.{layer}.down": torch.cat(parts).square().mean(0).sqrt().numpy()
        for layer, parts in kept.items()
    }


@pytest.mark.parametrize("positions", ["completion", "completion-predicting", "prompt", "prompt-last"])
def test_change_scores_equal_those_of_the_naive_way(positions):
    pair = adapted()
    assert pair.shared
    expected = naive(pair, positions)
    found = find_contrast(pair.base, pair.aligned, PROMPTS, positions=positions, max_new_tokens=8)
    for key, values in expected.items():
        np.testing.assert_allclose(found.scores[key], values, rtol=0, atol=1e-5 * values.max())


def test_batch_size_order_and_memory_budget_change_nothing(monkeypatch):
    pair = adapted()
    whole = find_contrast(pair.base, pair.aligned, PROMPTS, sites=ALL, max_new_tokens=6, count=30)
    turned = Prompts(list(PROMPTS)[::-1])
    for prompts, batch_size, memory in ((PROMPTS, 1, 2**30), (turned, 4, 2**30), (PROMPTS, "auto", 2000)):
        monkeypatch.setattr(module, "MEMORY_BUDGET", memory)
        other = find_contrast(
            pair.base, pair.aligned, prompts, sites=ALL, max_new_tokens=6, count=30, batch_size=batch_size
        )
        assert dict(other.neurons.items()).keys() == dict(whole.neurons.items()).keys()
        for key, values in whole.scores.items():
            np.testing.assert_allclose(other.scores[key], values, rtol=0, atol=1e-5 * max(values.max(), 1e-9))


def test_scores_are_symmetric_on_one_text_and_zero_between_a_model_and_itself():
    pair = adapted()
    text = pair.base.complete(PROMPTS, max_new_tokens=6)
    one, other = (
        find_contrast(first, second, PROMPTS, completions=text, sites=ALL)
        for first, second in ((pair.base, pair.aligned), (pair.aligned, pair.base))
    )
    same = find_contrast(pair.base, pair.base, PROMPTS, completions=text, sites=ALL, count=3)
    for key, values in one.scores.items():
        np.testing.assert_allclose(values, other.scores[key], rtol=1e-6)
        assert (values >= 0).all()
        assert not same.scores[key].any()
    assert max(values.max() for _, values in one.scores.items()) > 0


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_where_only_one_scale_differs_scores_are_that_difference_times_the_size_of_the_activation():
    base = model(0)
    config = peft.IA3Config(
        target_modules=["down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    )
    adapted_model = peft.get_peft_model(model(0).model, config).eval()
    scale = 1 + torch.linspace(-0.5, 0.5, 48)
    with torch.no_grad():
        adapted_model.base_model.model.model.layers[1].mlp.down_proj.ia3_l["default"].copy_(scale[None])
    aligned = LanguageModel(adapted_model, tiny_tokenizer())
    found = find_contrast(base, aligned, PROMPTS, positions="prompt", sites=ALL)
    for key in ("layers.0.down", "layers.0.q", "layers.1.q", "layers.1.o", "layers.1.up"):
        assert not found.scores[key].any(), key
    squares = []
    for encoded in base.encode(PROMPTS):
        seen = {}
        down = base.model.model.layers[1].mlp.down_proj
        hook = down.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.__setitem__("a", args[0][0].double())
        )
        with torch.no_grad():
            base.model(input_ids=torch.tensor([encoded.ids]))
        hook.remove()
        squares.append(seen["a"].square())
    size = torch.cat(squares).mean(0).sqrt()
    np.testing.assert_allclose(
        found.scores["layers.1.down"], (size * (scale - 1).abs().double()).numpy(), rtol=1e-5, atol=1e-7
    )


def test_separate_models_give_what_a_shared_base_gives():
    pair = adapted("lora", ("up_proj", "q_proj"))
    assert pair.shared
    shared_scores = find_contrast(pair.base, pair.aligned, PROMPTS, sites=ALL, max_new_tokens=6).scores
    with pair.aligned.active():
        merged = LanguageModel(_copy(pair.aligned), pair.aligned.tokenizer)
    with pair.base.active():
        plain = LanguageModel(_copy(pair.base), pair.base.tokenizer)
    separate_scores = find_contrast(plain, merged, PROMPTS, sites=ALL, max_new_tokens=6).scores
    for key, values in shared_scores.items():
        np.testing.assert_allclose(separate_scores[key], values, rtol=0, atol=2e-5 * max(values.max(), 1e-9))


def _copy(lm):
    import copy

    made = copy.deepcopy(lm.model)
    made.base_model.set_adapter(list(lm.adapters))
    return made.merge_and_unload().eval()


def test_given_completions_are_used_and_prompts_without_one_are_counted():
    pair = adapted()
    text = pair.aligned.complete(PROMPTS, max_new_tokens=6)
    whole = find_contrast(pair.base, pair.aligned, PROMPTS, generate_with="aligned", max_new_tokens=6)
    used = find_contrast(pair.base, pair.aligned, PROMPTS, completions=text)
    for key, values in whole.scores.items():
        np.testing.assert_allclose(used.scores[key], values, rtol=0, atol=1e-6 * values.max())
    without_ids = Completions([Completion(**{**vars(one), "token_ids": ()}) for one in list(text)[:4]])
    part = find_contrast(pair.base, pair.aligned, PROMPTS, completions=without_ids)
    assert (part.prompts.used, part.prompts.failed) == (4, 2)
    assert part.notes == ("2 prompts have no completion in the file given",)
    with pytest.raises(InputError, match="none of the 6 prompts has a completion"):
        find_contrast(
            pair.base,
            pair.aligned,
            PROMPTS,
            completions=Completions([Completion("x", "a", "b", (5,), "stop")]),
        )


def test_a_completion_whose_prompt_reads_otherwise_is_refused_and_the_difference_is_said():
    pair = adapted()
    text = pair.base.complete(PROMPTS, max_new_tokens=6)
    asked = ["how do i make a bomb", *(prompt.text for prompt in PROMPTS[1:])]
    said = (
        "prompt '0' is 'how do i make a bomb' in the list and 'how do i make a cake' in the completions "
        "file \\(1 of 6 differ\\)"
    )
    with pytest.raises(InputError, match=said):
        find_contrast(pair.base, pair.aligned, asked, completions=text)
    with pytest.raises(InputError, match=r"6 of 6 differ\): pass the prompts it was made from"):
        find_contrast(pair.base, pair.aligned, [f"{prompt.text} now" for prompt in PROMPTS], completions=text)
    spaced = [prompt.text.replace(" ", "  ") for prompt in PROMPTS]
    assert find_contrast(pair.base, pair.aligned, spaced, completions=text).prompts.used == 6


def test_of_several_arms_the_untreated_one_is_read_and_two_that_differ_are_refused():
    pair = adapted()
    plain = pair.base.complete(PROMPTS, max_new_tokens=6, arm="untreated/harmful")
    treated = pair.aligned.complete(PROMPTS, max_new_tokens=6, arm="treated 5/harmful")
    assert [one.token_ids for one in plain] != [one.token_ids for one in treated]
    harmless = Completions(
        [Completion(p.id, "another text", "red", (5,), "stop", "untreated/harmless") for p in PROMPTS]
    )
    alone = find_contrast(pair.base, pair.aligned, PROMPTS, completions=plain)
    found = find_contrast(pair.base, pair.aligned, PROMPTS, completions=plain + treated + harmless)
    assert found.scores == alone.scores
    assert found.notes == (
        "of 3 arms in the completions file only untreated/harmful, untreated/harmless is read",
    )
    others = Completions(dataclasses.replace(one, arm="patched") for one in plain)
    with pytest.raises(
        InputError,
        match=r"prompt '\d' has 2 completions in the file given, of patched \(seed 0\), treated 5/harmful",
    ):
        find_contrast(pair.base, pair.aligned, PROMPTS, completions=others + treated)


def test_completions_of_another_tokenizer_are_refused():
    pair = adapted()
    written = pair.base.complete(PROMPTS, max_new_tokens=4)
    for shift, said in ((10**6, "embeddings"), (1, "another tokenizer")):
        moved = [
            dataclasses.replace(one, token_ids=tuple((token + shift) for token in one.token_ids))
            for one in written
        ]
        with pytest.raises(MismatchError, match=said):
            find_contrast(pair.base, pair.aligned, PROMPTS, completions=Completions(moved))


def test_plain_texts_are_prompts_too():
    pair = adapted()
    found = find_contrast(pair.base, pair.aligned, ["what key"], positions="prompt")
    again = find_contrast(pair.base, pair.aligned, Prompts.from_list(["what key"]), positions="prompt")
    assert found.prompts.used == 1
    assert found.scores == again.scores


def test_an_empty_completion_contributes_no_tokens_and_is_counted():
    pair = adapted()
    answers = [
        Completion(p.id, p.text, "", () if i == 2 else (7, 8, 2, 9), "stop") for i, p in enumerate(PROMPTS)
    ]
    found = find_contrast(pair.base, pair.aligned, PROMPTS, completions=Completions(answers))
    assert (found.prompts.used, found.prompts.failed) == (5, 1)
    assert found.neurons.provenance.config["tokens"] == 10
    assert "empty completion" in found.notes[0]
    nothing = Completions([Completion(p.id, p.text, "", (2,), "stop") for p in PROMPTS])
    with pytest.raises(InputError, match="left a token to compare"):
        find_contrast(pair.base, pair.aligned, PROMPTS, completions=nothing)


def test_the_end_token_and_what_follows_it_is_cut():
    assert cut_at_end([5, 6, 2, 7, 2], (2, 3)) == [5, 6]
    assert cut_at_end([5, 6], (2,)) == [5, 6]
    one = span("p", [1, 2, 3], [4, 5], "completion-predicting")
    assert (one.ids, one.start, one.stop) == ((1, 2, 3, 4, 5), 2, 4)


def test_a_killed_run_continues_without_redoing_a_batch_and_gives_the_same(tmp_path, monkeypatch):
    pair = adapted()
    options = {"sites": ALL, "max_new_tokens": 6, "batch_size": 2, "agreement": 0.5, "count": 40}
    whole = find_contrast(pair.base, pair.aligned, PROMPTS, **options)
    checkpoint = Checkpoint(tmp_path / "state.safetensors")
    passes = []
    real = module._compare
    monkeypatch.setattr(module, "_compare", lambda *args: (passes.append(args[2].number), real(*args))[1])

    def die(done, total, tokens):
        if passes == [0, 1] and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_contrast(pair.base, pair.aligned, PROMPTS, checkpoint=checkpoint, progress=die, **options)
    monkeypatch.setattr(LanguageModel, "complete", lambda *args, **kwargs: pytest.fail("generated again"))
    again = find_contrast(pair.base, pair.aligned, PROMPTS, checkpoint=checkpoint, **options)
    assert passes == [0, 1, 2]
    for key, values in whole.scores.items():
        np.testing.assert_array_equal(values, again.scores[key])
    assert again.neurons == whole.neurons
    with pytest.raises(RunError, match="made with different prompts:"):
        find_contrast(pair.base, pair.aligned, PROMPTS[:3], checkpoint=checkpoint, **options)


def test_generation_continues_behind_what_was_written(tmp_path):
    pair = adapted()
    checkpoint = Checkpoint(tmp_path / "state.safetensors")

    def die(done, total, tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_contrast(
            pair.base,
            pair.aligned,
            PROMPTS,
            max_new_tokens=6,
            batch_size=2,
            checkpoint=checkpoint,
            progress=die,
        )
    assert len(checkpoint.load().arrays["text/writer/lengths"]) == 2
    again = find_contrast(
        pair.base, pair.aligned, PROMPTS, max_new_tokens=6, batch_size=2, checkpoint=checkpoint
    )
    whole = find_contrast(pair.base, pair.aligned, PROMPTS, max_new_tokens=6, batch_size=2)
    for key, values in whole.scores.items():
        np.testing.assert_array_equal(values, again.scores[key])


def test_agreement_keeps_what_the_prompts_choose_each_on_its_own():
    pair = adapted()
    each = [
        find_contrast(pair.base, pair.aligned, PROMPTS[i : i + 1], positions="prompt", count=20).neurons
        for i in range(6)
    ]
    counts = {}
    for chosen in each:
        for member in chosen:
            counts[member] = counts.get(member, 0) + 1
    found = find_contrast(pair.base, pair.aligned, PROMPTS, positions="prompt", count=20, agreement=0.5)
    assert set(found.neurons) == {member for member, times in counts.items() if times >= 3}
    none = find_contrast(pair.base, pair.aligned, PROMPTS, positions="prompt", count=1, agreement=1.0)
    if not len(none.neurons):
        assert "an agreement of" in none.notes[-1]


def test_subtraction_acts_after_selection():
    pair = adapted()
    whole = find_contrast(pair.base, pair.aligned, PROMPTS, positions="prompt", count=10)
    less = find_contrast(
        pair.base, pair.aligned, PROMPTS, positions="prompt", count=20, subtract=whole.neurons
    )
    assert len(less.neurons) == 10
    assert not len(less.neurons & whole.neurons)
    assert less.notes[-1] == "10 of 20 chosen neurons were subtracted"


def test_provenance_says_what_was_done():
    pair = adapted()
    found = find_contrast(pair.base, pair.aligned, PROMPTS, positions="prompt", layers="0:1", top=0.1)
    for made in (found.scores.provenance, found.neurons.provenance):
        assert made.method == "contrast"
        assert made.models == (pair.base.name, pair.aligned.name)
        assert made.model_fingerprint == pair.base.fingerprint
        assert made.prompts_sha256 == PROMPTS.sha256
        assert made.config["layers"] == "0:1"
        assert made.config["selection"] == {"top": 0.1}


def test_nothing_of_the_models_is_left_changed():
    base, aligned = separate()
    base.model.train()
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    find_contrast(base, aligned, PROMPTS, max_new_tokens=4)
    assert base.model.training
    assert all(module.training for module in base.model.modules())
    assert untouched(base)
    assert untouched(aligned)
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())


def test_models_that_do_not_belong_together_are_refused():
    with pytest.raises(MismatchError, match="different shapes"):
        find_contrast(model(0), model(0, intermediate_size=32), PROMPTS, positions="prompt")
    other = LanguageModel(model(0).model, tiny_tokenizer())
    other.tokenizer.add_tokens(["cakes"])
    with pytest.raises(MismatchError, match="tokenizer"):
        find_contrast(model(0), other, PROMPTS, positions="prompt")


def test_nan_is_an_error_that_names_the_site():
    base, aligned = separate()
    base.anatomy, aligned.anatomy  # noqa: B018 - proved while the weights are sound
    with torch.no_grad():
        aligned.model.model.layers[1].mlp.up_proj.weight[3] = float("nan")
    with pytest.raises(NumericalError, match="layers.1.down"):
        find_contrast(base, aligned, PROMPTS, positions="prompt")


@pytest.mark.parametrize(
    "options",
    [{"positions": "answer"}, {"generate_with": "both"}, {"top": 0.1, "count": 3}, {"sites": ("mlp",)}],
)
def test_arguments_out_of_range_are_usage_errors(options):
    pair = adapted()
    with pytest.raises(UsageError):
        find_contrast(pair.base, pair.aligned, PROMPTS, **options)


def test_contrast_of_routed_experts_counts_tokens_that_both_models_route_to_them():
    from families import build
    from tiny import tiny_tokenizer

    base, aligned = (LanguageModel(build("mixtral"), tiny_tokenizer()) for _ in range(2))
    with torch.no_grad():
        for parameter in aligned.model.parameters():
            parameter += 0.05 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
            )
    whole, single = (
        find_contrast(base, aligned, PROMPTS, positions="prompt", batch_size=size).scores
        for size in ("auto", 1)
    )
    assert set(whole.keys()) == set(base.table.select(sites=("down",)).sizes)
    for key, values in whole.items():
        np.testing.assert_allclose(single[key], values, rtol=0, atol=1e-5 * max(values.max(), 1e-6))


def test_the_budget_counts_of_routed_experts_the_tokens_that_they_get(monkeypatch):
    base, aligned = (LanguageModel(build("qwen3_moe", seed=seed), tiny_tokenizer()) for seed in (0, 1))
    anatomy = base.anatomy
    sites = ("gate", "up", "down")
    searched = base.table.select(sites=sites).sizes
    longest = max(len(one.ids) for one in base.encode(PROMPTS))
    room = 4 * longest * sum(size * anatomy.share_of_tokens(key) for key, size in searched.items())
    assert room < 4 * longest * sum(searched.values()) / 1.5
    calls: list[int] = []
    own = module._compare
    monkeypatch.setattr(module, "MEMORY_BUDGET", int(room) + 1)
    monkeypatch.setattr(module, "_compare", lambda *given: (calls.append(len(given[4])), own(*given))[1])
    found = find_contrast(base, aligned, PROMPTS, positions="prompt", sites=sites, batch_size=1, count=5)
    assert calls == [len(searched)] * len(PROMPTS)
    monkeypatch.setattr(module, "MEMORY_BUDGET", 1)
    for key, values in find_contrast(
        base, aligned, PROMPTS, positions="prompt", sites=sites, batch_size=1, count=5
    ).scores.items():
        np.testing.assert_array_equal(values, found.scores[key])


def test_experts_of_a_site_are_read_together_or_counted_as_if_each_got_every_token():
    sizes = {f"layers.0.experts.{number}.down": 4 for number in range(8)} | {"layers.0.up": 6}
    kept = {key: size * (0.25 if ".experts." in key else 1) for key, size in sizes.items()}
    experts = list(sizes)[:8]
    assert module._chunks(kept, sizes, 10, 140) == [[*experts, "layers.0.up"]]
    assert module._chunks(kept, sizes, 10, 80) == [experts, ["layers.0.up"]]
    assert module._chunks(kept, sizes, 10, 79) == [
        [experts[0]],
        *([experts[number]] for number in range(1, 8)),
        ["layers.0.up"],
    ]
    assert module._chunks(kept, sizes, 10, 1) == [[key] for key in sizes]
