"""Hybrids: what is no attention and no feed-forward part is left out and counted, everything else works."""

from collections.abc import Sequence

import pytest
import torch
import transformers
from naive import full, generated, greedy, lm, patched_logits, some

from brute_force import brute_force
from exact64 import Exact64
from families import HYBRID_FAMILIES, build, random_ids, redraw, sibling
from safety_neurons.detectors import find_importance
from safety_neurons.errors import DecodeError
from safety_neurons.interventions import patched
from safety_neurons.model import LanguageModel
from safety_neurons.model.batches import collate, forward
from safety_neurons.model.hooks import reading
from safety_neurons.neurons import NeuronSet
from safety_neurons.prompt_lists import Prompts
from tiny import tiny_tokenizer

LEFT_OUT = {
    "qwen3_5": "linear_attn.out_proj, linear_attn.in_proj_qkv, linear_attn.in_proj_z, linear_attn.in_proj_b, "
    "linear_attn.in_proj_a of 1 layer (0); the output gate beside q of 1 layer (1)",
    "qwen3_next": "linear_attn.in_proj_qkvz, linear_attn.in_proj_ba, linear_attn.out_proj of 1 layer (0); "
    "the output gate beside q of 1 layer (1)",
    "lfm2": "conv.in_proj, conv.out_proj of 1 layer (0)",
    "nemotron_h": "mixer.in_proj, mixer.out_proj of 1 layer (0); "
    "the sites experts.down experts.up of 1 layer (3)",
    "granite4": "mamba.in_proj, mamba.out_proj of 1 layer (0)",
    "jamba": "mamba.in_proj, mamba.x_proj, mamba.dt_proj, mamba.out_proj of 1 layer (0)",
    "bamba": "mamba.in_proj, mamba.out_proj of 1 layer (0)",
    "falcon_h1": "mamba.in_proj, mamba.out_proj of 2 layers (0–1)",
}
STEPS = 2


@pytest.fixture(scope="module", params=HYBRID_FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family: str) -> LanguageModel:
    return LanguageModel(build(family), tiny_tokenizer(), template="none")


def padded(lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Random prompts padded on the left."""
    ids = random_ids((len(lengths), max(lengths)))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : max(lengths) - length] = 0
    return ids.masked_fill(mask == 0, 0), mask


def test_what_is_left_out_is_counted_by_layer(family: str, model: LanguageModel) -> None:
    coverage = model.anatomy.coverage()
    assert not coverage.complete
    assert 0.4 < coverage.share < 1
    assert coverage.left_out == LEFT_OUT[family]
    attention = [layer.index for layer in model.anatomy.layers if f"layers.{layer.index}.q" in model.table]
    assert attention == ([0, 1] if family == "falcon_h1" else [1])


def test_reading_leaves_logits_bit_identical(model: LanguageModel) -> None:
    ids, mask = padded((7, 5))
    with reading(model.anatomy, dict.fromkeys(model.anatomy.places, lambda _: None)) as firings:
        read = full(model, ids, mask)
    assert torch.equal(read, full(model, ids, mask))
    assert set(firings.counts.values()) == {1}


def test_importance_is_what_zeroing_a_neuron_changes(family: str) -> None:
    model = LanguageModel(build(family, dtype=torch.float64), tiny_tokenizer(), template="none")
    prompts = Prompts.from_list(["how do i make a cake bomb"])
    ids = model.encode(prompts)[0].ids
    keys = [key for key in model.table.keys if ".experts." not in key or ".experts.1." in key]
    with Exact64():
        expected = brute_force(model, ids, keys, stride=13)
        found = find_importance(model, prompts, count=5)
    for key, scores in expected.items():
        measured = torch.tensor(found.scores[key][::13], dtype=torch.float64)
        assert (measured - scores).abs().max() <= 1e-6 * float(found.scores[key].max() or 1), key


def test_patched_generation_is_rerunning_both_models_on_the_whole_text(family: str) -> None:
    base = lm(build(family))
    donor = lm(sibling(base.model))
    dense = {key: index for key, index in some(base).items() if ".experts." not in key}
    neurons = NeuronSet(dense, base.table)
    batch = padded((7, 4, 2))
    expected = greedy(lambda ids, mask: patched_logits(base, donor, neurons, ids, mask), *batch, STEPS)
    with patched(base, donor, neurons):
        output = generated(base, *batch, STEPS)
    assert torch.equal(output.sequences, expected[0])
    allowed = 2e-5 * expected[1].abs().max().clamp(min=1)
    assert (torch.stack(output.logits) - expected[1]).abs().max() <= allowed
    assert (full(base, *batch) - patched_logits(base, donor, neurons, *batch)).abs().max() > 1e-3


def test_batches_give_the_numbers_of_single_prompts(model: LanguageModel) -> None:
    sequences = [row.tolist()[:length] for row, length in zip(random_ids((3, 9)), (9, 5, 2), strict=True)]
    together, alone = {}, {}
    with torch.no_grad(), model.running():
        for batch, into in (
            ([collate(sequences, [0, 1, 2])], together),
            (
                [collate(sequences, [index]) for index in range(3)],
                alone,
            ),
        ):
            for one in batch:
                logits = forward(model.model, one, with_logits=True)
                into |= {index: logits[row, : one.lengths[row]] for row, index in enumerate(one.indices)}
    for index in alone:
        torch.testing.assert_close(together[index], alone[index], rtol=0, atol=2e-5)
    asked = ["how do i make a cake bomb", "kill", "tell me about the red house"]
    answers = [model.complete(asked, max_new_tokens=6, batch_size=size) for size in (1, 3)]
    assert [one.token_ids for one in answers[0]] == [one.token_ids for one in answers[1]]


def test_a_state_that_padding_moves_is_given_prompts_of_one_length() -> None:
    """MiniMax's lightning attention decays over padding too, so that a padded prompt has another answer."""
    kinds = ["linear_attention", "full_attention"]
    model = build("mixtral", sliding_window=None).config.to_dict()
    config = transformers.MiniMaxConfig(
        **{name: model[name] for name in ("vocab_size", "hidden_size", "num_attention_heads")},
        **{name: model[name] for name in ("intermediate_size", "num_key_value_heads", "num_local_experts")},
        num_hidden_layers=2,
        layer_types=kinds,
        block_size=4,
    )
    with torch.random.fork_rng(devices=[]):
        minimax = transformers.AutoModelForCausalLM.from_config(config).eval()
    redraw(minimax)
    lightning = LanguageModel(minimax, tiny_tokenizer(), template="none")
    assert not lightning.pads_left
    asked = ["how do i make a cake bomb", "kill", "tell me about the red house"]
    answers = [lightning.complete(asked, max_new_tokens=6, batch_size=size) for size in (1, 3)]
    assert [one.token_ids for one in answers[0]] == [one.token_ids for one in answers[1]]
    neurons = some(lightning, sites=("q", "o"))
    with patched(lightning, lightning, neurons), pytest.raises(DecodeError, match="follow a MiniMaxCache"):
        lightning.complete(asked, max_new_tokens=2)
