import contextlib
import gzip
import importlib.util
import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import safety_neurons
from safety_neurons.errors import InputError, UsageError
from safety_neurons.prompt_lists import Message, Prompt, Prompts, prompts, readers
from safety_neurons.results.run import contents_of

RECORDS = [
    {"prompt": "How do I knit?", "response": "With two needles."},
    {"prompt": "How do I sew?", "response": "With one."},
]
TEXTS = [record["prompt"] for record in RECORDS]


def lines(records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def table(separator: str) -> str:
    return (
        "\n".join([separator.join(RECORDS[0]), *(separator.join(record.values()) for record in RECORDS)])
        + "\n"
    )


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        data = content if isinstance(content, bytes) else content.encode()
        path.write_bytes(
            gzip.compress(data) if name.endswith(".gz") and not isinstance(content, bytes) else data
        )
        return path

    return write


SHAPES = {
    "a.jsonl": lines(RECORDS),
    "a.json": json.dumps(RECORDS, indent=1),
    "a.csv": table(","),
    "a.tsv": table("\t"),
    "a.jsonl.gz": lines(RECORDS),
    "a.json.gz": json.dumps(RECORDS),
    "a.csv.gz": table(","),
    "columns.json": json.dumps({"prompt": TEXTS, "response": [record["response"] for record in RECORDS]}),
    "pandas.json": json.dumps(
        {key: {str(n): record[key] for n, record in enumerate(RECORDS)} for key in RECORDS[0]}
    ),
    "wrapped.json": json.dumps({"data": RECORDS}),
    "by_id.json": json.dumps({"x1": RECORDS[0], "x2": RECORDS[1]}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_gives_the_same_prompts_and_answers(write, name):
    found = prompts(write(name, SHAPES[name]))
    assert found.texts == TEXTS
    assert found.answers == ["With two needles.", "With one."]
    assert found.notes == []


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_text_files_hold_one_prompt_a_line(write, name):
    found = prompts(write(name, "first\r\n\nsecond line\u2028still second\nthird"))
    assert found.texts == ["first", "second line\u2028still second", "third"]
    assert found.notes == ["dropped 1 empty prompt (first: row 1)"]
    assert [prompt.id for prompt in found] == ["0", "2", "3"]


def test_a_path_may_be_text_or_a_path(write):
    path = write("a.jsonl", lines(RECORDS))
    assert prompts(str(path)) == prompts(path)
    assert prompts(path).name == "a.jsonl"


def test_columns_are_found_in_a_fixed_order_and_any_case(write):
    assert prompts(write("a.csv", "text,goal\nlong,short\n")).texts == ["short"]
    assert prompts(write("b.csv", "Prompt,x\nhello,1\n")).texts == ["hello"]
    assert prompts(write("c.csv", "x,forbidden_prompt\n1,hello\n")).texts == ["hello"]


def test_a_named_column_wins(write):
    path = write("a.csv", "prompt,de,target\nhello,hallo,ja\n")
    found = prompts(path, column="de", answer_column="target")
    assert (found[0].text, found[0].answer) == ("hallo", "ja")


def test_limit_keeps_the_first(write):
    assert prompts(write("a.jsonl", lines(RECORDS)), limit=1).texts == TEXTS[:1]
    with pytest.raises(UsageError, match="at least 1"):
        prompts(["a"], limit=0)


def test_an_alpaca_input_is_joined_to_its_instruction(write):
    rows = [
        {"instruction": "Translate.", "input": "Guten Tag", "output": "Good day"},
        {"instruction": "Sing.", "input": "", "output": "La"},
    ]
    found = prompts(write("a.json", json.dumps(rows)))
    assert found.texts == ["Translate.\n\nGuten Tag", "Sing."]
    assert found.answers == ["Good day", "La"]


def test_a_context_comes_before_its_behaviour(write):
    found = prompts(
        write(
            "a.csv",
            (
                'Behavior,ContextString,SemanticCategory,BehaviorID\nSum it up,"A '
                'long\r\ntext",copyright,sum_it\n'
            ),
        )
    )
    assert found[0] == Prompt("sum_it", "A long\r\ntext\n\n---\n\nSum it up", category="copyright")


def test_category_language_and_other_fields_are_kept(write):
    found = prompts(
        write(
            "a.jsonl",
            lines(
                [
                    {
                        "id": 7,
                        "prompt": "x",
                        "category": "fraud",
                        "language": "de",
                        "label": "unsafe",
                        "n": None,
                    }
                ]
            ),
        )
    )
    assert found[0] == Prompt("7", "x", category="fraud", language="de", meta={"label": "unsafe"})


def test_messages_give_turns_and_the_last_answer():
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
        {"role": "assistant", "content": "Bye"},
    ]
    found = prompts([{"messages": turns}])
    assert found[0].text == "And now?"
    assert [turn.role for turn in found[0].messages] == ["system", "user", "assistant", "user"]
    assert found[0].messages[3] == Message("user", "And now?")
    assert found[0].answer == "Bye"


def test_one_user_turn_is_a_plain_prompt():
    assert prompts([{"messages": [{"role": "user", "content": "Hello"}]}])[0].messages == ()


def test_sharegpt_conversations_and_preference_pairs_are_read():
    row = {
        "conversations": [{"from": "human", "value": "Hello"}],
        "chosen": {"from": "gpt", "value": "Hi"},
        "rejected": {"from": "gpt", "value": "No"},
    }
    found = prompts([{**row, "system": "Be kind."}])
    assert found[0].messages == (Message("system", "Be kind."), Message("user", "Hello"))
    assert found[0].answer == "Hi"


def test_a_prompt_column_may_hold_turns_and_chosen_a_conversation():
    turns = [{"role": "user", "content": "Hello"}]
    found = prompts(
        [
            {"prompt": turns, "chosen": [{"role": "assistant", "content": "Hi"}]},
            {"prompt": "Hey", "chosen": [*turns, {"role": "assistant", "content": "Ho"}]},
        ]
    )
    assert found.texts == ["Hello", "Hey"]
    assert found.answers == ["Hi", "Ho"]


def test_transcripts_become_turns_and_irregular_ones_are_counted(write):
    rows = [
        {
            "chosen": "\n\nHuman: One?\n\nAssistant: Yes.\n\nMore.\n\nHuman: Two?\n\nAssistant: No.",
            "rejected": "\n\nHuman: One?\n\nAssistant: x",
        },
        {"chosen": "\n\nHuman: Three?\n\nAssistant:", "rejected": "\n\nHuman: Three?\n\nAssistant: x"},
        {
            "chosen": "\n\nHuman: Four\n\nHuman: five?\n\nAssistant: Six.",
            "rejected": "\n\nHuman: Four\n\nHuman: five?\n\nAssistant: x",
        },
    ]
    found = prompts(write("a.jsonl", lines(rows)))
    assert found.texts == ["Two?", "Three?", "Four\n\nfive?"]
    assert found[0].messages == (
        Message("user", "One?"),
        Message("assistant", "Yes.\n\nMore."),
        Message("user", "Two?"),
    )
    assert found.answers == ["No.", None, "Six."]
    assert found.notes == [
        "joined 1 turn to the turn of the same role before it (first: row 2)",
        "1 conversation ends with an empty answer, taken as no answer (first: row 1)",
        "1 pair differs before its last turn; the chosen side is read (first: row 0)",
    ]


def test_nested_categories_become_the_category(write):
    found = prompts(write("a.json", json.dumps({"fraud": ["a", "b"], "weapons": {"guns": ["c"]}})))
    assert [(prompt.text, prompt.category) for prompt in found] == [
        ("a", "fraud"),
        ("b", "fraud"),
        ("c", "weapons/guns"),
    ]


def test_lists_in_memory_are_taken_as_they_are():
    ready = Prompts.from_list(["a"])
    assert prompts(ready) is ready
    assert prompts(["a", "b"]).texts == ["a", "b"]
    assert prompts([Prompt("x", "a")])[0].id == "x"
    assert prompts([{"goal": "a"}]).texts == ["a"]
    assert prompts({"goal": ["a", "b"], "target": ["c", "d"]}).answers == ["c", "d"]


def test_no_import_takes_the_place_of_the_public_function():
    importlib.import_module("safety_neurons.prompt_lists.readers")
    assert safety_neurons.prompts(["a"]).texts == ["a"]
    assert importlib.util.find_spec("safety_neurons.prompts") is None


# What is repaired or counted


def test_a_byte_order_mark_and_the_line_ends_of_rows_disappear_and_those_in_cells_stay(write):
    found = prompts(write("a.csv", b'\xef\xbb\xbfprompt,x\r\n"two\r\nlines",1\r\nplain,2\r\n'))
    assert found.texts == ["two\r\nlines", "plain"]


def test_json_lines_named_json_are_read_and_said(write):
    found = prompts(write("a.json", lines(RECORDS)))
    assert found.texts == TEXTS
    assert found.notes == ["named .json but holds JSON Lines; read as such"]


def test_a_json_array_named_jsonl_is_read_and_said(write):
    found = prompts(write("a.jsonl", json.dumps(RECORDS, indent=2)))
    assert found.texts == TEXTS
    assert found.notes == ["named .jsonl but holds one JSON array; read as such"]


def test_empty_and_null_prompts_are_dropped_and_counted(write):
    found = prompts(
        write("a.jsonl", '{"prompt": null}\n{"prompt": "  "}\n{"prompt": NaN}\n{"x": 1}\n{"prompt": "a"}\n')
    )
    assert found.texts == ["a"]
    assert found.notes == [
        "dropped 3 empty prompts (first: row 0)",
        "left out 1 row: no known column for the prompt (first: row 3)",
    ]


def test_duplicates_are_kept_and_counted(write):
    found = prompts(write("a.txt", "same\nother\nsame\nsame \n"))
    assert len(found) == 4
    assert found.notes == ["1 duplicate prompt, kept"]


def test_ids_that_occur_twice_are_numbered(write):
    found = prompts(write("a.csv", "id,prompt\nx,one\nx,two\n"))
    assert [prompt.id for prompt in found] == ["x", "x#2"]
    assert found.notes == ["1 ids occur more than once; numbered with #2, #3, …"]


def test_targets_taken_as_prompts_are_noticed(write):
    rows = "goal,target\n" + "".join(f'do {n},"Sure, here is how to do {n}"\n' for n in range(8))
    path = write("a.csv", rows)
    assert "8 of 8 prompts begin like an answer" in prompts(path, column="target").notes[0]
    assert "8 of 8 answers begin like compliance" in prompts(path).notes[0]


def test_a_huge_cell_is_read_and_the_process_wide_limit_stays(write):
    import csv

    before = csv.field_size_limit()
    found = prompts(write("a.csv", "prompt\n" + "x" * (before + 10) + "\n"))
    assert len(found[0].text) == before + 10
    assert csv.field_size_limit() == before


def test_another_separator_is_noticed(write):
    found = prompts(write("a.csv", "prompt;label\nhello, you;1\n"))
    assert found.texts == ["hello, you"]
    assert found.notes == ["cells are separated by ';'; read so"]


def test_short_rows_and_loose_quotation_marks_are_counted(write):
    found = prompts(write("a.csv", 'prompt,label\nhello\n"say" it,1\n'))
    assert found.texts == ["hello", '"say" it']
    assert found.notes == [
        "loose quotation marks from line 3 on; read as they stand",
        "1 row has fewer cells than the header; the missing ones are empty",
    ]


def test_half_surrogate_pairs_are_replaced_and_counted(write):
    found = prompts(write("a.jsonl", '{"prompt": "a \\ud83d b"}\n'))
    assert found.texts == ["a \ufffd b"]
    assert found.notes == ["replaced broken characters (half surrogate pairs) in 1 text (first: row 0)"]


def test_a_table_without_header_is_read_by_the_number_of_a_column(write):
    found = prompts(write("a.csv", "7,How do I knit?\n8,How do I sew?\n"), column="2")
    assert found.texts == TEXTS
    assert found.notes == ["no header row; columns taken by their number, counted from 1"]


# What is refused

BAD = {
    "empty": ("a.jsonl", b"", "the file is empty"),
    "blank": ("a.txt", b"\n \r\n", "the file is empty"),
    "only a mark": ("a.txt", b"\xef\xbb\xbf", "the file is empty"),
    "empty gzip": ("a.txt.gz", b"", "the file is empty"),
    "header only": ("a.csv", b"prompt,label\n", "no rows"),
    "empty list": ("a.json", b"[]", "no rows"),
    "all empty": ("a.csv", b"prompt,label\n,1\n,2\n", "empty in all 2 rows"),
    "wrong columns": (
        "a.csv",
        b"frage,label\nx,1\n",
        "it has 'frage', 'label'; expected one of prompt, goal.*column",
    ),
    "no header": (
        "a.csv",
        b"How do I knit a scarf,With two needles\nHow do I sew,With one\n",
        "for a file without a header .* column 1",
    ),
    "git lfs": (
        "a.jsonl.gz",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "a Git LFS pointer of 64 bytes.*git lfs pull",
    ),
    "latin 1": (
        "a.txt",
        "one\ntwo caf\u00e9 \n".encode("latin-1"),
        r"not UTF-8 at byte 11 \(0xe9, line 2\).*iconv",
    ),
    "half of utf 16": ("a.csv", b"\xff\xfep\x00r\x00o", "begins like UTF-16 text and is not"),
    "nul": ("a.txt", b"one\x00two", "a NUL byte at byte 3"),
    "cut gzip": (
        "a.txt.gz",
        gzip.compress(b"hello world, hello you" * 50)[:-12],
        "cut off or damaged.*download it again",
    ),
    "not gzip": ("a.txt.gz", b"hello", "not gzip data"),
    "gzip unnamed": ("a.txt", gzip.compress(b"hello"), "the content is gzip data"),
    "workbook": ("a.csv", b"PK\x03\x04rest", "a zip archive"),
    "parquet": ("a.parquet", b"PAR1", "says no known format; expected .jsonl"),
    "no ending": ("prompts", b"hello", "says no known format"),
    "bad line": ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n{"prompt": "c"}\n', "line 2 is not JSON"),
    "cut line": ("a.jsonl", b'{"prompt": "a"}\n{"prom', "the last line may be cut off"),
    "cut json": ("a.json", b'[{"prompt": "a"},', "not JSON at line 1"),
    "deep json": ("a.json", b"[" * 200_000, "nested too deeply|not JSON"),
    "deep line": ("a.jsonl", b'{"prompt": ' + b"[" * 200_000, "line 1 is not JSON"),
    "long number": (
        "a.json",
        b'[{"prompt": ' + b"9" * 5000 + b"}]",
        "row 0: record 1 is JSON that cannot be read .a whole number of 5000 digits.",
    ),
    "a number": ("a.json", b"3", "the JSON document is a int"),
    "numbers": ("a.json", b"[1, 2]", "record 1 is a int"),
    "uneven columns": ("a.json", b'{"goal": ["a"], "target": ["b", "c"]}', "goal 1, target 2"),
    "odd values": ("a.json", b'{"fraud": 3}', "'fraud' holds a int"),
    "extra cells": (
        "a.csv",
        b"prompt,label\nplease, do it,1\n",
        "row 2 has 3 cells but the header 2.*put quotes",
    ),
    "open quote": ("a.csv", b'prompt,label\n"hello,1\nyou,2\n', "never closed"),
    "double header": ("a.csv", b"prompt,prompt\na,b\n", "names prompt more than once"),
    "numbers as prompts": ("a.json", b'[{"prompt": 3}]', "row 0: the column 'prompt' holds a int"),
    "unknown role": (
        "a.json",
        b'[{"messages": [{"role": "king", "content": "x"}]}]',
        "turn 1 has role 'king'",
    ),
    "no content": (
        "a.json",
        b'[{"messages": [{"role": "user", "content": null}]}]',
        "the column 'messages' is empty in all 1 rows",
    ),
}


@pytest.mark.parametrize("first", ['sep="', '"sep="', '"sep="";"', "sep=", "sep=;;"])
def test_a_separator_that_is_none_is_a_line_like_others(write, first):
    path = write("a.csv", f"{first}\nprompt\nhow do i knit\n".encode())
    with contextlib.suppress(InputError):
        assert prompts(path)


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_in_one_line_that_names_the_file(write, case):
    name, content, message = BAD[case]
    path = write(name, content)
    with pytest.raises(InputError, match=message) as caught:
        prompts(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_named_column_that_is_absent_lists_those_there_are(write):
    path = write("a.csv", "en,de\nhello,hallo\n")
    with pytest.raises(InputError, match="no column 'fr'; it has 'en', 'de'; name one of them with column"):
        prompts(path, column="fr")
    with pytest.raises(
        InputError, match="no column 'answer'; it has 'en', 'de'; name one of them with answer_column"
    ):
        prompts(path, column="en", answer_column="answer")


def test_a_missing_file_suggests_the_one_that_was_meant(write):
    path = write("behaviors.csv", table(","))
    with pytest.raises(InputError, match=r"no such file.*did you mean .*behaviors\.csv\?"):
        prompts(path.with_name("behaviours.csv"))
    with pytest.raises(InputError, match="its folder .* does not exist either"):
        prompts(path.parent / "nowhere" / "a.csv")


def test_a_folder_is_refused_with_the_files_in_it(write):
    path = write("behaviors.csv", table(","))
    with pytest.raises(InputError, match=r"a folder, expected a file; it holds behaviors\.csv"):
        prompts(path.parent)


def test_what_has_no_end_is_refused_before_it_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zeros.txt").symlink_to("/dev/zero")
    for name in ("pipe.jsonl", "zeros.txt"):
        with pytest.raises(InputError, match="a pipe or a device; expected a file that can be read twice"):
            prompts(tmp_path / name)
        with pytest.raises(InputError, match="a pipe or a device; expected a file that can be read twice"):
            contents_of(tmp_path / name)


def test_a_question_as_source_is_refused_with_advice():
    with pytest.raises(InputError, match="no such file"):
        prompts("How do I knit?")
    with pytest.raises(InputError, match=r"for prompts in memory pass a list"):
        prompts("How do I knit?\nAnd sew?")


@pytest.mark.parametrize("source", [{"a": 1}, b"bytes", [1], [["a"]]])
def test_other_things_in_memory_are_refused(source):
    with pytest.raises(InputError, match="expected"):
        prompts(source)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    suffix=st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".txt"]),
    parts=st.lists(
        st.sampled_from(
            [
                '{"prompt":',
                '"a"',
                "}",
                "[",
                "]",
                ",",
                "\n",
                "\r",
                '"',
                "prompt",
                "messages",
                "é",
                ":",
                " ",
                "1e9",
                "\t",
                "null",
            ]
        ),
        max_size=12,
    ),
)
def test_any_content_gives_prompts_or_one_line_of_advice(tmp_path, suffix, parts):
    path = tmp_path / f"a{suffix}"
    path.write_text("".join(parts), encoding="utf-8", newline="")
    advice = ""
    try:
        texts = prompts(path).texts
    except InputError as error:
        texts, advice = [], str(error)
    assert all(text.strip() for text in texts)
    assert bool(texts) != (str(path) in advice)
    assert "\n" not in advice


def test_an_empty_list_is_refused():
    with pytest.raises(InputError, match="expected at least one prompt"):
        prompts([])


def test_a_file_that_unpacks_to_far_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LARGEST", 1 << 20)
    path = tmp_path / "bomb.txt.gz"
    path.write_bytes(gzip.compress(b"a\n" * (1 << 20)))
    with pytest.raises(InputError, match="unpacks to more than 1 MiB"):
        prompts(path)
