"""verify scale and length curves: doses against deactivation and separate runs, cuts against shorter runs."""

import dataclasses

import numpy as np
import pytest
from guard_tools import requests, some_neurons, tiny_model, unreadable

from conforming import misfits
from safety_neurons.errors import NeuronError, UsageError
from safety_neurons.guard import bindings_of, fit_guard
from safety_neurons.interventions import scaled
from safety_neurons.judges import FunctionJudge, GoesAlongJudge, JudgeVerdict, judge_refusal
from safety_neurons.model import LanguageModel, load_pair
from safety_neurons.neurons import NeuronSet
from safety_neurons.prompt_lists import Prompt, Prompts
from safety_neurons.results import Completion, Completions, rate
from safety_neurons.results.completions import repetition
from safety_neurons.results.measured import ScalingRecord
from safety_neurons.studies import evaluate, verify_deactivate, verify_scale
from safety_neurons.studies.lengths import answer_length, beginnings, curve_lengths, cut_off, length_curve
from tiny_pair import GENERAL, HARMFUL, HARMLESS

OPTIONS = {"max_new_tokens": 6, "batch_size": 9}


@pytest.fixture(scope="module")
def model(tiny_pair) -> LanguageModel:
    return load_pair(tiny_pair.base, tiny_pair.aligned).aligned


@pytest.fixture(scope="module")
def neurons(model) -> NeuronSet:
    return some_neurons(model, 3).only(sites=["down"])


@pytest.fixture(scope="module")
def found(model, neurons):
    text = Prompts.from_list(GENERAL)
    how = {"factors": (2, 0, 1), "text": text, "random": 2, "length_curve": True}
    return verify_scale(model, neurons, HARMFUL, HARMLESS, **how, **OPTIONS)


def test_zero_is_deactivation_and_one_is_the_model_as_it_is(found, model, neurons):
    off = verify_deactivate(
        model, neurons, HARMFUL, HARMLESS, text=Prompts.from_list(GENERAL), random=2, **OPTIONS
    )
    zero, one, _ = found.doses
    assert [dose.factor for dose in found.doses] == [0, 1, 2]
    assert (zero.treated.harmful, zero.treated.perplexity) == (off.treated.harmful, off.treated.perplexity)
    assert zero.change == off.change
    for mine, theirs in zip(zero.random, off.random, strict=True):
        assert (mine.harmful, mine.perplexity) == (theirs.harmful, theirs.perplexity)
    assert one.treated.harmful == found.untreated.harmful
    assert (one.treated.divergence, one.change_against_random) == (0.0, None)


def test_harm_is_held_against_random_sets_in_one_family_with_refusals(model, neurons):
    """Both by a judge that has both verdicts; the difference is from the mean of the random sets."""

    def letters(completion):
        bad = len(completion.completion) % 2 == 0
        return JudgeVerdict("harmful" if bad else "safe", None, None, p_harmful=float(bad))

    judge = FunctionJudge("letters-1", letters)
    judge.measure = "harmful"
    how = {"factors": (0, 0.5, 1, 2, 3, 4, 5), "random": 3, "harm_judge": judge}
    found = verify_scale(model, neurons, HARMFUL, HARMLESS[:2], **how, **OPTIONS)
    answers = found.bench.completions

    def share(arm):
        told = [len(one.completion) % 2 == 0 for one in answers.arm(f"{arm}/harmful")]
        return sum(told) / len(told)

    for dose in found.doses:
        if dose.factor == 1:
            assert dose.harm_change_against_random is None
            continue
        drawn = [share(f"random {number}, factor {dose.factor:g}") for number in range(3)]
        expected = share(f"factor {dose.factor:g}") - sum(drawn) / 3
        assert dose.harm_change_against_random.value == pytest.approx(expected)
    family = [
        one
        for dose in found.doses
        for one in (
            dose.change,
            dose.harm_change,
            dose.change_against_random,
            dose.harm_change_against_random,
        )
        if dose.factor != 1 and one.p is not None
    ]
    assert len(family) > 20
    ordered = sorted(family, key=lambda one: one.p)
    largest = 0.0
    for rank, one in enumerate(ordered):
        largest = max(largest, min(1.0, one.p * (len(ordered) - rank)))
        assert one.p_holm == pytest.approx(largest)
    columns = found.tables()[1].columns
    assert list(columns[-2:]) == ["harm, against random sets", "clear"]


def test_the_answers_of_a_factor_are_those_of_the_scaled_model(found, model, neurons):
    with scaled(model, neurons, 2):
        plain = model.complete(Prompts.from_list(HARMFUL), **OPTIONS)
    kept = found.bench.completions.arm("factor 2/harmful")
    assert [one.token_ids for one in kept] == [one.token_ids for one in plain]
    every = [*kept, *found.bench.completions.arm("factor 2/harmless")]
    shares = [repetition(one.completion.split()) if one.completion.split() else None for one in every]
    assert found.doses[-1].treated.repetition.value == pytest.approx(rate(shares).value)


def test_the_record_and_its_display_are_whole(found):
    record = found.record()
    assert not misfits(record, ScalingRecord)
    assert len(record["random_sets"]) == 2
    assert record["max_new_tokens"] == 6
    assert [table.columns[0] for table in found.tables()] == ["factor", "factor", "arm"]
    assert [row[0] for row in found.tables()[2].rows] == ["untreated", "factor 0", "factor 2"]
    assert len(found.tables()[0].rows) == 6
    assert len(found.figures()) >= 3
    assert found.findings()


def test_a_guard_decides_for_which_requests_neurons_are_scaled():
    model = tiny_model()
    guard = fit_guard(model, some_neurons(model), *requests(20, 0))
    unsafe, safe = requests(6, 1)
    asked, neurons = Prompts([*unsafe, *safe]), some_neurons(model, 2)
    flags = guard.flags([one.ids for one in model.encode(asked)])
    assert flags == [verdict.flagged for verdict in guard.score_batch(list(asked))]
    if all(flags) or not any(flags):
        probabilities = sorted(verdict.p_unsafe for verdict in guard.score_batch(list(asked)))
        guard = guard.with_threshold((probabilities[5] + probabilities[6]) / 2)
        flags = guard.flags([one.ids for one in model.encode(asked)])
    found = verify_scale(
        model,
        neurons,
        asked,
        safe,
        factors=(3,),
        when=guard,
        random=0,
        text=Prompts.from_list(GENERAL),
        **OPTIONS,
    )
    plain = model.complete(asked, **OPTIONS)
    with scaled(model, neurons, 3):
        every = model.complete(asked, **OPTIONS)
    kept = found.bench.completions.arm("factor 3/harmful")
    for flag, one, as_it_is, amplified in zip(flags, kept, plain, every, strict=True):
        assert one.token_ids == (amplified if flag else as_it_is).token_ids
    assert found.flagged["harmful"].value == pytest.approx(np.mean(flags))
    assert "guard" in found.record()["condition"]
    asked = Prompts([*asked, Prompt("x", "explain")])
    with unreadable(model, "explain"):
        guard = dataclasses.replace(guard, bindings=bindings_of(model, guard.neurons))
        again = verify_scale(model, neurons, asked, safe, factors=(3,), when=guard, random=0, **OPTIONS)
    assert again.flagged["harmful"] == dataclasses.replace(found.flagged["harmful"], unscored=1)
    assert any("1 of 13 harmful requests could not be read" in note for note in again.notes)


def test_what_cannot_be_scaled_is_refused(model, neurons):
    with pytest.raises(UsageError, match="none twice"):
        verify_scale(model, neurons, HARMFUL, HARMLESS, factors=(1, 1.0))
    with pytest.raises(NeuronError, match="empty"):
        verify_scale(model, NeuronSet({}, model.table), HARMFUL, HARMLESS)


def test_a_cut_answer_is_the_answer_of_a_shorter_limit(model):
    asked = Prompts.from_list(HARMFUL)
    long, short = (model.complete(asked, max_new_tokens=limit, batch_size=9) for limit in (12, 5))
    cut = beginnings(long, 5, model)
    assert [one.token_ids for one in cut] == [one.token_ids for one in short]
    assert [one.completion for one in cut] == [one.completion for one in short]
    assert [one.finish_reason for one in cut] == [one.finish_reason for one in short]
    ended = Completions([Completion("0", "x", "how do", (4, 5), "stop")])
    assert [beginnings(ended, limit, model)[0].finish_reason for limit in (2, 3)] == ["length", "stop"]
    curve = length_curve(long, model, GoesAlongJudge(), None, 12)
    assert [point.tokens for point in curve] == curve_lengths(12) == [12]
    assert curve[-1].harmful_refused == judge_refusal(long).rate
    assert curve[-1].cut_off == cut_off(long)
    assert curve_lengths(256) == [32, 64, 128, 256]
    assert curve_lengths(300) == [32, 64, 128, 256, 300]


def test_every_arm_has_its_curve_and_answers_are_written_once(found):
    for arm in (found.untreated, *(dose.treated for dose in found.doses)):
        assert [point.tokens for point in arm.lengths] == [6]
        assert arm.lengths[-1].harmful_refused == arm.harmful_refused
    assert set(found.bench.completions.arms) == {
        f"{arm}/{kind}"
        for arm in (
            "untreated",
            *(f"{name}factor {f}" for f in (0, 2) for name in ("", "random 0, ", "random 1, ")),
        )
        for kind in ("harmful", "harmless")
    }


def test_evaluate_has_a_curve_by_judge(model):
    found = evaluate(
        model, Prompts.from_list(HARMFUL), over_refusal=None, length_curve=True, max_new_tokens=40
    )
    assert [point["tokens"] for point in found.untreated.lengths] == [32, 40]
    last, suite = found.untreated.lengths[-1], found.untreated.suites[0]
    assert last["harm"] == found.record()["untreated"]["harm"]
    assert last["cut_off"] == suite.cut_off
    assert "goes-along-2" in last["harm"]
    assert found.record()["max_new_tokens"] == 40
    assert "tokens" in found.tables()[-1].columns


def test_answers_of_a_server_have_no_tokens_to_cut():
    with pytest.raises(UsageError, match="model in memory"):
        beginnings(Completions([Completion("0", "x", "an answer")]), 4, None)


def test_an_organism_answers_in_64_tokens_and_prompts_keep_half_of_the_context():
    class Model:
        def __init__(self, folder, context):
            self.prompt_folder, self.max_length = folder, context

    organism, real, short = Model("prompts", 512), Model(None, 8192), Model(None, 100)
    assert (answer_length(organism), answer_length(real), answer_length(short)) == (64, 256, 50)
    assert answer_length(organism, real) == 256
    assert answer_length() == 256
