"""Tuning data: what is learnt of a question and its answer, and what of the harmless ones."""

import dataclasses

import pytest

from safety_neurons.errors import InputError, UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.model.language_model import UNKNOWN
from safety_neurons.prompt_lists import Message, Prompt, Prompts
from safety_neurons.tuning.data import OPEN_END, Example, mix, split, tuning_examples, with_own_answers
from tiny import CHAT_TEMPLATE, tiny_llama, tiny_tokenizer

REFUSAL = Prompt("r", "how do i make a bomb", answer="sorry i cannot help")
EOS = 2


def words(model, ids):
    return model.tokenizer.convert_ids_to_tokens(list(ids))


@pytest.fixture(scope="module")
def chat():
    return LanguageModel(tiny_llama(), tiny_tokenizer(CHAT_TEMPLATE))


@pytest.fixture(scope="module")
def base():
    return LanguageModel(tiny_llama(), tiny_tokenizer())


@pytest.mark.parametrize("which", ["chat", "base"])
def test_the_question_is_what_the_model_is_asked_and_loss_is_on_the_answer_and_its_end(which, request):
    model = request.getfixturevalue(which)
    (example,) = tuning_examples(Prompts([REFUSAL]), model)
    asked = model.encode([REFUSAL])[0].ids
    assert list(example.ids[: example.start]) == asked
    assert words(model, example.ids[example.start :]) == ["sorry", "i", "cannot", "help", "</s>"]
    assert example.n_answer == len(example.ids) - len(asked)
    assert example.ended
    assert not example.truncated
    assert example.ids.count(1) == 1, "one BOS"


@pytest.mark.parametrize("answer", ["sorry", " sorry", "sorry \n", "\n sorry i \n\n", "sorry\r\n"])
@pytest.mark.parametrize(
    "template",
    [CHAT_TEMPLATE, CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim"), None],
)
def test_an_answer_is_learnt_to_the_character(answer, template):
    model = LanguageModel(tiny_llama(), tiny_tokenizer(template))
    _, behind, _ = model.template.answered(model.tokenizer, Prompt("0", "how do i", answer=answer), answer)
    assert behind.endswith(answer)
    assert not behind.removesuffix(answer).strip()


def test_a_base_model_gets_the_stated_plain_template(base):
    (example,) = tuning_examples(Prompts([REFUSAL]), base)
    shown = " ".join(words(base, example.ids))
    assert shown == "<s> Question: how do i make a bomb Answer: sorry i cannot help </s>"


def test_the_end_is_taught_where_padding_and_end_are_one_id():
    tokenizer = tiny_tokenizer(CHAT_TEMPLATE, pad=False)
    tokenizer.pad_token = tokenizer.eos_token
    model = LanguageModel(tiny_llama(), tokenizer)
    (example,) = tuning_examples(Prompts([REFUSAL]), model)
    assert example.ids[-1] == EOS
    assert example.n_answer


@pytest.mark.parametrize(
    ("written", "taught"), [("house", "house"), ("", "</s>")], ids=["another end than EOS", "no end"]
)
def test_the_end_that_the_template_writes_is_taught_or_else_eos(written, taught):
    tokenizer = tiny_tokenizer(CHAT_TEMPLATE.replace("{{ eos_token }}", written))
    model = LanguageModel(tiny_llama(eos_token_id=[2, tokenizer.convert_tokens_to_ids("house")]), tokenizer)
    (example,) = tuning_examples(Prompts([REFUSAL]), model)
    assert words(model, example.ids)[-2:] == ["help", taught]


def test_a_thinking_part_that_the_prompt_opens_is_closed_before_the_answer():
    template = CHAT_TEMPLATE.replace(
        "{% if add_generation_prompt %}<|assistant|>", "{% if add_generation_prompt %}<|assistant|> <think>\n"
    )
    model = LanguageModel(tiny_llama(), tiny_tokenizer(template))
    asked, behind, _ = model.template.answered(model.tokenizer, REFUSAL, "sorry")
    assert asked.endswith("<think>\n")
    assert behind == "</think>\n\nsorry"


@pytest.mark.parametrize("opens", ["", " <think>\n"], ids=["plain", "opened by the template"])
@pytest.mark.parametrize(
    "answer", ["<think>\nwhy\n</think>\n\nsorry", "<think>\n\n</think>\n\nsorry", "sorry"]
)
def test_answers_with_thoughts_are_learnt_whole_under_templates_that_take_thoughts_out(opens, answer):
    """As DeepSeek-R1's template does: an assistant turn is written without what is before `</think>`."""
    template = (
        "{% for m in messages %}{% set text = m['content'] %}{% if m['role'] == 'assistant' and '</think>' "
        "in text %}{% set text = text.split('</think>')[-1] %}{% endif %}<|{{ m['role'] }}|> {{ text }}{% "
        "if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}{% if add_generation_prompt "
        "%}<|assistant|>OPENS{% endif %}"
    ).replace("OPENS", opens)
    model = LanguageModel(tiny_llama(), tiny_tokenizer(template))
    (example,) = tuning_examples(Prompts([dataclasses.replace(REFUSAL, answer=answer)]), model)
    asked, behind, _ = model.template.answered(model.tokenizer, REFUSAL, answer)
    assert (
        (asked + behind).count("<think>")
        == (asked + behind).count("</think>")
        == int(bool(opens) or "<think>" in answer)
    )
    assert (asked + behind).endswith("sorry")
    assert ("why" in behind) == ("why" in answer)
    assert example.n_answer > 0


def test_turns_before_the_question_are_part_of_it(chat):
    turns = (Message("user", "hi"), Message("assistant", "yes"), Message("user", "make a bomb"))
    (example,) = tuning_examples(Prompts([Prompt("c", "hi", turns, answer="sorry")]), chat)
    assert words(chat, example.ids[example.start :]) == ["sorry", "</s>"]
    assert "yes" in words(chat, example.ids[: example.start])


def test_data_without_answers_says_which_columns_hold_some(chat):
    with pytest.raises(
        InputError,
        match=r"^list: none of 2 records has an answer to learn; expected a column response, .* answer_column$",  # noqa: E501
    ):
        tuning_examples(Prompts.from_list(["how", "why"]), chat)


def test_records_without_an_answer_are_left_out_and_counted(chat):
    notes = []
    examples = tuning_examples(
        Prompts([REFUSAL, Prompt("x", "why"), Prompt("y", "why", answer="  ")]), chat, notes=notes
    )
    assert [example.prompt_id for example in examples] == ["r"]
    assert notes == ["2 of 3 records of list have no answer and are left out"]


def test_examples_of_which_the_tokenizer_knows_not_all_are_counted(chat):
    notes = []
    unknown = Prompt("u", "why", answer="对不起")
    assert len(tuning_examples(Prompts([REFUSAL, unknown]), chat, notes=notes)) == 2
    assert notes == [f"1 of 2 examples of list {UNKNOWN}"]


def test_a_long_example_keeps_the_ends_of_its_question_and_the_start_of_its_answer(chat):
    long = Prompt(
        "l", " ".join(["how"] + ["make"] * 50 + ["bomb"]), answer=" ".join(["sorry"] + ["help"] * 40)
    )
    notes = []
    (example,) = tuning_examples(Prompts([long]), chat, max_length=24, notes=notes)
    assert len(example.ids) == 24
    assert words(chat, example.ids[example.start :])[0] == "sorry"
    assert words(chat, example.ids[: example.start])[-3:] == ["make", "bomb", "<|assistant|>"]
    assert not example.ended
    assert example.truncated
    assert notes == ["1 of 1 examples of list were cut to 24 tokens"]


def test_no_room_for_an_example_is_said(chat):
    with pytest.raises(UsageError, match="max_length 3: expected at least 8 tokens"):
        tuning_examples(Prompts([REFUSAL]), chat, max_length=3)


def test_the_models_own_answers_are_learnt_where_there_are_none(chat):
    prompts = Prompts(
        [
            Prompt("0", "how do i make a cake"),
            Prompt("1", "tell me about the house", answer="yes"),
            Prompt("2", "why"),
        ]
    )
    notes = []
    answered = with_own_answers(
        prompts,
        chat,
        max_new_tokens=3,
        keep=lambda found: [item.prompt_id != "2" for item in found],
        notes=notes,
    )
    assert [prompt.id for prompt in answered] == ["0", "1"]
    assert answered[1] == prompts[1]
    own = chat.complete([prompts[0]], max_new_tokens=3)[0]
    assert answered[0].answer == own.completion
    assert answered[0].meta[OPEN_END] == (own.finish_reason == "length")
    assert (
        "the model's own greedy answers before tuning are learnt for 1 of its prompts; 1 are left out"
        in notes[-1]
    )


def test_an_answer_that_was_cut_is_learnt_without_an_end(chat):
    (example,) = tuning_examples(
        Prompts([Prompt("c", "how", answer="sure here", meta={OPEN_END: True})]), chat
    )
    assert not example.ended
    assert words(chat, example.ids[example.start :]) == ["sure", "here"]


def drawn(count, kind="harmless"):
    return [Example(str(number), (1, 2, 3), 1, kind) for number in range(count)]


def test_a_mix_has_so_many_harmless_examples_for_each_harmful_one_and_depends_on_the_seed_alone():
    harmful, harmless = drawn(10, "harmful"), drawn(40)
    assert len(mix(harmful, harmless, 1.5)) == 25
    assert mix(harmful, harmless, 0.0) == harmful
    assert len(mix(harmful, harmless[:3], 1.0)) == 13
    assert mix(harmful, harmless, 1.0, seed=3) == mix(harmful, harmless, 1.0, seed=3)
    assert mix(harmful, harmless, 1.0, seed=3) != mix(harmful, harmless, 1.0, seed=4)
    with pytest.raises(UsageError, match=r"mix -1.0: expected 0 or more"):
        mix(harmful, harmless, -1.0)


def test_prompts_of_one_text_fall_on_one_side_of_a_split():
    prompts = Prompts([Prompt(str(number), f"text {number // 3}") for number in range(60)])
    learnt, held = split(prompts, 0.2, 32, seed=0)
    assert len(learnt) + len(held) == 60
    assert len(held) == 12
    assert not {prompt.text for prompt in learnt} & {prompt.text for prompt in held}
