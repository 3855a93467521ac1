"""guard evaluate from the command line: the object of the design, the curves, the tables, what is refused."""

import json
import re

import pytest
from running import command, done, refused

from tiny import FILL, tiny_llama_folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    import random

    folder = tmp_path_factory.mktemp("guard")
    tiny_llama_folder(folder / "model")
    number = random.Random(0)
    for name in ("fit", "test"):
        for kind, last in (("bad", "bomb"), ("good", "bread")):
            texts = {
                " ".join([*number.choices(FILL, k=6), last]): number.choice(("en", "de")) for _ in range(44)
            }
            rows = [json.dumps({"prompt": text, "language": code}) for text, code in texts.items()]
            (folder / f"{name}-{kind}.jsonl").write_text("\n".join(rows))
    model = ["--model", folder / "model"]
    done(
        "find",
        "importance",
        *model,
        "--prompts",
        folder / "fit-bad.jsonl",
        "--limit",
        "4",
        "--top",
        "0.1",
        "--out",
        folder / "found",
    )
    data = ["--unsafe", folder / "fit-bad.jsonl", "--safe", folder / "fit-good.jsonl", "--pooling", "last"]
    done("guard", "fit", *model, "--neurons", folder / "found", *data, "--out", folder / "fit")
    return folder


def evaluated(place, *more):
    data = ["--unsafe", f"set={place / 'test-bad.jsonl'}", "--safe", f"set={place / 'test-good.jsonl'}"]
    return [
        "guard",
        "evaluate",
        "--model",
        place / "model",
        "--guard",
        place / "fit",
        *data,
        "--random",
        "2",
        *more,
    ]


def test_it_gives_the_object_of_the_design_and_keeps_its_curves(place, tmp_path):
    fit = ["--fit-unsafe", place / "fit-bad.jsonl", "--fit-safe", place / "fit-good.jsonl"]
    detectors = ["--detectors", f"importance={place / 'found' / 'scores.safetensors'}", "--counts", "3,9"]
    more = [
        "--leave-out",
        "language",
        "--attacks",
        "behind-safe",
        "--perturbations",
        "typos",
        "--outputs",
        "5",
        "--max-new-tokens",
        "3",
    ]
    found = done(*evaluated(place, *fit, *detectors, *more, "--out", tmp_path / "run"))
    assert found["auroc"].keys() >= {"value", "low", "high", "n", "unscored"}
    assert found["tpr_at_fpr"].keys() >= {"0.05", "0.01"}
    assert 0 <= found["expected_calibration_error"] <= 1
    assert found["average_precision"]["value"] > 0.5
    assert {row["name"] for row in found["baselines"]} >= {
        "random neurons",
        "TF-IDF words",
        "residual stream",
        "refusal direction",
    }
    assert [row["value"] for row in found["tables"]["language"]] in (["en", "de"], ["de", "en"])
    assert [row["value"] for row in found["leave_out"]["language"]][2:] == ["each in its turn"]
    assert {(row["method"], row["count"]) for row in found["counts"]} == {
        ("importance", 3),
        ("importance", 9),
    }
    assert found["outputs"]["changed"] == 0
    curves = json.loads((tmp_path / "run" / "curves.json").read_text())
    assert curves["roc"].keys() == {"guard", *(row["name"] for row in found["baselines"])}
    assert curves["roc"]["guard"][0] == [0, 0]


def test_a_person_gets_tables_that_fit_a_terminal(place, tmp_path):
    shown = command(*evaluated(place, "--perturbations", "none", "--out", tmp_path / "run"))
    assert shown.code == 0, shown.err
    for words in (
        "The guard beside",
        "random neurons",
        "TF-IDF words",
        "By language",
        "At the threshold",
        "by 3 folds",
    ):
        assert re.search(words, shown.out + shown.err), words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fit-unsafe", "a.txt"], "--fit-unsafe and --fit-safe belong together"),
        (["--detectors", "a=b"], "--detectors without --fit-unsafe"),
        (["--counts", "ten"], "--counts 'ten'"),
        (["--fpr", "2"], "--fpr 2"),
        (["--answers-harmful", "a.txt"], "--answers-harmful and --answers-harmless belong together"),
        (["--attacks", "hypnosis"], "'hypnosis'"),
    ],
)
def test_what_cannot_be_right_is_refused_in_a_line(place, tmp_path, words, message):
    assert message in refused(*evaluated(place, *words, "--out", tmp_path / "run"), code=2)
