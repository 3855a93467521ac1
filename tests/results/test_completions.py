import json
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safety_neurons.errors import InputError, RunError
from safety_neurons.prompt_lists import Message, Prompt
from safety_neurons.results import Completion, Completions, conversation_of

texts = st.text(alphabet=st.characters(codec="utf-8"), max_size=20)
some = st.lists(
    st.tuples(
        texts,
        texts,
        texts,
        st.lists(st.integers(0, 10**6), max_size=4).map(tuple),
        st.sampled_from(["stop", "length"]),
        st.sampled_from(["untreated", "patched"]),
        st.integers(0, 9),
    ),
    min_size=1,
    max_size=5,
)


@given(some)
def test_saving_and_loading_gives_the_same_completions(tmp_path_factory, fields):
    items = [Completion(*entry) for entry in fields]
    path = tmp_path_factory.mktemp("completions") / "c.jsonl"
    Completions(items).save(path)
    assert Completions.load(path) == Completions(items)
    Completions(items).append(path)
    assert Completions.load(path) == Completions(items + items)


def test_half_a_surrogate_pair_is_no_text_and_is_never_written(tmp_path):
    path = tmp_path / "c.jsonl"
    Completions([Completion("0", "a \ud83d b", "\ud83d\ude00 \udc00")]).save(path)
    found = Completions.load(path)[0]
    assert (found.prompt, found.completion) == ("a \ufffd b", "\U0001f600 \ufffd")


BAD_FIELDS = {
    "negative ids": '"token_ids": [1, -1]',
    "ids as text": '"token_ids": ["1"]',
    "ids as floats": '"token_ids": [1.5]',
    "ids beyond 31 bits": '"token_ids": [4294967296]',
    "huge ids": '"token_ids": [1' + "0" * 400 + "]",
    "true as id": '"token_ids": [true]',
    "ids no list": '"token_ids": {"1": 2}',
    "seed as text": '"seed": "7"',
    "endless seed": '"seed": Infinity',
    "arm as number": '"arm": 3',
    "meta as list": '"meta": [1]',
    "truth as text": '"meta": {"thinking": "false"}',
    "a conversation as text": '"meta": {"messages": "hi"}',
    "verdicts as text": '"verdicts": "refused"',
    "deep meta": '"meta": ' + '{"a":' * 5000 + "1" + "}" * 5000,
    "a name twice": '"arm": "a", "arm": "b"',
    "half a pair": '"arm": "\\ud83d"',
}


@pytest.mark.parametrize("case", BAD_FIELDS)
@pytest.mark.parametrize("last", [False, True])
def test_a_record_of_other_types_is_refused_by_its_line_wherever_it_stands(tmp_path, case, last):
    path = tmp_path / "c.jsonl"
    good = '{"prompt": "p", "completion": "c"}\n'
    path.write_text(
        good + '{"prompt": "p", "completion": "c", ' + BAD_FIELDS[case] + "}" + ("" if last else "\n" + good)
    )
    with pytest.raises(InputError, match="line 2 of .* is not a completion"):
        Completions.load(path)


def test_the_conversation_travels_with_its_answer(tmp_path):
    turns = (
        Message("system", "s"),
        Message("user", "Hello"),
        Message("assistant", "Hi"),
        Message("user", "And now?"),
    )
    prompt = Prompt("0", "And now?", turns)
    path = tmp_path / "c.jsonl"
    Completions([Completion("0", prompt.text, "Bye", meta=conversation_of(prompt))]).save(path)
    found = Completions.load(path)[0]
    assert found.turns == turns
    assert found.answers(prompt)
    assert not found.answers(Prompt("0", "And now?", turns[1:]))
    assert Completion("1", "Hello", "Hi").turns == (Message("user", "Hello"),)


def test_a_file_cut_anywhere_gives_all_whole_lines_and_counts_the_cut_one(tmp_path):
    path = tmp_path / "c.jsonl"
    items = Completions(Completion(str(number), "é\u2028", "answer", (1, 2)) for number in range(3))
    items.save(path)
    whole = path.read_bytes()
    for end in range(1, len(whole)):
        path.write_bytes(whole[:end])
        loaded = Completions.load(path)
        finished = whole[:end].count(b"\n")
        assert loaded[:finished] == items[:finished]
        assert len(loaded) - finished + loaded.dropped == (0 if whole[:end].endswith(b"\n") else 1)


def test_appending_after_a_kill_cuts_the_unfinished_line_and_goes_on(tmp_path):
    path = tmp_path / "c.jsonl"
    items = Completions(Completion(str(number), "p", "answer") for number in range(3))
    items[:1].save(path)
    for end in (b"", b'{"prompt_id": "1", "pro', b'{"a'):
        items[:1].save(path)
        with path.open("ab") as stream:
            stream.write(end)
        items[1:].append(path)
        assert Completions.load(path) == items
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    items[:1].append(path)
    assert len(Completions.load(path)) == 4


def test_a_bad_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text(
        '{"prompt": "p", "completion": "a"}\n{"prompt": "p"\n{"prompt": "p", "completion": "a"}\n'
    )
    with pytest.raises(InputError, match="line 2"):
        Completions.load(path)


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "3",
        '{"prompt": "p"}',
        '{"completion": 3, "prompt": "p"}',
        '{"prompt": "p", "completion": "a", "finish_reason": "eos"}',
        "x",
    ],
)
def test_a_line_that_is_no_completion_is_refused(tmp_path, line):
    (tmp_path / "c.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match="line 1"):
        Completions.load(tmp_path / "c.jsonl")


@pytest.mark.parametrize(
    "content", [b"", b"\n\n", b"\xff\xfe\x00\n", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_empty_foreign_and_pointer_files_are_refused(tmp_path, content):
    (tmp_path / "c.jsonl").write_bytes(content)
    with pytest.raises(InputError, match="expected"):
        Completions.load(tmp_path / "c.jsonl")


def test_byte_order_mark_line_ends_of_windows_and_missing_fields_are_taken(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(
        b'\xef\xbb\xbf{"prompt": "p", "completion": "a"}\r\n{"prompt": "q", "completion": "b"}\r\n'
    )
    loaded = Completions.load(tmp_path / "c.jsonl")
    assert [item.prompt_id for item in loaded] == ["0", "1"]
    assert loaded[0].arm == "untreated"


def test_each_line_has_the_fields_that_others_read(tmp_path):
    Completions([Completion("1", "p", "a", (3,), "length", "patched", 2)]).save(tmp_path / "c.jsonl")
    record = json.loads((tmp_path / "c.jsonl").read_text())
    assert record.pop("token_ids") == [3]
    assert record.pop("finish_reason") == "length"
    assert record == {
        "prompt_id": "1",
        "prompt": "p",
        "completion": "a",
        "arm": "patched",
        "seed": 2,
        "verdicts": {},
    }


def test_arms_prompts_and_slices_are_completions_too():
    items = Completions(
        [Completion("1", "p", "a"), Completion("2", "q", "b"), Completion("1", "p", "c", arm="patched")]
    )
    assert items.arms == ("untreated", "patched")
    assert [item.completion for item in items.arm("patched")] == ["c"]
    assert [item.completion for item in items.by_id("1")] == ["a", "c"]
    assert len(items.arm("other")) == 0
    assert items[:2] + items[2:] == items


def test_verdicts_are_added_beside_others_and_the_original_stays():
    items = Completions([Completion("1", "p", "a", verdicts={"x": 1})])
    marked = items.with_verdicts("judge", [{"refused": True}])
    assert marked[0].verdicts == {"x": 1, "judge": {"refused": True}}
    assert items[0].verdicts == {"x": 1}
    with pytest.raises(InputError, match="0 verdicts for 1"):
        items.with_verdicts("judge", [])


def test_a_place_that_cannot_be_written_is_a_run_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        Completions([Completion("1", "p", "a")]).append(tmp_path / "file" / "c.jsonl")
    with pytest.raises(InputError, match="cannot read"):
        Completions.load(pathlib.Path(tmp_path / "nowhere.jsonl"))


RECORD = '{"prompt": "p", "completion": "c"'


@pytest.mark.parametrize(
    "content",
    [
        f"{RECORD}}}\r{RECORD}}}\r".encode(),
        f"{RECORD}}} {RECORD}}}".encode(),
        b"hello",
        f"{RECORD}}}\nhello".encode(),
        '{"prompt": "p", "completion": "caf\u00e9"}'.encode("latin-1"),
    ],
    ids=["old Macs", "two in a line", "a text", "a text behind records", "latin"],
)
def test_only_the_beginning_of_a_record_is_a_cut_line(tmp_path, content):
    path = tmp_path / "completions.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is not a completion"):
        Completions.load(path)
    Completions([Completion("0", "p", "c")]).append(path)
    assert path.read_bytes().startswith(content)


@pytest.mark.parametrize("end", [1, 20, len(f'{RECORD}, "é'.encode()) - 1])
def test_a_cut_line_is_counted_wherever_the_cut_is(tmp_path, end):
    path = tmp_path / "completions.jsonl"
    path.write_bytes(f"{RECORD}}}\n".encode() + f'{RECORD}, "é'.encode()[:end])
    found = Completions.load(path)
    assert (len(found), found.dropped) == (1, 1)


def test_zeros_in_the_place_of_a_line_are_a_cut_line(tmp_path):
    path = tmp_path / "completions.jsonl"
    path.write_bytes(f"{RECORD}}}\n".encode() + bytes(50))
    found = Completions.load(path)
    assert (len(found), found.dropped) == (1, 1)
    Completions([Completion("1", "p", "d")]).append(path)
    assert [(one.completion, found.dropped) for one in Completions.load(path)] == [("c", 1), ("d", 1)]
    assert Completions.load(path).dropped == 0


def test_completions_without_an_id_are_told_apart_by_their_line(tmp_path):
    path = tmp_path / "completions.jsonl"
    path.write_text(f'{RECORD}, "prompt_id": null}}\n{RECORD}}}\n')
    assert [one.prompt_id for one in Completions.load(path)] == ["0", "1"]


@pytest.mark.parametrize(
    "turn",
    [{"from": "human", "value": "x"}, {"role": "user", "content": [{"type": "text", "text": "x"}]}, "x"],
)
def test_a_conversation_that_is_not_of_role_and_text_is_refused_when_it_is_read(tmp_path, turn):
    path = tmp_path / "completions.jsonl"
    path.write_text(f'{RECORD}, "meta": {{"messages": [{json.dumps(turn)}]}}}}\n')
    with pytest.raises(InputError, match="line 1 .*'role' and 'content'"):
        Completions.load(path)
