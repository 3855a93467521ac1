"""Headers that do not stand where they should, tables as text, lists within lists, rows that are turns."""

import json

import pytest

from safety_neurons import prompts
from safety_neurons.errors import InputError


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(
        content if isinstance(content, str) else json.dumps(content), encoding="utf-8", newline=""
    )
    return path


TABLES = {
    "a title above": (
        "a.csv",
        "My prompts,,\n,,\nid,prompt,label\n1,How?,1\n",
        [("How?", "1")],
        "left out 2 rows above the header (id, prompt, label)",
    ),
    "comments above, with another separator": (
        "a.csv",
        "# v1, of today\n# it's mine\nprompt;label\nHow, so?;1\n",
        [("How, so?", "1")],
        "left out 2 rows above the header",
    ),
    "the same columns in another order": (
        "a.csv",
        "prompt,label\nHow?,1\nlabel,prompt\n0,Why?\n",
        [("How?", "1"), ("Why?", "0")],
        "row 3 is a header of its own (label, prompt)",
    ),
    "other columns": (
        "a.tsv",
        "id\tprompt\n1\tHow?\nid\ttext\tlabel\n2\tWhy?\t0\n",
        [("How?", None), ("Why?", "0")],
        "row 3 is a header of its own (id, text, label)",
    ),
    "as many other columns": (
        "a.csv",
        "id,prompt\n1,How?\nid,question\n2,Why?\n",
        [("How?", None), ("Why?", None)],
        "row 3 is a header",
    ),
    "a table of Markdown": (
        "a.csv",
        "| prompt | label |\n|:---|---:|\n| How? | 1 |\n",
        [("How?", "1")],
        "lines that rule the table",
    ),
    "a table of psql": (
        "a.csv",
        " prompt | label \n--------+-------\n How?   |     1\n",
        [("How?", "1")],
        "lines that rule the table",
    ),
    "row numbers of R": (
        "a.csv",
        '"prompt","label"\n"1","How?",1\n"2","Why, so?",0\n',
        [("How?", "1"), ("Why, so?", "0")],
        "rows begin with a number that the header does not name",
    ),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_header_is_found_where_it_stands_and_said(tmp_path, case):
    name, content, wanted, note = TABLES[case]
    found = prompts(written(tmp_path, name, content))
    assert [(one.text, one.meta.get("label")) for one in found] == wanted
    assert any(note in said for said in found.notes)


def test_rows_of_data_are_taken_for_no_header(tmp_path):
    rows = "word,prompt\nlabel,prompt me\nprompt,what is a prompt?\n7,prompt\n"
    found = prompts(written(tmp_path, "a.csv", rows))
    assert found.texts == ["prompt me", "what is a prompt?", "prompt"]
    assert found.notes == []
    comma = prompts(written(tmp_path, "b.csv", "id,prompt,label\n1,How, so?,1\n2,Why?,0\n"))
    assert comma.texts == ["Why?"]  # the first cell of the row left out is its id, and no number of R's
    assert comma.notes[0].startswith("left out 1 row: row 2 has 4 cells but the header 3")
    with pytest.raises(InputError, match="no column for the prompt; it has 'How do I knit.'"):
        prompts(written(tmp_path, "c.csv", "How do I knit?\nHow do I sew?\n"))


LISTS = {
    "goals and targets": (
        {"goals": ["How?", "Why?"], "targets": ["So", "No"]},
        [("How?", "So"), ("Why?", "No")],
        None,
    ),
    "queries beside others": (
        {"queries": ["How?"], "refs": ["x"]},
        [("How?", None)],
        "lists of one length are read as columns: queries, refs",
    ),
    "an artefact": (
        {"parameters": {"model": "v", "method": "PAIR"}, "jailbreaks": [{"prompt": "How?"}]},
        [("How?", None)],
        "left out what stands beside the prompts: parameters",
    ),
    "a task": (
        {
            "Contributors": ["x"],
            "Definition": ["Answer."],
            "Instances": [{"input": "How?", "output": ["So"]}],
        },
        [("How?", "So")],
        "left out what stands beside the prompts: Contributors, Definition",
    ),
    "kinds": (
        {"harmful": ["How?"], "harmless": ["Why?"]},
        [("How?", None), ("Why?", None)],
        "2 lists of prompts are read one after the other, and their names as categories: harmful, harmless",
    ),
    "pages": (
        [[{"prompt": "How?"}, {"prompt": "Why?"}], [{"prompt": "Who?"}]],
        [("How?", None), ("Why?", None), ("Who?", None)],
        None,
    ),
    "roles as names": ([{"conversation": {"user": "How?", "assistant": "So"}}], [("How?", "So")], None),
    "turns nobody can read": (
        [{"instruction": "How?", "conversations": [{"q": "a"}]}],
        [("How?", None)],
        "'instruction' is read in its place",
    ),
    "an answer of no weight": (
        [
            {
                "messages": [
                    {"role": "user", "content": "How?"},
                    {"role": "assistant", "content": "So", "weight": 0},
                ]
            }
        ],
        [("How?", "So")],
        "1 conversation ends with an answer of weight 0",
    ),
    "pairs after other requests": (
        [
            {
                "chosen": [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So"}],
                "rejected": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "No"}],
            }
        ],
        [("How?", "So")],
        "1 pair differs before its last turn",
    ),
}


LISTS |= {
    "a first page": (
        {"data": [{"prompt": "How?"}], "total": 100, "has_more": True},
        [("How?", None)],
        "the file says total 100 and holds 1 record",
    ),
    "another count": (
        {"metadata": {"count": 2}, "examples": [{"input": "How?", "output": "So"}]},
        [("How?", "So")],
        "the file says metadata.count 2 and holds 1 record",
    ),
    "a cursor": ({"results": [{"prompt": "How?"}], "next": "x"}, [("How?", None)], "('next' names more)"),
    "its own count": ({"n": 1, "items": [{"prompt": "How?"}], "next": None}, [("How?", None)], None),
    "counts of something else": ({"n_shot": 5, "num_labels": 2, "prompts": ["How?"]}, [("How?", None)], None),
    "a word beside": (
        {"persona": "x", "prompts": ["How?"]},
        [("How?", None)],
        "left out what stands beside the prompts: persona",
    ),
    "a message": ({"message": "How?"}, [("How?", None)], "1 text is read as a prompt, by the keys message"),
    "kinds and parts": (
        {"harmful": {"train": ["a"], "test": ["b"]}, "harmless": {"train": ["c"]}},
        [("a", None), ("b", None), ("c", None)],
        "3 lists of prompts are read one after the other, and their names as categories: harmful/train,",
    ),
}


@pytest.mark.parametrize("case", LISTS)
def test_json_of_other_shapes_is_read_right_and_what_is_left_is_said(tmp_path, case):
    content, wanted, note = LISTS[case]
    found = prompts(written(tmp_path, "a.json", content))
    assert [(one.text, one.answer) for one in found] == wanted
    assert any(note in said for said in found.notes) if note else found.notes == []


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_rows_that_are_turns_of_a_group_are_one_conversation_each(tmp_path, name):
    rows = [
        ("c1", 0, "user", "How?"),
        ("c1", 1, "assistant", "So."),
        ("c1", 2, "user", "And then?"),
        ("c2", 0, "user", "Why?"),
        ("c2", 1, "assistant", "No."),
        ("c3", 0, "user", "Who?"),
        ("c3", 1, "user", "What?"),
    ]
    keys = ("conversation_id", "turn", "role", "content")
    records = [dict(zip(keys, row, strict=True)) for row in rows]
    table = "\n".join(",".join(map(str, row)) for row in (keys, *rows))
    lines = "\n".join(map(json.dumps, records))
    found = prompts(written(tmp_path, name, {"a.json": records, "a.jsonl": lines, "a.csv": table}[name]))
    assert [(one.text, len(one.turns), one.answer, one.group) for one in found] == [
        ("And then?", 3, None, "c1"),
        ("Why?", 1, "No.", "c2"),
        ("Who?", 1, None, "c3"),
        ("What?", 1, None, "c3"),
    ]
    assert found.notes[0].startswith("5 rows with a role each are turns of 2 conversations")


@pytest.mark.parametrize(
    "history",
    [
        [["a", "b"], ["c", "d"]],
        "[['a', 'b'], ['c', 'd']]",
        [
            {"role": "USER", "message": text} if place % 2 == 0 else {"role": "CHATBOT", "message": text}
            for place, text in enumerate("abcd")
        ],
    ],
)
def test_earlier_turns_of_a_row_come_before_its_request(history):
    (found,) = prompts([{"instruction": "e", "input": "f", "output": "g", "system": "s", "history": history}])
    assert [turn.content for turn in found.turns] == ["s", "a", "b", "c", "d", "e\n\nf"]
    assert [turn.role for turn in found.turns] == ["system", *["user", "assistant"] * 2, "user"]
    assert (found.text, found.answer) == ("e\n\nf", "g")


@pytest.mark.parametrize("chosen", ["So", [{"role": "assistant", "content": "So"}]])
def test_pairs_of_answers_without_their_request_are_refused_by_what_they_lack(chosen):
    with pytest.raises(InputError, match="'chosen' holds an answer without its request"):
        prompts([{"chosen": chosen, "rejected": chosen}])


@pytest.mark.parametrize(
    "beside", [{"prompts": ["How?", "Why?"]}, {"prompts": ["How?", "Why?"], "targets": ["So", "No"]}]
)
def test_the_system_prompt_of_a_list_is_that_of_its_prompts(tmp_path, beside):
    found = prompts(written(tmp_path, "a.json", {"system_prompt": "Be brief.", **beside}))
    assert [[turn.content for turn in one.turns] for one in found] == [
        ["Be brief.", "How?"],
        ["Be brief.", "Why?"],
    ]
    assert "'system_prompt' is the system prompt of 2 rows (first: row 0)" in found.notes


def test_turns_are_put_in_the_order_of_their_numbers():
    said = (
        ("2", "user", "And?"),
        ("10", "assistant", "No."),
        ("0", "user", "How?"),
        ("1", "assistant", "So."),
    )
    keys = ("turn", "role", "content")
    (found,) = prompts([{"thread_id": "t", **dict(zip(keys, one, strict=True))} for one in said])
    assert [turn.content for turn in found.turns] == ["How?", "So.", "And?"]
    assert found.answer == "No."


def test_what_is_no_history_is_left_aside():
    found = prompts([{"prompt": "a", "history": [["b", "c", "d"]]}, {"prompt": "e", "history": []}])
    assert [len(one.turns) for one in found] == [1, 1]
    assert "lists and objects are left aside: 'history'" in found.notes


REFUSED = {
    "parts under longer names": (
        "a.json",
        {"train_sft": [{"prompt": "a"}], "test_sft": [{"prompt": "b"}]},
        "2 parts",
    ),
    "an error in JSON": (
        "a.json",
        {"error": "Entry not found", "code": "404"},
        "what a server says of an error",
    ),
    "an error in words": ("a.csv", "404: Not Found", "what a server says of an error"),
    "an error as text": ("a.txt", "Invalid username or password.", "what a server says of an error"),
    "XML": (
        "a.txt",
        '<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        "a page of the web or XML",
    ),
    "a page behind a comment": (
        "a.txt",
        "<!-- x -->\n<!doctype html><html></html>",
        "a page of the web or XML",
    ),
    "a document": ("a.txt", "{\\rtf1 How?}", "an RTF document"),
    "a table of psql as text": ("a.txt", " id | prompt \n----+----\n 1 | a\n", "is the header of a table"),
    "a table of Markdown as text": (
        "a.txt",
        "| id | prompt |\n|---|---|\n| 1 | a |\n",
        "is the header of a table",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_list_of_prompts_is_refused(tmp_path, case):
    name, content, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        prompts(written(tmp_path, name, content))


NOTED = {
    "a comment": ("# mine\na\n", "line 1, '# mine', looks like a comment"),
    "a table with unknown names": (
        "Nummer;Frage\n1;Wie?\n2;Wo?\n",
        "';' stands in every line 1 time, as in a table",
    ),
    "a merge": ("a\n<<<<<<< HEAD\nb\n=======\nc\n>>>>>>> x\n", "two versions of lines from line 2 on"),
}


@pytest.mark.parametrize("case", NOTED)
def test_lines_that_look_like_something_else_are_said(tmp_path, case):
    content, note = NOTED[case]
    found = prompts(written(tmp_path, "a.txt", content))
    assert len(found) == content.count("\n")
    assert any(note in said for said in found.notes)


@pytest.mark.parametrize(
    ("text", "written_in", "named"),
    [
        ("Wie heißt der Käse?", "cp1252", "WINDOWS-1252"),
        ("怎么做一个蛋糕?", "gb18030", "GB18030"),
        ("ケーキの作り方は?", "shift_jis", "SHIFT_JIS"),
        ("Как испечь торт?", "cp1251", "WINDOWS-1251"),
        ("Why?", "utf-16-le", "UTF-16LE"),
        ("Why?", "utf-16-be", "UTF-16BE"),
    ],
)
def test_the_encoding_that_is_named_is_one_that_may_be_meant(tmp_path, text, written_in, named):
    path = tmp_path / "a.csv"
    path.write_bytes(f"prompt\n{text}\n".encode(written_in))
    with pytest.raises(InputError, match=named) as error:
        prompts(path)
    assert ("WINDOWS-1252" in str(error.value)) == (named == "WINDOWS-1252")
