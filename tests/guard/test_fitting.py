"""Fitting a guard on a model whose prompts differ by a word, recalibrating it after an update, and what is said of the data."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from guarded import some_neurons, tiny_model

from safety_neurons import NeuronSet, Provenance
from safety_neurons.errors import ForeignModelError, InputError, UsageError
from safety_neurons.guard import Guard, fit_guard, recalibrate
from safety_neurons.guard.fitting import labelled
from safety_neurons.model import LanguageModel
from safety_neurons.prompts import Message, Prompt, Prompts
from tiny import WORDS

OTHERS = [word for word in WORDS if word not in ("bomb", "cake")][:40]


def requests(word: str, count: int, seed: int) -> list[str]:
    """Different sentences that end in a word."""
    generator = np.random.default_rng([seed, len(word)])
    return [" ".join([*generator.choice(OTHERS, generator.integers(3, 8)), word]) for _ in range(count)]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model()


@pytest.fixture(scope="module")
def neurons(model: LanguageModel) -> NeuronSet:
    return some_neurons(model, 8)


@pytest.fixture(scope="module")
def guard(model: LanguageModel, neurons: NeuronSet) -> Guard:
    return fit_guard(model, neurons, requests("bomb", 60, 0), requests("cake", 80, 0), fpr=0.05)


def test_a_fit_tells_the_kinds_apart_on_fresh_prompts_and_says_what_supports_it(guard: Guard, model: LanguageModel) -> None:
    caught = guard.score_batch(requests("bomb", 40, 1))
    passed = guard.score_batch(requests("cake", 40, 1))
    assert np.mean([verdict.flagged for verdict in caught]) > 0.8
    assert np.mean([verdict.flagged for verdict in passed]) < 0.2
    assert guard.model is model
    assert guard.in_force == "provisional fpr 0.05"
    assert any("provisional: 24 safe examples, 400 are needed" in note for note in guard.notes)
    assert all(point.threshold is None and not point.supported for point in guard.operating_points)
    assert {entry["pooling"] for entry in guard.report["poolings"]} == {
        "last", "mean", "max over windows of 4", "max over windows of 16",
    }  # fmt: skip
    best = max(guard.report["poolings"], key=lambda entry: (round(entry["auroc"]["value"], 6), -entry["log_loss"]))
    assert best["pooling"] == str(guard.pooling)
    assert guard.report["split"]["calibration"] == {"unsafe": 18, "safe": 24}
    histogram = guard.reference["p_unsafe"]
    assert (sum(histogram["unsafe"]), sum(histogram["safe"])) == (18, 24)
    assert sum(guard.reference["distance"]["counts"]) == 42


def test_enough_safe_prompts_support_a_point_and_its_threshold_is_in_force(model: LanguageModel, neurons: NeuronSet) -> None:
    found = fit_guard(model, neurons.only(sites=["down"]), requests("bomb", 30, 0), requests("cake", 160, 0), pooling="last", fpr=0.5)
    point = found.operating_points[0]
    assert (point.fpr_target, point.supported) == (0.5, True)
    assert (found.threshold, found.in_force) == (point.threshold, "fpr 0.5")
    assert found.at(0.5).threshold == found.threshold
    again = fit_guard(model, neurons.only(sites=["down"]), requests("bomb", 30, 0), requests("cake", 160, 0), pooling="last", fpr=0.5)
    assert torch.equal(again.weights, found.weights)
    assert again.threshold == found.threshold


def test_prompts_in_both_lists_repeats_and_truncated_ones_are_left_out_and_counted(neurons: NeuronSet) -> None:
    short = tiny_model(max_position_embeddings=24)
    unsafe, safe = requests("bomb", 30, 0), requests("cake", 30, 0)
    given = Prompts.from_list([*unsafe, unsafe[0].upper(), safe[3], "bomb " * 60], "unsafe")
    found = fit_guard(short, neurons, given, safe, pooling="last")
    notes = " | ".join(found.notes)
    assert "1 unsafe prompts are repeats" in notes
    assert "1 prompts are both unsafe and safe" in notes
    assert "1 truncated prompts were left out" in notes
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
    assert torch.equal(new.weights, guard.weights)
    assert new.bind(updated).threshold == new.threshold
    assert new.bindings.weights_sha256 != guard.bindings.weights_sha256
    assert any(note.startswith("AUROC ") for note in new.notes)
    assert np.mean([verdict.flagged for verdict in new.score_batch(requests("bomb", 30, 3))]) > 0.7
    assert new.report["recalibrated"]["bindings_before"] == guard.bindings.to_json()
    with pytest.raises(ForeignModelError):
        recalibrate(guard, tiny_model(intermediate_size=40), ["a"], ["b"])


def test_fitting_does_not_import_itself_into_using(tmp_path: Any, guard: Guard) -> None:
    import subprocess
    import sys

    guard.save(tmp_path)
    code = (
        "import sys, torch; from safety_neurons.guard import Guard; g = Guard.load(sys.argv[1]);"
        "print(float(g.probabilities(torch.zeros(1, len(g.neurons)))[0]) > 0, 'sklearn' in sys.modules, 'scipy' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["True", "False", "False"]
    assert dataclasses.is_dataclass(guard)
