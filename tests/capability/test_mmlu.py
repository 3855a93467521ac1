"""MMLU: likelihoods of the letters against a recomputation with nothing but the model."""

import zipfile

import numpy as np
import pytest
import torch

from safety_neurons.capability import measure_mmlu, mmlu
from safety_neurons.errors import InputError
from safety_neurons.interventions import deactivated
from safety_neurons.model import LanguageModel
from safety_neurons.neurons import NeuronSet
from tiny import tiny_llama, tiny_tokenizer

ROWS = ['"what is a cake, or a tree ?",bread,house,water,fire,A', "what is red ?,cake,key,door,lock,C", '"two\nlines ?",a,b,c,d,D']


@pytest.fixture(scope="module")
def model():
    return LanguageModel(tiny_llama(max_position_embeddings=64), tiny_tokenizer())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("mmlu") / "data"
    for split, rows in (("dev", ROWS[:2]), ("val", ROWS)):
        (root / split).mkdir(parents=True)
        for subject in ("high_school_cake", "trees"):
            (root / split / f"{subject}_{split}.csv").write_text("\r\n".join(rows) + "\r\n", encoding="utf-8", newline="")
    return root.parent


@torch.no_grad()
def likelihood(model, context, continuation):
    whole, before = (model.tokenizer(text)["input_ids"] for text in (context + continuation, context))
    ids = whole[-(model.max_length + 1) :]
    scores = model.model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
    n = len(whole) - len(before)
    return sum(float(scores[len(ids) - 1 - n + place, token]) for place, token in enumerate(ids[-n:]))


@pytest.mark.parametrize("size", [1, 3, "auto"])
def test_likelihoods_are_those_of_the_model_also_where_the_context_is_full(model, size):
    words = "how do i make a cake " * 12
    pairs = [("what is red ? Answer:", " cake"), ("what is red ? Answer:", " cake and tree"), (words, " key"), (words, " key lock")]
    found = mmlu.log_likelihoods(model, pairs, batch_size=size)
    assert found == pytest.approx([likelihood(model, *pair) for pair in pairs], rel=1e-5)


def test_the_likeliest_letter_is_the_answer_and_the_first_of_equals():
    assert mmlu.chosen([-1.0, -1.0, -3.0, -4.0, -4.0, -3.0, -2.0, -1.5]) == [0, 3]


def test_folder_and_zip_are_read_alike(folder, tmp_path):
    archive = tmp_path / "mmlu.zip"
    with zipfile.ZipFile(archive, "w") as target:
        for path in folder.rglob("*.csv"):
            target.write(path, path.relative_to(folder))
            target.writestr(f"__MACOSX/{path.relative_to(folder).parent}/._{path.name}", b"\x00\x05\x16\x07\xff")
    data = mmlu.read_mmlu(folder)
    assert data == mmlu.read_mmlu(archive)
    assert [question.subject for question in data.asked] == ["high school cake"] * 3 + ["trees"] * 3
    assert data.asked[2].text == "two\nlines ?"
    assert len(data.shown["trees"]) == 2


def test_a_question_is_put_as_usual(folder):
    data = mmlu.read_mmlu(folder)
    text = mmlu.context_of(data.asked[1], data.shown["trees"][:1])
    assert text == (
        "The following are multiple choice questions (with answers) about high school cake.\n\n"
        "what is a cake, or a tree ?\nA. bread\nB. house\nC. water\nD. fire\nAnswer: A\n\n"
        "what is red ?\nA. cake\nB. key\nC. door\nD. lock\nAnswer:"
    )


def test_accuracy_is_the_share_of_right_letters_by_subject_too_and_a_treatment_acts(model, folder):
    found = measure_mmlu(model, folder, shots=1)
    data = mmlu.read_mmlu(folder)
    expected = []
    for question in data.asked:
        context = mmlu.context_of(question, data.shown[question.subject][:1])
        scores = [likelihood(model, context, f" {letter}") for letter in mmlu.LETTERS]
        expected.append(float(np.argmax(scores) == question.answer))
    assert found.outcomes == tuple(expected)
    assert found.rate.n == 6
    assert found.details["subjects"]["trees"]["n"] == 3
    neurons = NeuronSet.all(model.table)
    pairs = [("what is red ? Answer:", " cake")]
    assert mmlu.log_likelihoods(model, pairs, lambda: deactivated(model, neurons)) != mmlu.log_likelihoods(model, pairs)


def test_a_limit_is_spread_over_the_subjects(model, folder):
    assert {name.rsplit(" ", 1)[0] for name in measure_mmlu(model, folder, limit=2).ids} == {"high school cake", "trees"}


def test_rows_of_another_shape_are_refused(tmp_path):
    (tmp_path / "val").mkdir()
    with pytest.raises(InputError, match="no file such as"):
        mmlu.read_mmlu(tmp_path)
    (tmp_path / "val" / "trees_val.csv").write_text("question,a,b,c,d,E\n")
    with pytest.raises(InputError, match="row 1 of"):
        mmlu.read_mmlu(tmp_path)
    (tmp_path / "x.zip").write_bytes(b"no zip")
    with pytest.raises(InputError, match="damaged"):
        mmlu.read_mmlu(tmp_path / "x.zip")


def test_the_real_archive_has_as_many_questions_as_it_should(shared):
    data = mmlu.read_mmlu(shared / "data" / "mmlu" / "mmlu_dev_val.zip")
    assert (len(data.asked), sum(map(len, data.shown.values())), len(data.shown)) == (1531, 285, 57)
