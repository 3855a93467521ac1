"""Texts that look wrong are said, kept to the character, and what is in order says nothing."""

import pytest

from safety_neurons import prompts

SAID = {
    "numbers of a list": (
        ["1. How?", "2) How?"],
        "every prompt begins with the number or the sign of a list",
    ),
    "signs of a list": (["- How?", "* Why?"], "every prompt begins with the number"),
    "quotation marks": (['"How?"', "“Why?”,"], "every prompt stands in quotation marks"),
    "names": (["Human: a", "Assistant: b", "Human: c", "Assistant: d"], "4 of 4 prompts begin with a name"),
    "names of YAML": (["- prompt: a", "  label: 1", "- prompt: b", "  label: 0"], "(prompt:, label:)"),
    "a list of Python": (["['How?', 'Why?']"], "1 prompt is a record or a list as text"),
    "records": (['{"prompt": "How?", "label": 1}'], "1 prompt is a record or a list as text"),
    "missing": (["#N/A", "\\N", "nil"], "3 prompts say what programs write for a missing value"),
    "no words": (["...", "–", "?!"], "3 prompts hold no letter and no digit"),
    "signs for control": (["a\x00b"], "1 text holds what a wrong decoding leaves"),
    "both sides": (["Human: a\nAssistant: b"], "1 prompt holds both sides of a conversation"),
    "both sides in one line": (["### Human: a### Assistant: b"], "holds both sides of a conversation"),
    "withheld": (["[removed]", "REDACTED"], "2 prompts say that a text was withheld"),
    "UTF-8 read as Western": (
        ["KÃ¤se", "donâ€™t", "Â£5", "schÃ¶n"],
        "4 texts hold what a wrong decoding leaves",
    ),
    "entities": (["It&#39;s?", "a &amp; b"], "2 prompts hold escaped signs"),
    "escapes": (["Gr\\u00fc\\u00dfe", "one\\nTwo"], "2 prompts hold escaped signs"),
    "a template": (
        ["<|im_start|>user\na<|im_end|>"],
        "1 prompt holds marks of a chat template ('<|im_start|>')",
    ),
    "another": (["### Instruction:\na\n\n### Response:\n"], "marks of a chat template"),
    "a beginning": (["<s>[INST] a [/INST]"], "marks of a chat template ('<s>')"),
}


@pytest.mark.parametrize("case", SAID)
def test_what_looks_wrong_is_said_and_kept(case):
    texts, said = SAID[case]
    found = prompts(texts)
    assert found.texts == texts
    assert len(found.notes) == 1
    assert said in found.notes[0]


@pytest.mark.parametrize(
    "texts",
    [
        ["1. How?", "Why?"],
        ['"How?"'],
        ["Note: a", "b", "c"],
        ["MANHÃ", "São Paulo: Ãtimo", "Âme", "à la carte"],
        ["Say <s>no</s> in HTML, please.", "[1, 2, 3]", "{x} and {y}", "a < b && c", "\\nu and \\theta"],
        ["Say &amp; in HTML", *(f"Why {place}?" for place in range(30))],
        ["Undefined behaviour?", "None of them?"],
    ],
)
def test_what_is_in_order_says_nothing(texts):
    assert [note for note in prompts(texts).notes if "empty" not in note] == []


def test_marks_in_answers_and_answers_not_to_give_are_said():
    rows = [{"prompt": "a", "response": "No.</s>", "response_label": "unsafe"}]
    assert [note.split(" (")[0] for note in prompts(rows).notes] == [
        "1 answer is marked false or not safe by the row; kept",
        "1 answer holds marks of a chat template",
    ]


def test_answers_of_one_letter_and_rows_of_several_parts_are_said():
    rows = [{"question": "a", "answer": "B", "split": part} for part in ("train", "test", "train")]
    assert [note.partition(" one letter")[0] for note in prompts(rows).notes[1:]] == [
        "3 answers are",
        "rows of 2 parts of a data set are read together (train 2, test 1)",
    ]
    one = [
        {**row, "split": "dev", "answer": "Bee", "question": f"q{place}"} for place, row in enumerate(rows)
    ]
    assert prompts(one).notes == []
