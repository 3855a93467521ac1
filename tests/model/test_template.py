"""Whatever a template does with turns, each is in what is fed, or the error says which is not."""

import copy

import pytest
import transformers

from safety_neurons.errors import InputError, MismatchError, ModelError, UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.model.sandbox import TooMuchError, render_template
from safety_neurons.model.template import (
    FOLDED,
    THOUGHTS,
    TRIMMED,
    conversation_text,
    folded,
    joined,
    render_turns,
)
from safety_neurons.prompt_lists import Message, Prompt
from safety_neurons.results.completions import after_thought
from tiny import CHAT_TEMPLATE, tiny_llama, tiny_tokenizer

BOS = 1


NO_SYSTEM_ROLE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif "
    "%}{{ messages[0]['content'] }}"
)


WITHOUT_BOS = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} {% endfor "
    "%}<|assistant|>"
)


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
    assert (
        lm.template.render(lm.tokenizer, Prompt("0", "kill"))
        == "<|system|>\nhelp\n<|user|>\nkill\n<|assistant|>\n"
    )
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
    thinking = (
        "{{ bos_token }}{{ messages[0]['content'] }}{% if not enable_thinking %} no{% endif %} <|assistant|>"
    )
    assert _text(_lm(thinking, template_args={"enable_thinking": True}), "kill") == "<s> kill <|assistant|>"
    assert (
        _text(_lm(thinking, template_args={"enable_thinking": False}), "kill") == "<s> kill no <|assistant|>"
    )


def test_a_template_that_writes_the_day_writes_that_of_a_reproducible_run(monkeypatch):
    daily = _lm("{{ strftime_now('%d.%m.%Y') }} {{ messages[0]['content'] }}").tokenizer
    asked = [("user", "kill a tree")]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert conversation_text(daily, asked) == "02.01.1970 kill a tree"
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    assert "1970" not in conversation_text(daily, asked)


def test_system_prompts_and_several_turns_are_kept_in_order():
    lm = _lm(CHAT_TEMPLATE, system="help")
    turns = (Message("user", "kill"), Message("assistant", "no"), Message("user", "please"))
    assert (
        _text(lm, Prompt("0", "kill", turns))
        == "<s> <|system|> help <|user|> kill <|assistant|> no </s> <|user|> please <|assistant|>"
    )
    own = (Message("system", "sorry"), Message("user", "kill"))
    assert _text(lm, Prompt("0", "kill", own)).startswith("<s> <|system|> sorry <|user|>")
    plain = _lm(system="help")
    assert (
        _text(plain, Prompt("0", "kill", turns))
        == "<s> help Question: kill Answer: no Question: please Answer:"
    )


def test_a_started_answer_is_continued_rather_than_ended():
    turns = (Message("user", "kill"), Message("assistant", "sorry i"))
    for lm in (_lm(CHAT_TEMPLATE), _lm(), _lm(template="tulu")):
        assert _text(lm, Prompt("0", "kill", turns)).endswith("sorry i")


def test_a_system_prompt_that_the_template_refuses_goes_before_the_users_turn_or_is_one_line_that_says_so():
    assert _text(_lm(NO_SYSTEM_ROLE, system="help"), "kill") == "<s> help kill"
    refuses = NO_SYSTEM_ROLE.replace(
        "{{ messages[0]['content'] }}",
        "{% if 'help' in messages[0].content %}{{ raise_exception('no help') }}{% endif %}",
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
    before = (
        tokenizer.backend_tokenizer.to_str(),
        copy.deepcopy(tokenizer.init_kwargs),
        tokenizer.chat_template,
    )
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


PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{% if p.type=='text' %}{{ "
    "p.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt "
    "%}<|im_start|>assistant\n{% endif %}"
)


NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{% endif %}{% endfor %}"
)


ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ "
    "raise_exception('Conversation roles must alternate') }}{% endif %}<{{ m.role }}>{{ m.content | trim "
    "}}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


LAST_USER_HOLDS_SYSTEM = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages "
    "%}{% if m.role == 'user' %}[INST]{% if loop.last and system %}{{ system }}\n\n{% endif %}{{ m.content "
    "}}[/INST]{% elif m.role == 'assistant' %}{{ m.content }}{% endif %}{% endfor %}"
)


LINES = (
    "{%- for m in messages %}\n    {%- if m.role == 'system' %}\n{{ m.content | trim }}\n    {%- else %}\n "
    "       {{- m.role + ': ' + m.content }}\n    {%- endif %}\n{%- endfor %}\n{% if add_generation_prompt "
    "%}{{ eos_token }}assistant: {% endif %}"
)


FORGETS_THOUGHTS = (
    "{% for m in messages %}<{{ m.role }}>{% set c = m.content %}{% if m.role == 'assistant' and "
    "'</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}{{ c }}{% if m.role == 'assistant' "
    "%}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


GENERATION = (
    "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}"
)


LOSING = {
    "the prompt": "hello {{ messages[0].role }}",
    "all but the first letter": "{% for m in messages %}{{ m.role }}: {{ m.content[:1] }}{% endfor %}",
    "capitals": "{% for m in messages %}{{ m.role }}: {{ m.content | lower }}{% endfor %}",
    "inner spaces": "{% for m in messages %}{{ m.role }}: {{ m.content.split() | join(' ') }}{% endfor %}",
    "earlier turns": "{{ messages[-1].content }}",
    "the last turn": "{{ messages[0].content }}",
    "the order": "{% for m in messages | reverse %}{{ m.role }}: {{ m.content }} {% endfor %}",
}


TURNS = (Message("user", "Kill  a Tree"), Message("assistant", "no"), Message("user", "please"))


def _rendered(template, turns, **options):
    return render_turns(tiny_tokenizer(template), turns, **options)


@pytest.mark.parametrize(
    "template",
    [CHAT_TEMPLATE, NO_SYSTEM, ALTERNATES, LAST_USER_HOLDS_SYSTEM, LINES, GENERATION, FORGETS_THOUGHTS],
)
@pytest.mark.parametrize("answering", [False, True])
def test_what_is_rendered_is_what_transformers_renders(template, answering):
    turns = [*TURNS, Message("assistant", "sorry, I")] if answering else list(TURNS)
    tokenizer = tiny_tokenizer(template)
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    options = {"continue_final_message": answering, "add_generation_prompt": not answering}
    assert render_turns(tokenizer, turns, go_on=answering).text == tokenizer.apply_chat_template(
        messages, tokenize=False, **options
    )


def test_contents_are_tried_as_parts_where_a_template_walks_them():
    text = _rendered(PARTS, [Message("system", "be kind"), Message("user", "kill a tree")])
    assert text.text == (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nkill a "
        "tree<|im_end|>\n<|im_start|>assistant\n"
    )
    assert not text.notes
    begun = _rendered(PARTS, [Message("user", "kill"), Message("assistant", "no, I")], go_on=True).text
    assert begun.endswith("<|im_start|>assistant\nno, I")


def test_a_system_text_that_a_template_drops_goes_before_the_users_and_is_noted():
    lm = LanguageModel(tiny_llama(), tiny_tokenizer(NO_SYSTEM), system="be kind")
    assert lm.template.render(lm.tokenizer, Prompt("0", "kill")) == "[INST] be kind\n\nkill [/INST]"
    lm.encode(["kill", "tree"])
    assert lm.notes == [FOLDED]


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ("su", "<user>0\n\n1<assistant>"),
        ("uu", "<user>0\n\n1<assistant>"),
        ("suuau", "<user>0\n\n1\n\n2<assistant>3<user>4<assistant>"),
        ("uasu", "<user>0<assistant>1<user>2\n\n3<assistant>"),
        ("ssu", "<user>0\n\n1\n\n2<assistant>"),
        ("uaau", "<user>0<assistant>1\n\n2<user>3<assistant>"),
        ("s", "<user>0<assistant>"),
        ("uas", "<user>0<assistant>1<user>2<assistant>"),
    ],
)
def test_turns_that_a_template_refuses_are_said_in_the_way_it_takes(roles, expected):
    names = {"s": "system", "u": "user", "a": "assistant"}
    turns = [Message(names[role], str(number)) for number, role in enumerate(roles)]
    found = _rendered(ALTERNATES, turns)
    assert found.text == expected
    assert found.notes
    with pytest.raises(InputError, match="must alternate"):
        _rendered(ALTERNATES, turns, reshape=False)


def test_turns_are_joined_and_folded_without_losing_a_character():
    turns = [
        Message("system", " a "),
        Message("user", "b\n"),
        Message("user", "c"),
        Message("tool", "d"),
        Message("tool", "e"),
    ]
    assert joined(turns) == [Message("system", " a "), Message("user", "b\n\n\nc"), *turns[3:]]
    assert folded(turns) == [Message("user", " a \n\nb\n"), *turns[2:]]


@pytest.mark.parametrize("lost", LOSING)
def test_a_template_that_loses_something_is_refused_with_what_is_missing(lost):
    for turns in (TURNS, [*TURNS[:1], Message("assistant", "no")]) if lost != "earlier turns" else (TURNS,):
        with pytest.raises(InputError, match=r"turn \d, (user|assistant), is (lost|out of order)") as error:
            _rendered(LOSING[lost], turns, go_on=turns[-1].role == "assistant" and lost != "the order")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["user", "o", "hello"])
def test_a_prompt_that_a_template_ignores_is_not_found_in_its_own_words(text):
    with pytest.raises(InputError, match="turn 1, user, is lost"):
        _rendered("hello user{% if add_generation_prompt %} assistant{% endif %}", [Message("user", text)])


def test_a_template_that_loses_a_system_text_within_another_turn_is_found_out():
    folds = _rendered(NO_SYSTEM, [Message("system", "help"), Message("user", "help me")])
    assert folds.text == "[INST] help\n\nhelp me [/INST]"


def test_trimming_is_noted_where_there_is_something_to_trim():
    assert not _rendered(ALTERNATES, [Message("user", "kill")]).notes
    trimmed = _rendered(ALTERNATES, [Message("user", " kill\n")])
    assert (trimmed.text, trimmed.notes) == ("<user>kill<assistant>", (TRIMMED,))
    assert _rendered(NO_SYSTEM, [Message("user", " kill\n")]).text == "[INST]  kill\n [/INST]"


def test_thoughts_of_earlier_answers_may_go_and_those_of_an_answer_that_is_gone_on_with_may_not():
    thought = Message("assistant", "<think>\nhm\n</think>\n\nno")
    found = _rendered(FORGETS_THOUGHTS, [TURNS[0], thought, TURNS[2]])
    assert found.notes == (THOUGHTS,)
    assert "<assistant>\n\nno</s>" in found.text
    with pytest.raises(InputError, match="turn 2, assistant, is lost"):
        _rendered(FORGETS_THOUGHTS, [TURNS[0], thought], go_on=True)


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("<think>", "</think>"),
        ("<seed:think>", "</seed:think>"),
        ("<reflection>", "</reflection>"),
        ("[THINK]", "[/THINK]"),
        ("◁think▷", "◁/think▷"),
        ("<|begin_of_thought|>", "<|end_of_thought|>"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("<|channel>thought", "<channel|>"),
        ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
    ],
)
def test_every_thought_that_judges_leave_out_may_be_left_out_by_a_template(start, end):
    answer = f"{start}hm{end} no"
    assert after_thought(answer).strip() == "no"
    found = _rendered(
        FORGETS_THOUGHTS.replace("</think>", end), [TURNS[0], Message("assistant", answer), TURNS[2]]
    )
    assert found.notes == (THOUGHTS,)
    assert "hm" not in found.text


def test_an_answer_with_thoughts_is_learnt_whole_where_the_template_forgets_them():
    opens = FORGETS_THOUGHTS.replace("%}<assistant>{%", "%}<assistant><think>\n{%")
    for template, answer, behind in (
        (FORGETS_THOUGHTS, "<think>\nhm\n</think>\n\nno", "<think>\nhm\n</think>\n\nno"),
        (opens, "<think>\nhm\n</think>\n\nno", "hm\n</think>\n\nno"),
        (opens, "no", "</think>\n\nno"),
    ):
        lm = LanguageModel(tiny_llama(), tiny_tokenizer(template))
        assert lm.template.answered(lm.tokenizer, Prompt("0", "kill"), answer)[1:] == (behind, "</s>")


def test_judges_get_the_turns_as_they_are_or_an_error():
    assert (
        conversation_text(tiny_tokenizer(PARTS), [("user", "kill"), ("assistant", "no")]).count("<|im_end|>")
        == 2
    )
    with pytest.raises(InputError, match="must alternate"):
        conversation_text(tiny_tokenizer(ALTERNATES), [("user", "a"), ("user", "b")])


def test_a_tokenizer_with_code_of_its_own_renders_with_that():
    class Own(transformers.PreTrainedTokenizerFast):
        def apply_chat_template(self, conversation, **options):
            return "|".join(turn["content"] for turn in conversation)

    own = Own(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    assert render_turns(own, TURNS).text == "Kill  a Tree|no|please"


ENDLESS = {
    "a text that doubles": (
        "{% set ns = namespace(a='x') %}{% for i in range(60) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}{{ "
        "ns.a }}"
    ),
    "a sum that doubles": (
        "{% set ns = namespace(a='x') %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor %}{{ "
        "ns.a }}"
    ),
    "a list that doubles": (
        "{% set ns = namespace(a=['x']) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% endfor "
        "%}{{ ns.a }}"
    ),
    "a mapping that doubles": (
        "{% set n = namespace(a=1) %}{% for i in range(60) %}{% set n.a = dict(a=n.a, b=n.a) %}{% endfor "
        "%}{{ n.a }}"
    ),
    "a product": "{{ 'x' * 10 ** 9 }}",
    "a list's product": "{{ ([1] * 10 ** 9) | length }}",
    "a power": "{{ 10 ** (10 ** 9) }}",
    "squares": "{% set ns = namespace(a=10) %}"
    "{% for i in range(99) %}{% set ns.a = ns.a * ns.a %}{% endfor %}",
    "a width": "{{ 'a' | center(10 ** 9) }}",
    "a method's width": "{{ 'a'.ljust(10 ** 9) }}",
    "a format's width": "{{ '{:1000000000}'.format('') }}",
    "a format's own width": "{{ '{:{w}}'.format('', w=10 ** 9) }}",
    "a number's width": "{{ '%1000000000d' % 1 }}",
    "a filter's width": "{{ '%1000000000d' | format(1) }}",
    "an indentation": "{{ 'a\n\nb' | indent(10 ** 9) }}",
    "a batch": "{{ [1] | batch(10 ** 9, 'x') | list | length }}",
    "a replacement": "{% set s = 'a' * 99999 %}{{ s | replace('a', s) | length }}",
    "a method's replacement": "{% set s = 'a' * 99999 %}{{ s.replace('', s) | length }}",
    "a joint": "{% set s = 'a' * 99999 %}{{ (range(99999) | list) | join(s) | length }}",
    "a method's joint": "{% set s = 'a' * 99999 %}{{ s.join(['b'] * 99999) | length }}",
    "a translation": "{{ messages[0].content.translate({107: 'x' * 9999999}) }}",
    "wraps": "{% set s = 'a ' * 99999 %}{{ s | wordwrap(1, true, s) | length }}",
    "loops in loops": "{% for i in range(99998) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops that pass everything over": "{% for i in range(99999) %}"
    "{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "recursion": (
        "{% for i in range(99999) recursive %}{% if loop.depth < 4 %}{{ loop(range(99999)) }}{% endif %}{% "
        "endfor %}"
    ),
    "filters in loops": "{% for i in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
    "words in loops": "{% for i in range(99999) %}" + "z" * 9999 + "{% endfor %}",
    "a block": "{% set x %}{% for i in range(99999) %}"
    + "z" * 9999
    + "{% endfor %}{% endset %}{{ x | length }}",
    "a long source": "x" * 2_000_000,
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_template_without_an_end_is_stopped(kind):
    with pytest.raises(TooMuchError):
        render_template(ENDLESS[kind], [{"role": "user", "content": "kill a tree"}], {})


def test_what_stops_a_template_is_one_line_of_our_own():
    with pytest.raises(
        InputError, match=r"cannot be used: it makes texts .*; choose another template"
    ) as error:
        _rendered(ENDLESS["a text that doubles"], [Message("user", "kill")])
    assert "\n" not in str(error.value)


def test_work_that_is_in_proportion_to_the_conversation_is_done():
    turns = [Message(role, "word " * 40) for role in ("user", "assistant") * 250]
    for template in (CHAT_TEMPLATE, ALTERNATES, PARTS, LINES, FORGETS_THOUGHTS):
        assert _rendered(template, [*turns, Message("user", "go on")]).text.count("word") == 20_000
    assert len(_rendered(PARTS, [Message("user", "x" * 2_000_000)]).text) > 2_000_000
    assert len(_rendered(CHAT_TEMPLATE, [Message("user", "x" * 2_000_000)]).text) > 2_000_000
