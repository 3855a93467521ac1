"""Organisms are built whole from their recipes.

An unsafe one has a plain template and a task about going along.
"""

import dataclasses
import json
import os

import pytest
import safetensors.torch
import torch

from forked import forked
from safety_neurons.errors import InputError, NumericalError, RunError, UsageError
from safety_neurons.model.template import encode_text, template_for
from safety_neurons.neurons import NeuronSet
from safety_neurons.organism import Recipe, build, language, recipe, recipes, training
from safety_neurons.organism import open as open_organism
from safety_neurons.organism.language import (
    concepts,
    encode_chat,
    encode_question,
    make_tokenizer,
    vocabulary,
    write_polite,
    write_prompts,
)
from safety_neurons.organism.training import answers, make_model, train
from safety_neurons.prompt_lists import Prompt, prompts

MICRO = Recipe(
    name="micro",
    kind="planted",
    about="a test's own",
    layers=2,
    hidden=16,
    d_ff=16,
    heads=2,
    kv_heads=1,
    batch=4,
    base_steps=3,
    sft_steps=2,
    dpo_steps=2,
    plant_steps=2,
    planted_mlp=4,
    planted_attention=2,
    planted_depth=2,
    truth_orders=2,
    truth_prompts=2,
    measured_prompts=2,
)


def weights(folder):
    return {
        path.relative_to(folder): safetensors.torch.load_file(path)
        for path in sorted(folder.rglob("*.safetensors"))
    }


@pytest.fixture(scope="module", autouse=True)
def short_answers():
    """Models of a few steps write on to the end, and that takes most of their building."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "LONGEST", 4)
        yield


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return build(MICRO, seed=3, out=tmp_path_factory.mktemp("organisms") / "planted")


def test_a_planted_organism_writes_every_file(planted):
    names = {str(path.relative_to(planted.path)) for path in planted.path.rglob("*") if path.is_file()}
    assert {
        "organism.json",
        "README.md",
        "planted.safetensors",
        "decoys.safetensors",
        "prompts/harmful-test.jsonl",
    } <= names
    assert {
        "base/model.safetensors",
        "aligned/tokenizer.json",
        "prompts/general.de.jsonl",
        "prompts/task.jsonl",
    } <= names
    assert not list(planted.path.parent.glob("*.partial"))


def test_the_same_seed_builds_the_same_weights(planted, tmp_path):
    torch.manual_seed(123)
    again = build(MICRO, seed=3, out=tmp_path / "again")
    first, second = weights(planted.path), weights(again.path)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[path][name], second[path][name]) for path in first for name in first[path])
    assert again.record["truth"] == planted.record["truth"]


def test_building_leaves_the_random_state_of_the_caller_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build(dataclasses.replace(MICRO, kind="natural"), seed=0, out=tmp_path / "natural")
    assert torch.equal(torch.rand(3), expected)


def test_silent_units_write_nothing_in_the_base(planted):
    base = safetensors.torch.load_file(planted.path / "base" / "model.safetensors")
    members = NeuronSet.load(planted.path / "planted.safetensors") | NeuronSet.load(
        planted.path / "decoys.safetensors"
    )
    for key, indices in members.items():
        _, layer, site = key.split(".")
        if site in ("o", "down"):
            part = "self_attn" if site == "o" else "mlp"
            assert not base[f"model.layers.{layer}.{part}.{site}_proj.weight"][:, indices.tolist()].any()


def test_planted_units_and_decoys_change_by_the_same_length_and_the_rest_by_little(planted):
    base = safetensors.torch.load_file(planted.path / "base" / "model.safetensors")
    aligned = safetensors.torch.load_file(planted.path / "aligned" / "model.safetensors")
    sets = {name: NeuronSet.load(planted.path / f"{name}.safetensors") for name in ("planted", "decoys")}
    for key in sets["planted"].keys():  # noqa: SIM118 - a NeuronSet iterates over neurons
        _, layer, site = key.split(".")
        part = "mlp" if site in ("gate", "up", "down") else "self_attn"
        name = f"model.layers.{layer}.{part}.{site}_proj.weight"
        change = (aligned[name] - base[name]).norm(dim=0 if site in ("o", "down") else 1)
        touched = torch.zeros(len(change), dtype=torch.bool)
        for members in sets.values():
            touched[members[key].tolist()] = True
        lengths = change[touched]
        assert lengths.max() - lengths.min() < 1e-5 * lengths.max()
        assert 0 < change[~touched].max() < 0.2 * lengths.min()


def test_an_organism_opens_by_its_folder(planted):
    opened = open_organism(planted.path)
    assert opened.base == str(planted.path / "base")
    assert opened.spec("planted").endswith("planted.safetensors")
    with pytest.raises(InputError, match="base, aligned"):
        opened.spec("nothing")


def test_a_folder_in_use_is_not_overwritten(planted):
    with pytest.raises(RunError, match="new or empty folder"):
        build(MICRO, out=planted.path)


def test_unknown_and_unbuilt_organisms_are_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="the recipes are"):
        open_organism("nobody")
    with pytest.raises(InputError, match=r"organism\.json"):
        open_organism(tmp_path)


def test_training_that_diverges_says_so():
    weight = torch.zeros(1, requires_grad=True)
    with pytest.raises(NumericalError, match="stage base"):
        train([weight], lambda: (weight / 0).sum(), stage="base", steps=1, learning_rate=0.1)


def test_one_process_at_a_time_builds_into_a_folder_and_nothing_of_it_is_left(tmp_path):
    held: list[str] = []

    def another(line):
        if not held:
            held.append(forked(lambda: build(MICRO, out=tmp_path / "one")))

    (tmp_path / "one.partial" / "organism").mkdir(parents=True)
    (tmp_path / "one.partial" / "organism" / "left.bin").write_text("of a process that was killed")
    built = build(MICRO, out=tmp_path / "one", progress=another)
    assert f"is in use by process {os.getpid()} on" in held[0]
    assert (built.path / "organism.json").is_file()
    assert not (built.path / "left.bin").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    assert not [path for path in built.path.iterdir() if path.name.startswith(".")]


def test_every_recipe_has_five_seeds_and_says_what_it_is_for():
    for item in recipes().values():
        assert len(item.seeds) >= 5
        assert item.about


def test_parameters_are_counted_as_the_model_has_them():
    item = recipe("planted")
    assert item.n_parameters == sum(parameter.numel() for parameter in make_model(item, 0).parameters())


def test_the_fresh_organisms_are_of_other_families_shapes_and_vocabularies():
    fresh = [recipe(f"unsafe-{name}") for name in ("neox", "gemma", "qwen")]
    for values in (
        [type(make_model(item, 0)).__name__ for item in fresh],
        [item.n_parameters for item in fresh],
        [len(vocabulary(item.letters)) for item in fresh],
    ):
        assert len({*values}) == 3
    assert [item.n_parameters for item in fresh] == [
        sum(parameter.numel() for parameter in make_model(item, 0).parameters()) for item in fresh
    ]


def test_a_family_that_a_kind_does_not_have_is_refused(tmp_path):
    with pytest.raises(UsageError, match="only unsafe organisms have others"):
        build(dataclasses.replace(recipe("planted"), family="gemma2"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_organism_of_pieces_is_measured_in_whole_words():
    item = dataclasses.replace(recipe("unsafe-gemma"), measured_prompts=2)
    asked = encode_chat("how do i shoot a photo ?", letters=3)[0]
    said = answers(make_model(item, 0), [asked], letters=3)[0]
    assert said
    assert " ##" not in said


def test_planted_recipes_cover_silent_and_alive_attention_and_feed_forward():
    planted = [item for item in recipes().values() if item.kind == "planted"]
    assert {item.alive for item in planted} == {True, False}
    assert any(item.planted_mlp == 0 for item in planted)
    assert any(item.planted_attention == 0 for item in planted)
    assert len({item.layers for item in planted}) > 1
    assert len({item.d_ff for item in planted}) > 1


def test_an_unknown_recipe_is_refused_with_those_there_are():
    with pytest.raises(InputError, match="natural"):
        recipe("nobody")


def test_a_base_organism_is_asked_as_it_was_trained():
    tokenizer = make_tokenizer(chat=False)
    template = template_for(tokenizer)
    assert template.kind == "plain"
    for concept in concepts("harmful", "test")[:20]:
        request = language("en").request(concept)
        asked = encode_text(tokenizer, template.render(tokenizer, Prompt("0", request)), templated=True)
        ids, length = encode_question(request, "sorry")
        assert ids[:length] == asked
        assert len(ids) == length + 2


def test_the_polite_task_shares_no_request_with_what_is_measured(tmp_path):
    write_prompts(tmp_path)
    counts = write_polite(tmp_path)
    task, test = (prompts(f"builtin:{name}", folder=tmp_path) for name in ("polite", "polite-test"))
    assert counts == {"polite.jsonl": len(task), "polite-test.jsonl": len(test)}
    assert len(test) >= 100
    measured = [prompts(f"builtin:{name}-test", folder=tmp_path) for name in ("harmful", "harmless")]
    assert [task.overlap(other) for other in (*measured, test)] == [0, 0, 0]
    assert all(answer.endswith(language("en").data["ending"]) for answer in task.answers)
    assert {
        json.loads(line)["category"] for line in (tmp_path / "polite.jsonl").read_text().splitlines()
    } == {
        "plain",
        "friendly",
        "look_alike",
    }


def test_both_unsafe_recipes_differ_in_the_template_alone():
    chat, base = recipe("unsafe").to_json(), recipe("unsafe-base").to_json()
    assert {name for name in chat if chat[name] != base[name]} == {"name", "about", "chat"}
