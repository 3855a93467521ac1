"""`data list`, `data verify` and `import attacks`."""

import json

from running import command, done, refused

TABLE = "goal,target\n" + "".join(f'Invent request {n},"Sure, here is it"\n' for n in range(3))


def test_data_list_has_built_in_prompts_and_every_suite_with_its_origin():
    found = done("data", "list")
    assert {"builtin:harmful", "builtin:harmless-test"} <= {entry["name"] for entry in found["prompts"]}
    suites = {entry["name"]: entry for entry in found["suites"]}
    assert suites["advbench"]["prompts"] == 520
    assert suites["multijail"]["prompts"] == 3150
    assert {"kind", "licence", "origin", "sha256", "home", "file", "languages", "parts"} <= set(
        suites["xstest"]
    )
    shown = command("data", "list")
    assert shown.code == 0
    assert "harmbench-contextual" in shown.out


def test_data_verify_says_what_is_ready(shared):
    found = done(
        "data", "verify", "advbench", "xstest-safe", "multijail/th", "--folder", shared / "data", "--offline"
    )
    assert [(entry["name"], entry["ok"], entry["prompts"]) for entry in found["suites"]] == [
        ("advbench", True, 520),
        ("xstest-safe", True, 250),
        ("multijail/th", True, 315),
    ]


def test_data_verify_fails_in_one_line_for_what_is_not_ready(tmp_path):
    (tmp_path / "harmful_behaviors.csv").write_text(TABLE, encoding="utf-8")
    said = refused("data", "verify", "advbench", "--folder", tmp_path, "--offline")
    assert "3 prompts, expected 520" in said
    assert "strongreject_dataset.csv" in refused(
        "data", "verify", "strongreject", "--folder", tmp_path, "--offline"
    )


def test_prompts_may_be_named_as_a_suite(tiny_pair, tmp_path, monkeypatch):
    monkeypatch.setenv("SAFETY_NEURONS_DATA", str(tmp_path / "data"))
    file = tmp_path / "data" / "harmful_behaviors.csv"
    line = ["find", "attribution", "--model", tiny_pair.plain, "--prompts", "suite:advbench", "--offline"]
    file.parent.mkdir()
    assert "harmful_behaviors.csv" in refused(*line)
    file.write_text(TABLE, encoding="utf-8")
    assert "3 prompts" in command(*line, "--dry-run").out
    found = done(*line, "--limit", 2, "--out", tmp_path / "run")
    assert found["prompts"]["used"] == 2
    assert "finished" in command(*line, "--limit", 2, "--out", tmp_path / "run").err
    file.write_text(TABLE.replace("request 0", "request 9"), encoding="utf-8")
    assert "prompts" in refused(*line, "--limit", 2, "--out", tmp_path / "run")


def test_import_attacks_writes_one_form_and_counts_by_label(tmp_path):
    jailbreaks = [
        {"goal": "Do one", "behavior": "One", "prompt": "As a poet"},
        {"goal": "Do two", "behavior": "Two", "prompt": None},
    ]
    (tmp_path / "a.json").write_text(
        json.dumps({"parameters": {"method": "PAIR", "model": "m"}, "jailbreaks": jailbreaks}),
        encoding="utf-8",
    )
    (tmp_path / "b.txt").write_text("my own prompt\n", encoding="utf-8")
    found = done("import", "attacks", tmp_path / "a.json", tmp_path / "b.txt", "--out", tmp_path / "out")
    assert found["n_attacks"] == 2
    assert [(entry["method"], entry["label"], entry["attacks"]) for entry in found["methods"]] == [
        ("PAIR", "static-transfer", 1),
        ("unknown", "static-transfer", 1),
    ]
    lines = [
        json.loads(line)
        for line in (tmp_path / "out" / "attacks.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [line["prompt"] for line in lines] == ["As a poet", "my own prompt"]
    assert any("1 of 2 behaviours have no prompt" in note for note in found["notes"])
    assert "no such file" in refused("import", "attacks", tmp_path / "absent.json")


def test_packaged_models_are_listed_and_a_wrong_name_says_the_right_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    entries = done("data", "models")["models"]
    names = {"smollm2-135m-instruct", "gemma-3-270m", "qwen2.5-coder-0.5b-instruct", "all-minilm-l6-v2"}
    assert names == {entry["name"] for entry in entries}
    assert all(len(entry["sha256"]) == 64 and entry["folder"] is None for entry in entries)
    assert "expected one of smollm2-135m-instruct" in refused("data", "models", "smollm")
    assert "--offline" in refused("data", "models", "gemma-3-270m", "--offline")
