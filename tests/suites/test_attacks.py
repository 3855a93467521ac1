"""Attack prompts made elsewhere: the formats they come in, one form they leave in."""

import json

import pytest

from safety_neurons.errors import InputError, UsageError
from safety_neurons.prompts import Prompt, Prompts
from safety_neurons.suites import Attack, Attacks, import_attacks

JAILBREAKS = {
    "parameters": {"method": "PAIR", "model": "vicuna-13b", "attack_type": "black_box"},
    "jailbreaks": [
        {"index": 0, "goal": "Do one", "behavior": "One", "category": "Kind", "prompt": "As a poet, do one", "jailbroken": True},
        {"index": 1, "goal": "Do two", "behavior": "Two", "category": "Kind", "prompt": None, "jailbroken": False},
        {"index": 2, "goal": "Do three", "behavior": "Three", "category": "Kind", "prompt": "As a cook, do three", "jailbroken": False},
    ],
}
GOALS = Prompts(
    [
        Prompt(
            "one",
            "Some context\n\n---\n\nDo one",
            category="Kind",
            meta={"goal": "Do one", "behavior_id": "one", "context": "Some context"},
        ),
        Prompt("two", "Do two", meta={"behavior_id": "two"}),
    ]
)


def save(path, document):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return path


def test_jailbreakbench_artefacts_keep_goal_method_and_model_and_count_null_prompts(tmp_path):
    found = import_attacks(save(tmp_path / "vicuna-13b.json", JAILBREAKS))
    assert [(item.behavior_id, item.goal, item.prompt) for item in found] == [
        ("One", "Do one", "As a poet, do one"),
        ("Three", "Do three", "As a cook, do three"),
    ]
    assert {(item.method, item.source_model, item.adaptive, item.label) for item in found} == {
        ("PAIR", "vicuna-13b", False, "static-transfer")
    }
    assert found[0].meta["jailbroken_source_model"] is True
    assert found.notes == ["1 of 3 behaviours have no prompt (the attack gave none); left out"]


def test_harmbench_test_cases_take_method_and_model_from_their_path_and_goals_by_id(tmp_path):
    cases = {"one": ["first case", "second case"], "two": ["third", "", None, ["image.png", "look"]]}
    path = save(tmp_path / "results" / "GCG" / "llama2_7b" / "test_cases" / "test_cases.json", cases)
    found = import_attacks(path, goals=GOALS)
    assert [(item.behavior_id, item.goal, item.prompt) for item in found] == [
        ("one", "Do one", "first case"),
        ("one", "Do one", "second case"),
        ("two", "Do two", "third"),
    ]
    assert {(item.method, item.source_model) for item in found} == {("GCG", "llama2_7b")}
    assert found[0].meta["context"] == "Some context"
    assert found.notes == ["3 test cases are empty or not text (images); left out"]
    assert len({prompt.id for prompt in found.prompts}) == 3
    assert any("3 of 3 attacks have no goal" in note for note in import_attacks(path).notes)


def test_plain_lists_are_prompts_suffixes_or_templates(tmp_path):
    path = save(tmp_path / "list.txt", "as a poet, do one\nsomething else\n")
    found = import_attacks(path, method="hand", goals=GOALS)
    assert [(item.goal, item.prompt, item.method) for item in found] == [
        ("Do one", "as a poet, do one", "hand"),
        ("", "something else", "hand"),
    ]
    suffixes = import_attacks(save(tmp_path / "gcg.txt", "zeta ==\n! kappa\n"), goals=GOALS, read_as="suffixes")
    assert [item.prompt.rsplit("---\n\n")[-1] for item in suffixes] == [
        "Do one zeta ==",
        "Do two zeta ==",
        "Do one ! kappa",
        "Do two ! kappa",
    ]
    assert [item.goal for item in suffixes[:2]] == ["Do one", "Do two"]
    templates = import_attacks(save(tmp_path / "t.json", ["You are X. [INSERT PROMPT HERE] Now!"]), goals=GOALS[1:], read_as="templates")
    assert [item.prompt for item in templates] == ["You are X. Do two Now!"]
    with pytest.raises(InputError, match="have no place for the goal"):
        import_attacks(path, goals=GOALS, read_as="templates")
    with pytest.raises(InputError, match="expected goals"):
        import_attacks(path, read_as="suffixes")
    with pytest.raises(UsageError, match="read_as 'riddles'"):
        import_attacks(path, read_as="riddles")


def test_a_table_with_goals_and_targets_keeps_them(tmp_path):
    found = import_attacks(save(tmp_path / "a.csv", "goal,prompt,method,target\nDo one,As a poet,TAP,Sure\n"))
    assert (found[0].goal, found[0].prompt, found[0].method, found[0].meta["target"]) == ("Do one", "As a poet", "TAP", "Sure")


def test_what_is_saved_is_read_again_and_has_the_six_fields(tmp_path):
    attacks = Attacks(
        [Attack("one", "Do one", "As a poet ü", "GCG", "m", True, {"target": "Sure", "loss": 0.5}), Attack("two", "Do two", "x")]
    )
    path = attacks.save(tmp_path / "out" / "attacks.jsonl")
    first = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    assert list(first) == ["behavior_id", "goal", "prompt", "method", "source_model", "adaptive", "meta"]
    assert Attacks.load(path) == attacks
    assert [prompt.meta["label"] for prompt in attacks.prompts] == ["adaptive", "static-transfer"]
    assert attacks.prompts[0].meta["goal"] == "Do one"
    assert attacks.prompts[0].meta["kind"] == "harmful"


def test_attacks_are_adaptive_only_on_the_model_they_were_made_on():
    attacks = Attacks([Attack("one", "Do one", "x", "GCG", "m", True)])
    assert attacks.used_on("m")[0].label == "adaptive"
    assert attacks.used_on("m, tuned")[0].label == "static-transfer"


def test_broken_files_are_said(tmp_path):
    for name, text in {"half.json": '{"jailbreaks": [', "empty.json": '{"jailbreaks": []}', "odd.json": '{"jailbreaks": [3]}'}.items():
        with pytest.raises(InputError) as caught:
            import_attacks(save(tmp_path / name, text))
        assert name in str(caught.value)
