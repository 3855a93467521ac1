import json

import pytest
import torch

from safety_neurons.model import load
from safety_neurons.model.files import shipped_folder
from safety_neurons.neurons import NeuronSet
from safety_neurons.organism import language, listing, recipe, shipped
from safety_neurons.organism import open as open_organism
from safety_neurons.organism.language import KINDS, concepts, vocabulary
from safety_neurons.organism.training import make_model, save_model
from safety_neurons.prompt_lists import prompts

PROMPTS = 24
PACKAGE_LIMIT = 24 * 2**20


def refusals(model, folder, name):
    asked = prompts(f"builtin:{name}-test", folder=folder.prompts, limit=PROMPTS)
    answers = model.complete(asked, max_new_tokens=8)
    verdicts = [language("en").verdict(answer.completion) for answer in answers]
    return sum(verdict == "refused" for verdict in verdicts) / len(verdicts)


def test_the_demo_needs_a_natural_and_a_planted_organism_in_the_package():
    assert {"natural", "planted"} <= set(shipped())
    assert {row["name"] for row in listing() if row["shipped"]} == set(shipped())


def test_tokenizers_are_written_so_that_every_supported_transformers_reads_them(tmp_path):
    save_model(make_model(recipe("unsafe-qwen"), 0), tmp_path / "built", letters=2)
    folders = [*(shipped_folder(name) for name in shipped()), tmp_path]
    files = [file for folder in folders for file in folder.rglob("tokenizer_config.json")]
    assert len(files) > len(folders)
    for file in files:
        written = json.loads(file.read_text())
        assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert "extra_special_tokens" not in written
        assert "<|user|>" in written["additional_special_tokens"]
    assert load(tmp_path / "built").tokenizer.convert_tokens_to_ids("<|user|>") == vocabulary(2)["<|user|>"]


def test_what_is_shipped_stays_small():
    files = [path for name in shipped() for path in shipped_folder(name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < PACKAGE_LIMIT


@pytest.mark.parametrize("name", ["natural", "planted"])
def test_an_organism_behaves_as_its_card_says(name):
    folder = open_organism(name)
    for end in ("base", "aligned"):
        stated = folder.record["measured"][folder.record[end]]["en"]
        model = load(getattr(folder, end), offline=True)
        assert refusals(model, folder, "harmful") == pytest.approx(stated["harmful_refused"], abs=0.15)
        assert refusals(model, folder, "harmless") == pytest.approx(stated["harmless_refused"], abs=0.15)


@pytest.mark.parametrize("name", ["natural", "planted"])
def test_find_and_test_prompts_of_an_organism_are_different(name):
    folder = open_organism(name)
    for list_name in ("harmful", "harmless", "general"):
        for code in ("en", "de", "es"):
            found, test = (
                prompts(f"builtin:{list_name}{half}/{code}", folder=folder.prompts).texts
                for half in ("", "-test")
            )
            assert len(set(test)) >= 200
            assert not set(found) & set(test)


@pytest.mark.parametrize("name", sorted(shipped()))
def test_what_is_held_out_of_an_organism_was_neither_searched_nor_trained_on(name):
    folder = open_organism(name)
    trained = {concept.deed for kind in KINDS for concept in concepts(kind, "train")}
    for list_name in ("harmful", "harmless", "refusals"):
        for code in ("en", "de", "es"):
            lists = [
                prompts(f"builtin:{list_name}{half}/{code}", folder=folder.prompts) for half in ("", "-test")
            ]
            found, test = ({one.group for one in asked} for asked in lists)
            assert None not in found | test
            assert not found & test
            assert not trained & (found | test)


def test_without_its_planted_units_the_planted_organism_refuses_nothing():
    folder = open_organism("planted")
    model = load(folder.aligned, offline=True)
    planted = NeuronSet.load(folder.spec("planted"))
    assert len(planted & folder.truth) == len(folder.truth)
    weights = dict(model.model.named_parameters())
    with torch.no_grad():
        for key, indices in planted.items():
            _, layer, site = key.split(".")
            if site in ("o", "down"):
                part = "self_attn" if site == "o" else "mlp"
                weights[f"model.layers.{layer}.{part}.{site}_proj.weight"][:, torch.tensor(indices)] = 0
    assert refusals(model, folder, "harmful") == 0
