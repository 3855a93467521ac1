"""Prompts that are hard for every detector: NaN, a single token, longer than the context."""

import numpy as np
import pytest
import torch

import safety_neurons as sn
from safety_neurons.errors import NumericalError
from safety_neurons.model import LanguageModel, kl_divergence, token_divergences, token_losses
from safety_neurons.model.language_model import UNKNOWN
from safety_neurons.model.likelihood import answer_probabilities
from safety_neurons.neurons import NeuronSet
from safety_neurons.prompt_lists import Prompts
from safety_neurons.results import Completions
from tiny import tiny_llama, tiny_tokenizer

MARKED = "please fire fire now"
GOOD = [
    "how do i make a cake",
    "tell me about the red house please",
    "kill the tree",
    "what key",
    "write a story about water and a plant",
]
HARMLESS = ["open the door", "grow a small tree in the house", "tell me about blue water"]
WORST = [*GOOD[:2], MARKED, *GOOD[2:]]


def marked_model(seed: int, noise: int = 0) -> LanguageModel:
    """A model whose embedding of a word that comes twice in a row is NaN."""
    model = tiny_llama(seed)
    generator = torch.Generator().manual_seed(noise)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    lm = LanguageModel(model, tiny_tokenizer(), template="none")
    word = lm.tokenizer("fire", add_special_tokens=False)["input_ids"][0]

    def spoil(_, given, output):
        ids = given[0]
        twice = (ids[:, 1:] == word) & (ids[:, :-1] == word)
        output[:, 1:][twice] = torch.nan
        return output

    model.get_input_embeddings().register_forward_hook(spoil)
    return lm


@pytest.fixture(scope="module")
def pair():
    base, aligned = marked_model(0, 5), marked_model(0, 6)
    assert base.table.fingerprint == aligned.table.fingerprint
    return base, aligned


SHORT = {"max_new_tokens": 4}
FINDERS = {
    "activation-magnitude": lambda base, _, prompts: sn.find_activation_magnitude(base, prompts),
    "attribution": lambda base, _, prompts: sn.find_attribution(base, prompts),
    "attribution-patching": lambda base, aligned, prompts: sn.find_attribution_patching(
        base, aligned, prompts, midpoints=2
    ),
    "contrast": lambda base, aligned, prompts: sn.find_contrast(base, aligned, prompts, **SHORT),
    "contrast, prompt": lambda base, aligned, prompts: sn.find_contrast(
        base, aligned, prompts, positions="prompt"
    ),
    "heads": lambda base, _, prompts: sn.find_heads(base, prompts),
    "importance": lambda base, _, prompts: sn.find_importance(base, prompts),
    "importance, agreement": lambda base, _, prompts: sn.find_importance(
        base, prompts, top=0.2, agreement=1.0
    ),
    "importance-contrast": lambda base, aligned, prompts: sn.find_importance_contrast(base, aligned, prompts),
    "swap-attribution": lambda base, aligned, prompts: sn.find_swap_attribution(base, aligned, prompts),
    "mask": lambda base, aligned, prompts: sn.find_mask(base, aligned, prompts, harmless=HARMLESS, rounds=2),
    "cna": lambda base, _, prompts: sn.find_cna(base, prompts, harmless=HARMLESS, general=GOOD),
    "effect-size": lambda base, _, prompts: sn.find_effect_size(
        base, prompts, harmless=HARMLESS, positions="prompt"
    ),
    "probe": lambda base, _, prompts: sn.find_probe(base, prompts, harmless=HARMLESS),
    "probe-weights": lambda base, _, prompts: sn.find_probe_weights(base, prompts, harmless=HARMLESS),
    "refusal-direction": lambda base, _, prompts: sn.find_refusal_direction(base, prompts, harmless=HARMLESS),
    "relp": lambda base, _, prompts: sn.find_relp(base, prompts),
    "snip": lambda base, _, prompts: sn.find_snip(base, prompts, harmless=HARMLESS, sites=["down"]),
    "wanda": lambda base, _, prompts: sn.find_wanda(base, prompts, harmless=HARMLESS, sites=["down"]),
}


def test_every_detector_that_reads_prompts_is_here():
    reads_none = {"random", "weight-change", "weight-magnitude"}
    needs_a_mixture = {"routing"}  # in test_routing.py
    named = (
        {name.removeprefix("find_").replace("_", "-") for name in sn.__all__ if name.startswith("find_")}
        - reads_none
        - needs_a_mixture
    )
    assert named == {name.split(",")[0] for name in FINDERS}


@pytest.mark.parametrize("name", FINDERS)
def test_a_prompt_that_gives_nan_is_left_out_counted_and_said(pair, name):
    found, expected = (FINDERS[name](*pair, prompts) for prompts in (WORST, GOOD))
    assert (found.prompts.used, found.prompts.failed) == (expected.prompts.used, expected.prompts.failed + 1)
    assert any("NaN" in note for note in found.notes)
    assert not any("NaN" in note for note in expected.notes)
    for key, scores in expected.scores.items():
        np.testing.assert_allclose(found.scores[key], scores, rtol=1e-3, atol=1e-4 * np.abs(scores).max())
    assert len(found.neurons) == len(expected.neurons)


@pytest.mark.parametrize("name", FINDERS)
def test_only_prompts_that_give_nan_are_an_error_that_says_so(pair, name):
    with pytest.raises(NumericalError, match="NaN|finite"):
        FINDERS[name](*pair, [MARKED, f"how {MARKED}"])


@pytest.mark.parametrize(
    "options", [{}, {"sample": True, "seed": 3}, {"num_beams": 2}], ids=["greedy", "sampled", "beams"]
)
def test_a_completion_of_nan_is_empty_and_marked_and_unscored(pair, options, tmp_path):
    notes = []
    answers = pair[0].complete(WORST, **SHORT, notes=notes, **options)
    failed = [one for one in answers if one.finish_reason == "failed"]
    assert [(one.prompt, one.completion, one.token_ids) for one in failed] == [(MARKED, "", ())]
    assert notes == [f"1 of 6 prompts {UNKNOWN}", "1 of 6 prompts gave NaN or infinity and have no answer"]
    expected = pair[0].complete(GOOD, **SHORT, **options)
    if "sample" not in options:  # draws go by batch
        assert [one.token_ids for one in answers if one.prompt != MARKED] == [
            one.token_ids for one in expected
        ]
    assert sn.judge_refusal(answers).rate.unscored == 1 + sum(not one.completion.strip() for one in expected)
    answers.save(tmp_path / "completions.jsonl")
    assert [one.finish_reason for one in Completions.load(tmp_path / "completions.jsonl")] == [
        one.finish_reason for one in answers
    ]


def test_statistics_leave_it_out(pair):
    lm, notes = pair[0], []
    ids = [row.ids for row in lm.encode(WORST)]
    found = sn.activation_statistics(lm, ids, notes=notes)
    expected = sn.activation_statistics(lm, [ids[index] for index in (0, 1, 3, 4, 5)])
    assert found.failed == 1
    assert found.counts == expected.counts
    assert len(notes) == 1
    for key, sums in expected.sums.items():
        np.testing.assert_allclose(found.sums[key], sums, rtol=1e-4, atol=1e-4)


def test_losses_and_divergences_leave_it_out(pair):
    lm, notes = pair[0], []
    losses, expected = token_losses(lm, WORST, notes=notes), token_losses(lm, GOOD)
    assert losses.failed == 1
    assert losses.total == pytest.approx(expected.total, rel=1e-5)
    assert losses.n_tokens == expected.n_tokens
    ids = [row.ids for row in lm.encode(WORST)]
    assert [len(row) for row in token_divergences(lm, ids, pair[1], notes=notes)] == [
        0 if n == 2 else len(ids[n]) for n in range(6)
    ]
    assert sum("NaN" in note for note in notes) == 2
    assert np.isfinite(kl_divergence(lm, ids, pair[1]))
    assert kl_divergence(lm, [ids[2]], pair[1]) is None


def test_a_choice_is_none_of_the_answers(pair):
    lm = pair[0]
    ids = [row.ids for row in lm.encode(WORST[1:3])]
    fine, broken = answer_probabilities(lm, ids, [[[5], [6]]] * 2)
    assert np.isfinite(fine.probabilities).all()
    assert np.isnan([broken.mass, *broken.probabilities]).all()


def test_verify_counts_it_as_unscored_in_every_arm(pair):
    lm = pair[0]
    told = sn.verify_deactivate(
        lm,
        NeuronSet({"layers.0.down": range(9)}, lm.table),
        Prompts.from_list(WORST),
        Prompts.from_list(HARMLESS),
        random=1,
        **SHORT,
    ).record()
    for arm in (told["untreated"], told["treated"], *told["random"]):
        assert arm["harmful_refused"]["unscored"] >= 1


@pytest.fixture(scope="module")
def short_pair():
    found = []
    for noise in (5, 6):
        lm = marked_model(0, noise)
        lm.model.config.max_position_embeddings = 40
        found.append(LanguageModel(lm.model, tiny_tokenizer(adds_bos=False), template="none"))
    return found


@pytest.mark.parametrize("name", FINDERS)
def test_a_prompt_of_a_single_token_is_scored(short_pair, name):
    assert [len(row.ids) for row in short_pair[0].encode(["water", "house"])] == [1, 1]
    found = FINDERS[name](*short_pair, ["water", "house"])
    assert found.prompts.used + found.prompts.failed == 2
    assert found.prompts.used >= 1


@pytest.mark.parametrize("name", FINDERS)
def test_a_prompt_longer_than_the_context_is_counted_truncated(short_pair, name):
    found = FINDERS[name](*short_pair, [*HARMLESS, "tell me about the red house " * 10])
    assert found.prompts.truncated == 1
    assert found.prompts.used + found.prompts.failed == 4
