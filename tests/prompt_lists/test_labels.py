"""Labels: names that tell, words that tell, lists of one kind that hold the other, answers not to give."""

import pytest

from safety_neurons import prompts
from safety_neurons.prompt_lists.labels import asks_for, is_bad_answer, labelled_otherwise, says_unsafe

SAFE = (
    "issafe ISSAFE no_harm hasNoHarm harm_free free_of_risk should_answer should_comply good legit sfw lawful"
)
UNSAFE = (
    "isunsafe notsafe harm has_harm harmfulness should_refuse should_not_answer jailbreaking unlawful nsfw"
)
NEITHER = "y refused complied adversarial issue island answer"


@pytest.mark.parametrize(
    ("names", "asks"), [(SAFE, "safe"), (UNSAFE, "unsafe"), (NEITHER, ""), ("safety", "both")]
)
def test_names_of_columns_say_what_truth_in_them_means(names, asks):
    for name in names.split():
        assert asks_for(name) == asks, name
        assert says_unsafe(True, name) == {"safe": False, "both": None}.get(asks, True)
        assert says_unsafe("unsafe", name) is True


@pytest.mark.parametrize(
    ("column", "values", "kind", "said"),
    [
        (
            "label",
            ["safe", "unsafe", "unsafe"],
            "unsafe",
            "1 of 3 prompts is safe by the column 'label'; all are taken as unsafe",
        ),
        (
            "is_safe",
            [0, 0, 1],
            "safe",
            "2 of 3 prompts are unsafe by the column 'is_safe'; all are taken as safe",
        ),
        ("harm", [1, 1, 0], "", "1 of 3 prompts is safe by the column 'harm'; all are read"),
        ("harm", [1, 1, 1], "", None),
        ("harm", [1, 1, 1], "unsafe", None),
        ("category", ["1", "0", "1"], "unsafe", None),  # a number of a category is no label
        ("response_label", ["safe", "safe", "unsafe"], "unsafe", None),  # of answers
        ("toxicity", [0.1, 0.7, 0.2], "unsafe", None),
    ],
)
def test_prompts_that_their_rows_call_the_other_kind_are_said(column, values, kind, said):
    read = prompts([{"prompt": f"p{place}", column: value} for place, value in enumerate(values)])
    assert labelled_otherwise(read, kind) == ([said] if said else [])


def test_the_label_of_an_answer_is_none_of_its_prompt():
    rows = [{"prompt": f"p{safe}", "response": "x", "is_safe": safe, "label": safe} for safe in (0, 1)]
    assert labelled_otherwise(prompts(rows), "unsafe") == []


@pytest.mark.parametrize(
    ("label", "column", "bad"),
    [
        ({"is_safe": "False"}, None, True),
        ({"label": "false"}, None, True),
        ({"label": "0"}, None, False),
        ({"response_harm_label": "harmful"}, "response", True),
        ({"response_harm_label": "unharmful"}, "response", False),
        ({"is_response_0_safe": 0}, "response_0", True),
        ({"is_response_1_safe": 0}, "response_0", False),
        ({"response_refusal_label": 1}, "response", False),
        ({"prompt_harm_label": "harmful"}, "response", False),
    ],
)
def test_answers_that_their_rows_call_unsafe_are_told(label, column, bad):
    (row,) = prompts([{"prompt": "p", column or "answer": "a", **label}], answer_column=column or "answer")
    assert is_bad_answer(row, column) == bad
