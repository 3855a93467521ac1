"""Fitting a guard on a model whose prompts differ by a word, recalibrating it after an update, and what is
said of the data.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from guarded import some_neurons, tiny_model

from safety_neurons import NeuronSet, Provenance
from safety_neurons.errors import ForeignModelError, InputError, UsageError
from safety_neurons.guard import Guard, Pooling, fit_guard, recalibrate
from safety_neurons.guard.fit import further_readings, labelled, measured_on, said_of_parts
from safety_neurons.model import LanguageModel
from safety_neurons.prompt_lists import Message, Prompt, Prompts
from safety_neurons.results import plain
from tiny import WORDS, tiny_llama, tiny_tokenizer

OTHERS = [word for word in WORDS if word not in ("bomb", "cake")][:40]


def requests(word: str, count: int, seed: int) -> list[str]:
    """Different sentences that end in a word."""
    generator = np.random.default_rng([seed, len(word)])
    return [" ".join([*generator.choice(OTHERS, generator.integers(3, 8)), word]) for _ in range(count)]


@pytest.fixture(scope="module")
def neurons(model: LanguageModel) -> NeuronSet:
    return some_neurons(model, 8)


@pytest.fixture(scope="module")
def guard(model: LanguageModel, neurons: NeuronSet) -> Guard:
    return fit_guard(model, neurons, requests("bomb", 60, 0), requests("cake", 80, 0), fpr=0.05)


def test_a_fit_tells_the_kinds_apart_on_fresh_prompts_and_says_what_supports_it(
    guard: Guard, model: LanguageModel
) -> None:
    caught = guard.score_batch(requests("bomb", 40, 1))
    passed = guard.score_batch(requests("cake", 40, 1))
    assert np.mean([verdict.flagged for verdict in caught]) > 0.8
    assert np.mean([verdict.flagged for verdict in passed]) < 0.2
    assert guard.model is model
    assert guard.in_force == "provisional fpr 0.05"
    assert any("provisional: 24 safe examples, 400 are needed" in note for note in guard.notes)
    assert all(point.threshold is None and not point.supported for point in guard.operating_points)
    assert {entry["pooling"] for entry in guard.report["poolings"]} == {
        "last",
        "mean",
        "max over windows of 4",
        "max over windows of 16",
    }
    best = max(
        guard.report["poolings"], key=lambda entry: (round(entry["auroc"]["value"], 6), -entry["log_loss"])
    )
    assert best["pooling"] == str(guard.pooling)
    assert guard.report["split"]["calibration"] == {"unsafe": 18, "safe": 24}
    histogram = guard.reference["p_unsafe"]
    assert (sum(histogram["unsafe"]), sum(histogram["safe"])) == (18, 24)
    assert sum(guard.reference["distance"]["counts"]) == 42


def test_enough_safe_prompts_support_a_point_and_its_threshold_is_in_force(
    model: LanguageModel, neurons: NeuronSet
) -> None:
    found = fit_guard(
        model,
        neurons.only(sites=["down"]),
        requests("bomb", 30, 0),
        requests("cake", 160, 0),
        pooling="last",
        fpr=0.5,
    )
    point = found.operating_points[0]
    assert (point.fpr_target, point.supported) == (0.5, True)
    assert (found.threshold, found.in_force) == (
        point.threshold,
        "provisional fpr 0.5",
    )  # not measured on the user's traffic yet
    assert found.at(0.5).threshold == found.threshold
    again = fit_guard(
        model,
        neurons.only(sites=["down"]),
        requests("bomb", 30, 0),
        requests("cake", 160, 0),
        pooling="last",
        fpr=0.5,
    )
    assert torch.equal(again.classifier.weights, found.classifier.weights)
    assert again.threshold == found.threshold


def test_prompts_in_both_lists_repeats_and_truncated_ones_are_left_out_and_counted(
    neurons: NeuronSet,
) -> None:
    short = tiny_model(max_position_embeddings=24)
    unsafe, safe = requests("bomb", 30, 0), requests("cake", 30, 0)
    given = Prompts.from_list([*unsafe, unsafe[0].upper(), safe[3], "bomb " * 60], "unsafe")
    found = fit_guard(short, neurons, given, safe, pooling="last")
    notes = " | ".join(found.notes)
    assert "1 unsafe prompt repeats others" in notes
    assert "1 prompt is both unsafe and safe" in notes
    assert "left out of the fit: 1 truncated prompt" in notes
    assert found.report["prompts"] == {"unsafe": 30, "safe": 29, "left_out": 1}


def test_turns_count_when_prompts_are_told_apart() -> None:
    turns = [(Message("system", word), Message("user", "go")) for word in ("a", "b")]
    data = labelled(Prompts([Prompt("0", "go", turns[0])]), Prompts([Prompt("0", "go", turns[1])]))
    assert len(data.prompts) == 2
    with pytest.raises(InputError, match="in the other list too"):
        labelled(Prompts([Prompt("0", "go", turns[0])]), Prompts([Prompt("1", "go", turns[0])]))


def test_prompts_that_the_neurons_were_found_on_are_counted(model: LanguageModel, neurons: NeuronSet) -> None:
    unsafe = Prompts.from_list(requests("bomb", 20, 0))
    found_on = Provenance("neurons", "test", config={"prompt_digests": unsafe[:7].digests})
    told = NeuronSet(dict(neurons.items()), model.table, found_on)
    guard = fit_guard(model, told, unsafe, requests("cake", 20, 0), pooling="last")
    assert "7 of the 40 prompts are among those the neurons were found on" in guard.notes


@pytest.mark.parametrize("pooling", ["last", "mean", "auto"])
def test_features_that_are_the_same_at_every_prompt_are_refused(model: LanguageModel, pooling: str) -> None:
    dead = tiny_model()
    down = dead.anatomy.layers[1].module.mlp
    with torch.no_grad():
        down.gate_proj.weight.zero_()  # so the input of down is 0 at every token
    silent = NeuronSet({"layers.1.down": range(20)}, dead.table)
    with pytest.raises(InputError, match="the same at every prompt") as caught:
        fit_guard(dead, silent, requests("bomb", 20, 0), requests("cake", 20, 0), pooling=pooling, other=None)
    assert "\n" not in str(caught.value)
    alive = fit_guard(
        model, silent, requests("bomb", 20, 0), requests("cake", 20, 0), pooling="last", other=None
    )
    with pytest.raises(InputError, match="the same at every prompt"):
        recalibrate(alive, dead, requests("bomb", 20, 1), requests("cake", 20, 1))


def test_a_template_that_ignores_the_prompt_cannot_be_fit_on(neurons: NeuronSet) -> None:
    deaf = LanguageModel(tiny_llama(), tiny_tokenizer("{{ bos_token }}tell me a story"), name="deaf")
    with pytest.raises(InputError) as caught:
        fit_guard(deaf, neurons, requests("bomb", 20, 0), requests("cake", 20, 0), pooling="last")
    assert "\n" not in str(caught.value)


def test_a_fit_says_what_its_threshold_catches_and_what_it_flags_of_requests_from_elsewhere(
    guard: Guard, model: LanguageModel
) -> None:
    false, caught = guard.rates or (None, None)
    assert caught is not None
    assert false is not None
    held = np.array(guard.reference["probabilities"]["unsafe"])
    assert (caught.n, caught.value) == (18, float((held >= guard.threshold).mean()))
    assert guard.standing["caught"] == caught.to_json()
    assert guard.why_idle is None
    assert guard.report["other"]["safe"] == "builtin:look-alikes"
    assert guard.report["other"]["fpr"]["n"] == guard.report["other"]["tpr"]["n"] == 68
    assert any("provisional until it was measured on your own traffic" in note for note in guard.notes)
    other = fit_guard(
        model,
        guard.neurons,
        requests("bomb", 60, 0),
        requests("cake", 80, 0),
        pooling="last",
        fpr=0.05,
        other=(requests("bomb", 30, 5), [f"{text} bomb cake" for text in requests("bomb", 30, 6)]),
    )
    told = other.report["other"]
    flagged = [
        verdict.flagged
        for verdict in other.score_batch([f"{text} bomb cake" for text in requests("bomb", 30, 6)])
    ]
    assert told["fpr"]["value"] == np.mean(flagged)
    unread = tiny_model()
    with torch.no_grad():
        unread.inner.get_input_embeddings().weight[unread.encode("where")[0].ids[-2]] = torch.nan
    lists = [Prompts.from_list([*requests("bomb", 30, seed), "where", "where how"]) for seed in (5, 6)]
    before = measured_on(dataclasses.replace(other, model=unread), *(one[:30] for one in lists))
    after = measured_on(dataclasses.replace(other, model=unread), *lists)
    for name in ("fpr", "tpr"):
        assert after.report["other"][name] == {**before.report["other"][name], "unscored": 2}
    assert any("4 of 64 requests from another source could not be read" in note for note in after.notes)
    warned = any("of safe requests from another source" in note for note in other.notes)
    assert warned == (told["fpr"]["low"] > 0.05)
    unmeasured = fit_guard(
        model, guard.neurons, requests("bomb", 20, 0), requests("cake", 20, 0), pooling="last", other=None
    )
    assert "other" not in unmeasured.report


def test_what_a_threshold_catches_is_as_sure_as_there_are_groups(
    model: LanguageModel, neurons: NeuronSet, tmp_path: pathlib.Path
) -> None:
    """Four requests each are of one deed: the threshold in force knows as little as its operating point."""

    def grouped(word: str, seed: int) -> Prompts:
        texts = requests(word, 80, seed)
        return Prompts(
            [Prompt(f"{word}-{n}", text, group=f"{word}-{n // 4}") for n, text in enumerate(texts)]
        )

    found = fit_guard(model, neurons, grouped("bomb", 0), grouped("cake", 0), fpr=0.3, other=None)
    again = recalibrate(found, model, grouped("bomb", 1), grouped("cake", 1))
    found.save(tmp_path)
    for guard in (found, again, Guard.load(tmp_path)):
        (point,) = (one for one in guard.operating_points if one.fpr_target == 0.3)
        assert guard.rates is not None
        for rate, known in zip(guard.rates, (point.fpr, point.tpr), strict=True):
            assert (rate.value, rate.n) == (known.value, known.n)
            assert (rate.low, rate.high) == pytest.approx((known.low, known.high))
    alone = dataclasses.replace(found, reference={**found.reference, "groups": None})
    assert found.rates is not None
    assert alone.rates is not None
    for rate, known in zip(found.rates, alone.rates, strict=True):
        assert rate.value == known.value
        assert (rate.high or 0) - (rate.low or 0) > (known.high or 0) - (known.low or 0)


def test_a_guard_that_flags_look_alikes_is_warned_of(model: LanguageModel, neurons: NeuronSet) -> None:
    """Safe requests of the other source that are what the fit calls unsafe."""
    found = fit_guard(
        model,
        neurons,
        requests("bomb", 60, 0),
        requests("cake", 80, 0),
        fpr=0.05,
        other=(requests("bomb", 30, 5), requests("bomb", 30, 6)),
    )
    assert found.report["other"]["fpr"]["low"] > 0.05
    assert any("of safe requests from another source (list) it flags" in note for note in found.notes)


def test_a_guard_at_a_threshold_that_catches_nothing_says_so(guard: Guard) -> None:
    highest = max(guard.reference["probabilities"]["unsafe"])
    idle = guard.with_threshold(float(np.nextafter(highest, 2)))
    assert idle.why_idle is not None
    assert "caught 0 of 18 unsafe requests" in idle.why_idle
    assert guard.with_threshold(highest).why_idle is None  # one of them
    assert (
        dataclasses.replace(idle, reference={}).rates is None
    )  # an old file and a threshold of one's own: nobody knows
    old = dataclasses.replace(guard, reference={})
    assert old.rates == guard.rates  # its operating point knows


def test_only_safe_requests_of_ones_own_end_that_a_rate_is_provisional(
    model: LanguageModel, guard: Guard
) -> None:
    own = recalibrate(guard, model, requests("bomb", 40, 7), requests("cake", 60, 7), fpr=0.5)
    assert (own.confirmed, own.in_force, own.at(0.5).in_force) == (True, "fpr 0.5", "fpr 0.5")
    assert not any("your own traffic" in note for note in own.notes)
    seen = recalibrate(guard, model, requests("bomb", 40, 7), requests("cake", 60, 0), fpr=0.5)
    built_in = recalibrate(
        guard, model, model.prompts("builtin:harmful"), model.prompts("builtin:harmless"), fpr=0.5
    )
    for one in (seen, built_in):
        assert (one.confirmed, one.in_force, one.at(0.5).in_force) == (
            False,
            "provisional fpr 0.5",
            "provisional fpr 0.5",
        )
    assert own.report["other"] is None  # measured at another threshold


def test_conversations_are_fit_on_and_the_largest_of_their_readings_sets_the_threshold(
    model: LanguageModel, neurons: NeuronSet
) -> None:
    def talks(word: str, count: int, seed: int) -> list[list[dict[str, str]]]:
        return [
            [
                {"role": "user", "content": first},
                {"role": "assistant", "content": "here is the cake"},
                {"role": "user", "content": last},
            ]
            for first, last in zip(
                requests("cake", count, seed + 50), requests(word, count, seed), strict=True
            )
        ]

    unsafe, safe = talks("bomb", 40, 0), talks("cake", 60, 0)
    found = fit_guard(model, neurons, unsafe, safe, pooling="last", fpr=0.05, other=None)
    told = found.report["conversations"]
    assert (told["fpr"]["n"], told["tpr"]["n"]) == (18, 12)
    assert told["fpr"]["value"] >= told["fpr_read_whole"]["value"]
    verdicts = found.score_batch(safe + unsafe, top=0)
    kept = {word: set(np.round(found.reference["probabilities"][word], 5)) for word in ("safe", "unsafe")}
    parts = {"safe": verdicts[:60], "unsafe": verdicts[60:]}
    chances = {word: {round(one.p_unsafe or 0, 5) for one in part} for word, part in parts.items()}
    assert kept["safe"] <= chances["safe"]  # what set the threshold is what verdicts say
    assert kept["unsafe"] <= chances["unsafe"]
    assert any(one.reading != "conversation" for one in verdicts)
    again = recalibrate(found, model, talks("bomb", 20, 3), talks("cake", 20, 3))
    assert again.report["conversations"]["fpr"]["n"] == 20


def test_what_cannot_be_fit_is_one_line(model: LanguageModel, neurons: NeuronSet) -> None:
    with pytest.raises(InputError, match="no safe prompts"):
        fit_guard(model, neurons, ["bomb"], [])
    with pytest.raises(InputError, match="expected at least 10"):
        fit_guard(model, neurons, requests("bomb", 4, 0), requests("cake", 30, 0))
    with pytest.raises(UsageError, match="window"):
        fit_guard(model, neurons, requests("bomb", 20, 0), requests("cake", 20, 0), window=4)
    with pytest.raises(UsageError, match="false-positive rate"):
        fit_guard(model, neurons, requests("bomb", 20, 0), requests("cake", 20, 0), fpr=0.0)


def test_recalibrating_keeps_the_weights_and_makes_the_guard_fit_the_updated_model(guard: Guard) -> None:
    updated = tiny_model()
    with torch.no_grad():
        for parameter in updated.inner.parameters():
            parameter.mul_(1.02)
    with pytest.raises(Exception, match="other weights"):
        guard.bind(updated)
    new = recalibrate(guard, updated, requests("bomb", 30, 2), requests("cake", 30, 2))
    assert torch.equal(new.classifier.weights, guard.classifier.weights)
    assert new.bind(updated).threshold == new.threshold
    assert new.bindings.weights_sha256 != guard.bindings.weights_sha256
    assert any(note.startswith("AUROC ") for note in new.notes)
    assert np.mean([verdict.flagged for verdict in new.score_batch(requests("bomb", 30, 3))]) > 0.7
    assert new.report["recalibrated"]["bindings_before"] == plain(guard.bindings)
    with pytest.raises(ForeignModelError):
        recalibrate(guard, tiny_model(intermediate_size=40), ["a"], ["b"])


def test_fitting_does_not_import_itself_into_using(tmp_path: Any, guard: Guard) -> None:
    import subprocess
    import sys

    guard.save(tmp_path)
    code = (
        "import sys, torch; from safety_neurons.guard import Guard; g = "
        "Guard.load(sys.argv[1]);print(float(g.probabilities(torch.zeros(1, len(g.neurons)))[0]) > 0, "
        "'sklearn' in sys.modules, 'scipy' in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert out.stdout.split() == ["True", "False", "False"]
    assert dataclasses.is_dataclass(guard)


def test_readings_of_a_conversation_that_give_nan_are_left_out_and_told(neurons: NeuronSet) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.inner.get_input_embeddings().weight[model.encode("where")[0].ids[-2]] = torch.nan
    turns = [("user", "where"), ("assistant", "a tree"), ("user", "bake a cake")]
    broken, whole = (
        Prompt("x", turns[-1][1], messages=tuple(Message(role, text) for role, text in some))
        for some in (turns, [("user", "a house"), *turns[1:]])
    )
    asked = [Prompt("y", "cake"), broken, whole]
    rows, unread = further_readings(model, asked, neurons, Pooling.of("last"))
    assert unread == {1}
    assert rows.keys() == {1, 2}
    assert 0 < len(rows[1]) < len(rows[2])
    assert np.isfinite(rows[1]).all()
    assert said_of_parts(unread) == [
        "1 conversation has a reading that gave NaN or infinity: the others count"
    ]
    assert said_of_parts(set()) == []
