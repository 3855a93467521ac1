"""find mask, and neurons that come from other projects and go to other tools, from the command line."""

import json

import numpy as np
import torch
from running import done, refused
from safetensors.numpy import save_file

from safety_neurons.neurons import NeuronSet


def test_a_mask_of_the_size_asked_for_is_written(tiny_pair, tmp_path):
    words = [
        "find",
        "mask",
        *tiny_pair.models,
        "--prompts",
        tiny_pair.harmful,
        "--harmless",
        tiny_pair.harmless,
        "--rounds",
        "2",
    ]
    result = done(*words, "--count", "6", "--out", tmp_path / "run")
    assert result["n_neurons"] == 6
    assert result["method"] == "mask"
    assert NeuronSet.load(result["neurons"]).provenance.config["units"] == 6
    alone = done(
        *words[:-4], "--harmless", "none", "--rounds", "1", "--top", "0.1", "--out", tmp_path / "alone"
    )
    assert alone["n_neurons"] == 10


def test_files_of_three_projects_come_in(tiny_pair, tmp_path):
    model = ["--model", tiny_pair.plain]
    (tmp_path / "sn.txt").write_text("{0: {1, np.int64(2)}}\n{0: {1, 2}}\n{1: {3}}\n{}\n{}\n")
    result = done(
        "import", "neurons", tmp_path / "sn.txt", *model, "--format", "sn-tune", "--out", tmp_path / "one"
    )
    assert result["n_neurons"] == 5
    assert NeuronSet.load(result["neurons"])["layers.1.q"].tolist() == [3]
    values = torch.rand(2, 48)
    ranks = torch.stack(torch.unravel_index(values.flatten().argsort(descending=True), (2, 48)), 1)
    torch.save((values, ranks, values, values, values, values), tmp_path / "scores.pt")
    words = ["import", "neurons", tmp_path / "scores.pt", *model, "--format", "change-scores", "--count", "4"]
    result = done(*words, "--out", tmp_path / "two")
    assert {(key, index) for key, index in NeuronSet.load(result["neurons"])} == {
        (f"layers.{a}.down", b) for a, b in ranks[:4].tolist()
    }
    weights = np.random.default_rng(0).normal(size=48)
    weights[7] = 9.0
    save_file({"model.layers.0.mlp.up_proj": weights}, tmp_path / "weights.safetensors")
    result = done(
        "import",
        "neurons",
        tmp_path / "weights.safetensors",
        *model,
        "--format",
        "neurostrike",
        "--out",
        tmp_path / "three",
    )
    assert list(NeuronSet.load(result["neurons"])) == [("layers.0.up", 7)]


def test_what_is_hostile_or_of_another_form_is_one_line(tiny_pair, tmp_path):
    model = ["--model", tiny_pair.plain, "--out", tmp_path / "run"]
    (tmp_path / "bad.txt").write_text("{0: {exit()}}\n{}\n{}\n{}\n{}\n")
    assert "not a number" in refused("import", "neurons", tmp_path / "bad.txt", "--format", "sn-tune", *model)
    assert "expected one of" in refused(
        "import", "neurons", tmp_path / "bad.txt", "--format", "magic", *model, code=2
    )
    (tmp_path / "weights.p").write_bytes(b"\x80\x04}.")
    assert "docs/exchange.md" in refused(
        "import", "neurons", tmp_path / "weights.p", "--format", "neurostrike", *model
    )


def test_names_for_other_tools_are_written_as_json(tiny_pair, tmp_path):
    NeuronSet({"layers.1.down": [3, 5]}).save(tmp_path / "neurons.safetensors")
    words = ["export", "neurons", "--neurons", tmp_path / "neurons.safetensors", "--model", tiny_pair.plain]
    for tool, expected in (
        ("transformer-lens", {"blocks.1.mlp.hook_post": [3, 5]}),
        ("nnsight", {"model.layers[1].mlp.down_proj.input": [3, 5]}),
    ):
        result = done(*words, "--to", tool, "--out", tmp_path / tool)
        with open(result["names"], encoding="utf-8") as stream:
            assert json.load(stream) == expected
