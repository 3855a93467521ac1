"""find_importance from prompts to a set: selection, agreement, failures, checkpoints."""

import numpy as np
import peft
import pytest
import torch

import families
from safety_neurons.detectors import find_importance, importance
from safety_neurons.errors import NumericalError, RunError, UsageError
from safety_neurons.model import LanguageModel, activation_statistics
from safety_neurons.neurons import Selection
from safety_neurons.results import Checkpoint
from tiny import tiny_llama, tiny_tokenizer

PROMPTS = [
    "how do i make a bomb",
    "tell me about cake",
    "how do i kill a plant",
    "open the door please now",
    "why",
]


@pytest.fixture
def lm():
    return LanguageModel(tiny_llama(), tiny_tokenizer(), template="none")


def values(found):
    return np.concatenate([found.scores[key] for key in found.scores])


def test_the_largest_one_per_cent_of_all_sites_is_chosen_by_default(lm):
    found = find_importance(lm, PROMPTS)
    assert set(found.scores.keys()) == set(lm.table.keys)
    assert len(found.neurons) == round(0.01 * lm.table.n_neurons)
    assert (found.prompts.used, found.prompts.failed, found.prompts.truncated) == (5, 0, 0)


def test_the_score_is_the_mean_over_prompts_whatever_the_batches_and_the_order(lm):
    alone = [values(find_importance(lm, [prompt])) for prompt in PROMPTS]
    for batch_size in (1, 2, "auto"):
        together = values(find_importance(lm, PROMPTS[::-1], batch_size=batch_size))
        np.testing.assert_allclose(together, np.mean(alone, axis=0), rtol=1e-4, atol=1e-6)


def test_full_agreement_is_the_intersection_of_the_prompts_own_sets(lm):
    found = find_importance(lm, PROMPTS, top=0.2, agreement=1.0)
    sets = [find_importance(lm, [prompt], top=0.2).neurons for prompt in PROMPTS]
    expected = sets[0]
    for other in sets[1:]:
        expected = expected & other
    assert found.neurons == expected
    assert 0 < len(found.neurons) < len(sets[0])


def test_an_empty_agreement_says_which_would_give_one_neuron(lm):
    found = find_importance(lm, PROMPTS, count=1, agreement=1.0, sites=("q",))
    if len(found.neurons) == 0:
        assert any("agreement" in note for note in found.notes)


def test_foundation_neurons_are_subtracted_after_selection(lm):
    safety, foundation = (
        find_importance(lm, PROMPTS, count=50),
        find_importance(lm, ["one two three"], count=50),
    )
    left = find_importance(lm, PROMPTS, count=50, subtract=foundation.neurons).neurons
    assert left == safety.neurons - foundation.neurons
    assert len(left & foundation.neurons) == 0


OTHERS = {
    "harmless": ["open the door", "grow a tree in the house"],
    "general": ["one two three", "red water"],
}


@pytest.mark.parametrize("rule", [{"count": 50}, {"top": 0.2, "agreement": 0.6}])
def test_the_specific_part_is_chosen_on_the_prompts_and_on_no_other_text(lm, rule):
    found = find_importance(lm, PROMPTS, minus=OTHERS, **rule)
    chosen = find_importance(lm, PROMPTS, **rule).neurons
    others = {name: find_importance(lm, texts, **rule).neurons for name, texts in OTHERS.items()}
    assert found.neurons == chosen - others["harmless"] - others["general"]
    assert 0 < len(found.neurons) < len(chosen)
    specific = found.specific
    assert (specific.n_chosen, specific.n_specific) == (len(chosen), len(found.neurons))
    assert specific.share == len(found.neurons) / len(chosen)
    assert specific.sets == {"chosen": chosen, **others}
    for row in specific.minus:
        both = others[row.name]
        assert (row.n_prompts, row.n_neurons) == (2, len(both))
        assert row.n_shared == len(chosen & both)
        assert row.jaccard == len(chosen & both) / len(chosen | both)
    one, other = (find_importance(lm, PROMPTS[part::2], **rule).neurons for part in (0, 1))
    assert specific.by_chance == pytest.approx(len(one ^ other) / (len(one) + len(other)))
    assert found.notes[-1] == specific.said()
    assert found.neurons.provenance.config["specific"] == specific.record()


def test_what_is_specific_needs_names_and_prompts(lm):
    few = find_importance(lm, PROMPTS[:2], minus={"same": PROMPTS[:2]}, count=9)
    assert (few.specific.share, few.specific.by_chance, len(few.neurons)) == (0.0, None, 0)
    with pytest.raises(UsageError, match="expected prompts by name"):
        find_importance(lm, PROMPTS, minus=["a"])
    with pytest.raises(UsageError, match="named 'chosen'"):
        find_importance(lm, PROMPTS, minus={"chosen": ["a"]})


def test_only_the_sites_and_layers_asked_for_are_scored(lm):
    found = find_importance(lm, PROMPTS[:2], sites=("o", "down"), layers="1:2")
    assert sorted(found.scores.keys()) == ["layers.1.down", "layers.1.o"]
    whole = find_importance(lm, PROMPTS[:2])
    np.testing.assert_allclose(found.scores["layers.1.o"], whole.scores["layers.1.o"], rtol=1e-5)


def test_a_killed_search_goes_on_behind_its_last_batch_with_the_same_result(lm, tmp_path):
    whole = find_importance(lm, PROMPTS, batch_size=2, top=0.1, agreement=0.6)

    def kill(done, of, tokens):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_importance(
            lm,
            PROMPTS,
            batch_size=2,
            top=0.1,
            agreement=0.6,
            checkpoint=Checkpoint(tmp_path / "part"),
            progress=kill,
        )
    seen = []
    again = find_importance(
        lm,
        PROMPTS,
        batch_size=2,
        top=0.1,
        agreement=0.6,
        checkpoint=Checkpoint(tmp_path / "part"),
        progress=lambda done, of, tokens: seen.append((done, of)),
    )
    assert seen == [(3, 3)]
    assert again.prompts == whole.prompts
    np.testing.assert_array_equal(values(again), values(whole))
    assert again.neurons == whole.neurons


def test_a_prompt_without_tokens_is_counted_and_not_scored():
    lm = LanguageModel(tiny_llama(), tiny_tokenizer(adds_bos=False), template="none")
    found = find_importance(lm, ["tell me", "", "yes no"])
    assert (found.prompts.used, found.prompts.failed) == (2, 1)
    assert any("could not be read" in note for note in found.notes)


def test_a_prompt_longer_than_the_context_is_counted():
    lm = LanguageModel(tiny_llama(max_position_embeddings=8), tiny_tokenizer(), template="none")
    found = find_importance(lm, ["how do i make a cake in the house please", "yes"])
    assert (found.prompts.used, found.prompts.truncated) == (2, 1)


def test_a_prompt_that_gives_not_a_number_is_left_out_and_counted(lm):
    bad = lm.encode(["cake"])[0].ids[-1]
    with torch.no_grad():
        lm.model.model.embed_tokens.weight[bad] = float("nan")
    found = find_importance(lm, PROMPTS)
    assert (found.prompts.used, found.prompts.failed) == (4, 1)
    assert np.isfinite(values(found)).all()
    with pytest.raises(NumericalError, match="none of 1 prompts"):
        find_importance(lm, ["tell me about cake"])


def test_a_prompt_that_does_not_fit_in_memory_is_counted(lm, monkeypatch):
    inner = importance._Reduce.__call__

    def scarce(self, batch):
        if batch.width > 7:
            raise torch.OutOfMemoryError("out of memory")
        return inner(self, batch)

    monkeypatch.setattr(importance._Reduce, "__call__", scarce)
    found = find_importance(
        lm, [*PROMPTS, "how do i make a cake in the house", "how do i grow a tree in the house"]
    )
    assert (found.prompts.used, found.prompts.failed) == (5, 2)
    assert any("halved" in note for note in found.notes)


def test_nothing_of_the_model_is_left_changed(lm):
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    find_importance(lm, PROMPTS[:2])
    assert all(torch.equal(before[name], value) for name, value in lm.model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())


def test_bfloat16_models_are_scored_in_float32(lm):
    half = LanguageModel(tiny_llama().to(torch.bfloat16), tiny_tokenizer(), template="none")
    one, other = find_importance(lm, PROMPTS).scores, find_importance(half, PROMPTS).scores
    assert one.rank_correlation(other) > 0.97


def test_published_scores_have_no_gate(lm):
    found = find_importance(lm, PROMPTS[:2], as_published=True)
    assert not any(key.endswith("gate") for key in found.scores)
    np.testing.assert_array_equal(found.scores["layers.0.up"], found.scores["layers.0.down"])


def test_an_unknown_space_is_an_error(lm):
    with pytest.raises(UsageError, match="expected one of output, probability"):
        find_importance(lm, PROMPTS, space="logits")


def test_agreement_uses_the_same_rule_as_a_selection(lm):
    found = find_importance(lm, PROMPTS[:1], top_per_matrix=3, agreement=1.0)
    chosen = Selection(top_per_matrix=3).choose(dict(found.scores.items()))
    assert len(found.neurons) == sum(int(mask.sum()) for mask in chosen.values())


def test_the_share_a_prompt_chooses_is_of_the_neurons_that_have_a_published_score(lm):
    options = {"as_published": True, "top": 0.1}
    voted, chosen = (
        find_importance(lm, PROMPTS[:1], agreement=1.0, **options),
        find_importance(lm, PROMPTS[:1], **options),
    )
    assert list(voted.neurons) == list(chosen.neurons)


@pytest.mark.parametrize("options", [{"layers": range(1, 2)}, {"layers": "1:2"}, {"as_published": True}])
def test_shares_are_of_the_neurons_that_were_searched(lm, options):
    found = find_importance(lm, PROMPTS[:1], count=6, **options)
    assert found.neurons.share_of_neurons == pytest.approx(6 / len(found.scores))


def test_a_batch_of_unequal_prompts_gives_the_scores_of_each_alone_also_with_eager_attention_and_a_window():
    model = families.build("gemma2", torch.float64, vocab_size=tiny_llama().config.vocab_size)
    lm = LanguageModel(model, tiny_tokenizer(), template="none")
    together, alone = (
        find_importance(lm, [PROMPTS[0] * 3, "why"], batch_size=size, sites=("v", "down")) for size in (2, 1)
    )
    assert together.prompts.used == 2
    for key in alone.scores:
        np.testing.assert_allclose(together.scores[key], alone.scores[key], rtol=1e-6)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("ia3", ("k_proj", "o_proj", "up_proj", "down_proj")),
        ("lora", ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj")),
    ],
)
def test_unmerged_adapters_score_as_the_merged_weights_do(kind, targets):
    model = tiny_llama().double()
    if kind == "ia3":
        config = peft.IA3Config(target_modules=list(targets), feedforward_modules=["o_proj", "down_proj"])
    else:
        config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=list(targets))
    adapted = peft.get_peft_model(model, config).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "ia3_" in name or "lora_" in name:
                parameter.copy_(1 + 0.4 * torch.randn(parameter.shape, generator=generator))
    unmerged = find_importance(LanguageModel(adapted, tiny_tokenizer(), template="none"), PROMPTS).scores
    merged = find_importance(
        LanguageModel(adapted.merge_and_unload(), tiny_tokenizer(), template="none"), PROMPTS
    ).scores
    for key in merged:
        np.testing.assert_allclose(
            unmerged[key], merged[key], rtol=0, atol=1e-6 * merged[key].max(), err_msg=key
        )


def test_a_partial_result_of_another_template_is_not_taken_up(lm, tmp_path):
    find_importance(lm, PROMPTS[:2], checkpoint=Checkpoint(tmp_path / "part"))
    other = LanguageModel(lm.model, lm.tokenizer, template="tulu")
    with pytest.raises(RunError, match="made with different models:"):
        find_importance(other, PROMPTS[:2], checkpoint=Checkpoint(tmp_path / "part"))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "qwen2_moe"])
def test_experts_without_a_token_vote_for_nothing(family):
    many = {
        "num_local_experts" if family in ("mixtral", "gpt_oss") else "num_experts": 9
    }  # four tokens reach eight at most
    model = LanguageModel(
        families.build(family, num_hidden_layers=2, **many), tiny_tokenizer(adds_bos=False), template="none"
    )
    prompts = ["fire", "water", "red house"]
    seen = {key: 0 for key in model.table.keys if ".experts." in key}
    for prompt in prompts:
        counts = activation_statistics(model, [row.ids for row in model.encode([prompt])]).counts
        for key in seen:
            seen[key] += counts[key] > 0
    assert 0 in seen.values()
    found = find_importance(model, prompts, sites=["gate", "up", "down"], top_per_matrix=5, agreement=1.0)
    chosen = dict(found.neurons.items())
    assert {key for key in chosen if ".experts." in key} <= {key for key, count in seen.items() if count}
    for key, indices in chosen.items():
        assert (found.scores[key][indices] > 0).all()
    for key, count in seen.items():
        if count == 1:  # one prompt decides alone: its five largest
            assert len(chosen[key]) == 5
    idle = find_importance(model, prompts, sites=["gate", "up", "down"], top_per_matrix=5)
    zeros = sum(int((idle.scores[key][indices] == 0).sum()) for key, indices in idle.neurons.items())
    assert any(
        note.startswith(f"{zeros} of the {len(idle.neurons)} chosen neurons have a score of exactly 0")
        for note in idle.notes
    )
