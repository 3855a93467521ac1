"""GSM8K: what is read from an answer, and the score of a model on a file."""

import json

import pytest

from safety_neurons.capability import gsm8k, measure_gsm8k
from safety_neurons.errors import InputError
from safety_neurons.model import LanguageModel
from tiny import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def model():
    return LanguageModel(tiny_llama(), tiny_tokenizer())


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "test.jsonl"
    sums = [{"question": f"what is the cake {number} ?", "answer": f"it is <<1+1=2>> {number} .\n#### {number}"} for number in range(8)]
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
    assert (gsm8k.strict(answer), gsm8k.flexible(answer)) == (strict, flexible)


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [("1,234", "x #### 1234", True), ("$18.", "#### 18", True), ("18.0", "#### 18", False), ("[invalid]", "#### 1", False)],
)
def test_signs_of_money_commas_and_a_last_stop_do_not_matter(found, expected, same):
    assert gsm8k.matches(found, expected) is same


def test_the_score_counts_right_answers_and_leaves_missing_ones_unscored():
    sums = [gsm8k.Sum("a", "#### 1"), gsm8k.Sum("b", "#### 2"), gsm8k.Sum("c", "#### 3")]
    found = gsm8k.scored("gsm8k", ["#### 1", "so it is 2", None], sums)
    assert (found.rate.value, found.rate.n, found.rate.unscored) == (0.5, 2, 1)
    assert found.details["flexible"]["value"] == 1.0


def test_without_a_training_file_the_last_records_are_examples_and_are_not_asked(file):
    asked, shown, notes = gsm8k.asked_and_shown(file, shots=3)
    assert (len(asked), len(shown)) == (5, 3)
    assert not set(asked) & set(shown)
    assert "not asked" in notes[0]
    (file.parent / "train.jsonl").write_text(json.dumps({"question": "q", "answer": "#### 9"}) + "\n")
    asked, shown, notes = gsm8k.asked_and_shown(file.parent, shots=3, limit=2)
    assert (len(asked), [one.question for one in shown], notes) == (2, ["q"], [])


def test_a_model_is_asked_without_a_template_and_each_answer_once(model, file, monkeypatch):
    kept = {}
    first = measure_gsm8k(model, file, shots=1, max_new_tokens=6, answered=kept.__setitem__)
    assert sorted(kept) == list(range(7))
    generate = gsm8k.generate

    def counting(lm, sequences, decoding, *, skip, **options):
        assert sorted(skip) == [0, 1, 2]
        assert model.decode(sequences[3]).endswith("Answer:")
        return generate(lm, sequences, decoding, skip=skip, **options)

    monkeypatch.setattr(gsm8k, "generate", counting)
    again = measure_gsm8k(model, file, shots=1, max_new_tokens=6, done={number: kept[number] for number in range(3)})
    assert again == first


def test_an_answer_ends_where_the_next_question_begins():
    assert gsm8k.cut("it is 3\nQuestion: what") == "it is 3\n"


def test_a_context_that_is_too_long_loses_its_beginning_and_says_so(model, file):
    found = measure_gsm8k(model, file, shots=5, max_new_tokens=100)
    assert any("lost their beginning" in note for note in found.notes)


def test_a_file_of_another_shape_is_refused(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"q": 1}\n')
    with pytest.raises(InputError, match="line 1"):
        gsm8k.read_sums(tmp_path)
    with pytest.raises(InputError, match="cannot read"):
        gsm8k.read_sums(tmp_path / "none.jsonl")


def test_the_real_file_has_as_many_sums_as_it_should(shared):
    assert len(gsm8k.read_sums(shared / "data" / "gsm8k")) == 1319
