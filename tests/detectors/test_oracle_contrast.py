"""Change scores, ranks, statistics and features recorded from a public implementation of paper 2."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from safety_neurons.detectors import find_contrast
from safety_neurons.detectors.contrast import contrast_statistics
from safety_neurons.detectors.methods import Contrast
from safety_neurons.detectors.reading import read
from safety_neurons.detectors.runner import PromptCounts, Run, Stream
from safety_neurons.detectors.text import Span, Texts, texts
from safety_neurons.model import load_pair
from safety_neurons.model.batches import collate
from safety_neurons.prompt_lists import prompts as read_prompts

RUNS = {"completion": "sft_gen__sft_vs_dpo__completion", "prompt-last": "sft_vs_dpo__prompt_last"}
LAYERS = range(4)


@pytest.fixture(scope="module")
def folder(shared):
    if not (shared / "oracle-contrast").is_dir():
        pytest.skip("the recorded results are not beside this checkout")
    return shared / "oracle-contrast"


@pytest.fixture(scope="module")
def recorded(folder):
    return load_file(folder / "change_scores.safetensors")


@pytest.fixture(scope="module")
def pair(folder):
    base, sft, dpo = (folder / "fixture" / name for name in ("base", "adapter_sft", "adapter_dpo"))
    return load_pair(f"{base}+{sft}", f"{base}+{sft}+{dpo}", template="tulu")


@pytest.fixture(scope="module")
def asked(folder):
    return read_prompts(folder / "fixture" / "prompts.jsonl", limit=16)


def stacked(values):
    return np.stack([values[f"layers.{layer}.down"] for layer in LAYERS])


@pytest.mark.parametrize("positions", RUNS)
def test_recorded_scores_and_ranks_come_out(positions, recorded, pair, asked):
    found = find_contrast(pair.base, pair.aligned, asked, positions=positions, max_new_tokens=24, count=26)
    scores, expected = stacked(dict(found.scores.items())), recorded[f"{RUNS[positions]}/change_scores"]
    tolerance = 1e-5 * expected.max()
    np.testing.assert_allclose(scores, expected, rtol=0, atol=tolerance)
    ours = np.argsort(-scores.flatten(), kind="stable")
    theirs = recorded[f"{RUNS[positions]}/neuron_ranks"] @ np.array([128, 1])
    moved = ours != theirs
    assert (np.abs(expected.flatten()[ours] - expected.flatten()[theirs])[moved] <= 2 * tolerance).all()
    assert sorted(theirs) == list(range(512))
    assert found.prompts.used == 16


@pytest.mark.parametrize("positions", RUNS)
def test_recorded_means_and_deviations_come_out(positions, recorded, pair, asked):
    text = texts(pair.base, asked, positions=positions, max_new_tokens=24, stream=Stream(None, {}))
    statistics, _ = contrast_statistics(Run((pair.base, pair.aligned), asked, Contrast()), text)
    names = {"aligned": "first", "base": "second"}
    for ours, theirs in names.items():
        for values, kind in ((statistics.mean(ours), "mean"), (statistics.standard_deviation(ours), "std")):
            expected = recorded[f"{RUNS[positions]}/{theirs}_{kind}"]
            np.testing.assert_allclose(
                stacked(values),
                expected,
                rtol=0,
                atol=1e-5 * np.abs(expected).max(),
                err_msg=f"{ours} {kind}",
            )


@pytest.mark.parametrize("positions", RUNS)
def test_the_very_ids_and_masks_that_were_recorded_give_the_recorded_scores(positions, recorded, pair):
    spans = []
    for batch in range(2):
        ids, attention, chosen = (
            recorded[f"{RUNS[positions]}/batch{batch}/{name}"]
            for name in ("input_ids", "attention_mask", "select_mask")
        )
        for row in range(len(ids)):
            tokens = ids[row][attention[row] == 1].tolist()
            counted = (
                chosen[row][-len(tokens) :]
                if chosen.shape[1] >= len(tokens)
                else np.pad(chosen[row], (len(tokens) - chosen.shape[1], 0))
            )
            where = np.flatnonzero(counted)
            assert (np.diff(where) == 1).all()
            spans.append(Span(f"{batch}/{row}", tuple(tokens), int(where[0]), int(where[-1]) + 1))
    text = Texts(tuple(spans), PromptCounts(len(spans)))
    assert text.n_tokens == (363 if positions == "completion" else 16)
    statistics, _ = contrast_statistics(
        Run((pair.base, pair.aligned), read_prompts(["any"]), Contrast()), text
    )
    expected = recorded[f"{RUNS[positions]}/change_scores"]
    np.testing.assert_allclose(stacked(statistics.scores()), expected, rtol=0, atol=1e-5 * expected.max())


def test_the_top_of_the_list_and_its_layers_are_the_recorded_ones(folder, pair, asked):
    meta = json.loads((folder / "change_scores_meta.json").read_text())
    found = find_contrast(pair.base, pair.aligned, asked, max_new_tokens=24, top=0.05)
    assert found.neurons.provenance.config["tokens"] == meta[RUNS["completion"]]["n_tokens"] == 363
    assert [len(found.neurons[f"layers.{layer}.down"]) for layer in LAYERS] == [5, 3, 7, 11]
    best = [(3, 115), (0, 125), (2, 57), (0, 121), (0, 91), (2, 43), (3, 107), (3, 48)]
    numbers = [3.345594, 2.393389, 1.985843, 1.810965, 1.767597, 1.648770, 1.565659, 1.505082]
    scores = stacked(dict(found.scores.items()))
    order = np.argsort(-scores.flatten())[:8]
    assert [(int(place) // 128, int(place) % 128) for place in order] == best
    np.testing.assert_allclose(scores.flatten()[order], numbers, atol=4e-5)


def test_the_two_completion_positions_differ_as_recorded(pair, asked):
    own, predicting = (
        find_contrast(pair.base, pair.aligned, asked, max_new_tokens=24, positions=positions, count=26)
        for positions in ("completion", "completion-predicting")
    )
    assert own.scores.rank_correlation(predicting.scores) == pytest.approx(0.983, abs=0.002)
    assert len(own.neurons & predicting.neurons) / 26 == pytest.approx(0.85, abs=0.02)


def test_a_layer_range_leaves_the_other_scores_as_they_are(pair, asked):
    whole = find_contrast(pair.base, pair.aligned, asked, max_new_tokens=24)
    part = find_contrast(pair.base, pair.aligned, asked, max_new_tokens=24, layers="0:3")
    assert list(part.scores.keys()) == [f"layers.{layer}.down" for layer in range(3)]
    for key, values in part.scores.items():
        np.testing.assert_array_equal(values, whole.scores[key])


def test_recorded_features_come_out(folder, pair, asked):
    stored = load_file(folder / "features.safetensors")
    columns = stored["features/sft/top128/columns"]
    last = {}
    for row, encoded in enumerate(pair.base.encode(asked)):
        seen = {}
        readers = {
            f"layers.{layer}.down": lambda values, layer=layer, seen=seen: seen.__setitem__(
                layer, values[0, -1].clone()
            )
            for layer in LAYERS
        }
        read(pair.base, collate([encoded.ids], [0]), readers)
        last[row] = torch.stack([seen[layer] for layer in LAYERS]).numpy()
    features = np.stack([last[row][columns[:, 0], columns[:, 1]] for row in range(16)])
    expected = stored["features/sft/top128"]
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-4)
