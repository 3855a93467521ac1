"""find: every method from the command line, its files, its object, its selections, and runs that go on."""

import pathlib

import numpy as np
import pytest
from running import command, done, record, refused

from safety_neurons.neurons import NeuronSet, Scores

KEYS = {
    "neurons",
    "scores",
    "n_neurons",
    "n_parameters",
    "share_of_neurons",
    "share_of_parameters",
    "prompts",
}
SINGLE = ("importance", "attribution")
PAIR = ("contrast", "importance-contrast", "attribution-patching")
SHORT = {"contrast": ["--max-new-tokens", "4"]}


def words_of(method, pair, *more):
    models = pair.models if method in PAIR else ["--model", pair.aligned]
    return [
        "find",
        method,
        *models,
        "--prompts",
        pair.harmful,
        "--batch-size",
        "3",
        *SHORT.get(method, []),
        *more,
    ]


@pytest.mark.parametrize("method", SINGLE + PAIR)
def test_every_method_writes_scores_and_neurons_and_says_where(method, tiny_pair, tmp_path):
    result = done(*words_of(method, tiny_pair, "--out", tmp_path / "run"))
    assert result.keys() >= KEYS
    assert result["prompts"] == {"used": 9, "failed": 0, "truncated": 0}
    assert pathlib.Path(result["neurons"]).is_absolute()
    assert pathlib.Path(result["scores"]).is_absolute()
    neurons, scores = NeuronSet.load(result["neurons"]), Scores.load(result["scores"])
    assert result["n_neurons"] == len(neurons) > 0
    assert result["share_of_neurons"] == pytest.approx(len(neurons) / len(scores))
    assert scores.provenance.method == method
    own = record(tmp_path / "run")
    assert own["status"] == "finished"
    assert own["device"] == "cpu, float32"
    assert own["hashes"]["model_fingerprint"] == neurons.provenance.model_fingerprint


@pytest.mark.parametrize(
    ("rule", "count"),
    [
        (["--top", "0.1"], 10),
        (["--count", "7"], 7),
        (["--top-per-matrix", "3"], 6),
        (["--threshold", "-1"], 96),
    ],
)
def test_a_selection_takes_exactly_that_many(rule, count, tiny_pair, tmp_path):
    assert done(*words_of("contrast", tiny_pair, *rule, "--out", tmp_path / "run"))["n_neurons"] == count


def test_an_agreement_keeps_no_more_than_the_plain_selection(tiny_pair, tmp_path):
    loose = done(
        *words_of("importance", tiny_pair, "--top", "0.2", "--agreement", "0.3", "--out", tmp_path / "loose")
    )
    strict = done(
        *words_of("importance", tiny_pair, "--top", "0.2", "--agreement", "1.0", "--out", tmp_path / "strict")
    )
    few, many = NeuronSet.load(strict["neurons"]), NeuronSet.load(loose["neurons"])
    assert 0 < len(few) < len(many)
    assert few & many == few


def test_an_empty_set_fails_keeps_the_scores_and_names_the_agreement_that_gives_one(tiny_pair, tmp_path):
    words = words_of("contrast", tiny_pair, "--count", "1", "--agreement", "1.0", "--out", tmp_path / "run")
    line = refused(*words)
    assert "no neuron was chosen" in line
    share = line.split("an agreement of ")[1].split(" ")[0]
    scores = tmp_path / "run" / "scores.safetensors"
    assert str(scores) in line
    assert len(Scores.load(scores)) == 96
    enough = words_of(
        "contrast", tiny_pair, "--count", "1", "--agreement", share, "--out", tmp_path / "enough"
    )
    assert done(*enough)["n_neurons"] >= 1
    more = words_of(
        "contrast", tiny_pair, "--count", "1", "--agreement", float(share) + 0.02, "--out", tmp_path / "more"
    )
    assert "no neuron was chosen" in refused(*more)


def test_sites_and_layers_limit_the_search(tiny_pair, tmp_path):
    words = words_of(
        "importance",
        tiny_pair,
        "--sites",
        "q,down",
        "--layers",
        "1:2",
        "--count",
        "5",
        "--out",
        tmp_path / "run",
    )
    scores = Scores.load(done(*words)["scores"])
    assert scores.keys() == ["layers.1.q", "layers.1.down"]


def test_subtracting_a_file_or_the_foundation_takes_those_neurons_away(tiny_pair, tmp_path):
    whole = NeuronSet.load(
        done(*words_of("importance", tiny_pair, "--top", "0.1", "--out", tmp_path / "whole"))["neurons"]
    )
    other = done(*words_of("importance", tiny_pair, "--top", "0.02", "--out", tmp_path / "other"))
    left = done(
        *words_of(
            "importance",
            tiny_pair,
            "--top",
            "0.1",
            "--subtract",
            other["neurons"],
            "--out",
            tmp_path / "left",
        )
    )
    assert NeuronSet.load(left["neurons"]) == whole - NeuronSet.load(other["neurons"])
    extra = ["--subtract", "foundation", "--foundation", tiny_pair.text]
    rest = done(*words_of("importance", tiny_pair, "--top", "0.1", *extra, "--out", tmp_path / "rest"))
    foundation = NeuronSet.load(tmp_path / "rest" / "foundation.safetensors")
    assert len(foundation) == len(whole)
    assert 0 < rest["n_neurons"] < len(whole)
    assert NeuronSet.load(rest["neurons"]) == whole - foundation


def test_the_specific_part_is_said_shown_and_kept(tiny_pair, tmp_path):
    minus = ["--minus", f"{tiny_pair.harmless},words={tiny_pair.text}"]
    words = [*words_of("importance", tiny_pair, "--top", "0.1"), *minus]
    found = done(*words, "--out", tmp_path / "run")
    specific = found["specific"]
    chosen, left = NeuronSet.load(specific["chosen"]), NeuronSet.load(found["neurons"])
    others = [NeuronSet.load(row["neurons"]) for row in specific["minus"]]
    assert [row["name"] for row in specific["minus"]] == ["harmless", "words"]
    assert left == chosen - others[0] - others[1]
    assert specific["share"] == found["n_neurons"] / len(chosen) == len(left) / len(chosen)
    assert 0 <= specific["by_chance"] < 1
    assert not (tmp_path / "run" / "checkpoints").exists()
    shown = command(*words, "--out", tmp_path / "run").out
    assert "Specific to the prompts: " in shown
    assert "Taken away: chosen on other prompts too" in shown
    assert command("report", tmp_path / "run", "--out", tmp_path / "report.html").code == 0
    assert "Specific to the prompts" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "specific" not in done(*words_of("importance", tiny_pair), "--out", tmp_path / "plain")
    twice = command(*words, "--minus", f"{tiny_pair.text},{tiny_pair.text}", "--out", tmp_path / "twice")
    assert twice.code == 2
    assert "expected NAME=FILE with other names" in twice.err


def test_completions_of_a_file_are_used_instead_of_generating(tiny_pair, tmp_path):
    verified = [
        "verify",
        "patch",
        *tiny_pair.models,
        *tiny_pair.measured_on,
        "--text",
        "none",
        "--random",
        "0",
        "--max-new-tokens",
        "4",
    ]
    first = done(*words_of("contrast", tiny_pair, "--out", tmp_path / "first"))
    written = done(*verified, "--neurons", tmp_path / "first", "--out", tmp_path / "verify")["completions"]
    chosen = [
        line
        for line in pathlib.Path(written).read_text(encoding="utf-8").splitlines()
        if '"arm": "untreated/harmful"' in line
    ]
    file = tmp_path / "completions.jsonl"
    file.write_text("\n".join(chosen) + "\n", encoding="utf-8")
    again = done(*words_of("contrast", tiny_pair, "--completions", file, "--out", tmp_path / "again"))
    assert Scores.load(again["scores"]) == Scores.load(first["scores"])


def test_a_finished_run_is_left_alone_and_overwrite_starts_it_again(tiny_pair, tmp_path):
    words = words_of("contrast", tiny_pair, "--out", tmp_path / "run")
    first = done(*words)
    before = pathlib.Path(first["scores"]).stat().st_mtime_ns
    again = command(*words)
    assert again.code == 0
    assert "this run is finished" in again.err
    assert "5 neurons" in again.out
    assert pathlib.Path(first["scores"]).stat().st_mtime_ns == before
    assert done(*words) == first
    done(*words, "--overwrite")
    assert pathlib.Path(first["scores"]).stat().st_mtime_ns > before


def test_another_configuration_in_the_same_folder_is_refused(tiny_pair, tmp_path):
    first = done(*words_of("contrast", tiny_pair, "--out", tmp_path / "run"))
    before = pathlib.Path(first["scores"]).read_bytes()
    line = refused(*words_of("contrast", tiny_pair, "--top", "0.2", "--out", tmp_path / "run"))
    assert "top" in line
    assert "--overwrite" in line
    assert "verify" not in line
    assert "find-contrast" in refused(*words_of("importance", tiny_pair, "--out", tmp_path / "run"))
    assert pathlib.Path(first["scores"]).read_bytes() == before
    assert (
        done(*words_of("contrast", tiny_pair, "--top", "0.2", "--out", tmp_path / "run", "--overwrite"))[
            "n_neurons"
        ]
        == 19
    )


def test_a_dry_run_writes_nothing(tiny_pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = done(*words_of("contrast", tiny_pair, "--dry-run"))
    assert plan["prompts"] == 9
    assert plan["weights_bytes"] > 0
    said = command(*words_of("contrast", tiny_pair, "--dry-run"))
    assert said.code == 0
    assert "weights" in said.out
    done(*words_of("contrast", tiny_pair, "--dry-run", "--out", tmp_path / "named"))
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_out_goes_to_a_folder_of_its_own(tiny_pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = {done(*words_of("contrast", tiny_pair))["run"] for _ in range(3)}
    assert len(folders) == 3
    assert {pathlib.Path(folder).parent for folder in folders} == {tmp_path / "runs"}


@pytest.mark.parametrize("method", ["contrast", "importance", "attribution-patching"])
def test_a_run_record_repeats_the_run(method, tiny_pair, tmp_path):
    first = done(*words_of(method, tiny_pair, "--count", "6", "--out", tmp_path / "first", "--seed", "3"))
    again = done("run", tmp_path / "first" / "run.json", "--out", tmp_path / "again")
    assert again["n_neurons"] == first["n_neurons"]
    assert Scores.load(again["scores"]) == Scores.load(first["scores"])
    assert NeuronSet.load(again["neurons"]) == NeuronSet.load(first["neurons"])
    assert record(tmp_path / "again")["arguments"] == record(tmp_path / "first")["arguments"]


def test_a_repeated_run_takes_common_options_of_its_own(tiny_pair, tmp_path):
    done(*words_of("contrast", tiny_pair, "--out", tmp_path / "first"))
    done("run", tmp_path / "first" / "run.json", "--out", tmp_path / "again", "--dtype", "float64")
    assert record(tmp_path / "again")["device"] == "cpu, float64"
    low, high = (Scores.load(tmp_path / name) for name in ("first", "again"))
    for key in low:
        assert np.allclose(low[key], high[key], rtol=1e-4)


def test_what_is_no_recipe_is_refused(tmp_path):
    assert "does not exist" in refused("run", tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("[1", encoding="utf-8")
    assert "is not a recipe" in refused("run", tmp_path / "bad.json")
    (tmp_path / "other.json").write_text('{"verb": "dance", "arguments": {}}', encoding="utf-8")
    assert "dance" in refused("run", tmp_path / "other.json", code=2)
    (tmp_path / "odd.json").write_text(
        '{"verb": "find-contrast", "arguments": {"colour": "red"}}', encoding="utf-8"
    )
    assert "colour" in refused("run", tmp_path / "odd.json", code=2)
