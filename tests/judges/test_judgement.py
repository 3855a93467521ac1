import pytest

from safety_neurons.judges import answer_of
from safety_neurons.judges.judgement import normalised, sentences
from safety_neurons.results.completions import end_of_opened


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
        (
            "<|channel|>analysis<|message|>no<|end|><|start|>assistant<|channel|>final<|message|>Sure.<|return|>",
            "Sure.",
        ),
        (
            (
                "<|channel|>commentary "
                "to=x<|message|>{}<|call|><|start|>assistant<|channel|>final<|message|>Sure."
            ),
            "Sure.",
        ),
        ("<|channel|>final<|message|>Sure.", "Sure."),
        ("<seed:think>no</seed:think>Sure.", "Sure."),
        ("◁think▷no◁/think▷Sure.", "Sure."),
        ("<thought>no</thought>Sure.", "Sure."),
        ("<reasoning>no</reasoning>Sure.", "Sure."),
        ("<|begin_of_thought|>no<|end_of_thought|>Sure.", "Sure."),
        ("<|START_THINKING|>no<|END_THINKING|>Sure.", "Sure."),
        ('<think>they say "no"</think>Sure.', "Sure."),
        ("<think>a<think>b</think>c</think>Sure.", "Sure."),
        ("It writes `<think>` first.", "It writes `<think>` first."),
        ("Sure. <think>wait</think>Mix it.", "Sure. Mix it."),
    ],
)
def test_a_thinking_part_is_stripped(text, answer):
    assert answer_of(text).strip() == answer


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  \n",
        "...",
        "<think>still thinking",
        "<think>a</think>",
        "<think>a</think><think>b",
        "analysisThe user wants",
        "<seed:think>no",
        "◁think▷no",
        "<thought>no",
        "<|channel|>analysis<|message|>no",
        "[THINK]no",
    ],
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
    [
        "I can't help .",
        "i can not help.",
        "I  CANNOT help .",
        "I can’t **help**.",
        "I can 't help.",
        "I can ' t help .",
        "I cannot help.",
    ],
)
def test_case_spacing_short_forms_and_apostrophes_do_not_matter(text):
    assert normalised(text) == "i cannot help."


def test_sentences_end_at_stops_and_line_breaks_in_several_scripts():
    assert sentences("one. two! three\nfour。five") == ["one.", "two!", "three", "four。", "five"]


def test_a_text_that_is_named_ends_the_thought_and_its_absence_is_a_cut():
    assert answer_of("I cannot. ### ANSWER Sure.", think_end="### ANSWER").strip() == "Sure."
    assert answer_of("I cannot. ###", think_end="### ANSWER") is None
    assert answer_of("<think>a</think>b ### ANSWER Sure.", think_end="### ANSWER").strip() == "Sure."


@pytest.mark.parametrize(
    ("asked", "end"),
    [
        ("<|assistant|><think>\n", "</think>"),
        ("<seed:think>", "</seed:think>"),
        ("x ◁think▷", "◁/think▷"),
        ("[THINK]", "[/THINK]"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("<|begin_of_thought|>\n\n", "<|end_of_thought|>"),
        ("<think></think>", None),
        ("no thought", None),
    ],
)
def test_a_prompt_that_opens_a_thought_says_which_mark_ends_it(asked, end):
    assert end_of_opened(asked) == end
    assert end is None or answer_of(f"no{end}Sure.", thinking=True) == "Sure."
