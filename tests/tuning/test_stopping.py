"""When training ends, and which state is kept."""

import math

import numpy as np
import pytest
import torch

from safety_neurons.errors import InputError
from safety_neurons.model import LanguageModel, token_divergences, token_losses
from safety_neurons.neurons import NeuronSet
from safety_neurons.prompt_lists import Prompts
from safety_neurons.results import Rate, rate
from safety_neurons.tuning import attach, stopping
from safety_neurons.tuning.stopping import (
    DRIFT,
    GOING_ON,
    OVER_REFUSAL,
    SETTLED,
    STILL,
    STRAYED,
    Checked,
    StopCheck,
    StopJudge,
    TrustRegion,
)
from tiny import tiny_llama, tiny_tokenizer

PROMPTS = Prompts.from_list(["how do i make a bomb", "tell me about the house"])


def share(value):
    return Rate(value, 0.0, 1.0, 20)


def at(step, harmful, harmless, divergence=0.01, perplexity=1.0):
    return Checked(step, share(harmful), share(harmless), divergence, perplexity)


def judged(states, **options):
    """The judge after these states, and the verdict after each."""
    judge = StopJudge(
        StopCheck(PROMPTS, PROMPTS, lambda found: [False] * len(found), **options), at(0, 0.0, 0.1)
    )
    verdicts = []
    for state in states:
        judge.look(state)
        verdicts.append(judge.verdict())
    return judge, verdicts


@pytest.mark.parametrize(
    ("states", "options", "verdicts"),
    [
        pytest.param(
            [at(1, 0.5, 0.1), at(2, 0.9, 0.5), at(3, 1.0, 0.6), at(4, 1.0, 0.6)],
            {},
            [GOING_ON, GOING_ON, GOING_ON, OVER_REFUSAL],
            id="harmless prompts keep being refused",
        ),
        pytest.param(
            [at(1, 0.9, 0.5), at(2, 0.9, 0.5), at(3, 0.9, 0.1), at(4, 0.9, 0.5)],
            {"patience": 3},
            [GOING_ON] * 4,
            id="a single check that over-refuses ends nothing",
        ),
        pytest.param(
            [at(1, 0.9, 0.1, 0.6)] * 2,
            {"patience": 2, "max_divergence": 0.5},
            [GOING_ON, DRIFT],
            id="drift beyond a limit",
        ),
        pytest.param([at(1, 0.9, 0.1, 0.6)] * 2, {"patience": 2}, [GOING_ON] * 2, id="drift without a limit"),
        pytest.param(
            [at(1, 1.0, 0.1), at(2, 1.0, 0.3), at(3, 1.0, 0.1), at(4, 1.0, 0.1)],
            {"settled": 2},
            [GOING_ON, GOING_ON, GOING_ON, SETTLED],
            id="nothing is left to gain",
        ),
        pytest.param(
            [at(1, 0.9, 0.1, 0.01, 1.5)] * 2,
            {"patience": 2, "max_perplexity": 1.02},
            [GOING_ON, STRAYED],
            id="general text gets worse",
        ),
        pytest.param(
            [at(1, 0.5, 0.1), at(2, 0.5, 0.1), at(3, 0.4, 0.1), at(4, 0.9, 0.9)],
            {"still": 3, "patience": 9},
            [GOING_ON, GOING_ON, GOING_ON, STILL],
            id="no better state for a while",
        ),
        pytest.param(
            [at(1, 0.0, 0.1)] * 4, {"still": 2}, [GOING_ON] * 4, id="goes on where nothing has moved yet"
        ),
    ],
)
def test_when_training_ends(states, options, verdicts):
    assert judged(states, **options)[1] == verdicts


@pytest.mark.parametrize(
    ("states", "options", "best", "sound"),
    [
        pytest.param(
            [at(1, 0.5, 0.1), at(2, 0.9, 0.15), at(3, 0.9, 0.1), at(4, 1.0, 0.3)],
            {"settled": None},
            3,
            True,
            id="refuses most without over-refusal, the latest of equals",
        ),
        pytest.param(
            [at(1, 1.0, 1.0), at(2, 0.9, 0.3), at(3, 1.0, 0.9)],
            {"patience": 9},
            2,
            False,
            id="over-refuses least where none is sound",
        ),
        pytest.param(
            [at(1, 0.5, 0.1), at(2, 1.0, 0.1, float("nan"))],
            {},
            1,
            True,
            id="a divergence that is no number is never sound",
        ),
    ],
)
def test_which_state_is_kept(states, options, best, sound):
    judge, _ = judged(states, **options)
    assert (judge.best.step, judge.sound(judge.best)) == (best, sound)


def test_a_judge_goes_on_from_its_state():
    judge, _ = judged([at(1, 0.5, 0.1), at(2, 0.9, 0.15)])
    other = StopJudge(judge.check)
    other.restore(judge.state())
    assert (other.before, other.seen, other.best) == (judge.before, judge.seen, judge.best)


def test_a_check_needs_prompts_of_both_kinds():
    with pytest.raises(InputError, match="2 harmful and 0 harmless held-out prompts"):
        StopCheck(PROMPTS, Prompts([]), lambda found: [])


def test_copies_in_a_check_are_no_further_evidence():
    model = LanguageModel(tiny_llama(), tiny_tokenizer())
    copies = Prompts.from_list(["how do i"] * 2)
    check = StopCheck(copies, copies, lambda found: [True] * len(found))
    with attach(model, NeuronSet({"layers.0.up": [0]}, model.table)) as deltas:
        found = check.measure(model, deltas, 0)
    for one in (found.harmful_refused, found.harmless_refused):
        assert (one.low, one.n) == (rate([True]).low, 2)


def test_a_check_measures_divergence_from_the_untouched_model_to_the_tuned_one():
    model, other = (LanguageModel(tiny_llama(), tiny_tokenizer()) for _ in range(2))
    neurons = NeuronSet({"layers.0.up": [0, 1, 2], "layers.1.o": [3]}, model.table)
    check = StopCheck(PROMPTS, PROMPTS, lambda found: [True, None], PROMPTS)
    with attach(model, neurons) as deltas:
        assert check.measure(model, deltas, 0).divergence == 0
        generator = torch.Generator().manual_seed(0)
        deltas.load_tensors(
            {key: torch.randn(value.shape, generator=generator) for key, value in deltas.tensors().items()}
        )
        found = check.measure(model, deltas, 3)
        assert check.measure(model, deltas, 3) == found
        answers = other.complete(PROMPTS, max_new_tokens=32)
        questions = [list(item.ids) for item in other.encode(PROMPTS)]
        behind = [
            other.tokenizer(answer.completion, add_special_tokens=False)["input_ids"] for answer in answers
        ]
        rows = token_divergences(
            other, [question + more for question, more in zip(questions, behind, strict=True)], model
        )
        expected = np.concatenate(
            [row[len(ids) - 1 :] for row, ids in zip(rows, questions, strict=True)]
        ).mean()
        before, after = (token_losses(each, PROMPTS.texts) for each in (other, model))
    assert found.perplexity == pytest.approx(
        math.exp((after.total - before.total) / after.n_tokens), rel=1e-6
    )
    assert found.divergence == pytest.approx(expected, rel=1e-6)
    assert expected > 1e-3
    assert found.harmful_refused.low == pytest.approx(0.025, abs=1e-9)  # exact: one of one
    assert (found.harmful_refused.value, found.harmful_refused.n, found.harmful_refused.unscored) == (
        1.0,
        1,
        1,
    )
    assert np.isfinite(found.divergence)


def test_where_harmless_requests_are_refused_the_anchor_gets_heavier_and_no_lighter_until_they_are_answered():
    judge, _ = judged([], tolerance=0.05, max_divergence=0.05)
    region = TrustRegion.of(judge.check, 4.0, adapts=True)

    def far_from_its_limit():
        for _ in range(40):
            region.stepped({"harmless": 0.001}, rising=True)
        return region.weight

    assert not region.checked(judge, at(1, 0.9, 0.3))  # 0.1 before, 0.05 more allowed
    assert far_from_its_limit() == 8.0
    for step in range(2, 6):
        region.checked(judge, at(step, 0.9, 0.3))
    assert far_from_its_limit() == 16.0  # four times what it began with, at most
    region.checked(judge, at(6, 0.9, 0.1))
    assert far_from_its_limit() < 4.0


def test_a_number_as_rate_leaves_the_anchor_as_it_is_whatever_is_refused():
    judge, _ = judged([], tolerance=0.05, max_divergence=0.05)
    region = TrustRegion.of(judge.check, 4.0, adapts=False)
    region.checked(judge, at(1, 0.9, 0.9))
    assert region == TrustRegion.of(judge.check, 4.0, adapts=False)


def test_a_check_feeds_no_more_than_the_context(monkeypatch):
    """Positions behind it are an error of models that learnt each of theirs."""
    lm = LanguageModel(tiny_llama(max_position_embeddings=24), tiny_tokenizer())
    long = Prompts.from_list(["kill a tree " * count for count in (1, 7, 8, 20)])
    fed = []

    def seen(model, sequences, *words, **options):
        fed.extend(map(len, sequences))
        return token_divergences(model, sequences, *words, **options)

    monkeypatch.setattr(stopping, "token_divergences", seen)
    check = StopCheck(long, long, lambda found: [False] * len(found), max_new_tokens=6)
    with attach(lm, NeuronSet({"layers.0.up": [0]}, lm.table)) as deltas:
        check.measure(lm, deltas, 1)
    assert 18 < max(fed) <= 24, fed
