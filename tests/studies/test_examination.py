"""doctor: passes on sound models of several families, and fails when something is really wrong."""

import contextlib

import pytest
import torch

from conforming import misfits
from families import build
from safety_neurons.model import LanguageModel
from safety_neurons.results.records import ExaminationRecord
from safety_neurons.studies import doctor, examination
from tiny import CHAT_TEMPLATE, tiny_llama, tiny_tokenizer

CHECKS = (
    "coverage",
    "identity with hooks on",
    "padding and batching, logits",
    "padding and batching, completions",
    "self-patch",
    "importance against brute force",
    "nothing left behind",
    "cost of hooks per token and layer",
)


def failed(found):
    return [check.check for check in found.checks if check.passed is False]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3", "mixtral"])
def test_a_sound_model_passes_every_check(family):
    found = doctor(LanguageModel(build(family), tiny_tokenizer(CHAT_TEMPLATE), name=family), n_sampled=2)
    assert [check.check for check in found.checks] == list(CHECKS)
    assert failed(found) == [], found.checks
    assert found.healthy
    assert misfits(found.record(), ExaminationRecord) == []
    assert found.model == family
    assert [check.check for check in found.checks if check.passed is None] == [
        "cost of hooks per token and layer"
    ]


def test_sixteen_bit_weights_pass_with_their_own_tolerance():
    found = doctor(LanguageModel(tiny_llama().to(torch.bfloat16), tiny_tokenizer(CHAT_TEMPLATE)), n_sampled=2)
    assert failed(found) == []


def llama():
    return LanguageModel(tiny_llama(), tiny_tokenizer(CHAT_TEMPLATE))


def test_a_wrong_importance_is_found_out(monkeypatch):
    real = examination.find_importance

    def wrong(*args, **options):
        found = real(*args, **options)
        values = {key: value * (1.01 if key.endswith("down") else 1) for key, value in found.scores.items()}
        return type(found)(type(found.scores)(values, found.scores.table), found.neurons, found.prompts)

    monkeypatch.setattr(examination, "find_importance", wrong)
    assert failed(doctor(llama(), n_sampled=2)) == ["importance against brute force"]


def test_hooks_that_change_what_they_read_are_found_out(monkeypatch):
    real = examination.reading

    def meddling(anatomy, readers):
        return real(
            anatomy,
            {key: lambda values: values.mul_(1.001) if hasattr(values, "mul_") else None for key in readers},
        )

    monkeypatch.setattr(examination, "reading", meddling)
    assert "identity with hooks on" in failed(doctor(llama(), n_sampled=1))


def test_a_patch_that_is_not_the_identity_is_found_out(monkeypatch):
    from safety_neurons.interventions import deactivated

    monkeypatch.setattr(examination, "patched", lambda base, _aligned, members: deactivated(base, members))
    assert failed(doctor(llama(), n_sampled=1)) == ["self-patch"]


def test_something_left_on_the_model_is_found_out(monkeypatch):
    @contextlib.contextmanager
    def sticky(base, _aligned, _members):
        base.model.model.layers[0].register_forward_hook(lambda *_: None)
        yield

    monkeypatch.setattr(examination, "patched", sticky)
    found = doctor(llama(), n_sampled=1)
    assert failed(found) == ["nothing left behind"]
    assert "hooks 0 → 1" in str(found.checks[-2].measured)


def test_hooks_of_the_owner_are_no_fault():
    model = llama()
    handle = model.model.model.layers[0].register_forward_hook(lambda *_: None)
    assert failed(doctor(model, n_sampled=1)) == []
    handle.remove()


def test_a_model_that_minds_padding_is_found_out():
    model = llama()
    forward = model.model.model.forward

    def minding(*args, **options):
        mask = options.get("attention_mask")
        output = forward(*args, **options)
        if mask is not None and mask.ndim == 2 and bool((mask == 0).any()):
            output.last_hidden_state = output.last_hidden_state * 1.5 + 0.5
        return output

    model.model.model.forward = minding
    assert "padding and batching, logits" in failed(doctor(model, n_sampled=1))


def test_an_experiment_that_raises_is_a_failed_check_and_the_others_still_run(monkeypatch):
    from safety_neurons.errors import UnsupportedModelError

    def raising(*_, **__):
        raise UnsupportedModelError("site q cannot be proved")

    monkeypatch.setattr(examination, "find_importance", raising)
    found = doctor(llama(), n_sampled=1)
    assert failed(found) == ["importance against brute force"]
    assert "site q cannot be proved" in str(found.checks[5].measured)
    assert len(found.checks) == len(CHECKS)


def test_progress_hears_of_every_check():
    heard = []
    doctor(llama(), n_sampled=1, progress=heard.append)
    assert heard == list(CHECKS)
