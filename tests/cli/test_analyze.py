"""analyze, as a user types it: layers and overlap of files that a find run would write."""

import json
import pathlib

import numpy as np
import pytest
from running import command, done, record, refused

from safety_neurons import organism
from safety_neurons.neurons import NeuronSet, Provenance, Scores
from tiny_pair import HARMFUL


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two folders as find runs leave them, scores half alike."""
    folder = tmp_path_factory.mktemp("found")
    table = organism.open("planted").truth.table
    generator = np.random.default_rng(0)
    common = {key: generator.normal(size=size) for key, size in table.sizes.items()}
    for name in ("one", "two"):
        provenance = Provenance("scores", "drawn", model_fingerprint=table.fingerprint)
        scores = Scores(
            {key: values + generator.normal(size=len(values)) for key, values in common.items()},
            table,
            provenance,
        )
        (folder / name).mkdir()
        scores.save(folder / name / "scores.safetensors")
        scores.top(0.02).save(folder / name / "neurons.safetensors")
    return folder


def test_layers_is_one_command_with_a_figure_and_a_finished_run_stays(runs, tmp_path):
    line = ["analyze", "layers", runs / "one", "truth=organism:planted/truth", "--out", tmp_path / "run"]
    found = done(*line)
    assert [each["name"] for each in found["sets"]] == ["one", "truth"]
    truth = NeuronSet.load(organism.spec("planted/truth"))
    counted = {place["name"]: place["members"] for place in found["sets"][1]["by_matrix"] if place["members"]}
    assert counted == truth.counts()
    assert pathlib.Path(found["figure"]).read_text().startswith("<svg")
    shown = command(*line)
    assert "mostly in self-attention" in shown.out
    assert "finished" in shown.err
    assert "holds a run with sets" in refused(*line[:2], runs / "two", "--out", tmp_path / "run")


def test_overlap_is_one_command_and_its_record_repeats_it(runs, tmp_path):
    found = done(
        "analyze",
        "overlap",
        runs / "one",
        runs / "two",
        "organism:planted/decoys",
        "--count",
        40,
        "--out",
        tmp_path / "run",
    )
    sets = [Scores.load(runs / name).count(40) for name in ("one", "two")]
    assert found["pairs"][0]["shared"]["value"] == len(sets[0] & sets[1])
    assert found["pairs"][0]["spearman"]["value"] == pytest.approx(0.5, abs=0.05)
    assert found["pairs"][1]["spearman"]["value"] is None
    kept = "--count takes sets anew from scores, and none lie beside decoys: kept as they are"
    assert record(tmp_path / "run")["notes"] == [kept]
    assert pathlib.Path(found["figure"]).is_file()
    again = done("run", tmp_path / "run" / "run.json", "--out", tmp_path / "again")
    assert json.dumps(again["pairs"]) == json.dumps(found["pairs"])
    assert (
        "one, two"
        in command("analyze", "overlap", runs / "one", runs / "two", "--out", tmp_path / "shown").out
    )


def test_members_that_the_other_search_could_not_find_are_left_out_aloud(runs, tmp_path):
    scores = Scores.load(runs / "one" / "scores.safetensors")
    (tmp_path / "down").mkdir()
    Scores({key: values for key, values in scores.items() if key.endswith("down")}, scores.table).save(
        tmp_path / "down/scores.safetensors"
    )
    shown = command(
        "analyze", "overlap", runs / "one", tmp_path / "down", "--count", 60, "--out", tmp_path / "run"
    ).out
    left = len(scores.count(60)) - len(scores.count(60).only(sites=["down"]))
    assert f"one, down: {left} of one left out" in shown


def test_names_are_shown_as_they_read_and_whole(runs, tmp_path):
    name = "[/bold]a-rather-long-name-of-a-set\x1b[31m"
    shown = command("analyze", "layers", f"{name}={runs / 'one'}", "--out", tmp_path / "layers")
    assert shown.code == 0, shown.err
    assert "[/bold]a-rather-long-name-of-a-set⟨U+001B⟩[31m lies in" in shown.out
    several = [f"a-rather-long-name-of-set-{number}={runs / 'one'}" for number in range(4)]
    shown = command("analyze", "layers", *several, "--out", tmp_path / "several")
    assert "…" not in shown.out


def test_what_cannot_be_compared_is_one_line(runs, tmp_path):
    assert "at least two" in refused("analyze", "overlap", runs / "one", "--out", tmp_path / "run")
    assert "no file or folder" in refused(
        "analyze", "layers", tmp_path / "nowhere", "--out", tmp_path / "run"
    )
    assert "together" in refused(
        "analyze", "layers", runs / "one", "--top", 0.1, "--count", 3, "--out", tmp_path / "run", code=2
    )


@pytest.fixture(scope="module")
def words(tiny_pair):
    """Requests by language and by category, of which a tiny model makes little."""
    folder = tiny_pair.folder / "analyzed"
    folder.mkdir(exist_ok=True)
    for half, texts in (("find", HARMFUL[:6]), ("test", HARMFUL[3:])):
        for code in ("en", "de"):
            rows = [
                json.dumps({"prompt": text, "category": "ab"[number % 2], "language": code})
                for number, text in enumerate(texts)
            ]
            (folder / f"{half}.{code}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


def test_languages_and_transfer_are_one_command_each(words, tiny_pair, tmp_path):
    common = ["--units", 6, "--random", 1, "--max-new-tokens", 3]
    places = [
        "--find-prompts",
        f"{words}/find.{{language}}.jsonl",
        "--test-prompts",
        f"{words}/test.{{language}}.jsonl",
    ]
    line = [
        "analyze",
        "languages",
        "--model",
        tiny_pair.aligned,
        "--languages",
        "en,de",
        *places,
        *common,
        "--out",
        tmp_path / "languages",
    ]
    found = done(*line)
    assert found["method"] == "importance"
    assert found["languages"][0]["n_units"] == 6
    assert found["shared"]["n_units"] == 6
    assert found["skipped"] == ["en specific, minus intersection", "de specific, minus intersection"] + [
        "en specific, minus union",
        "de specific, minus union",
    ]
    assert {(cell["set"], cell["group"]) for cell in found["matrix"]} == {
        (name, group) for name in ("en", "de", "shared by all") for group in ("en", "de")
    }
    assert pathlib.Path(found["figure"]).is_file()
    assert "Not measured are the empty sets en specific, minus intersection" in command(*line).out
    assert NeuronSet.load(found["neurons"]["de"]).n_units == 6
    line = [
        "analyze",
        "transfer",
        *tiny_pair.models,
        "--prompts",
        words / "find.en.jsonl",
        "--harmful",
        words / "test.en.jsonl",
        *common,
    ]
    line += [
        "--harmless",
        tiny_pair.harmless,
        "--tasks",
        f"perplexity:{tiny_pair.text}",
        "--out",
        tmp_path / "transfer",
    ]
    found = done(*line)
    assert found["groups"] == ["a", "b"]
    assert len(found["matrix"]) == 4
    assert found["overlap"][0]["names"] == ["a", "b"]
    assert "General ability under patching" in command(*line).out


def test_prompts_to_measure_on_are_read_before_anything_is_found(words, tiny_pair, tmp_path):
    common = ["--units", 6, "--max-new-tokens", 3]
    places = [
        "--find-prompts",
        f"{words}/find.{{language}}.jsonl",
        "--test-prompts",
        f"{words}/missing.{{language}}.jsonl",
    ]
    line = ["analyze", "languages", "--model", tiny_pair.aligned, "--languages", "en,de", *places, *common]
    assert "missing.en.jsonl" in refused(*line, "--out", tmp_path / "languages")
    line = [
        "analyze",
        "transfer",
        *tiny_pair.models,
        "--prompts",
        words / "find.en.jsonl",
        "--harmful",
        words / "test.en.jsonl",
        *common,
    ]
    for option, given, said, code in [
        ("--harmless", words / "missing.jsonl", "missing.jsonl", 1),
        ("--tasks", "wikitexts:a", "'wikitexts:a'", 2),
        ("--tasks", f"gsm8k:{words / 'missing'}", "missing", 1),
        ("--answers", tiny_pair.harmless, "without an answer", 1),
    ]:
        assert said in refused(*line, option, given, "--out", tmp_path / "transfer", code=code)
    assert not list(tmp_path.glob("*/*.scores.safetensors"))


def test_vocabulary_and_progressive_are_one_command_each(tiny_pair, tmp_path):
    find = [
        "find",
        "contrast",
        *tiny_pair.models,
        "--prompts",
        tiny_pair.harmful,
        "--top",
        0.1,
        "--max-new-tokens",
        3,
    ]
    assert done(*find, "--out", tmp_path / "found")["n_neurons"]
    few = [*tiny_pair.measured_on, "--limit", 3]
    line = [
        "analyze",
        "vocabulary",
        "--model",
        tiny_pair.aligned,
        "--neurons",
        tmp_path / "found",
        *few,
        "--cards",
        2,
        "--random",
        2,
    ]
    found = done(*line, "--out", tmp_path / "cards")
    scores = Scores.load(tmp_path / "found")
    assert [card["score"] for card in found["cards"]] == sorted(
        np.concatenate([part for _, part in scores.items()]).tolist()
    )[:-3:-1]
    assert "writes towards" in command(*line, "--out", tmp_path / "cards").out
    line = [
        "analyze",
        "progressive",
        "--model",
        tiny_pair.aligned,
        "--neurons",
        tmp_path / "found",
        *few,
        "--text",
        tiny_pair.text,
    ]
    line += ["--random", 1, "--points", 2, "--max-new-tokens", 3, "--out", tmp_path / "steps"]
    found = done(*line)
    assert [curve["order"] for curve in found["curves"]] == [
        "front to back",
        "back to front",
        "one layer alone",
        "by score",
    ]
    assert "random neurons" in command(*line).out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["languages", "--model", "nowhere", "--languages", "en"], "at least two"),
        (["languages", "--model", "nowhere", "--languages", "en,de,en"], "none twice"),
        (["languages", "--model", "nowhere", "--method", "contrast"], "needs a pair"),
        (["languages", "--model", "nowhere", "--sets", "en=a.safetensors"], "no set for 'de'"),
        (["languages", "--model", "nowhere", "--find-prompts", "a.jsonl"], "{language}"),
        (["languages", "--model", "nowhere", "--definitions", "all"], "union, intersection"),
        (["transfer", "--base", "a", "--aligned", "b", "--method", "luck"], "unknown"),
        (["transfer", "--base", "a", "--aligned", "b", "--suites", "a"], "NAME=FILE"),
        (["vocabulary", "--model", "nowhere"], "neither"),
        (["vocabulary", "--model", "nowhere", "--at", "layers.0.down"], "KEY:INDEX"),
        (["progressive", "--model", "nowhere"], "--neurons is missing"),
    ],
)
def test_what_no_model_can_make_right_is_said_at_once(line, said, tmp_path):
    outcome = command("analyze", *line, "--out", tmp_path / "run")
    assert outcome.code == 2, outcome.err
    assert said in outcome.err
    assert not (tmp_path / "run").exists()
