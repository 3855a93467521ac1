"""guard fit, guard recalibrate and evaluate --guard, from the command line to the files."""

import json
from pathlib import Path
from typing import Any

import pytest

from safety_neurons.cli.verb import build
from safety_neurons.guard import REFUSAL
from tiny import tiny_llama_folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, a neuron file, labelled prompts and completions."""
    from safety_neurons import NeuronSet, load

    folder = tmp_path_factory.mktemp("guard")
    tiny_llama_folder(folder / "model")
    model = load(str(folder / "model"))
    NeuronSet({"layers.1.down": range(20)}, model.table).save(folder / "neurons.safetensors")
    words = ["make", "tell", "write", "steal", "open", "lock", "explain", "please", "show", "small"]
    rows = [
        (f"{a} {b} the {kind}", label)
        for kind, label in (("bomb", "unsafe"), ("cake", "safe"))
        for a in words
        for b in words[:3]
    ]
    (folder / "labelled.jsonl").write_text(
        "".join(json.dumps({"prompt": text, "label": label}) + "\n" for text, label in rows)
    )
    answers = {"unsafe": "Sure, here is the bomb", "safe": "Sorry, I cannot help"}
    (folder / "completions.jsonl").write_text(
        "".join(json.dumps({"prompt": text, "completion": answers[label]}) + "\n" for text, label in rows)
    )
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str]:
    """Exit code and standard output of a command."""
    try:
        code = build()([str(word) for word in words], prog_name="safety-neurons", standalone_mode=False)
    except SystemExit as stop:
        code = stop.code
    return int(code or 0), capsys.readouterr().out


def test_a_guard_is_fit_on_suites_by_name_and_by_their_labels(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = map(json.loads, (place / "labelled.jsonl").read_text().splitlines())
    rows = [f"{one['prompt']},{int(one['label'] == 'unsafe')}\n" for one in records]
    (tmp_path / "toxic-chat_annotation_test.csv").write_text("user_input,toxicity\n" + "".join(rows))
    monkeypatch.setenv("SAFETY_NEURONS_DATA", str(tmp_path))
    line = ["guard", "fit", "--model", place / "model", "--neurons", place / "neurons.safetensors"]
    line += ["--pooling", "last", "--offline", "--json"]
    by_name = ["--unsafe", "suite:toxic-chat-unsafe", "--safe", "suite:toxic-chat-safe"]
    by_label = ["--labelled", "suite:toxic-chat", "--label-column", "kind"]
    for name, source in (("by name", by_name), ("by label", by_label)):
        code, out = run(capsys, *line, *source, "--out", tmp_path / name)
        assert code == 0, out
        assert json.loads(out)["prompts"] == {"unsafe": 30, "safe": 30, "left_out": 0}


def test_a_fitted_guard_is_loaded_recalibrated_and_answers(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model", place / "model", "--json", "--fpr", "0.05"]
    sources = ["--labelled", place / "labelled.jsonl"]
    code, out = run(
        capsys,
        "guard",
        "fit",
        *common,
        *sources,
        "--neurons",
        place / "neurons.safetensors",
        "--pooling",
        "last",
        "--recheck-every",
        "4",
        "--recheck-tokens",
        "8",
        "--out",
        place / "fit",
    )
    result = json.loads(out)
    assert code == 0, result
    assert result["n_neurons"] == 20
    assert result["prompts"] == {"unsafe": 30, "safe": 30, "left_out": 0}
    assert [point["supported"] for point in result["operating_points"]] == [False] * 3
    assert (result["recheck"]["every"], result["recheck"]["own"]) == (4, True)
    assert result["answers"]["answers"]["unsafe"] >= 10
    assert (place / "fit" / "guard" / "answers" / "guard.json").is_file()
    assert result["achieved"] == (result["caught"]["low"] > 0)
    assert (result["caught"]["n"], result["false_positives"]["n"]) == (9, 9)
    assert result["in_force"].startswith("provisional")
    assert result["other"]["safe"] == "builtin:look-alikes"
    assert result["other"]["fpr"]["n"] == result["other"]["tpr"]["n"] == 68
    assert (place / "fit" / "guard" / "guard.json").is_file()
    code, out = run(
        capsys,
        "guard",
        "recalibrate",
        *common,
        "--guard",
        place / "fit",
        "--completions",
        place / "completions.jsonl",
        "--judge",
        "compliance",
        "--out",
        place / "again",
    )
    again = json.loads(out)
    assert code == 0, again
    assert again["auroc_before"] == result["auroc"]
    assert again["labels"]["judge"] == "compliance-1"
    assert again["recheck"] is None
    code, out = run(
        capsys,
        "evaluate",
        "--model",
        place / "model",
        "--guard",
        place / "again",
        "--suite",
        place / "labelled.jsonl",
        "--over-refusal",
        "none",
        "--max-new-tokens",
        "4",
        "--limit",
        "4",
        "--json",
        "--out",
        place / "evaluated",
    )
    evaluated = json.loads(out)
    assert code == 0, evaluated
    assert evaluated["treatment"].startswith("guard on 20 neurons")
    lines = [
        json.loads(line) for line in (place / "evaluated" / "completions.jsonl").read_text().splitlines()
    ]
    treated = [line for line in lines if line["arm"] == "treated"]
    assert len(treated) == 4
    for line in treated:
        assert line["meta"]["guard"]["flagged"] == (line["completion"] == REFUSAL)


def test_conversations_of_a_file_are_fit_on(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["make", "tell", "write", "steal", "open", "lock"]
    for name, last in (("unsafe", "bomb"), ("safe", "cake")):
        turns = [
            [("user", f"{a} the house"), ("assistant", "yes"), ("user", f"{a} {b} the {last}")]
            for a in words
            for b in words
        ]
        rows = [{"messages": [{"role": role, "content": text} for role, text in one]} for one in turns]
        (place / f"{name}-talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out = run(
        capsys,
        "guard",
        "fit",
        "--model",
        place / "model",
        "--neurons",
        place / "neurons.safetensors",
        "--pooling",
        "last",
        "--unsafe",
        place / "unsafe-talks.jsonl",
        "--safe",
        place / "safe-talks.jsonl",
        "--other-safe",
        "none",
        "--other-unsafe",
        "none",
        "--json",
        "--out",
        place / "talks",
    )
    result = json.loads(out)
    assert code == 0, result
    assert result["other"] is None
    told = result["conversations"]
    assert told["fpr"]["n"] == told["tpr"]["n"] == told["fpr_read_whole"]["n"] == 11


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no unsafe prompts"),
        (["--unsafe", "builtin:harmful"], "--unsafe without --safe"),
        (["--completions", "x.jsonl"], "belong together"),
        (["--labelled", "x.jsonl", "--fpr", "0"], "--fpr 0"),
        (["--labelled", "x.jsonl", "--pooling", "best"], "--pooling"),
        (["--labelled", "x.jsonl", "--window", "4"], "only max and agree have windows"),
        (["--labelled", "x.jsonl", "--recheck-every", "90"], "expected no more"),
        (["--labelled", "x.jsonl", "--answers-harmful", "x.jsonl"], "belong together"),
        (["--labelled", "x.jsonl", "--pooling", "last", "--agree", "2"], "expected --pooling agree"),
        (
            ["--labelled", "x.jsonl", "--other-safe", "none"],
            "--other-unsafe and --other-safe belong together",
        ),
    ],
)
def test_options_that_contradict_one_another_are_usage_errors_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    code, out = run(capsys, "guard", "fit", "--model", "nowhere", "--neurons", "nothing", "--json", *words)
    assert code == 2
    assert said in json.loads(out)["error"]
