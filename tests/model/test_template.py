import copy

import pytest

from safety_neurons.errors import InputError, MismatchError, ModelError, UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.prompts import Message, Prompt
from tiny import CHAT_TEMPLATE, tiny_llama, tiny_tokenizer

BOS = 1
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{{ messages[0]['content'] }}"
)
WITHOUT_BOS = "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} {% endfor %}<|assistant|>"


def _text(lm, prompt):
    return lm.tokenizer.decode(lm.encode(prompt)[0].ids, skip_special_tokens=False)


def _lm(chat_template=None, *, tokenizer=None, **options):
    return LanguageModel(tiny_llama(), tokenizer or tiny_tokenizer(chat_template), **options)


def test_auto_takes_the_chat_template_with_one_bos_and_the_generation_prompt():
    lm = _lm(CHAT_TEMPLATE)
    assert _text(lm, "kill a tree") == "<s> <|user|> kill a tree <|assistant|>"
    assert lm.encode("kill a tree")[0].ids.count(BOS) == 1


def test_auto_falls_back_to_the_plain_template_where_the_tokenizer_has_none():
    assert _text(_lm(), "kill a tree") == "<s> Question: kill a tree Answer:"


def test_a_chat_template_without_bos_gets_the_one_the_tokenizer_adds_and_no_more():
    assert _text(_lm(WITHOUT_BOS), "kill") == "<s> <|user|> kill <|assistant|>"
    without = tiny_tokenizer(WITHOUT_BOS, adds_bos=False)
    assert _text(_lm(tokenizer=without), "kill") == "<|user|> kill <|assistant|>"


def test_none_feeds_what_the_tokenizer_makes_of_the_text_as_it_is():
    lm = _lm(CHAT_TEMPLATE, template="none")
    assert lm.encode("kill a tree")[0].ids == lm.tokenizer("kill a tree")["input_ids"]
    assert _text(lm, "<s> kill a tree") == "<s> kill a tree"


def test_tulu_writes_its_marks_and_ends_behind_the_assistant_mark():
    lm = _lm(template="tulu", system="help")
    assert lm.template.render(lm.tokenizer, Prompt("0", "kill")) == "<|system|>\nhelp\n<|user|>\nkill\n<|assistant|>\n"
    assert _text(lm, "kill") == "<s> <|system|> help <|user|> kill <|assistant|>"


def test_a_template_file_is_used_without_touching_the_tokenizer(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{{ bos_token }}{{ messages[0]['content'] }} {{ ending }}", encoding="utf-8")
    lm = _lm(CHAT_TEMPLATE, template=str(file), template_args={"ending": "tree"})
    assert _text(lm, "kill") == "<s> kill tree"
    assert lm.tokenizer.chat_template == CHAT_TEMPLATE


def test_a_template_file_cannot_reach_into_python(tmp_path):
    file = tmp_path / "bad.jinja"
    file.write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}", encoding="utf-8")
    with pytest.raises(InputError, match="chat template cannot say turns of user .*unsafe"):
        _lm(template=str(file)).encode("kill")


def test_template_arguments_reach_the_chat_template():
    thinking = "{{ bos_token }}{{ messages[0]['content'] }}{% if not enable_thinking %} no{% endif %} <|assistant|>"
    assert _text(_lm(thinking, template_args={"enable_thinking": True}), "kill") == "<s> kill <|assistant|>"
    assert _text(_lm(thinking, template_args={"enable_thinking": False}), "kill") == "<s> kill no <|assistant|>"


def test_system_prompts_and_several_turns_are_kept_in_order():
    lm = _lm(CHAT_TEMPLATE, system="help")
    turns = (Message("user", "kill"), Message("assistant", "no"), Message("user", "please"))
    assert _text(lm, Prompt("0", "kill", turns)) == "<s> <|system|> help <|user|> kill <|assistant|> no </s> <|user|> please <|assistant|>"
    own = (Message("system", "sorry"), Message("user", "kill"))
    assert _text(lm, Prompt("0", "kill", own)).startswith("<s> <|system|> sorry <|user|>")
    plain = _lm(system="help")
    assert _text(plain, Prompt("0", "kill", turns)) == "<s> help Question: kill Answer: no Question: please Answer:"


def test_a_started_answer_is_continued_rather_than_ended():
    turns = (Message("user", "kill"), Message("assistant", "sorry i"))
    for lm in (_lm(CHAT_TEMPLATE), _lm(), _lm(template="tulu")):
        assert _text(lm, Prompt("0", "kill", turns)).endswith("sorry i")


def test_a_system_prompt_that_the_template_refuses_goes_before_the_users_turn_or_is_one_line_that_says_so():
    assert _text(_lm(NO_SYSTEM, system="help"), "kill") == "<s> help kill"
    refuses = NO_SYSTEM.replace(
        "{{ messages[0]['content'] }}", "{% if 'help' in messages[0].content %}{{ raise_exception('no help') }}{% endif %}"
    )
    with pytest.raises(InputError, match="System role not supported.*leave system out") as caught:
        _lm(refuses, system="help").encode("kill")
    assert "\n" not in str(caught.value)


def test_template_none_beside_a_chat_template_is_noted():
    assert "chat template" in _lm(CHAT_TEMPLATE, template="none").notes[0]
    assert not _lm(template="none").notes
    assert not _lm(CHAT_TEMPLATE).notes


def test_template_options_that_nothing_would_use_are_refused(tmp_path):
    with pytest.raises(UsageError, match="template 'none'"):
        _lm(template="none", system="help")
    with pytest.raises(UsageError, match="enable_thinking"):
        _lm(template_args={"enable_thinking": False})
    with pytest.raises(InputError, match=r"cannot be read.*'auto', 'none', 'tulu'"):
        _lm(template=str(tmp_path / "absent.jinja"))
    (tmp_path / "empty.jinja").write_text(" ")
    with pytest.raises(InputError, match="empty"):
        _lm(template=str(tmp_path / "empty.jinja"))


def test_a_prompt_longer_than_the_context_keeps_both_ends_and_is_marked():
    lm = LanguageModel(tiny_llama(max_position_embeddings=16), tiny_tokenizer(CHAT_TEMPLATE))
    short, long = lm.encode(["kill", "kill " * 40], reserve=4)
    assert not short.truncated
    assert long.truncated
    assert len(long.ids) == 12
    assert lm.tokenizer.decode(long.ids[:3]) == "<s> <|user|> kill"
    assert lm.tokenizer.decode(long.ids[-2:]) == "kill <|assistant|>"
    with pytest.raises(ModelError, match="leave no room"):
        lm.encode("kill " * 40, reserve=16)


def test_prompts_without_tokens_and_tokenizers_of_another_model_are_refused():
    with pytest.raises(InputError, match="has no tokens"):
        _lm(tokenizer=tiny_tokenizer(adds_bos=False), template="none").encode("")
    with pytest.raises(MismatchError, match="do not belong together"):
        LanguageModel(tiny_llama(vocab_size=8), tiny_tokenizer()).encode("tree")
    with pytest.raises(ModelError, match="without a tokenizer"):
        LanguageModel(tiny_llama()).encode("tree")


def test_encoding_leaves_the_tokenizer_as_it_was():
    tokenizer = tiny_tokenizer(CHAT_TEMPLATE, pad=False)
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=7)
    before = (tokenizer.backend_tokenizer.to_str(), copy.deepcopy(tokenizer.init_kwargs), tokenizer.chat_template)
    lm = _lm(tokenizer=tokenizer, system="help")
    assert len(lm.encode("kill a tree and a house and a door")[0].ids) == 14
    lm.encode_texts(["kill a tree"])
    assert (tokenizer.backend_tokenizer.to_str(), tokenizer.init_kwargs, tokenizer.chat_template) == before
    assert tokenizer.pad_token is None
    assert lm.pad_id == 2


def test_running_text_gets_one_bos_and_is_cut_at_the_context():
    lm = LanguageModel(tiny_llama(max_position_embeddings=6), tiny_tokenizer(CHAT_TEMPLATE))
    assert lm.encode_texts(["kill a tree", "kill " * 9]) == [
        [1, *lm.tokenizer.convert_tokens_to_ids(["kill", "a", "tree"])],
        [1] + [16] * 5,
    ]
    assert lm.encode_texts(["kill a tree"], limit=2)[0][0] == BOS
