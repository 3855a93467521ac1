"""The README's Python example runs as it stands, with the shipped organism in the place of a model of the reader's."""

import pathlib
import re

import torch

import safety_neurons as sn

README = pathlib.Path(__file__).resolve().parents[1] / "README.md"


def example() -> str:
    """The first Python block."""
    block = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    assert block is not None
    return block[1]


def test_the_example_runs_on_the_organism_and_its_neurons_restore_refusals(capsys) -> None:
    text = example().replace("org/model+sft+dpo", "organism:natural/dpo").replace("org/model+sft", "organism:natural/sft")
    text = text.replace('"builtin:harmful")', '"builtin:harmful")[:12]').replace('"builtin:harmful-test")', '"builtin:harmful-test")[:12]')
    text = text.replace("sn.prompts(", "base.prompts(")  # An organism speaks a language of its own.
    assert text.count("base.prompts(") == 2
    inputs = {"input_ids": torch.tensor([[1, 5, 9]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    space = {"inputs": {**inputs, "max_new_tokens": 2}}
    exec(text, space)  # noqa: S102 - the README is ours
    assert re.match(r"\d\.\d\d \[\d\.\d\d, \d\.\d\d\], n 12, unscored 0", capsys.readouterr().out)
    assert len(space["found"].neurons) == round(0.05 * 4 * 512)


def test_a_pair_of_organism_stages_shares_its_base_and_keeps_its_short_names() -> None:
    pair = sn.load_pair("organism:natural/sft", "organism:natural/dpo")
    assert pair.shared
    assert (pair.base.name, pair.aligned.name) == ("organism:natural/sft", "organism:natural/dpo")
    assert pair.base.prompts("builtin:harmful")[0].text != sn.prompts("builtin:harmful")[0].text
