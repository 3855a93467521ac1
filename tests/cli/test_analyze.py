"""analyze, as a user types it: layers and overlap of files that a find run would write."""

import json
import pathlib

import numpy as np
import pytest
from running import command, done, refused

from safety_neurons import organism
from safety_neurons.neurons import NeuronSet, Provenance, Scores


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two folders as find runs leave them, scores half alike."""
    folder = tmp_path_factory.mktemp("found")
    table = organism.open("planted").truth.table
    generator = np.random.default_rng(0)
    common = {key: generator.normal(size=size) for key, size in table.sizes.items()}
    for name in ("one", "two"):
        provenance = Provenance("scores", "drawn", model_fingerprint=table.fingerprint)
        scores = Scores({key: values + generator.normal(size=len(values)) for key, values in common.items()}, table, provenance)
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
    found = done("analyze", "overlap", runs / "one", runs / "two", "organism:planted/decoys", "--count", 40, "--out", tmp_path / "run")
    sets = [Scores.load(runs / name).count(40) for name in ("one", "two")]
    assert found["pairs"][0]["shared"]["value"] == len(sets[0] & sets[1])
    assert found["pairs"][0]["spearman"]["value"] == pytest.approx(0.5, abs=0.05)
    assert found["pairs"][1]["spearman"]["value"] is None
    assert pathlib.Path(found["figure"]).is_file()
    again = done("run", tmp_path / "run" / "run.json", "--out", tmp_path / "again")
    assert json.dumps(again["pairs"]) == json.dumps(found["pairs"])
    assert "one, two" in command("analyze", "overlap", runs / "one", runs / "two", "--out", tmp_path / "shown").out


def test_what_cannot_be_compared_is_one_line(runs, tmp_path):
    assert "at least two" in refused("analyze", "overlap", runs / "one", "--out", tmp_path / "run")
    assert "no file or folder" in refused("analyze", "layers", tmp_path / "nowhere", "--out", tmp_path / "run")
    assert "together" in refused("analyze", "layers", runs / "one", "--top", 0.1, "--count", 3, "--out", tmp_path / "run", code=2)
