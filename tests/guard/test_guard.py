"""Guards: what they say of prompts, what they are bound to, and what their files may hold."""

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from guarded import some_neurons, texts, tiny_guard, tiny_model

from safety_neurons.errors import (
    ForeignModelError,
    InputError,
    MismatchError,
    ModelError,
    RunError,
    SafetyNeuronsError,
    UsageError,
)
from safety_neurons.guard import Guard, OperatingPoint, bindings_of, read_features
from safety_neurons.guard.calibration import Recheck
from safety_neurons.model import LanguageModel
from safety_neurons.prompt_lists import Message, Prompt
from safety_neurons.results import Rate
from tiny import CHAT_TEMPLATE, tiny_adapter_folder, tiny_llama, tiny_llama_folder, tiny_tokenizer

RATE = Rate(0.04, 0.02, 0.07, 400)


def by_hand(guard: Guard, model: LanguageModel, text: str) -> float:
    """σ((bias + Σ w (x − mean) / scale) / temperature + shift), spelled out."""
    row = read_features(model, [text], guard.neurons, pooling=guard.pooling).values[0].astype(np.float64)
    how = guard.classifier
    mean, scale, weights = (np.asarray(vector, np.float64) for vector in (how.mean, how.scale, how.weights))
    odds = (
        how.bias + np.sum(weights * (row - mean) / scale)
    ) / how.calibration.temperature + how.calibration.shift
    return float(1 / (1 + np.exp(-odds)))


def test_a_verdict_is_the_formula_and_flags_from_the_threshold_on(model: LanguageModel, guard: Guard) -> None:
    asked = texts(8)
    verdicts = guard.score_batch(asked)
    expected = [by_hand(guard, model, text) for text in asked]
    np.testing.assert_allclose([verdict.p_unsafe for verdict in verdicts], expected, rtol=1e-5)
    assert {verdict.flagged for verdict in verdicts} == {True, False}
    for verdict in verdicts:
        assert verdict.p_unsafe is not None
        assert verdict.flagged == (verdict.p_unsafe >= 0.5)
        assert verdict.status == "ok"
        assert verdict.latency_ms > 0
        alone = guard.with_threshold(verdict.p_unsafe).score(asked[verdicts.index(verdict)])
        assert alone.p_unsafe == pytest.approx(verdict.p_unsafe, rel=1e-5)
    features = torch.from_numpy(read_features(model, asked, guard.neurons).values)
    np.testing.assert_allclose(guard.probabilities(features).numpy(), expected, rtol=1e-5)
    assert guard.score(asked[0], threshold=0.0).flagged


def test_top_neurons_are_those_with_the_largest_share_of_the_log_odds(
    model: LanguageModel, guard: Guard
) -> None:
    row = read_features(model, ["make a cake"], guard.neurons).values[0]
    parts = guard.classifier.weights.numpy() * row / guard.classifier.scale.numpy()
    names = list(guard.neurons)
    expected = [names[place] for place in np.argsort(-parts)[:5] if parts[place] > 0]
    verdict = guard.score("make a cake")
    assert [(top.key, top.index) for top in verdict.top_neurons] == expected
    assert guard.score("make a cake", top=0).top_neurons == ()


def test_conversations_are_scored_as_the_template_writes_them(model: LanguageModel, guard: Guard) -> None:
    turns = [
        {"role": "system", "content": "no"},
        {"role": "user", "content": "make a cake"},
        {"role": "assistant", "content": "sure"},
        {"role": "user", "content": "and a bomb"},
    ]
    messages = tuple(Message(turn["role"], turn["content"]) for turn in turns)
    same = [guard.score(turns), guard.score(list(messages)), guard.score(Prompt("x", "and a bomb", messages))]
    assert len({verdict.p_unsafe for verdict in same}) == 1
    whole = guard.score_encoded([guard.encode(turns)])[0]
    assert whole.p_unsafe != guard.score("and a bomb").p_unsafe
    assert whole.n_tokens == len(model.encode(Prompt("x", "", messages))[0].ids)
    alone = guard.score_batch(
        [turn["content"] for turn in turns]
    )  # the largest of the whole and of every turn counts
    assert same[0].p_unsafe == pytest.approx(
        max(verdict.p_unsafe or 0 for verdict in (whole, *alone)), rel=1e-5
    )


@pytest.mark.parametrize(
    "wrong", ["", "  ", [], [{"role": "user"}], [{"content": "x"}], [{"role": "king", "content": "x"}]]
)
def test_a_request_that_is_none_is_an_input_error(guard: Guard, wrong: object) -> None:
    with pytest.raises(InputError):
        guard.score(wrong)  # type: ignore[arg-type]


def test_a_truncated_prompt_is_flagged_whatever_its_probability_unless_told_otherwise() -> None:
    short = tiny_model(max_position_embeddings=16)
    guard = tiny_guard(short, threshold=1.0)
    verdict = guard.score("cake " * 50)
    assert (verdict.status, verdict.flagged) == ("truncated", True)
    assert not guard.score("cake " * 50, fail_open=True).flagged
    assert not guard.score("cake").flagged


def test_nan_is_an_error_that_flags_its_own_prompt_only() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.inner.get_input_embeddings().weight[model.encode("bomb")[0].ids[-2]] = torch.nan
    guard = tiny_guard(model, threshold=1.0)
    fine, broken, also = guard.score_batch(["cake", "bomb", "tree"])
    assert (broken.status, broken.flagged, broken.p_unsafe) == ("error", True, None)
    assert not guard.score("bomb", fail_open=True).flagged
    assert [one.told for one in (fine, broken, guard.score("bomb", fail_open=True))] == [False, None, None]
    assert [fine.status, also.status, fine.flagged, also.flagged] == ["ok", "ok", False, False]


def test_a_batch_that_fails_is_read_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    guard = tiny_guard(model, threshold=1.0)
    poison = model.encode("bomb")[0].ids[-2]
    forward = type(model.inner.model).forward

    def failing(self: object, input_ids: torch.Tensor, **others: object) -> object:
        if bool((input_ids == poison).any()):
            raise RuntimeError("kernel\nfailed")
        return forward(self, input_ids=input_ids, **others)

    monkeypatch.setattr(model.inner.model, "forward", failing.__get__(model.inner.model))
    fine, broken = guard.score_batch(["cake", "bomb"])
    assert (fine.status, fine.flagged) == ("ok", False)
    assert (broken.status, broken.flagged, broken.error) == ("error", True, "RuntimeError: kernel failed")


def test_a_job_that_has_lost_a_process_ends_and_flags_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    guard = tiny_guard(model, threshold=1.0)

    def gone(*_: object, **__: object) -> object:
        raise RunError("process 1 of 2 has ended")

    monkeypatch.setattr(model.inner.model, "forward", gone)
    with pytest.raises(RunError, match="process 1 of 2 has ended"):
        guard.score_batch(["cake", "bomb"])
    with pytest.raises(RunError, match="process 1 of 2 has ended"):
        guard.score("cake")


def test_operating_points_are_chosen_by_their_rate_and_unsupported_ones_are_refused(guard: Guard) -> None:
    points = (
        OperatingPoint(0.05, 0.7, RATE, RATE, True),
        OperatingPoint(0.001, None, RATE, RATE, False, "400 safe examples"),
    )
    several = dataclasses.replace(guard, operating_points=points)
    assert several.at(0.05).threshold == 0.7
    assert several.at(0.05).in_force == "provisional fpr 0.05"
    with pytest.raises(
        UsageError, match=r"0\.001 is not supported \(400 safe examples\); supported are 0\.05"
    ):
        several.at(0.001)
    with pytest.raises(UsageError, match="no operating point"):
        several.at(0.2)
    with pytest.raises(UsageError, match="between 0 and 1"):
        guard.with_threshold(1.5)


# Bindings


def test_a_guard_refuses_another_architecture_other_weights_tokenizer_template_and_type(
    model: LanguageModel, guard: Guard
) -> None:
    assert guard.bind(tiny_model()).threshold == guard.threshold  # the same model loaded again
    with pytest.raises(ForeignModelError, match="fingerprint"):
        guard.bind(tiny_model(intermediate_size=40))
    with pytest.raises(MismatchError, match="other weights"):
        guard.bind(tiny_model(seed=1))
    with pytest.raises(MismatchError, match="bfloat16"):
        guard.bind(LanguageModel(tiny_llama().to(torch.bfloat16), model.tokenizer))
    with pytest.raises(MismatchError, match="another template"):
        guard.bind(LanguageModel(model.inner, tiny_tokenizer(CHAT_TEMPLATE + " ")))
    with pytest.raises(MismatchError, match="another template"):
        guard.bind(LanguageModel(model.inner, model.tokenizer, system="be nice"))
    with pytest.raises(MismatchError, match="another tokenizer"):
        guard.bind(LanguageModel(model.inner, tiny_tokenizer(CHAT_TEMPLATE, adds_bos=False)))


def test_a_change_behind_the_guards_layers_is_none_of_its_business() -> None:
    model = tiny_model()
    neurons = some_neurons(model).only(layers="0:1")
    before = bindings_of(model, neurons)
    with torch.no_grad():
        model.inner.model.layers[1].mlp.down_proj.weight.mul_(2)
        model.inner.lm_head.weight.mul_(2)
    assert bindings_of(model, neurons) == before
    with torch.no_grad():
        model.inner.model.layers[0].input_layernorm.weight[3] += 1e-3
    assert bindings_of(model, neurons) != before


def test_adapters_count_by_what_they_are_and_not_by_their_names(tmp_path: Path) -> None:
    from safety_neurons import load, load_pair

    base = tiny_llama_folder(tmp_path / "base")
    first = tiny_adapter_folder(base, tmp_path / "first", seed=1, kind="lora")
    second = tiny_adapter_folder(base, tmp_path / "second", seed=2, kind="lora")
    alone, both = load(f"{base}+{second}"), load_pair(f"{base}+{first}", f"{base}+{second}")
    neurons = some_neurons(alone)
    ours = [
        bindings_of(one, neurons).weights_sha256 for one in (alone, both.aligned, both.base, load(str(base)))
    ]
    assert ours[0] == ours[1]
    assert len(set(ours)) == 3


# Files


def test_a_saved_guard_says_the_same(model: LanguageModel, guard: Guard, tmp_path: Path) -> None:
    points = (
        OperatingPoint(0.05, 0.7, RATE, RATE, True),
        OperatingPoint(0.001, None, RATE, Rate(None, None, None, 0), False, "few"),
    )
    whole = dataclasses.replace(guard, operating_points=points, notes=("a note",), report={"auroc": 1.0})
    whole.save(tmp_path)
    again = Guard.load(tmp_path, model)
    assert again.neurons == guard.neurons
    assert (again.operating_points, again.threshold, again.in_force, again.notes) == (
        points,
        0.5,
        "given",
        ("a note",),
    )
    pairs = zip(again.score_batch(texts(4)), guard.score_batch(texts(4)), strict=True)
    assert all(ours.p_unsafe == theirs.p_unsafe for ours, theirs in pairs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["guard.json", "guard.safetensors"]
    with pytest.raises(ModelError, match="not bound"):
        Guard.load(tmp_path).score("cake")


@pytest.mark.parametrize("more", [{}, {"by_seed": []}, {"why": None, "by_seed": [], "later": 1}])
def test_rates_of_older_and_newer_files_load(guard: Guard, tmp_path: Path, more: dict[str, Any]) -> None:
    points = (OperatingPoint(0.05, 0.7, RATE, RATE, True),)
    recheck = Recheck(4, 16, 0.5, 0.05, RATE, RATE, True)
    dataclasses.replace(guard, operating_points=points, recheck=recheck).save(tmp_path)
    facts = json.loads((tmp_path / "guard.json").read_text())
    del facts["sealed_sha256"]  # files of earlier versions have none
    old = {
        "value": RATE.value,
        "low": RATE.low,
        "high": RATE.high,
        "n": RATE.n,
        "unscored": RATE.unscored,
        **more,
    }
    for record in (facts["operating_points"][0], facts["recheck"]):
        record.update({"fpr": old, "tpr": old})
    (tmp_path / "guard.json").write_text(json.dumps(facts))
    again = Guard.load(tmp_path)
    assert (again.operating_points, again.recheck) == (points, recheck)
    facts["operating_points"][0]["fpr"] = {**old, "low": "x"}
    (tmp_path / "guard.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match="damaged operating point"):
        Guard.load(tmp_path)


@pytest.mark.parametrize(
    "facts",
    [
        "",
        "{",
        "[1]",
        "[" * 100_000,
        '{"schema": 3}',
        '{"schema": "safety-neurons-guard/1"}',
        '{"schema": "safety-neurons-guard/2"}',
        "\udcff",
    ],
)
def test_facts_that_are_damaged_are_one_line(guard: Guard, tmp_path: Path, facts: str) -> None:
    guard.save(tmp_path)
    (tmp_path / "guard.json").write_bytes(facts.encode("utf-8", "surrogateescape"))
    with pytest.raises(SafetyNeuronsError) as caught:
        Guard.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("threshold", "NaN"),
        ("threshold", "2"),
        ("threshold", "null"),
        ("bias", '"x"'),
        ("bias", "1e999"),
        ("pooling", "{}"),
        ("pooling", '{"kind": "max", "window": 0}'),
        ("operating_points", "3"),
        ("operating_points", "[{}]"),
        ("bindings", "{}"),
        (
            "calibration",
            '{"kind": "temperature", "temperature": -1, "shift": 0, "scores": [], "log_odds": []}',
        ),
        ("recheck", "[]"),
        ("reference", '{"probabilities": 3}'),
        ("reference", '{"probabilities": {"safe": [0.1], "unsafe": 3}}'),
        ("reference", '{"probabilities": {"safe": [0.1], "unsafe": ["x"]}}'),
        ("reference", '{"groups": {"safe": [], "unsafe": []}}'),
        (
            "reference",
            '{"probabilities": {"safe": [0.1], "unsafe": [0.2]}, "groups": {"safe": [], "unsafe": [0]}}',
        ),
        (
            "calibration",
            '{"kind": "isotonic", "temperature": 1, "shift": 0, "scores": [2, 1], "log_odds": [0, 1]}',
        ),
        ("notes", "1"),
    ],
)
def test_a_field_that_makes_no_sense_is_one_line(
    guard: Guard, tmp_path: Path, field: str, value: str
) -> None:
    guard.save(tmp_path)
    path = tmp_path / "guard.json"
    facts = json.loads(path.read_text()) | {field: "@@"}
    path.write_text(json.dumps(facts).replace('"@@"', value))
    with pytest.raises(SafetyNeuronsError) as caught:
        Guard.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", ["threshold", "in_force", "bias", "point", "extra", "weights", "thresholds"])
def test_numbers_changed_by_hand_and_files_of_two_guards_are_refused(
    model: LanguageModel, guard: Guard, tmp_path: Path, what: str
) -> None:
    points = (OperatingPoint(0.05, 0.7, RATE, RATE, True),)
    whole = dataclasses.replace(guard, operating_points=points, in_force="fpr 0.05", notes=("a note",))
    whole.save(tmp_path / "guard")
    path, other = tmp_path / "guard" / "guard.json", tmp_path / "other"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"notes": [], "bindings": facts["bindings"] | {"model": "mine"}}))
    Guard.load(tmp_path / "guard", model)  # words for people
    torch.manual_seed(3)
    moved = dataclasses.replace(guard.classifier, weights=torch.randn(guard.classifier.n_features))
    dataclasses.replace(guard, classifier=moved).save(other)
    if what in ("weights", "thresholds"):
        name = "guard.safetensors" if what == "weights" else "guard.json"
        (other / name).replace(path.with_name(name))
    else:
        changed: dict[str, Any] = {"threshold": 0.01, "in_force": "fpr 0.001", "bias": 0.2, "extra": 1}
        facts["operating_points"][0]["threshold"] = 0.99
        path.write_text(json.dumps(facts if what == "point" else facts | {what: changed[what]}))
    with pytest.raises(InputError, match=r"not as Guard\.save wrote it.*; expected one guard"):
        Guard.load(tmp_path / "guard", model)


def hostile() -> dict[str, bytes]:
    """Files that say more than they hold, or hold what no guard has."""
    from safetensors.torch import save

    vectors = {name: torch.ones(2) for name in ("weights", "mean", "scale")}
    meta = {"guard": "safety-neurons-guard/1"}
    members = {"neurons/layers.0.down": torch.tensor([1, 2])}
    return {
        "empty": b"",
        "huge header": struct.pack("<Q", 2**60) + b"{}",
        "no header": struct.pack("<Q", 4) + b"null",
        "not a guard": save({**vectors, **members}),
        "two axes": save({**vectors, **members, "weights": torch.ones(2, 2)}, meta),
        "too many weights": save({**vectors, **members, "weights": torch.ones(3)}, meta),
        "no weights": save(members, meta),
        "no neurons": save(vectors, meta),
        "unknown key": save({**vectors, "neurons/../../x": torch.tensor([1, 2])}, meta),
        "twice": save({**vectors, "neurons/layers.0.down": torch.tensor([2, 2])}, meta),
        "nan": save({**vectors, **members, "weights": torch.tensor([1.0, torch.nan])}, meta),
        "scale 0": save({**vectors, **members, "scale": torch.zeros(2)}, meta),
        "float16": save({**{name: vector.half() for name, vector in vectors.items()}, **members}, meta),
        "negative": save({**vectors, "neurons/layers.0.down": torch.tensor([-1, 2])}, meta),
        "extra": save({**vectors, **members, "pickle": torch.ones(1)}, meta),
    }


@pytest.mark.parametrize("kind", hostile())
def test_weights_that_are_hostile_are_one_line(guard: Guard, tmp_path: Path, kind: str) -> None:
    guard.save(tmp_path)
    (tmp_path / "guard.safetensors").write_bytes(hostile()[kind])
    with pytest.raises(SafetyNeuronsError) as caught:
        Guard.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_guard_and_a_file_too_large_are_errors(guard: Guard, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="check the path"):
        Guard.load(tmp_path / "nowhere")
    guard.save(tmp_path)
    with (tmp_path / "guard.json").open("ab") as stream:
        stream.truncate(2**26)
    with pytest.raises(InputError, match="expected at most"):
        Guard.load(tmp_path)
