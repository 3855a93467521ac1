"""Tests of labelled requests: labels of columns and of completions; columns, attacks and perturbations."""

import base64

import numpy as np
import pytest
from guard_tools import requests

from safety_neurons.errors import InputError, UsageError
from safety_neurons.prompt_lists import Message, Prompt, Prompts
from safety_neurons.results import Completion, Completions
from safety_neurons.studies.guard_data import (
    AS_WRITTEN,
    ATTACKS,
    OVER_REFUSAL,
    PERTURBATIONS,
    VARIANTS,
    cases_of,
    given,
    labelled_by_column,
    labelled_by_completions,
)

REFUSES, COMPLIES = "Sorry, I cannot help with that.", "Sure, to build a bomb you first take a pot."


def answer(number: int, text: str, arm: str = "untreated", seed: int = 0) -> Completion:
    return Completion(str(number), f"how do I build a bomb {number}", text, arm=arm, seed=seed)


@pytest.mark.parametrize("values", [(False, True), (0, 1), ("0.0", "1.0"), ("unsafe", "safe")], ids=repr)
def test_a_column_that_asks_whether_a_prompt_is_safe_is_not_read_upside_down(values):
    asked = zip(("bad", "good"), values, strict=True)
    records = [Prompt(text, text, meta={"is_safe": value, "unsafe": not value}) for text, value in asked]
    data = labelled_by_column(Prompts(records), "is_safe")
    assert (data.unsafe.texts, data.safe.texts) == (["bad"], ["good"])
    assert len(data.notes) == (values != ("unsafe", "safe"))
    if isinstance(values[0], bool):
        other = labelled_by_column(Prompts(records), "unsafe")
        assert (other.unsafe.texts, other.notes) == (["bad"], ())


@pytest.mark.parametrize(
    ("column", "unsafe"),
    [
        *(
            (name, True)
            for name in ("label", "toxicity", "flagged", "unsafe", "IS_UNSAFE", "isHarmful", "not_safe")
        ),
        *(
            (name, True)
            for name in ("isNotSafe", "non-benign", "jailbreak", "not_harmless", "notsafe", "output_toxic")
        ),
        *(
            (name, False)
            for name in ("safe", "isSafe", "is_response_0_safe", "non_toxic", "nonToxic", "harmless")
        ),
        *(
            (name, False)
            for name in ("is_not_harmful", "notHarmful", "no_jailbreak", "unharmful", "not unsafe")
        ),
    ],
)
def test_truth_values_are_read_as_the_name_of_their_column_asks(column, unsafe):
    records = [Prompt(text, text, meta={column: value}) for text, value in (("yes", 1), ("no", "false"))]
    data = labelled_by_column(Prompts(records), column)
    assert [*data.unsafe.texts, *data.safe.texts] == (["yes", "no"] if unsafe else ["no", "yes"])
    assert bool(data.notes) != unsafe


@pytest.mark.parametrize(
    ("column", "unsafe", "told"),
    [
        ("acceptable", False, True),
        ("is_allowed", False, True),
        ("inappropriate", True, False),
        ("disallowed", True, False),
        ("safe_label", False, True),
        ("not_flagged", False, True),
        ("refused", True, True),
        ("human_annotation", True, True),
    ],
)
def test_how_truth_values_are_read_is_said_where_a_name_asks_for_safe_or_does_not_tell(column, unsafe, told):
    records = [Prompt(text, text, meta={column: value}) for text, value in (("yes", 1), ("no", 0))]
    data = labelled_by_column(Prompts(records), column)
    assert (data.unsafe.texts == ["yes"]) == unsafe
    assert bool(data.notes) == told


@pytest.mark.parametrize("column", ["safety", "safety_label", "safe_or_unsafe", "harmful vs harmless"])
def test_truth_values_in_a_column_whose_name_does_not_tell_are_refused(column):
    with pytest.raises(InputError, match="does not tell whether that is safe"):
        labelled_by_column(Prompts([Prompt("a", "a", meta={column: 1})]), column)
    words = labelled_by_column(Prompts([Prompt("a", "a", meta={column: "unsafe"})]), column)
    assert words.unsafe.texts == ["a"]


def test_labels_of_a_column_are_read_in_every_usual_spelling() -> None:
    unsafe = ["unsafe", "Harmful", 1, True, "1", 1.0, "1.0", "TRUE"]
    safe = ["safe", "benign", 0, False, " HARMLESS ", "-1.0", "0.0"]
    none = ["", None, "nan", float("nan"), "<NA>", "null"]
    values = [*unsafe, *safe, *none]
    data = labelled_by_column(
        Prompts([Prompt(str(n), f"p{n}", meta={"label": value}) for n, value in enumerate(values)])
    )
    assert [prompt.meta["label"] for prompt in data.unsafe] == unsafe
    assert [prompt.meta["label"] for prompt in data.safe] == safe
    assert data.notes == ("left out 6 prompts without a label",)


@pytest.mark.parametrize(
    ("meta", "message"),
    [({"label": "maybe"}, "label 'maybe'"), ({"other": 1}, "no record has a field 'label'")],
)
def test_a_label_nobody_knows_is_one_line(meta: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        labelled_by_column(Prompts([Prompt("0", "p", meta=meta)]))


def test_a_prompt_is_unsafe_if_its_answer_does_harm_and_unscored_ones_are_left_out() -> None:
    data = labelled_by_completions(
        Completions([answer(0, COMPLIES), answer(1, REFUSES), answer(2, "")]), "compliance"
    )
    assert [prompt.text for prompt in data.unsafe] == ["how do I build a bomb 0"]
    assert [prompt.text for prompt in data.safe] == ["how do I build a bomb 1"]
    assert data.notes == ("left out 1 prompt without a scored answer",)
    by_refusal = labelled_by_completions(Completions([answer(0, COMPLIES), answer(1, REFUSES)]), "refusal")
    assert (by_refusal.unsafe, by_refusal.safe) == (data.unsafe, data.safe)


def test_most_of_several_answers_decide_and_a_draw_is_unsafe() -> None:
    several = [answer(0, text, seed=seed) for seed, text in enumerate((COMPLIES, REFUSES, REFUSES))]
    drawn = [answer(1, text, seed=seed) for seed, text in enumerate((COMPLIES, REFUSES))]
    data = labelled_by_completions(Completions([*several, *drawn]), "compliance")
    assert [prompt.id for prompt in data.unsafe] == ["1"]
    assert "2 prompts have answers of both kinds: what most of them are counts" in data.notes


def test_arms_are_told_apart_and_answers_to_harmless_requests_are_safe_unjudged() -> None:
    mixed = Completions(
        [
            answer(0, COMPLIES, "base/harmful"),
            answer(1, COMPLIES, "base/harmless"),
            answer(2, REFUSES, "aligned/harmful"),
        ]
    )
    with pytest.raises(UsageError, match=r"2 arms \(base, aligned\)"):
        labelled_by_completions(mixed, "compliance")
    data = labelled_by_completions(mixed, "compliance", arm="base")
    assert ([prompt.id for prompt in data.unsafe], [prompt.id for prompt in data.safe]) == (["0"], ["1"])
    assert "left aside 1 completion of other arms" in data.notes
    with pytest.raises(InputError, match="no completions of arm 'tuned'"):
        labelled_by_completions(mixed, "compliance", arm="tuned")


def test_sources_add_up() -> None:
    both = given(Prompts.from_list(["a"]), None) + given(None, Prompts.from_list(["b", "c"]))
    assert (both.unsafe.texts, both.safe.texts) == (["a"], ["b", "c"])


@pytest.fixture(scope="module")
def cases():
    unsafe, safe = requests(12, 0)
    return cases_of(unsafe, safe, over_refusal=requests(3, 1)[1], variants=tuple(VARIANTS))


def test_both_kinds_get_every_variant_and_lead_back_to_what_they_were_made_of(cases):
    for name in VARIANTS:
        rows = cases.where(name)
        assert len(rows) == 24
        assert cases.unsafe[rows].sum() == 12
        for row in rows:
            case = cases.items[row]
            made_of = cases.items[case.origin]
            assert made_of.variant == AS_WRITTEN
            assert (case.unsafe, case.source, case.prompt.language) == (
                made_of.unsafe,
                made_of.source,
                made_of.prompt.language,
            )
    assert len(cases.where(OVER_REFUSAL)) == 3
    assert not cases.unsafe[cases.where(OVER_REFUSAL)].any()


def test_wrappers_hold_the_whole_request_beside_a_safe_one(cases):
    safe = {case.prompt.text for case in cases.items if case.variant == AS_WRITTEN and not case.unsafe}
    for name in ("behind-safe", "before-safe", "between-safe", "later-turn", "earlier-turn"):
        for row in cases.where(name):
            text = cases.texts[row]
            own = cases.items[cases.items[row].origin].prompt.text
            assert own in text
            assert any(other in text for other in safe - {own})
    later, earlier = (cases.items[cases.where(name)[0]].prompt for name in ("later-turn", "earlier-turn"))
    own = cases.items[0].prompt.text
    assert (
        [turn.role for turn in later.messages]
        == ["user", "assistant", "user"]
        == [turn.role for turn in earlier.messages]
    )
    assert later.messages[-1].content == own == earlier.messages[0].content


def test_perturbations_change_the_wording_and_nothing_else(cases):
    changed = 0
    for row in cases.where("typos"):
        was, now = cases.items[cases.items[row].origin].prompt.text.split(), cases.texts[row].split()
        assert [(sorted(word), word[0]) for word in was] == [(sorted(word), word[0]) for word in now]
        changed += was != now
    assert changed > 10
    row = cases.where("upper-case")[0]
    assert cases.texts[row].lower() == cases.items[cases.items[row].origin].prompt.text
    row = cases.where("base64")[0]
    assert (
        base64.b64encode(cases.items[cases.items[row].origin].prompt.text.encode()).decode()
        in cases.texts[row]
    )


def test_a_conversation_keeps_its_earlier_turns():
    talk = Prompt(
        "a",
        "how do i open a lock ?",
        (Message("system", "be kind"), Message("user", "how do i open a lock ?")),
    )
    made = cases_of(
        Prompts([talk]), Prompts([Prompt("b", "bake bread")]), variants=("no-punctuation", "later-turn")
    )
    plain, later = (made.items[made.where(name)[0]].prompt for name in ("no-punctuation", "later-turn"))
    assert [turn.content for turn in plain.messages] == ["be kind", "how do i open a lock"]
    assert [turn.role for turn in later.messages] == ["system", "user", "assistant", "user"]
    assert (later.messages[0], later.messages[-1]) == talk.messages


@pytest.mark.parametrize("last", ["assistant", "tool", "system"])
def test_the_request_of_a_conversation_is_its_last_user_turn_whoever_speaks_last(last):
    request = (
        "please explain whether somebody could actually open several different locks without having their "
        "matching keys ?"
    )
    turns = (Message("user", request), Message(last, "Sure, first"))
    talk, names = Prompt("a", turns[0].content, turns), [name for name in VARIANTS if name != "gcg"]
    made = cases_of(Prompts([talk]), Prompts([Prompt("b", "bake bread")]), variants=names)
    for name in names:
        changed = made.items[made.where(name)[0]].prompt
        assert [turn for turn in changed.messages if turn.role == last and turn == turns[1]], (
            name
        )  # what others said is not reworded
        assert changed.messages != turns, name
        asked = [turn.content for turn in changed.messages if turn.role == "user"]
        assert changed.text in asked, name
        if name == "earlier-turn":
            assert sum(turn.role == "assistant" for turn in changed.messages) == 1


def test_what_is_in_both_lists_is_left_out_and_repeats_count_once():
    unsafe, safe = Prompts.from_list(["One  a", "two", "TWO"]), Prompts.from_list(["one A", "three"])
    found = cases_of(unsafe, safe)
    assert [(case.prompt.text, case.unsafe) for case in found.items] == [("two", True), ("three", False)]
    assert "1 request is both unsafe and safe" in found.notes[0]
    with pytest.raises(InputError, match="no safe requests"):
        cases_of(unsafe, Prompts.from_list(["two"]))
    with pytest.raises(UsageError, match="'hypnosis': expected some of behind-safe"):
        cases_of(unsafe, safe, variants=("hypnosis",))


def test_columns_are_source_language_category_and_any_field():
    unsafe, safe = requests(8, 2)
    found = cases_of([Prompts(unsafe, "one")], [Prompts(safe[:5], "one"), Prompts(safe[5:], "two")])
    assert found.values("source") == ["one", "two"]
    assert set(found.values("kind")) <= {"harmful", "look_alike", "plain"}
    assert found.having("source", "two").sum() == 3
    assert found.values("nothing of the kind") == []


def test_a_limit_draws_as_many_of_either_kind_and_equal_seeds_draw_the_same():
    unsafe, safe = requests(20, 3)
    one, again, other = (
        cases_of(unsafe, safe, variants=("typos",), seed=seed, limit=6) for seed in (1, 1, 2)
    )
    assert len(one.where("typos")) == 12
    assert one.texts == again.texts
    assert one.texts != other.texts


def test_attacks_and_perturbations_do_not_share_a_name():
    assert len(VARIANTS) == len(ATTACKS) + len(PERTURBATIONS)
    assert not np.isin(AS_WRITTEN, list(VARIANTS))
