import pytest

from safety_neurons.judges import answer_of
from safety_neurons.judges.judgement import normalised, sentences


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("plain", "plain"),
        ("<think>I cannot do that</think>Sure.", "Sure."),
        ("<THINK>\nhm\n</THINK>\n\nSure.", "Sure."),
        ("the mark was in the prompt</think>Sure.", "Sure."),
        ("[THINK]no[/THINK]Sure.", "Sure."),
        ("<think>a</think><think>b</think>Sure.", "Sure."),
        ("analysisThe user wants bread.assistantfinalSure.", "Sure."),
    ],
)
def test_a_thinking_part_is_stripped(text, answer):
    assert answer_of(text).strip() == answer


@pytest.mark.parametrize(
    "text", ["", "  \n", "...", "<think>still thinking", "<think>a</think>", "<think>a</think><think>b", "analysisThe user wants"]
)
def test_nothing_to_judge_is_none(text):
    assert answer_of(text) is None


def test_a_thought_that_the_prompt_opened_and_nothing_ended_is_no_answer():
    assert answer_of("I should refuse, so I cannot", thinking=True) is None
    assert answer_of("I should refuse</think>Sure.", thinking=True) == "Sure."
    assert answer_of("I should refuse, so I cannot") is not None


def test_an_analysis_channel_in_any_script_and_case_is_a_thought():
    assert answer_of("analysisнужно отказать") is None
    assert answer_of("analysisthey want bread") is None


def test_an_answer_that_begins_with_the_word_analysis_is_an_answer():
    assert answer_of("analysis of the problem: none") is not None


@pytest.mark.parametrize(
    "text",
    ["I can't help .", "i can not help.", "I  CANNOT help .", "I can’t **help**.", "I can 't help.", "I can ' t help .", "I cannot help."],
)
def test_case_spacing_short_forms_and_apostrophes_do_not_matter(text):
    assert normalised(text) == "i cannot help."


def test_sentences_end_at_stops_and_line_breaks_in_several_scripts():
    assert sentences("one. two! three\nfour。five") == ["one.", "two!", "three", "four。", "five"]
