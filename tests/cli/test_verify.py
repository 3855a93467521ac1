"""verify and compare from the command line: the objects, the tables, and runs that are killed and go on."""

import collections
import json
import pathlib
import re

import pytest
from running import command, done, record, refused

from safety_neurons.detectors import METHODS
from safety_neurons.model import LanguageModel
from safety_neurons.neurons import NeuronSet, Scores
from safety_neurons.results import Completions

ARM = {"harmful_refused", "harmless_refused", "perplexity"}
RATE = {"value", "low", "high", "n", "unscored"}
SHORT = ["--max-new-tokens", "6", "--batch-size", "4"]


@pytest.fixture(scope="module")
def found(tiny_pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("found")
    words = ["--prompts", tiny_pair.harmful, "--max-new-tokens", "4"]
    done("find", "contrast", *tiny_pair.models, *words, "--top", "0.2", "--out", folder / "contrast")
    return folder / "contrast"


def patch(pair, *more):
    return ["verify", "patch", *pair.models, *pair.measured_on, "--text", pair.text, *SHORT, *more]


def check_arm(arm, *, n=9):
    assert arm.keys() >= ARM
    for name in ("harmful_refused", "harmless_refused"):
        assert arm[name].keys() >= RATE
        assert arm[name]["n"] + arm[name]["unscored"] == n
    assert arm["perplexity"] > 1


def test_patching_a_set_gives_the_object_of_the_design(found, tiny_pair, tmp_path):
    result = done(*patch(tiny_pair, "--neurons", found, "--random", "2", "--out", tmp_path / "run"))
    for arm in (result["untreated"], result["treated"], result["ceiling"], *result["random"]):
        check_arm(arm)
    assert len(result["random"]) == 2
    assert result["causal_effect"].keys() >= {"value", "low", "high", "measure"}
    assert result["n_neurons"] == len(NeuronSet.load(found))
    assert result["overlap_with_find_prompts"] == {"harmful": 9, "harmless": 0}
    arms = Completions.load(result["completions"]).arms
    treated = f"treated {result['n_neurons']}"
    controls = [f"random {number} of {result['n_neurons']}" for number in range(2)]
    measured = ["untreated", "aligned", treated, *controls, "ceiling", "ceiling by parameters"]
    assert sorted(arms) == sorted(f"{arm}/{kind}" for arm in measured for kind in ("harmful", "harmless"))
    assert record(tmp_path / "run")["status"] == "finished"


def test_deactivating_has_no_causal_effect_and_says_why(found, tiny_pair, tmp_path):
    words = [
        "verify",
        "deactivate",
        "--model",
        tiny_pair.aligned,
        *tiny_pair.measured_on,
        "--text",
        "none",
        *SHORT,
    ]
    result = done(
        *words, "--neurons", found / "neurons.safetensors", "--random", "1", "--out", tmp_path / "run"
    )
    assert result["aligned"] is None
    assert result["causal_effect"]["value"] is None
    assert "no base" in result["causal_effect"]["why"]
    assert result["treated"]["perplexity"] is None
    assert result["treated"]["divergence"] > 0
    assert result["change"].keys() >= RATE


@pytest.mark.parametrize("kind", ["patch", "deactivate"])
def test_a_sweep_has_one_point_a_size(kind, found, tiny_pair, tmp_path):
    models = tiny_pair.models if kind == "patch" else ["--model", tiny_pair.aligned]
    words = [
        "verify",
        kind,
        *models,
        *tiny_pair.measured_on,
        "--text",
        "none",
        *SHORT,
        "--scores",
        found,
        "--sizes",
        "0.25,0.05,1",
        "--limit",
        "3",
    ]
    result = done(*words, "--random", "1", "--out", tmp_path / "run")
    assert [point["size"] for point in result["sizes"]] == [0.05, 0.25, 1.0]
    assert [point["n_neurons"] for point in result["sizes"]] == [5, 24, 96]
    assert [len(point["random"]) for point in result["sizes"]] == [1, 1, 1]
    assert any("share members" in note for note in result["notes"])


def test_both_sides_are_those_of_the_two_verbs_in_one_table(found, tiny_pair, tmp_path):
    words = [
        *tiny_pair.measured_on,
        "--text",
        tiny_pair.text,
        *SHORT,
        "--scores",
        found,
        "--sizes",
        "0.05,0.25",
    ]
    words += ["--limit", "3", "--random", "1"]
    both = done("verify", "both", *tiny_pair.models, *words, "--out", tmp_path / "both")
    apart = {
        "patch": done("verify", "patch", *tiny_pair.models, *words, "--out", tmp_path / "patch"),
        "deactivate": done(
            "verify", "deactivate", "--model", tiny_pair.aligned, *words, "--out", tmp_path / "deactivate"
        ),
    }
    for side, result in apart.items():
        assert both[side] == {
            key: value for key, value in result.items() if key not in ("completions", "run")
        }
    assert (tmp_path / "both" / "deactivated-completions.jsonl").read_bytes() == (
        tmp_path / "deactivate" / "completions.jsonl"
    ).read_bytes()
    shown = command("verify", "both", *tiny_pair.models, *words, "--out", tmp_path / "shown")
    assert re.search(r"neurons +restored +(of random )?sets", shown.out)
    assert re.search(r"^24 \(25 %\) ", shown.out, re.MULTILINE)


def test_a_repeated_verification_gives_the_same_numbers(found, tiny_pair, tmp_path):
    first = done(
        *patch(tiny_pair, "--neurons", found, "--random", "1", "--limit", "3", "--out", tmp_path / "first")
    )
    again = done("run", tmp_path / "first" / "run.json", "--out", tmp_path / "again")
    for result in (first, again):
        del result["completions"], result["run"]
    assert again == first


def counted(monkeypatch, *, die_at=None):
    """Counts the batches that are generated; dies at the start of one of them."""
    seen = collections.Counter()
    generate = LanguageModel.complete

    def complete(self, *args, progress=None, **options):
        def told(*numbers):
            if progress is not None:
                progress(*numbers)
            seen["batches"] += 1
            if seen["batches"] == die_at:
                raise MemoryError("killed here")

        return generate(self, *args, progress=told, **options)

    monkeypatch.setattr(LanguageModel, "complete", complete)
    return seen


def test_a_killed_verification_generates_no_finished_batch_again(found, tiny_pair, tmp_path, monkeypatch):
    die_at = 5  # in the middle of an arm: four prompts of each kind are two batches
    words = patch(
        tiny_pair, "--neurons", found, "--random", "0", "--text", "none", "--limit", "4", "--batch-size", "2"
    )
    with monkeypatch.context() as patched:
        whole = counted(patched)
        expected = done(*words, "--out", tmp_path / "whole")
    with monkeypatch.context() as patched:
        counted(patched, die_at=die_at)
        assert command(*words, "--out", tmp_path / "killed").code == 1
    kept = len(Completions.load(tmp_path / "killed" / "completions.jsonl"))
    assert kept > 0
    with monkeypatch.context() as patched:
        rest = counted(patched)
        result = done(*words, "--out", tmp_path / "killed")
    assert rest["batches"] == whole["batches"] - die_at
    for one in (expected, result):
        del one["run"], one["completions"]
    assert result == expected
    both = [Completions.load(tmp_path / name / "completions.jsonl") for name in ("whole", "killed")]
    assert both[0] == both[1]


def test_answers_are_not_gone_on_with_where_prompts_have_changed(found, tiny_pair, tmp_path, monkeypatch):
    prompts = tmp_path / "harmful.txt"
    prompts.write_text(pathlib.Path(tiny_pair.harmful).read_text(encoding="utf-8"), encoding="utf-8")
    words = [
        "verify",
        "patch",
        *tiny_pair.models,
        "--harmful",
        prompts,
        "--harmless",
        tiny_pair.harmless,
        "--text",
        "none",
        *SHORT,
    ]
    words += ["--neurons", found, "--random", "0", "--out", tmp_path / "run"]
    with monkeypatch.context() as patched:
        counted(patched, die_at=4)
        assert command(*words).code == 1
    prompts.write_text(
        "write a story\n" + prompts.read_text(encoding="utf-8").split("\n", 1)[1], encoding="utf-8"
    )
    assert "another harmful" in refused(*words)
    answers = Completions.load(done(*words, "--overwrite")["completions"])
    assert {one.prompt for one in answers.arm("untreated/harmful")} == set(
        prompts.read_text(encoding="utf-8").splitlines()
    )


# compare


def compared(pair, *more):
    words = [
        "compare",
        *pair.models,
        "--prompts",
        pair.harmful,
        "--find-harmless",
        pair.harmless,
        "--find-general",
        pair.text,
        *pair.measured_on,
    ]
    return [*words, "--max-new-tokens", "3", "--limit", "3", "--top", "0.1", "--random", "2", *more]


def test_compare_puts_all_methods_side_by_side(tiny_pair, tmp_path):
    result = done(*compared(tiny_pair, "--out", tmp_path / "run"))
    names = [row["method"] for row in result["methods"]]
    expected = [name for name in METHODS if name not in ("heads", "routing")]  # of a dense model's units
    assert names == [*expected, "random 0", "random 1"]
    for row in result["methods"]:
        assert row.keys() >= {
            "method",
            "n_neurons",
            "recall",
            "causal_effect",
            "harmful_refused",
            "harmless_refused",
            "seconds",
        }
        assert row["recall"] is None
        assert row["n_units"] == result["budget"] == 10
    apart = 2  # Either random set was kept apart from one method's, and its agreement with that is none.
    assert len(result["agreement"]) == len(names) * (len(names) - 1) / 2 - apart
    for name in expected:
        file = f"{name}-10.scores.safetensors" if name == "mask" else f"{name}.scores.safetensors"
        assert len(Scores.load(tmp_path / "run" / file)) == 96
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_compare_measures_recall_of_a_planted_truth_in_units(tiny_pair, tmp_path, found):
    truth = NeuronSet(
        {"layers.0.up": [3, 9], "layers.0.down": [3], "layers.1.gate": [40]}, NeuronSet.load(found).table
    )
    truth.save(tmp_path / "truth.safetensors")
    words = compared(
        tiny_pair, "--truth", tmp_path / "truth.safetensors", "--methods", "weight-change,importance"
    )
    result = done(*words, "--out", tmp_path / "run")
    assert result["budget"] == 3
    assert result["sites"] == [
        "q",
        "k",
        "v",
        "o",
        "gate",
        "up",
        "down",
    ]  # no method is told where the truth lies
    assert {row["n_units"] for row in result["methods"]} == {3}
    assert all(row["recall"] in (0, 1 / 3, 2 / 3, 1) for row in result["methods"])
    row = result["truth"]
    assert (row["method"], row["n_units"], row["recall"], row["seconds"]) == ("truth", 3, 1, 0)
    assert row.keys() == result["methods"][0].keys()
    shown = command(*words, "--out", tmp_path / "shown").out
    assert re.search(r"^truth +3 +", shown, re.MULTILINE)
    assert "the planted truth itself (3 units) restores" in " ".join(shown.split())
    page = tmp_path / "report.html"
    done("report", tmp_path / "run", "--out", page)
    assert "the planted truth itself" in page.read_text(encoding="utf-8")


def test_a_killed_comparison_takes_up_the_methods_that_were_done(tiny_pair, tmp_path, monkeypatch):
    words = compared(tiny_pair, "--methods", "weight-change,contrast", "--random", "0")
    expected = done(*words, "--out", tmp_path / "whole")

    def dies(*_, **__):
        raise MemoryError("killed here")

    with monkeypatch.context() as patched:
        patched.setattr("safety_neurons.detectors.contrast.score", dies)
        assert command(*words, "--out", tmp_path / "killed").code == 1
    monkeypatch.setattr(
        "safety_neurons.detectors.baselines.change", lambda *_, **__: pytest.fail("found again")
    )
    result = done(*words, "--out", tmp_path / "killed")
    for one in (expected, result):
        del one["run"], one["completions"]
        assert all(row.pop("seconds") >= 0 for row in one["methods"])
    assert result == expected


# What a person sees


def test_tables_fit_a_terminal_of_80_columns(found, tiny_pair, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    verified = command(
        *patch(
            tiny_pair,
            "--scores",
            found,
            "--sizes",
            "0.05,0.2",
            "--random",
            "1",
            "--limit",
            "4",
            "--out",
            tmp_path / "verify",
        )
    )
    both = command(
        *compared(tiny_pair, "--methods", "importance-contrast,weight-change", "--out", tmp_path / "compare")
    )
    assert verified.code == both.code == 0
    for outcome in (verified, both):
        assert "\x1b" not in outcome.out
        for line in outcome.out.splitlines():
            assert (
                len(line.rstrip()) <= 80
                or re.search(r"[:.] ", line)
                or re.match(r"(run|completions|Patching|/) ?", line)
            ), line
    rows = [line.split() for line in both.out.splitlines() if line.startswith("importance-contrast")]
    assert len(rows) > 1, "columns that have no room stand below"
    assert "…" not in re.sub("…[^\n]*more[)]", "", both.out + verified.out), (
        "but in names of models in the heading"
    )
    assert re.search(
        r"^[\d,]+ patched \(20 %\) +\d\.\d\d \[\d\.\d\d, \d\.\d\d\] ", verified.out, re.MULTILINE
    )
    assert re.search(r" +causal effect", verified.out)


def test_a_pipe_gets_no_progress_and_no_bars(found, tiny_pair, tmp_path, capfd):
    outcome = command(
        *patch(tiny_pair, "--neurons", found, "--random", "0", "--limit", "2", "--out", tmp_path / "run")
    )
    assert outcome.code == 0
    assert "%|" not in outcome.err
    assert "Loading" not in outcome.err
    captured = capfd.readouterr()
    assert captured.err == ""
    assert captured.out == ""


def test_an_empty_selection_of_prompts_is_refused(found, tiny_pair, tmp_path):
    (tmp_path / "none.txt").write_text("\n\n", encoding="utf-8")
    words = [
        "verify",
        "patch",
        *tiny_pair.models,
        "--harmful",
        tmp_path / "none.txt",
        "--harmless",
        tiny_pair.harmless,
    ]
    assert "none.txt" in refused(*words, "--neurons", found, "--out", tmp_path / "run")


def test_a_comparison_record_is_json_through_and_through(tiny_pair, tmp_path):
    done(*compared(tiny_pair, "--methods", "weight-change", "--random", "0", "--out", tmp_path / "run"))
    text = (tmp_path / "run" / "run.json").read_text(encoding="utf-8")
    assert json.loads(text)["result"]["methods"][0]["method"] == "weight-change"
    assert "NaN" not in text


def test_a_terminal_gets_a_bar_with_tokens_per_second_and_the_name_of_the_arm_at_work(
    found, tiny_pair, tmp_path, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    words = [
        "find",
        "contrast",
        *tiny_pair.models,
        "--prompts",
        tiny_pair.harmful,
        "--max-new-tokens",
        "4",
        "--batch-size",
        "3",
    ]
    outcome = command(*words, "--out", tmp_path / "find", terminal=True)
    assert outcome.code == 0
    assert "tokens/s" in outcome.err
    assert "9/9" in outcome.err or "3/3" in outcome.err
    assert "Loading" not in outcome.err
    assert "5 neurons" in outcome.out
    verified = command(
        *patch(tiny_pair, "--neurons", found, "--random", "0", "--limit", "2", "--out", tmp_path / "run"),
        terminal=True,
    )
    assert "verify" in verified.err
    silent = command(*words, "--out", tmp_path / "json", "--json", terminal=True)
    assert silent.err == ""
    assert silent.json["n_neurons"] == 5
