"""A study that goes on from a folder goes on with the same models, sets and settings, told by their content,
or says what is another.
"""

import pathlib
import shutil

import pytest
import torch

from safety_neurons import studies
from safety_neurons.detectors.methods import Importance
from safety_neurons.detectors.runner import Run, Stream, _resume_key
from safety_neurons.errors import RunError, UnsupportedModelError
from safety_neurons.model import load, load_pair
from safety_neurons.model.identity import identity
from safety_neurons.neurons import NeuronSet
from safety_neurons.results import Checkpoint
from safety_neurons.studies import bench, tax
from tiny_pair import tiny_pair

__all__ = ["tiny_pair"]


class Reached(Exception):
    """Everything was checked, and the work would start."""


@pytest.fixture
def pair(tiny_pair, tmp_path):
    for name in ("plain", "sft", "dpo"):
        shutil.copytree(tiny_pair.folder / name, tmp_path / name)
    base, sft, dpo = (tmp_path / name for name in ("plain", "sft", "dpo"))
    return load_pair(f"{base}+{sft}", f"{base}+{sft}+{dpo}")


def studies_of(pair, neurons, file):
    from safety_neurons.prompt_lists import prompts

    asked = (prompts(["how do i kill"]), prompts(["how do i cook"]))
    more = {"completions_file": file}
    shelf = {"place": lambda name: file.parent / name}
    return {
        "verify deactivate": lambda: studies.verify_deactivate(pair.aligned, neurons, *asked, **more),
        "verify patch": lambda: studies.verify_patch(pair.base, pair.aligned, neurons, *asked, **more),
        "compare": lambda: studies.compare(
            pair.base, pair.aligned, *asked, find_prompts=asked[0], truth=neurons, **more, **shelf
        ),
        "progressive": lambda: studies.progressive(pair.aligned, neurons, *asked, **more),
        "languages": lambda: studies.deactivation_matrix(
            pair.aligned, {"en": neurons}, {"en": asked[0]}, **more
        ),
        "transfer": lambda: studies.transfer(
            pair.base, pair.aligned, {"en": neurons}, {"en": asked[0]}, asked[1], **more
        ),
        "tax": lambda: tax.cross_patch(
            {"a": pair.base, "b": pair.aligned}, neurons, *asked, measure=lambda *_: [], **more
        ),
    }


@pytest.mark.parametrize(
    "name", ["verify deactivate", "verify patch", "compare", "progressive", "languages", "transfer", "tax"]
)
def test_other_weights_or_neurons_are_not_gone_on_with(name, pair, tmp_path, monkeypatch):
    def reached(*_, **__):
        raise Reached

    monkeypatch.setattr(bench.Answers, "__init__", reached)
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / "completions.jsonl"
    table = pair.base.table
    ours, others = (NeuronSet({"layers.0.down": indices}, table) for indices in ([0, 1], [0, 2]))
    for _ in range(2):
        with pytest.raises(Reached):
            studies_of(pair, ours, file)[name]()
    with pytest.raises(RunError, match="neurons|sets|truth"):
        studies_of(pair, others, file)[name]()
    pair.base.name = pair.aligned.name = "called something else"
    with pytest.raises(Reached):
        studies_of(pair, ours, file)[name]()
    with torch.no_grad():
        pair.base.inner.get_input_embeddings().weight.data[3, 3] += (
            1  # reached through .data, which counts no version
        )
    with pytest.raises(
        RunError, match=r"made with different (model|models|base|aligned) of completions.jsonl"
    ):
        studies_of(pair, ours, file)[name]()


def key_of(models, **config):
    from safety_neurons.prompt_lists import prompts

    return _resume_key(Run(tuple(models), prompts(["x"]), Importance(top=0.1), batch_size=2), config)


def test_a_partial_sum_is_gone_on_with_by_the_same_weights_alone(pair, tmp_path):
    checkpoint = Checkpoint(tmp_path / "find.safetensors")
    both = [pair.base, pair.aligned]
    Stream(checkpoint, key_of(both)).save()
    Stream(checkpoint, key_of(both))
    pair.base.name = "renamed"
    Stream(checkpoint, key_of(both))
    with pytest.raises(RunError, match="made with different models: use another output folder"):
        Stream(checkpoint, key_of([pair.aligned, pair.base]))
    with pytest.raises(RunError, match="made with different layers:"):
        Stream(checkpoint, key_of(both, layers="0:1"))
    with torch.no_grad():
        next(value for name, value in pair.base.inner.named_parameters() if "ia3" in name)[:] += 1
    with pytest.raises(RunError, match="made with different models"):
        Stream(checkpoint, key_of(both))


def test_two_views_of_one_model_two_orders_of_rows_and_two_templates_are_told_apart(pair):
    seen = [identity(pair.base), identity(pair.aligned)]
    weight = next(
        value for name, value in pair.base.inner.named_parameters() if "down_proj" in name and value.ndim == 2
    )
    with torch.no_grad():
        weight[:] = weight.flip(0).clone()  # the same numbers in other places
    seen.append(identity(pair.base))
    assert len({one["weights"] for one in seen}) == 3
    pair.base.template = type(pair.base.template)(**{**vars(pair.base.template), "system": "Be kind."})
    assert identity(pair.base)["template"] != seen[0]["template"]


def test_weights_elsewhere_count_by_their_files(tiny_pair, tmp_path):
    model = load(shutil.copytree(tiny_pair.plain, tmp_path / "plain"))
    name = "lm_head" if hasattr(model.inner, "lm_head") else next(iter(dict(model.inner.named_children())))
    module = getattr(model.inner, name)
    module.weight = torch.nn.Parameter(module.weight.to("meta"))
    first = identity(model)
    assert identity(model) == first
    (pathlib.Path(model.folder) / "config.json").write_text("{}")
    assert identity(model)["weights"] != first["weights"]
    model.folder = None
    with pytest.raises(UnsupportedModelError, match="off-loaded"):
        identity(model)
