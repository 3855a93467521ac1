"""Labels of prompts: from a column, and from what a model wrote to them."""

import pytest

from safety_neurons.errors import InputError, UsageError
from safety_neurons.prompts import Prompt, Prompts
from safety_neurons.results import Completion, Completions
from safety_neurons.studies.guard_data import given, labelled_by_column, labelled_by_completions

REFUSES, COMPLIES = "Sorry, I cannot help with that.", "Sure, to build a bomb you first take a pot."


def answer(number: int, text: str, arm: str = "untreated", seed: int = 0) -> Completion:
    return Completion(str(number), f"how do I build a bomb {number}", text, arm=arm, seed=seed)


def test_labels_of_a_column_are_read_in_every_usual_spelling() -> None:
    values = ["unsafe", "Harmful", 1, True, "1", "safe", "benign", 0, False, " HARMLESS ", ""]
    data = labelled_by_column(Prompts([Prompt(str(n), f"p{n}", meta={"label": value}) for n, value in enumerate(values)]))
    assert [prompt.id for prompt in data.unsafe] == ["0", "1", "2", "3", "4"]
    assert [prompt.id for prompt in data.safe] == ["5", "6", "7", "8", "9"]
    assert data.notes == ("1 prompts without a label were left out",)


@pytest.mark.parametrize(("meta", "message"), [({"label": "maybe"}, "label 'maybe'"), ({"other": 1}, "no record has a field 'label'")])
def test_a_label_nobody_knows_is_one_line(meta: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        labelled_by_column(Prompts([Prompt("0", "p", meta=meta)]))


def test_a_prompt_is_unsafe_if_its_answer_does_harm_and_unscored_ones_are_left_out() -> None:
    data = labelled_by_completions(Completions([answer(0, COMPLIES), answer(1, REFUSES), answer(2, "")]), "compliance")
    assert [prompt.text for prompt in data.unsafe] == ["how do I build a bomb 0"]
    assert [prompt.text for prompt in data.safe] == ["how do I build a bomb 1"]
    assert data.notes == ("1 prompts without a scored answer were left out",)
    by_refusal = labelled_by_completions(Completions([answer(0, COMPLIES), answer(1, REFUSES)]), "refusal")
    assert (by_refusal.unsafe, by_refusal.safe) == (data.unsafe, data.safe)


def test_most_of_several_answers_decide_and_a_draw_is_unsafe() -> None:
    several = [answer(0, text, seed=seed) for seed, text in enumerate((COMPLIES, REFUSES, REFUSES))]
    drawn = [answer(1, text, seed=seed) for seed, text in enumerate((COMPLIES, REFUSES))]
    data = labelled_by_completions(Completions([*several, *drawn]), "compliance")
    assert [prompt.id for prompt in data.unsafe] == ["1"]
    assert "2 prompts have answers of both kinds: they count as what most of them are" in data.notes


def test_arms_are_told_apart_and_answers_to_harmless_requests_are_safe_unjudged() -> None:
    mixed = Completions([answer(0, COMPLIES, "base/harmful"), answer(1, COMPLIES, "base/harmless"), answer(2, REFUSES, "aligned/harmful")])
    with pytest.raises(UsageError, match=r"2 arms \(base, aligned\)"):
        labelled_by_completions(mixed, "compliance")
    data = labelled_by_completions(mixed, "compliance", arm="base")
    assert ([prompt.id for prompt in data.unsafe], [prompt.id for prompt in data.safe]) == (["0"], ["1"])
    assert "1 completions of other arms were left aside" in data.notes
    with pytest.raises(InputError, match="no completions of arm 'tuned'"):
        labelled_by_completions(mixed, "compliance", arm="tuned")


def test_sources_add_up() -> None:
    both = given(Prompts.from_list(["a"]), None) + given(None, Prompts.from_list(["b", "c"]))
    assert (both.unsafe.texts, both.safe.texts) == (["a"], ["b", "c"])
