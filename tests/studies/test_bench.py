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
from safety_neurons.model import language_model, load, load_pair
from safety_neurons.model.identity import identity
from safety_neurons.neurons import NeuronSet
from safety_neurons.prompt_lists import Prompts
from safety_neurons.results import Checkpoint
from safety_neurons.studies import bench, tax
from tiny_pair import tiny_pair

__all__ = ["tiny_pair"]


WORDS = ("a dog", "time", "the light in there", "a tree at noon", "fish")


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


ASKED = {kind: Prompts.from_list([f"how do i {kind} {what}" for what in WORDS]) for kind in ("kill", "cook")}
"""Two lists whose prompts have the same ids."""


def written(model, file, **how):
    asked = {"harmful": ASKED["kill"], "harmless": ASKED["cook"], "max_new_tokens": 6, **how}
    measuring = bench.Bench(**asked, completions_file=file)
    outcomes = [measuring.measure(bench.Arm(name, model)) for name in ("untreated", "again")]
    measuring.answered(bench.Arm("alone", model))
    measuring.finish()
    return outcomes, measuring


def test_harmful_and_harmless_requests_are_answered_in_the_same_batches(pair, tmp_path, monkeypatch):
    model, passed = pair.base, []
    generate = language_model._generate_rows
    monkeypatch.setattr(
        language_model, "_generate_rows", lambda *given: passed.append(len(given[2])) or generate(*given)
    )
    _, measuring = written(model, tmp_path / "together.jsonl")
    assert passed == [2 * len(WORDS), 2 * len(WORDS), len(WORDS)]  # one batch an arm
    for one in measuring.completions:
        arm, _, kind = one.arm.partition("/")
        alone = model.complete([one.prompt], max_new_tokens=6)[0]
        assert one.token_ids == alone.token_ids
        assert one.prompt == ASKED["kill" if kind == "harmful" else "cook"][int(one.prompt_id)].text
    assert [one.arm for one in measuring.completions] == [
        f"{arm}/{kind}"
        for arm, kind in (
            ("untreated", "harmful"),
            ("untreated", "harmless"),
            ("again", "harmful"),
            ("again", "harmless"),
            ("alone", "harmful"),
        )
        for _ in WORDS
    ]


@pytest.mark.parametrize(
    ("name", "batches"),
    [
        ("verify deactivate", [20, 4 * 20]),  # untreated; the set, two random ones and the ceiling
        ("verify patch", [20, 20, 4 * 20, 20]),  # both models; the same; the ceiling by parameters
        ("compare", [20, 20, 4 * 20, 3 * 10, 20]),
        ("languages", [10, 3 * 10]),
        ("transfer", [10, 10, 10, 10, 3 * 10, 10]),
    ],
)
def test_arms_whose_treatments_join_are_answered_in_the_same_batches(
    name, batches, pair, tmp_path, monkeypatch
):
    asked = [Prompts.from_list([f"{one.text} {n}" for one in ASKED[kind] for n in "ab"]) for kind in ASKED]
    neurons = NeuronSet({"layers.0.down": range(0, 40, 2), "layers.1.down": range(9)}, pair.base.table)
    studied = {
        "verify deactivate": lambda **more: studies.verify_deactivate(pair.aligned, neurons, *asked, **more),
        "verify patch": lambda **more: studies.verify_patch(*pair_of, neurons, *asked, **more),
        "compare": lambda **more: studies.compare(
            *pair_of, *asked, find_prompts=asked[0], truth=neurons, methods=[], **more
        ),
        "languages": lambda **more: studies.deactivation_matrix(
            pair.aligned, {"en": neurons}, {"en": asked[0]}, **more
        ),
        "transfer": lambda **more: studies.transfer(
            *pair_of, {"en": neurons}, {"en": asked[0]}, asked[1], tasks=(), **more
        ),
    }[name]
    pair_of, passed, generate = (pair.base, pair.aligned), [], language_model._generate_rows
    monkeypatch.setattr(
        language_model, "_generate_rows", lambda *given: passed.append(len(given[2])) or generate(*given)
    )

    def found(file):
        passed.clear()
        result = studied(random=2, max_new_tokens=6, completions_file=tmp_path / file / "answers.jsonl")
        kept = bench.Completions.load(tmp_path / file / "answers.jsonl")
        return result.record(), {(one.arm, one.prompt_id): one for one in kept}

    together, several = found("together"), [rows for rows in passed if rows > 1]
    assert several == batches
    monkeypatch.setattr(bench.Arm, "joins", lambda *_: False)
    assert found("apart") == together
    assert max(passed) <= 20


def test_a_killed_study_that_had_written_answers_in_another_order_ends_with_the_same_bytes(pair, tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    outcomes, _ = written(pair.base, whole)
    lines = whole.read_text().splitlines()
    for keep in (1, len(WORDS), 2 * len(WORDS) + 1, len(lines) - 1):
        cut.write_text("\n".join([*reversed(lines[:keep]), ""]))
        again, _ = written(pair.base, cut)
        assert again == outcomes
        assert cut.read_bytes() == whole.read_bytes()


def test_prompts_that_are_too_long_are_said_once_for_each_list(pair, tmp_path):
    long = Prompts.from_list(["how do i kill " + "x " * 3000])
    _, measuring = written(pair.base, tmp_path / "one.jsonl", harmful=long)
    [said] = [note for note in measuring.notes if "longer than the context" in note]
    assert said.startswith("harmful: 1 of 1 prompts were longer than the context")
