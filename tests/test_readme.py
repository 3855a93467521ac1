"""What the README states and a machine can hold it to: its Python example, on the shipped organism, and the
tree.
"""

import importlib.util
import pathlib
import re

import pytest
import torch

import safety_neurons as sn

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


def example() -> str:
    """The first Python block."""
    block = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    assert block is not None
    return block[1]


def test_the_example_runs_on_the_organism_and_its_neurons_restore_refusals(capsys) -> None:
    text = (
        example()
        .replace("org/model+sft+dpo", "organism:natural/dpo")
        .replace("org/model+sft", "organism:natural/sft")
    )
    text = text.replace('"builtin:harmful")', '"builtin:harmful")[:12]').replace(
        '"builtin:harmful-test")', '"builtin:harmful-test")[:12]'
    )
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


def script(name="docs/tree.py"):
    spec = importlib.util.spec_from_file_location(pathlib.Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["README.md", "docs/house.md"])
def test_the_tree_in_a_page_is_the_tree(name):
    tree, page = script(), (ROOT / name).read_text(encoding="utf-8")
    assert tree.with_tree(page, tree.PAGES[name]) == page, (
        f"the tree in {name} is out of date: run `python docs/tree.py --write`"
    )


def test_every_module_of_the_package_is_in_the_tree_with_a_line():
    tree, source = script().tree(), ROOT / "src" / "safety_neurons"
    boxes = {path.parent.name for path in source.glob("*/__init__.py")}
    alone = {path.name for path in source.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert {line.split()[1].rstrip("/") for line in tree.splitlines() if line[:1].isdigit()} == boxes | alone
    assert tree.count(".py ") == sum(path.name != "__init__.py" for path in source.glob("*/**/*.py")) + len(
        alone
    )
    assert not [
        line
        for line in tree.splitlines()[1:-1]
        if len(line.split(maxsplit=2)) < 2 or line.rstrip().endswith((".py", "/"))
    ]


def test_a_readme_that_lost_its_marks_is_said():
    with pytest.raises(SystemExit, match="put them back"):
        script().with_tree("# no marks")


def test_the_page_of_models_shows_the_versions_that_were_measured():
    measured = script("benchmarks/compatibility.py")
    assert any("verbs" in row for row in measured.recorded().values())
    assert measured.table() in (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
