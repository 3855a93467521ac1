"""Generations recorded with a public implementation of paper 2, reproduced token by token."""

import pathlib

import pytest
import torch
from safetensors.torch import load_file

from safety_neurons.interventions import patched
from safety_neurons.model import LanguageModel, Pair, load, load_pair

SETS = ["top0", "top26", "top128", "top512", "random0_64"]


@pytest.fixture(scope="module")
def folder(shared: pathlib.Path) -> pathlib.Path:
    found = shared / "oracle-contrast"
    if not (found / "generation.safetensors").is_file():
        pytest.skip("the recorded generations are not beside this checkout")
    return found


@pytest.fixture(scope="module")
def records(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "generation.safetensors")


@pytest.fixture(scope="module")
def specs(folder: pathlib.Path) -> tuple[str, str]:
    sft = f"{folder / 'fixture/base'}+{folder / 'fixture/adapter_sft'}"
    return sft, f"{sft}+{folder / 'fixture/adapter_dpo'}"


@pytest.fixture(scope="module")
def pair(specs: tuple[str, str]) -> Pair:
    found = load_pair(*specs)
    assert found.shared
    return found


@pytest.fixture(scope="module")
def separate(specs: tuple[str, str]) -> tuple[LanguageModel, LanguageModel]:
    return load(specs[0]), load(specs[1])


def members(records: dict[str, torch.Tensor], name: str) -> dict[str, list[int]]:
    if name in ("top0", "top512"):
        return {} if name == "top0" else {f"layers.{layer}.down": list(range(128)) for layer in range(4)}
    found: dict[str, list[int]] = {}
    for layer, index in records[f"index/{name}"].tolist():
        found.setdefault(f"layers.{layer}.down", []).append(index)
    return found


def continuation(model: LanguageModel, records: dict[str, torch.Tensor], prefix: str) -> object:
    with torch.no_grad():
        return model.model.generate(
            input_ids=records[f"{prefix}/prompt_ids"],
            attention_mask=records[f"{prefix}/attention_mask"],
            max_new_tokens=24,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )


@pytest.mark.parametrize("models", ["pair", "separate"])
@pytest.mark.parametrize("name", SETS)
def test_one_stacked_batch_and_two_models_in_memory_give_the_recorded_tokens(
    name: str, models: str, records: dict[str, torch.Tensor], request: pytest.FixtureRequest
) -> None:
    prefix = f"guided/sft<-dpo/{name}/batch0"
    value = request.getfixturevalue(models)
    base, donor = (value.base, value.aligned) if models == "pair" else value
    with patched(base, donor, members(records, name)):
        output = continuation(base, records, prefix)
    assert torch.equal(output.sequences, records[f"{prefix}/sequences"])
    if f"{prefix}/scores" in records:
        assert (torch.stack(output.logits) - records[f"{prefix}/scores"]).abs().max() <= 1e-3


def test_plain_generation_of_each_view_gives_the_recorded_tokens(
    pair: Pair, records: dict[str, torch.Tensor]
) -> None:
    for view, name in ((pair.base, "sft"), (pair.aligned, "dpo")):
        prefix = f"plain/{name}/eval_prompts/batch0"
        with view.active():
            assert torch.equal(continuation(view, records, prefix).sequences, records[f"{prefix}/sequences"])


def test_patching_every_neuron_writes_what_the_donor_writes(
    pair: Pair, records: dict[str, torch.Tensor]
) -> None:
    with patched(pair.base, pair.aligned, members(records, "top512")):
        output = continuation(pair.base, records, "plain/dpo/eval_prompts/batch0")
    assert torch.equal(output.sequences, records["plain/dpo/eval_prompts/batch0/sequences"])
