"""GSM8K: what is read from an answer.

MMLU: likelihoods of the letters against a recomputation with nothing but the model.
"""

import json
import zipfile

import numpy as np
import pytest
import torch

from safety_neurons.capability import measure_gsm8k, measure_mmlu, measures, tasks
from safety_neurons.errors import InputError
from safety_neurons.interventions import deactivated
from safety_neurons.model import LanguageModel
from safety_neurons.neurons import NeuronSet
from tiny import tiny_llama, tiny_tokenizer

ROWS = [
    '"what is a cake, or a tree ?",bread,house,water,fire,A',
    "what is red ?,cake,key,door,lock,C",
    '"two\nlines ?",a,b,c,d,D',
]


@pytest.fixture(scope="module")
def model():
    return LanguageModel(tiny_llama(), tiny_tokenizer())


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "test.jsonl"
    sums = [
        {"question": f"what is the cake {number} ?", "answer": f"it is <<1+1=2>> {number} .\n#### {number}"}
        for number in range(8)
    ]
    path.write_text("".join(json.dumps(one) + "\n" for one in sums), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("answer", "strict", "flexible"),
    [
        ("so she has 3.\n#### 1,234", "1,234", "1,234"),
        ("#### 5 and #### 6", "5", "6"),
        ("The answer is $18.", "[invalid]", "$18."),
        ("it is -7", "[invalid]", "-7"),
        ("####7", "[invalid]", "7"),
        ("#### -0.5 dollars", "-0.5", "-0.5"),
        ("I have no idea.", "[invalid]", "[invalid]"),
        ("", "[invalid]", "[invalid]"),
    ],
)
def test_a_number_is_read_in_two_ways(answer, strict, flexible):
    assert (measures.strict(answer), measures.flexible(answer)) == (strict, flexible)


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        ("1,234", "x #### 1234", True),
        ("$18.", "#### 18", True),
        ("18.0", "#### 18", False),
        ("[invalid]", "#### 1", False),
    ],
)
def test_signs_of_money_commas_and_a_last_stop_do_not_matter(found, expected, same):
    assert measures.matches(found, expected) is same


def test_the_score_counts_right_answers_and_leaves_missing_ones_unscored():
    sums = [measures.Sum("a", "#### 1"), measures.Sum("b", "#### 2"), measures.Sum("c", "#### 3")]
    found = measures.score_sums("gsm8k", ["#### 1", "so it is 2", None], sums)
    assert (found.rate.value, found.rate.n, found.rate.unscored) == (0.5, 2, 1)
    assert found.details["flexible"]["value"] == 1.0


def test_without_a_training_file_the_last_records_are_examples_and_are_not_asked(file):
    asked, shown, notes = measures.asked_and_shown(file, shots=3)
    assert (len(asked), len(shown)) == (5, 3)
    assert not set(asked) & set(shown)
    assert "not asked" in notes[0]
    (file.parent / "train.jsonl").write_text(json.dumps({"question": "q", "answer": "#### 9"}) + "\n")
    asked, shown, notes = measures.asked_and_shown(file.parent, shots=3, limit=2)
    assert (len(asked), [one.question for one in shown], notes) == (2, ["q"], [])


def test_a_model_is_asked_without_a_template_and_each_answer_once(model, file, monkeypatch):
    kept = {}
    first = measure_gsm8k(model, file, shots=1, max_new_tokens=6, answered=kept.__setitem__)
    assert sorted(kept) == list(range(7))
    generate = measures.generate

    def counting(lm, sequences, decoding, *, skip, **options):
        assert sorted(skip) == [0, 1, 2]
        assert model.decode(sequences[3]).endswith("Answer:")
        return generate(lm, sequences, decoding, skip=skip, **options)

    monkeypatch.setattr(measures, "generate", counting)
    again = measure_gsm8k(
        model, file, shots=1, max_new_tokens=6, done={number: kept[number] for number in range(3)}
    )
    assert again == first


def test_an_answer_ends_where_the_next_question_begins():
    assert measures.cut("it is 3\nQuestion: what") == "it is 3\n"


def test_a_context_that_is_too_long_loses_its_beginning_and_says_so(model, file):
    found = measure_gsm8k(model, file, shots=5, max_new_tokens=100)
    assert any("lost their beginning" in note for note in found.notes)


def test_a_file_of_another_shape_is_refused(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"q": 1}\n')
    with pytest.raises(InputError, match="line 1"):
        measures.read_sums(tmp_path)
    with pytest.raises(InputError, match="cannot read"):
        measures.read_sums(tmp_path / "none.jsonl")


def test_the_real_file_has_as_many_sums_as_it_should(shared):
    assert len(measures.read_sums(shared / "data" / "gsm8k")) == 1319


@pytest.fixture(scope="module")
def short_model():
    return LanguageModel(tiny_llama(max_position_embeddings=64), tiny_tokenizer())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("mmlu") / "data"
    for split, rows in (("dev", ROWS[:2]), ("val", ROWS)):
        (root / split).mkdir(parents=True)
        for subject in ("high_school_cake", "trees"):
            (root / split / f"{subject}_{split}.csv").write_text(
                "\r\n".join(rows) + "\r\n", encoding="utf-8", newline=""
            )
    return root.parent


@torch.no_grad()
def likelihood(model, context, continuation):
    whole, before = (model.tokenizer(text)["input_ids"] for text in (context + continuation, context))
    ids = whole[-(model.max_length + 1) :]
    scores = model.model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
    n = len(whole) - len(before)
    return sum(float(scores[len(ids) - 1 - n + place, token]) for place, token in enumerate(ids[-n:]))


@pytest.mark.parametrize("size", [1, 3, "auto"])
def test_likelihoods_are_those_of_the_model_also_where_the_context_is_full(short_model, size):
    words = "how do i make a cake " * 12
    pairs = [
        ("what is red ? Answer:", " cake"),
        ("what is red ? Answer:", " cake and tree"),
        (words, " key"),
        (words, " key lock"),
    ]
    found = measures.log_likelihoods(short_model, pairs, batch_size=size)
    assert found == pytest.approx([likelihood(short_model, *pair) for pair in pairs], rel=1e-5)


def test_the_likeliest_letter_is_the_answer_and_the_first_of_equals():
    assert measures.chosen([-1.0, -1.0, -3.0, -4.0, -4.0, -3.0, -2.0, -1.5]) == [0, 3]


def test_folder_and_zip_are_read_alike(folder, tmp_path):
    archive = tmp_path / "mmlu.zip"
    with zipfile.ZipFile(archive, "w") as target:
        for path in folder.rglob("*.csv"):
            target.write(path, path.relative_to(folder))
            target.writestr(
                f"__MACOSX/{path.relative_to(folder).parent}/._{path.name}", b"\x00\x05\x16\x07\xff"
            )
    data = measures.read_mmlu(folder)
    assert data == measures.read_mmlu(archive)
    assert [question.subject for question in data.asked] == ["high school cake"] * 3 + ["trees"] * 3
    assert data.asked[2].text == "two\nlines ?"
    assert len(data.shown["trees"]) == 2


def test_a_question_is_put_as_usual(folder):
    data = measures.read_mmlu(folder)
    text = measures.question_context(data.asked[1], data.shown["trees"][:1])
    assert text == (
        "The following are multiple choice questions (with answers) about high school cake.\n\n"
        "what is a cake, or a tree ?\nA. bread\nB. house\nC. water\nD. fire\nAnswer: A\n\n"
        "what is red ?\nA. cake\nB. key\nC. door\nD. lock\nAnswer:"
    )


def test_accuracy_is_the_share_of_right_letters_by_subject_too_and_a_treatment_acts(short_model, folder):
    found = measure_mmlu(short_model, folder, shots=1)
    data = measures.read_mmlu(folder)
    expected = []
    for question in data.asked:
        context = measures.question_context(question, data.shown[question.subject][:1])
        scores = [likelihood(short_model, context, f" {letter}") for letter in measures.LETTERS]
        expected.append(float(np.argmax(scores) == question.answer))
    assert found.outcomes == tuple(expected)
    assert found.rate.n == 6
    assert found.details["subjects"]["trees"]["n"] == 3
    neurons = NeuronSet.all(short_model.table)
    pairs = [("what is red ? Answer:", " cake")]
    untreated = measures.log_likelihoods(short_model, pairs)
    assert (
        measures.log_likelihoods(short_model, pairs, lambda: deactivated(short_model, neurons)) != untreated
    )


def test_a_limit_is_spread_over_the_subjects(short_model, folder):
    assert {name.rsplit(" ", 1)[0] for name in measure_mmlu(short_model, folder, limit=2).ids} == {
        "high school cake",
        "trees",
    }


def test_rows_of_another_shape_are_refused(tmp_path):
    (tmp_path / "val").mkdir()
    with pytest.raises(InputError, match="no file such as"):
        measures.read_mmlu(tmp_path)
    (tmp_path / "val" / "trees_val.csv").write_text("question,a,b,c,d,E\n")
    with pytest.raises(InputError, match="row 1 of"):
        measures.read_mmlu(tmp_path)
    (tmp_path / "x.zip").write_bytes(b"no zip")
    with pytest.raises(InputError, match="damaged"):
        measures.read_mmlu(tmp_path / "x.zip")


def test_the_real_archive_has_as_many_questions_as_it_should(shared):
    data = measures.read_mmlu(shared / "data" / "mmlu" / "mmlu_dev_val.zip")
    assert (len(data.asked), sum(map(len, data.shown.values())), len(data.shown)) == (1531, 285, 57)


def test_a_line_separator_within_a_question_ends_no_line(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text('{"question": "a\u2028b\u0085c", "answer": "#### 1,000"}\n', encoding="utf-8")
    assert measures.read_sums(path) == [("a\u2028b\u0085c", "#### 1,000")]


@pytest.mark.parametrize("answer", ["#### -5", "#### $1,450.50", "72", "#### 18.", "#### .5"])
def test_references_that_a_model_can_match_are_read(tmp_path, answer):
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps({"question": "a", "answer": answer}))
    assert measures.read_sums(path)[0].answer == answer


@pytest.mark.parametrize("answer", [None, ["#### 5"], "", "The answer is 42.", "#### 5/8", "#### five"])
def test_a_reference_that_no_answer_could_match_is_refused(tmp_path, answer):
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps({"question": "a", "answer": answer}))
    with pytest.raises(InputError, match="line 1 .*no answer could match; expected"):
        measures.read_sums(path)


def asked(tmp_path, text):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "art_test.csv").write_text(text)
    return [(one.text, one.answer) for one in measures.read_mmlu(tmp_path).asked]


def test_questions_with_loose_quotation_marks_stay_apart_and_keep_them(tmp_path):
    text = '"Whose,a,b,c,d,A\nsay "x",a,b,c,d,B\n\n"He ""said"", so",a,b,c,d,C\n'
    assert asked(tmp_path, text) == [('"Whose', 0), ('say "x"', 1), ('He "said", so', 2)]


def test_a_long_question_is_read_and_an_open_quotation_mark_refused_in_one_line(tmp_path):
    assert asked(tmp_path, f'"{"x" * 140_000}",a,b,c,d,A\n') == [("x" * 140_000, 0)]
    (tmp_path / "test" / "art_test.csv").write_text('"Q,a,b,c,d,A\n' + "R,a,b,c,d,B\n" * 20_000)
    with pytest.raises(InputError, match=r"art_test.csv: a quotation mark opened in row 1 is never closed"):
        measures.read_mmlu(tmp_path)
    (tmp_path / "test" / "art_test.csv").write_text("question,A,B,C,D,answer\nQ,a,b,c,d,A\n")
    with pytest.raises(InputError, match=r"row 1 of test.art_test.csv has 6 cells, the last 'answer'"):
        measures.read_mmlu(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"Q,a,b,c,d,A\nR",a,b,c,d,B\n', "a cell from line 1 of .* holds lines that look like rows"),
        (" ,a,b,c,d,A\n", "row 1 of"),
        ("Q,,,,,A\n", "row 1 of"),
        ("\n", "art_test.csv is empty"),
    ],
)
def test_questions_that_are_merged_blank_or_none_are_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        asked(tmp_path, text)


def test_subjects_with_too_few_examples_are_said(short_model, tmp_path):
    for split, subjects in (("test", ("art", "law")), ("dev", ("art",))):
        (tmp_path / split).mkdir()
        for subject in subjects:
            (tmp_path / split / f"{subject}_{split}.csv").write_text("Q,a,b,c,d,A\n")
    assert measure_mmlu(short_model, tmp_path, shots=1).notes == (
        "mmlu: 1 of 2 questions are asked behind fewer than 1 example: the dev files have no more (law)",
    )


def test_a_table_that_is_there_twice_is_refused(tmp_path):
    for folder in ("test", "copy/test"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "anatomy_test.csv").write_text("What?,1,2,3,4,A\n")
    with pytest.raises(InputError, match="anatomy_test.csv twice"):
        measures.read_mmlu(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "wiki.txt",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
            "Git LFS pointer",
        ),
        ("wiki.jsonl", b'{"text": "a"}\n', "a file of records; expected running text"),
        ("wiki.csv.gz", b"text\na\n", "a file of records"),
        ("wiki.txt", b'{"text": "a"}\n{"text": "b"}\n', "a file of records"),
        ("table.txt", b"id\ttext\n1\ta\n", "a file of records"),
        ("wiki.txt", b"a\0b", "NUL byte"),
        ("wiki.txt", b"", "empty"),
    ],
)
def test_running_text_that_is_none_is_refused_before_it_is_measured(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        tasks.checked([f"wikitext:{tmp_path / name}"], measures.TaskSettings())
