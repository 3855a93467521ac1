"""Files and objects of the shapes people really have: every row is used, or counted and shown.

No character of a text is changed.
"""

import gzip
import json
import pickle

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import given as every
from hypothesis import strategies as st

from safety_neurons.errors import InputError
from safety_neurons.model import LanguageModel
from safety_neurons.prompt_lists import (
    Message,
    Prompt,
    Prompts,
    as_prompt,
    as_prompts,
    objects,
    prompts,
    rows,
    tables,
)
from safety_neurons.results import rate

IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
USER, CHAT = (
    [{"role": "user", "content": "Hi"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
)
TEXT = " \t Hi\u00a0 there e\u0301 \r\nline \n"
"""Outer and inner white space, a decomposed letter, both line ends."""


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


ROWS = {
    "garak attempt": (
        {
            "prompt": {"turns": [{"role": "user", "content": {"text": "Hi", "lang": "en"}}]},
            "outputs": [{"text": "No"}],
        },
        "No",
    ),
    "garak hit": ({"goal": "probe's goal", "prompt": "Hi", "output": {"text": "No"}}, "No"),
    "inspect": ({"input": USER, "target": "No"}, "No"),
    "lm-eval": (
        {
            "doc_id": 3,
            "doc": {"question": "other"},
            "arguments": {"gen_args_0": {"arg_0": "Hi", "arg_1": {}}},
            "target": "No",
        },
        "No",
    ),
    "OpenAI batch": ({"custom_id": "x", "body": {"model": "m", "messages": USER}}, None),
    "Gemini": (
        {
            "contents": [
                {"role": "user", "parts": [{"text": "Hi"}]},
                {"role": "model", "parts": [{"text": "No"}]},
            ]
        },
        "No",
    ),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "No"}]}, "No"),
    "UltraChat": ({"id": "1", "data": ["Hi", "No"]}, "No"),
    "MT-Bench": ({"question_id": 81, "category": "writing", "turns": ["Hi", "And now?"]}, None),
    "WildChat": (
        {"conversation_hash": "h", "conversation": [*USER, {"role": "assistant", "content": "No"}]},
        "No",
    ),
    "arena": ({"conversation_a": USER, "conversation_b": CHAT}, None),
    "OpenOrca": ({"system_prompt": "", "question": "Hi", "response": "No"}, "No"),
    "ToxicChat": ({"user_input": "Hi", "model_output": "No", "toxicity": 0}, "No"),
    "WildGuard": ({"prompt": "Hi", "adversarial": True, "response": "No"}, "No"),
    "WildJailbreak, vanilla": ({"vanilla": "Hi", "adversarial": "", "completion": "No"}, "No"),
    "HarmBench completions": ({"test_case": "Hi", "generation": "No", "label": 0}, "No"),
    "DPO strings": ({"prompt": "Hi", "chosen": "No", "rejected": "Yes"}, "No"),
    "DPO turns": (
        {
            "chosen": [*USER, {"role": "assistant", "content": "No"}],
            "rejected": [*USER, {"role": "assistant", "content": "Yes"}],
        },
        "No",
    ),
    "several answers": ({"prompt": "Hi", "response": ["No", "Yes"]}, "No"),
    "written JSON": ({"messages": json.dumps(USER)}, None),
    "written Python": ({"messages": str(USER)}, None),
    "numpy's records": (
        {"messages": "[{'role': 'user', 'content': 'Hi'}\n {'role': 'assistant', 'content': 'No'}]"},
        "No",
    ),
    "parts": (
        {"messages": [{"role": "user", "content": [IMAGE, {"type": "text", "text": "Hi"}]}]},
        None,
    ),
    "LangChain": ({"messages": [{"type": "human", "content": "Hi"}, {"type": "ai", "content": "No"}]}, "No"),
    "Anthropic": (
        {
            "system": [{"type": "text", "text": "s"}],
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        },
        None,
    ),
    "another case": ({"Behavior": "label", "Goal": "Hi"}, None),
    "spaces in the name": ({"Forbidden Prompt": "Hi"}, None),
    "FLAN": ({"inputs": "Hi", "targets": "No"}, "No"),
    "BeaverTails": ({"prompt": "Hi", "response": "No", "category": {"theft": True}, "is_safe": False}, "No"),
    "RealToxicityPrompts": (
        {"prompt": {"text": "Hi", "toxicity": 0.1}, "continuation": {"text": "No"}},
        None,
    ),
    "Anthropic batch": ({"custom_id": "x", "params": {"model": "m", "messages": USER}}, None),
    "Open Assistant": ({"text": "Hi", "role": "prompter", "lang": "en"}, None),
    "viewer": ({"row_idx": 0, "row": {"prompt": "Hi"}}, None),
}


@pytest.mark.parametrize("case", ROWS)
def test_public_rows_give_the_request_and_the_answer(case):
    row, answer = ROWS[case]
    found = prompts([row])
    assert (found[0].text, found[0].answer) == ("Hi", answer)


FILES = {
    "split.json": json.dumps({"columns": ["prompt", "label"], "index": [0], "data": [["Hi", 1]]}),
    "table.json": json.dumps(
        {"schema": {"fields": [{"name": "prompt"}]}, "data": [{"index": 0, "prompt": "Hi"}]}
    ),
    "index.json": json.dumps({"0": {"prompt": "Hi"}}),
    "columns.json": json.dumps({"prompt": {"0": "Hi"}, "label": {"0": 1}}),
    "viewer.json": json.dumps(
        {"features": [], "rows": [{"row_idx": 0, "row": {"prompt": "Hi"}}], "num_rows_total": 1}
    ),
    "listed.json": json.dumps({"metadata": {"count": 2}, "examples": [{"input": "Hi", "target": "b"}]}),
    "named.json": json.dumps(
        {"name": "my set", "description": "about locks", "version": 2, "prompts": ["Hi"]}
    ),
    "beside.json": json.dumps({"license": "MIT", "fraud": ["Hi"], "size": 1}),
    "inspect.json": json.dumps(
        {"eval": {"task": "t"}, "status": "success", "samples": [{"id": 1, "input": "Hi", "target": "x"}]}
    ),
    "behaviours.json": json.dumps({"theft": [{"test_case": "Hi", "generation": "No"}]}),
    "turns.json": json.dumps([*USER, {"role": "assistant", "content": "b"}]),
    "pretty.jsonl": '{\n "prompt": "Hi"\n}\n',
    "commas.jsonl": '{"prompt": "Hi"},\n',
    "spread.json": '{\n "prompt": "Hi"\n}\n',
    "sep.csv": "sep=;\nprompt;label\nHi;1\n",
    "backslash.csv": 'prompt,note\nHi,"a \\"b\\", c"\n',
    "one column.csv": "prompt\nHi\n",
    "utf16.csv": "prompt,label\r\nHi,1\r\n".encode("utf-16"),
    "bom.jsonl": b'\xef\xbb\xbf{"prompt": "Hi"}\n',
}


@pytest.mark.parametrize("name", FILES)
def test_public_files_give_their_one_prompt(tmp_path, name):
    assert prompts(written(tmp_path, name, FILES[name])).texts == ["Hi"]


ODD = {
    "empty turns": {"messages": []},
    "null": {"prompt": None},
    "number": {"prompt": 3},
    "unknown role": {"messages": [{"role": "king", "content": "x"}]},
    "image alone": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
    "no user": {"messages": [{"role": "system", "content": "x"}]},
    "not turns": {"messages": "text"},
    "texts": {"prompt": ["a", "b"]},
    "setup": {"entry_type": "start_run setup"},
    "an answer by itself": {"text": "No", "role": "assistant"},
    "a number": 7,
    "a list": [1],
}


@pytest.mark.parametrize("case", ODD)
def test_one_odd_row_costs_no_other_and_is_counted_with_its_number(tmp_path, case):
    lines = [{"prompt": "a"}, {"prompt": "b"}, ODD[case], {"prompt": "c"}]
    found = prompts(written(tmp_path, "a.jsonl", "\n".join(map(json.dumps, lines))))
    assert found.texts == ["a", "b", "c"]
    assert sum("(first: row 2)" in note for note in found.notes) == 1 + (case == "image alone")


def test_an_odd_row_of_a_table_and_a_name_twice_are_counted_too(tmp_path):
    found = prompts(written(tmp_path, "a.csv", "prompt,label\na,1\nb, c,1\nd,0\n"))
    assert found.texts == ["a", "d"]
    assert any(
        note.startswith("left out 1 row: row 3 has 3 cells") and "(first: row 1)" in note
        for note in found.notes
    )
    found = prompts(written(tmp_path, "a.jsonl", '{"prompt": "a"}\n{"prompt": "b", "prompt": "c"}\n'))
    assert found.texts == ["a"]
    assert "two values for one name" in found.notes[0]


def test_calls_of_tools_and_other_roles_are_turns():
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "now", "arguments": "{}"}}],
    }
    turns = [*USER, call, {"role": "ipython", "content": "12:00"}, {"role": "assistant", "content": "Noon."}]
    found = prompts([{"messages": turns}])[0]
    assert [turn.role for turn in found.messages] == ["user", "assistant", "tool"]
    assert '"now"' in found.messages[1].content
    assert (found.text, found.answer) == ("Hi", "Noon.")


def test_system_and_context_are_used_and_said():
    found = prompts([{"system": "Answer in French.", "prompt": "Name a colour."}])
    assert found[0].messages == (Message("system", "Answer in French."), Message("user", "Name a colour."))
    assert "'system' is the system prompt of 1 row (first: row 0)" in found.notes
    found = prompts([{"instruction": "Sum up.", "context": "A text.", "response": "ok"}])
    assert (found[0].text, found[0].answer) == ("Sum up.\n\nA text.", "ok")
    assert any("'context' is put behind the request" in note for note in found.notes)


@pytest.mark.parametrize(
    "row",
    [
        {"body": {"instructions": "Be kind.", "input": USER}},
        {
            "systemInstruction": {"parts": [{"text": "Be kind."}]},
            "contents": [{"role": "user", "parts": [{"text": "Hi"}]}],
        },
        {"preamble": "Be kind.", "prompt": "Hi"},
        {"custom_id": "x", "params": {"system": [{"type": "text", "text": "Be kind."}], "messages": USER}},
    ],
)
def test_system_texts_of_servers_requests_are_used_and_said(row):
    found = prompts([row])
    assert found[0].messages == (Message("system", "Be kind."), Message("user", "Hi"))
    assert any("is the system prompt of 1 row" in note for note in found.notes)


def test_a_row_is_read_from_the_column_that_it_has_and_the_group_is_kept():
    found = prompts(
        [{"prompt": "a", "group": "g"}, {"messages": USER, "conversation_id": "c"}, {"instruction": "b"}]
    )
    assert found.texts == ["a", "Hi", "b"]
    assert [prompt.group for prompt in found] == ["g", "c", None]
    assert any(note.startswith("the prompt is in 'prompt' in 1") for note in found.notes)


def test_metadata_alone_is_no_list_of_prompts(tmp_path):
    with pytest.raises(InputError, match="without a list of prompts"):
        prompts(written(tmp_path, "a.json", json.dumps({"name": "my set", "description": "about locks"})))


def csv(text):
    return '"' + text.replace('"', '""') + '"'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps([TEXT])),
        ("a.jsonl", json.dumps({"prompt": TEXT, "response": TEXT})),
        (
            "b.jsonl",
            json.dumps(
                {"messages": [{"role": "user", "content": TEXT}, {"role": "assistant", "content": TEXT}]}
            ),
        ),
        (
            "c.jsonl",
            json.dumps({"conversations": [{"from": "human", "value": TEXT}, {"from": "gpt", "value": TEXT}]}),
        ),
        (
            "d.jsonl",
            json.dumps(
                {
                    "chosen": f"\n\nHuman: {TEXT}\n\nAssistant: {TEXT}",
                    "rejected": "\n\nHuman: x\n\nAssistant: y",
                }
            ),
        ),
        ("a.csv", f"prompt,response\n{csv(TEXT)},{csv(TEXT)}\n"),
        ("a.tsv", f"prompt\tresponse\n{csv(TEXT)}\t{csv(TEXT)}\n"),
    ],
)
def test_no_character_of_a_text_is_changed(tmp_path, name, content):
    found = prompts(written(tmp_path, name, content))[0]
    assert found.text == TEXT
    assert found.answer in (TEXT, None)
    assert (found.answer is None) == (name == "a.json")


def test_lines_keep_all_but_their_ends(tmp_path):
    assert prompts(written(tmp_path, "a.txt", " a \r\n\tb\u2028 c\r d \ne ")).texts == [
        " a ",
        "\tb\u2028 c\r d ",
        "e ",
    ]
    with_quotes = prompts(written(tmp_path, "a.csv", 'prompt,x\n"say" it,1\nsay "it",1\n'))
    assert with_quotes.texts == ['"say" it', 'say "it"']


def frame(rows):
    import pandas

    return pandas.DataFrame(rows)


def data_set(rows):
    import datasets

    return datasets.Dataset.from_list(rows)


def array(rows):
    import numpy

    return numpy.array([row["prompt"] for row in rows])


WAYS = {
    "records": lambda rows: rows,
    "tuple": tuple,
    "generator": iter,
    "columns": lambda rows: {"prompt": [row["prompt"] for row in rows]},
    "conversations": lambda rows: [[{"role": "user", "content": row["prompt"]}] for row in rows],
    "turns": lambda rows: [[Message("user", row["prompt"])] for row in rows],
    "texts": lambda rows: [row["prompt"] for row in rows],
    "prompts": lambda rows: [Prompt(str(number), row["prompt"]) for number, row in enumerate(rows)],
    "frame": frame,
    "data set": data_set,
    "array": array,
    "series": lambda rows: frame(rows)["prompt"],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("door", [prompts, as_prompts])
def test_python_takes_whatever_holds_prompts_through_one_door(way, door):
    found = door(WAYS[way]([{"prompt": " a"}, {"prompt": "b\n"}]))
    assert isinstance(found, Prompts)
    assert found.texts == [" a", "b\n"]
    assert [prompt.id for prompt in found] == ["0", "1"]


def test_a_model_is_given_the_turns_and_never_how_python_prints_them(monkeypatch):
    seen = []
    monkeypatch.setattr(
        LanguageModel, "encode", lambda _self, given, **_: seen.extend(as_prompts(given)) or []
    )
    lm = object.__new__(LanguageModel)
    for given in (
        USER,
        [USER],
        USER[0],
        {"prompt": "Hi"},
        [{"prompt": "Hi"}],
        "Hi",
        (text for text in ["Hi"]),
    ):
        lm.encode(given)
    assert [prompt.text for prompt in seen] == ["Hi"] * 7
    assert all(prompt.turns == (Message("user", "Hi"),) for prompt in seen)


@pytest.mark.parametrize(
    "given",
    [
        [1],
        [["a"]],
        {"a"},
        b"x",
        [{"prompt": 3}],
        ["a\ud83d"],
        [{"prompt": ""}],
        "builtin:harmful",
        {"x": [1]},
    ],
)
def test_what_is_no_prompt_is_one_clear_error(given):
    with pytest.raises(InputError) as caught:
        as_prompts(given)
    assert "expected" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_request_keeps_a_last_turn_of_the_assistant():
    asked = as_prompt(CHAT)
    assert asked.turns == (Message("user", "a"), Message("assistant", "b"))
    assert asked.text == "a"
    with pytest.raises(InputError, match="2 requests"):
        as_prompt(["a", "b"])


def test_rows_are_bounded_and_a_limit_reads_the_first(tmp_path, monkeypatch):
    for module in (rows, tables):
        monkeypatch.setattr(module, "MOST_ROWS", 1000)
    for name, content in (
        ("a.csv.gz", "prompt,x\n" + "a,1\n" * 3000),
        ("a.json.gz", json.dumps(["a"] * 3000)),
        ("a.txt.gz", "a\n" * 3000),
    ):
        path = written(tmp_path, name, gzip.compress(content.encode()))
        with pytest.raises(InputError, match="more than 1,000 rows.*split it"):
            prompts(path)
        assert len(prompts(path, limit=5)) == 5


def test_a_prompt_takes_little_memory():
    assert not hasattr(Prompt("0", "a"), "__dict__")
    assert pickle.loads(pickle.dumps(Prompt("0", "a"))) == Prompt("0", "a")


def test_a_table_of_many_columns_is_read_in_time_that_grows_with_its_cells(tmp_path, monkeypatch):
    header = ",".join(["prompt", *(f"c{number}" for number in range(20_000))])
    counted = []
    monkeypatch.setattr(
        objects, "Counter", lambda cells=(): counted.append(len(cells)) or tables_counter(cells)
    )
    found = prompts(written(tmp_path, "a.csv", f"{header}\nHi\nHo,1\n"))
    assert found.texts == ["Hi", "Ho"]
    assert counted == [20_001]  # names are counted once, not once for each name
    assert len(found[1].meta) == 1


tables_counter = objects.Counter

cells = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "prompt", "text", "messages", "turns", "from", "value", "data", "x"]
            ),
            inner,
        )
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@every(value=cells)
def test_any_value_in_memory_or_in_a_file_gives_prompts_or_one_line(tmp_path, value):
    path = written(tmp_path, "a.json", json.dumps(value))
    reads = [lambda: prompts([value]), lambda: as_prompts([value]), lambda: prompts(path)]
    reads += [lambda: prompts(value), lambda: as_prompts(value)] if isinstance(value, list | dict) else []
    for read in reads:
        found, advice = [], "expected"
        try:
            found = read()
        except InputError as error:
            advice = str(error)
        assert "expected" in advice
        assert "\n" not in advice
        assert all(isinstance(prompt.text, str) for prompt in found)


# Nothing is merged, paired wrongly or lost in silence

KEPT_APART = {
    "lines of old Macs": ("a.txt", "a\rb\r", [("a", None), ("b", None)]),
    "a table of old Macs": ("a.csv", "sep=;\rprompt;answer\ra;1\rb;2\r", [("a", "1"), ("b", "2")]),
    "blank lines before the header": ("a.csv", "\n ,\nprompt,answer\na,1\nb,2\n", [("a", "1"), ("b", "2")]),
    "two marks": ("a.csv", "\ufeff\ufeffprompt,answer\na,1\nb,2\n", [("a", "1"), ("b", "2")]),
    "spaces before quotation marks": (
        "a.csv",
        'id, prompt, answer\n1, "a, b", 1\n2, c, "2"\n',
        [("a, b", "1"), ("c", "2")],
    ),
    "requests of a human": (
        "a.json",
        json.dumps([{"role": "human", "content": "a"}, {"role": "Human", "content": "b"}]),
        [("a", None), ("b", None)],
    ),
    "turns from and to": (
        "a.json",
        json.dumps([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]),
        [("a", "b")],
    ),
    "texts beside their answers": (
        "a.json",
        json.dumps({"questions": ["a", "b"], "answers": ["1", "2"]}),
        [("a", "1"), ("b", "2")],
    ),
    "prompts beside their answers": (
        "a.json",
        json.dumps({"name": "x", "prompts": ["a", "b"], "responses": ["1", "2"]}),
        [("a", "1"), ("b", "2")],
    ),
    "rows in another order": (
        "a.json",
        json.dumps({"goal": {"0": "a", "1": "b"}, "target": {"1": "2", "0": "1"}}),
        [("a", "1"), ("b", "2")],
    ),
    "an agent's turn by itself": (
        "a.jsonl",
        '{"role": "User", "content": "a"}\n{"role": "Agent", "content": "b"}\n',
        [("a", None)],
    ),
    "answers of SQuAD": (
        "a.jsonl",
        json.dumps({"question": "a", "answers": {"text": ["1", "one"], "answer_start": [0, 3]}}),
        [("a", "1")],
    ),
}


@pytest.mark.parametrize("case", KEPT_APART)
def test_requests_stay_apart_and_keep_their_own_answers(tmp_path, case):
    name, content, wanted = KEPT_APART[case]
    assert [(one.text, one.answer) for one in prompts(written(tmp_path, name, content))] == wanted


def test_what_is_left_out_of_an_object_a_cell_or_a_row_is_said(tmp_path):
    beside = json.dumps({"prompts": ["a"], "few_shot": ["x", "y"]})
    assert prompts(written(tmp_path, "a.json", beside)).notes == [
        "left out what stands beside the prompts: few_shot"
    ]
    numbers = (
        '{"prompt": "a", "answer": 4}\n{"prompt": "b", "answer": true}\n{"prompt": "c", "answer": "4"}\n'
    )
    found = prompts(written(tmp_path, "a.jsonl", numbers))
    assert found.answers == [None, None, "4"]
    assert found.notes[0].startswith("2 answers are numbers or truth values")
    system = {"system": "B", "messages": [{"role": "system", "content": "A"}, *USER]}
    found = prompts(written(tmp_path, "b.jsonl", json.dumps(system)))
    assert found[0].messages[0] == Message("system", "A")
    assert "other system prompt is left out" in found.notes[0]
    alone = {"messages": [{"role": "assistant", "content": "x"}]}
    found = prompts(written(tmp_path, "c.jsonl", json.dumps(alone) + '\n{"prompt": "a"}\n'))
    assert found.notes[0].startswith("left out 1 conversation without a user's turn")


@pytest.mark.parametrize(("name", "sign"), [("a.csv", ","), ("a.tsv", "\t")])
def test_a_cell_that_swallows_rows_is_noticed_and_one_of_several_lines_is_not(tmp_path, name, sign):
    rows = [["prompt", "label"], ['"a', "1"], ["b", "0"], ['c"', "1"]]
    found = prompts(written(tmp_path, name, "\n".join(map(sign.join, rows))))
    assert len(found) == 1
    assert found.notes == [
        "a cell from line 2 on holds lines that look like rows; look whether a quotation mark is missing"
    ]
    rows = [["prompt", "label"], ['"a\nb\nc"', "1"]]
    assert prompts(written(tmp_path, name, "\n".join(map(sign.join, rows)))).notes == []


@pytest.mark.parametrize(
    "split",
    [
        {"columns": ["prompt", "label"], "data": [["a", 1, "x"]]},
        {"columns": ["prompt", "label"], "data": [["a"]]},
        {"columns": ["prompt", "prompt"], "data": [["a", "b"]]},
        {"goal": {"0": "a", "1": "b"}, "target": {"1": "2", "2": "3"}},
        {"questions": ["a", "b"], "answers": ["1"]},
    ],
)
def test_columns_that_do_not_fit_one_another_are_refused(tmp_path, split):
    with pytest.raises(InputError, match=r"columns|the header names"):
        prompts(written(tmp_path, "a.json", json.dumps(split)))


def test_unnamed_columns_are_kept_apart(tmp_path):
    (found,) = prompts(written(tmp_path, "a.csv", ",,prompt\n0,x,a\n"))
    assert list(found.meta.values()) == ["0", "x"]
    assert len(found.meta) == 2


def test_a_number_in_the_first_row_of_data_is_no_name_of_a_column(tmp_path):
    table = written(tmp_path, "a.csv", "How do I knit?,1\nHow do I sew?,0\n")
    assert prompts(table, column="1").texts == ["How do I knit?", "How do I sew?"]
    named = written(tmp_path, "b.csv", "0,1\nx,How do I knit?\n")
    assert prompts(named, column="1").texts == ["How do I knit?"]


def test_ids_and_groups_that_a_table_made_floats_of_are_whole(tmp_path):
    found = prompts([{"id": 7.0, "group": 1.0, "prompt": "a"}, {"id": 8.0, "group": 1.5, "prompt": "b"}])
    assert [(one.id, one.group) for one in found] == [("7", "1"), ("8", "1.5")]


@pytest.mark.parametrize("ids", [["a", "a", "a#2"], ["a#2", "a", "a"], ["a", "a", "a#2", "a#2", "a"]])
def test_numbered_ids_meet_no_given_one(ids):
    found = prompts([{"id": one, "prompt": "x"} for one in ids])
    assert len({one.id for one in found}) == len(ids)
    assert found[ids.index("a#2")].id == "a#2"


# What many tools leave in files is read right, said or refused

CLASSES = {"name": "label", "type": {"names": ["unsafe", "safe"], "_type": "ClassLabel"}}
VIEWED = [
    {"row_idx": 0, "row": {"prompt": "a", "label": 0}, "truncated_cells": []},
    {"row_idx": 1, "row": {"prompt": "b", "label": -1}},
    {"row_idx": 2, "row": {"prompt": "cut", "label": 1}, "truncated_cells": ["prompt"]},
]
SAID = {
    "tables joined": (
        "a.csv",
        "prompt,label\na,1\nprompt,label\nb,0\n",
        ["a", "b"],
        "left out 1 row that repeats the header",
    ),
    "tables with marks joined": (
        "a.csv",
        "\ufeffprompt,label\na,1\n\ufeffprompt,label\nb,0\n",
        ["a", "b"],
        "left out 1 byte order mark within the file",
    ),
    "lines with marks joined": (
        "a.jsonl",
        '{"prompt": "a"}\n\ufeff{"prompt": "b"}\n',
        ["a", "b"],
        "1 byte order",
    ),
    "JSON Lines as text": (
        "a.txt",
        '{"prompt": "a"}\n\n{"prompt": "b"}\n',
        ["a", "b"],
        "named .txt but holds JSON",
    ),
    "JSON as text": ("a.txt", '[\n{"prompt": "a"},\n"b"]', ["a", "b"], "named .txt but holds JSON"),
    "what stands beside records in JSON as text": (
        "a.txt",
        '{"k": ["z"], "prompts": [{"prompt": "a"}]}',
        ["a"],
        "left out what stands beside",
    ),
    "brackets in text": ("a.txt", "[ISBN] a [/ISBN]\n{b}\n", ["[ISBN] a [/ISBN]", "{b}"], None),
    "a name in text": ("a.txt", "prompt\na\n", ["prompt", "a"], "looks like the name of a column"),
    "the hub's viewer": (
        "a.json",
        json.dumps({"features": [CLASSES], "rows": VIEWED, "num_rows_total": 9}),
        ["a", "b"],
        "the viewer gave 3 rows of 9",
    ),
    "several candidates": (
        "a.jsonl",
        '{"instruction": "a", "question": "b", "choices": ["c"]}',
        ["a"],
        "'question' holds text too and is left aside in 1 row",
    ),
    "two cases of a name": ("a.csv", "Prompt,prompt\na,b\n", ["b"], "'Prompt' holds text too"),
    "the same in other columns": ("a.jsonl", json.dumps({"prompt": "a", "messages": CHAT}), ["a"], None),
    "lists": ("a.jsonl", '{"prompt": "a", "choices": [["b", "c"]]}', ["a"], "left aside: 'choices'"),
    "earlier turns": (
        "a.jsonl",
        '{"prompt": "a", "history": [["b", "c"]]}',
        ["a"],
        "1 row holds earlier turns beside the request; put before it",
    ),
    "missing values as words": (
        "a.csv",
        "prompt,answer\nnan,x\nNone,None\n",
        ["nan", "None"],
        "2 prompts say what",
    ),
    "missing answers as words": ("a.csv", "prompt,answer\na,x\nb,nan\n", ["a", "b"], "1 answer says what"),
    "numbers": ("a.csv", "prompt,prompt_text\n1,a\n2,b\n", ["1", "2"], "2 prompts are numbers"),
    "a wrong decoding": ("a.txt", "caf\ufffd\n", ["caf\ufffd"], "1 text holds what a wrong decoding leaves"),
    "an unwanted answer": (
        "a.jsonl",
        '{"prompt": "a", "completion": "b", "label": false}\n{"prompt": "c", "response": "d", "is_safe": 0}',
        ["a", "c"],
        "2 answers are marked false or not safe by the row",
    ),
    "texts by keys": (
        "a.json",
        '{"How?": "So.", "Why?": "Because."}',
        ["So.", "Because."],
        "by the keys How?, Why?",
    ),
}


@pytest.mark.parametrize("case", SAID)
def test_what_many_tools_leave_in_files_is_read_right_and_said(tmp_path, case):
    name, content, texts, note = SAID[case]
    found = prompts(written(tmp_path, name, content))
    assert found.texts == texts
    assert any(note in said for said in found.notes) if note else found.notes == []


MISTAKEN = {
    "a text beside the list": (
        "a.json",
        '{"goal": "of the study", "prompts": ["a"]}',
        "under 'goal' and a list",
    ),
    "a title beside records": (
        "a.json",
        '{"text": "My set", "data": [{"prompt": "a"}]}',
        "under 'text' and a list",
    ),
    "splits": (
        "a.json",
        '{"train": [{"prompt": "a"}], "test": [{"prompt": "b"}]}',
        "2 parts .'train', 'test'.",
    ),
    "a table as text": ("a.txt", "prompt,label\na,1\n", "is the header of a table.*name the file .csv"),
    "a page as text": ("a.txt", "\n<!DOCTYPE HTML>\n<html>Not found</html>", "a page of the web"),
    "a page as a table": ("a.csv", "<html>\n<body>404</body>", "a page of the web"),
}


@pytest.mark.parametrize("case", MISTAKEN)
def test_files_that_may_mean_something_else_are_refused(tmp_path, case):
    name, content, message = MISTAKEN[case]
    with pytest.raises(InputError, match=message):
        prompts(written(tmp_path, name, content))


def test_numbers_of_classes_are_what_the_data_set_says_in_files_and_in_memory(tmp_path):
    import datasets

    viewed = json.dumps({"features": [CLASSES], "rows": VIEWED})
    found = prompts(written(tmp_path, "a.json", viewed))
    assert [prompt.meta.get("label") for prompt in found] == ["unsafe", None]
    assert any("record 3 is cut off in prompt by the hub's viewer" in note for note in found.notes)
    named = datasets.Features(
        {"prompt": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    rows = datasets.Dataset.from_list(
        [{"prompt": "a", "label": 0}, {"prompt": "b", "label": 1}], features=named
    )
    found = prompts(rows)
    assert [prompt.meta["label"] for prompt in found] == ["bad", "good"]
    assert any("0 bad, 1 good" in note for note in found.notes)


def test_the_word_for_a_missing_value_is_no_group_and_no_language():
    found = prompts(
        [{"prompt": "a", "group": "nan", "lang": "None"}, {"prompt": "b", "group": "g", "lang": "de"}]
    )
    assert [(one.group, one.language) for one in found] == [(None, None), ("g", "de")]


def test_a_column_that_the_user_names_is_not_doubted(tmp_path):
    path = written(tmp_path, "a.json", '{"goal": "a", "prompts": ["b"]}')
    assert prompts(path, column="goal").texts == ["a"]
    assert prompts([{"question": "a", "instruction": "b"}], column="question").notes == []


def test_copies_are_one_group_and_tell_nothing_new(tmp_path):
    found = prompts(written(tmp_path, "a.csv", "id,prompt,group\n1,a,\n2,b,\n3,a,\n4,a,g\n5,c,\n6,c,\n"))
    assert found.groups[:4] == ["g", None, "g", "g"]
    assert found.groups[4] == found.groups[5] is not None
    assert not {*prompts(["a", "a"]).groups} & {*prompts(["b", "b"]).groups}  # of both lists the ids are 0, 1
    outcomes = [1, 0, 1, 1, 0, 1]
    twice = prompts([f"p{number % 6}" for number in range(12)])
    once, doubled = rate(outcomes), rate(outcomes * 2, twice.groups)
    assert doubled.value == once.value
    assert doubled.high - doubled.low >= 0.9 * (once.high - once.low)
