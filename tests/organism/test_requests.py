"""Tests of the organisms' labelled requests."""

import json

import pytest

from safety_neurons.errors import InputError, UsageError
from safety_neurons.organism import prompt_files
from safety_neurons.organism.requests import requests, write_requests
from safety_neurons.prompts import prompts


def test_no_request_of_the_test_half_is_in_another_half():
    held_out = [prompt for found in requests("test", ("de",)) for prompt in found]
    others = {prompt.digest for found in requests(("find", "train"), ("de",)) for prompt in found}
    assert len(held_out) > 1000
    assert not [prompt for prompt in held_out if prompt.digest in others]
    groups = {prompt.group for found in requests(("find", "train"), ("de",)) for prompt in found}
    assert None not in groups
    assert not [prompt for prompt in held_out if prompt.group in groups]


def test_the_find_half_holds_every_builtin_request_with_the_same_label(tmp_path):
    prompt_files.write_prompts(tmp_path)
    unsafe, safe = requests("find", ("es",))
    for name, found in (("harmful", unsafe), ("harmless", safe)):
        assert set(prompts(f"builtin:{name}/es", folder=tmp_path).texts) <= set(found.texts)
    assert not set(unsafe.texts) & set(safe.texts)


def test_look_alikes_share_their_verb_and_friendly_requests_their_object_with_harmful_ones():
    unsafe, safe = requests("find", ("en",))
    harmful = " ".join(unsafe.texts).split()
    look_alike = next(prompt for prompt in safe if prompt.meta["kind"] == "look_alike")
    plain = next(prompt for prompt in safe if prompt.meta["kind"] == "plain")
    assert look_alike.category in {prompt.category for prompt in unsafe}
    assert plain.category == "plain"
    assert sum(word in harmful for word in look_alike.text.split()) > sum(word in harmful for word in plain.text.split()) - 4


def test_files_read_back_with_kind_category_and_language(tmp_path):
    counts = write_requests(tmp_path, "test", ("es",))
    read = prompts(tmp_path / "safe.jsonl")
    assert len(read) == counts["safe.jsonl"] == len(requests("test", ("es",))[1])
    assert {prompt.language for prompt in read} == {"es"}
    assert {prompt.meta["kind"] for prompt in read} == {"look_alike", "friendly", "plain"}
    assert len({json.loads(line)["id"] for line in (tmp_path / "unsafe.jsonl").read_text().splitlines()}) == counts["unsafe.jsonl"]


def test_an_unknown_half_or_language_is_an_error():
    with pytest.raises(UsageError, match="half validation: expected some of find, test, train"):
        requests("validation")
    with pytest.raises(InputError, match="'fr'"):
        requests("find", ("fr",))
