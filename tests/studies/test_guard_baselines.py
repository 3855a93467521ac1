"""Tests of the classifiers beside a guard: on planted features, and against what transformers itself
gives.
"""

import numpy as np
import pytest
import torch
import transformers
from guard_tools import requests, some_neurons, tiny_model
from sklearn import metrics

from safety_neurons.guard import Pooling, read_features
from safety_neurons.guard.features import Collector
from safety_neurons.model.passes import read_residual
from safety_neurons.prompt_lists import Prompts
from safety_neurons.studies.guard_baselines import (
    DirectionProjection,
    Layered,
    Linear,
    SparseLayers,
    Words,
    read_cases,
    sentence_vectors,
)


@pytest.fixture(scope="module")
def planted():
    """Residual streams of three layers, of which the second alone knows the label."""
    number = np.random.default_rng(0)
    labels = number.random(400) < 0.4
    values = number.normal(size=(400, 3, 8)).astype(np.float32)
    values[:, 1, 2] += 3 * labels
    return values, labels, np.arange(280), np.arange(280, 400)


@pytest.mark.parametrize("kind", [Layered, DirectionProjection, SparseLayers])
def test_the_layer_that_knows_is_found(planted, kind):
    values, labels, fit, test = planted
    score = kind(values, labels).fit(fit, seed=0)
    assert metrics.roc_auc_score(labels[test], score(test)) > 0.95
    blind = np.delete(values, 1, axis=1)
    assert metrics.roc_auc_score(labels[test], kind(blind, labels).fit(fit, seed=0)(test)) < 0.65


def test_scores_are_calibrated_log_odds(planted):
    values, labels, fit, test = planted
    for baseline in (Linear(values[:, 1], labels), DirectionProjection(values, labels)):
        chances = 1 / (1 + np.exp(-baseline.fit(fit, 0)(test)))
        assert abs(chances.mean() - labels[test].mean()) < 0.1


def test_a_row_without_numbers_is_left_out_of_the_fit(planted):
    values, labels, fit, test = planted
    broken = values[:, 1].copy()
    broken[3] = np.nan
    assert np.isfinite(Linear(broken, labels).fit(fit, 0)(test)).all()


@pytest.mark.parametrize("analyzer", ["word", "char_wb"])
def test_words_know_the_words_they_have_seen_and_no_others(analyzer):
    number = np.random.default_rng(1)
    labels = np.arange(240) % 2 == 0
    texts = [
        " ".join(number.choice(["aa", "bb", "cc", "dd"], 5)) + (" xplode" if label else " garden")
        for label in labels
    ]
    texts[200:] = [text.replace("xplode", "zuend").replace("garden", "huhn") for text in texts[200:]]
    score = Words(texts, labels, analyzer).fit(np.arange(160), seed=0)
    seen, unseen = np.arange(160, 200), np.arange(200, 240)
    assert metrics.roc_auc_score(labels[seen], score(seen)) == 1
    assert metrics.roc_auc_score(labels[unseen], score(unseen)) < 0.75


def test_the_residual_stream_is_the_one_of_transformers():
    model = tiny_model()
    prompts = Prompts([*requests(3, 0)[0], *requests(2, 1)[1][:1]])
    ids = [item.ids for item in model.encode(prompts)]
    found = read_residual(model, ids, batch_size=2)
    for row, sequence in zip(found, ids, strict=True):
        with torch.no_grad():
            states = model.model(torch.tensor([sequence]), output_hidden_states=True).hidden_states
        assert np.allclose(row[0], states[1][0, -1], atol=1e-5)
        assert np.allclose(model.inner.model.norm(torch.tensor(row[1])).detach(), states[2][0, -1], atol=1e-5)


def test_every_set_is_read_as_on_its_own():
    model = tiny_model()
    prompts = requests(4, 0)[0]
    sets = {"guard": some_neurons(model, 4), "other": some_neurons(model, 3)}
    read = read_cases(model, prompts, sets, Pooling("mean"))
    for name, members in sets.items():
        assert np.allclose(
            read.sets[name], read_features(model, prompts, members, pooling="mean").values, atol=1e-6
        )
    assert read.lengths.tolist() == [len(item.ids) for item in model.encode(prompts)]


def test_tokens_that_agree_are_read_for_the_guard_and_the_last_one_for_its_baselines():
    model = tiny_model()
    prompts, members = requests(4, 0)[0], some_neurons(model, 4)
    weights = torch.linspace(-1, 1, len(members))
    sets = {"guard": members, "other": some_neurons(model, 3)}
    read = read_cases(model, prompts, sets, Pooling("agree", 4, 2), direction=weights)
    for name, some in sets.items():
        assert np.allclose(read.sets[name], read_features(model, prompts, some).values, atol=1e-6)
    collector = Collector(model.anatomy, members, [Pooling("agree", 4, 4)], weights)
    for row, item in zip(read.own, model.encode(prompts), strict=True):
        with collector, torch.no_grad():
            collector.start()
            model.inner(input_ids=torch.tensor([item.ids]))
            tokens = collector.tokens(Pooling("agree", 4, 4))[0][0].numpy()
        second = sorted(float(token @ weights.numpy()) for token in tokens)[-2]
        assert float(row @ weights.numpy()) == pytest.approx(second, abs=1e-5)


def test_sentence_vectors_are_means_over_tokens_without_padding(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "make", "a", "cake", "bomb"]
    transformers.BertTokenizerFast(vocab={word: place for place, word in enumerate(words)}).save_pretrained(
        tmp_path
    )
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    torch.manual_seed(0)
    encoder = transformers.BertModel(config).eval()
    encoder.save_pretrained(tmp_path)
    texts = ["make a cake", "bomb", "make a bomb a cake"]
    found = sentence_vectors(str(tmp_path), texts, batch=2)
    for row, text in zip(found, texts, strict=True):
        ids = [2, *(words.index(word) for word in text.split()), 3]
        with torch.no_grad():
            mean = encoder(torch.tensor([ids])).last_hidden_state[0].mean(0)
        assert np.allclose(row, mean / mean.norm(), atol=1e-5)
