import hashlib

import numpy as np
import pytest

from safety_neurons.prompt_lists import (
    Message,
    Prompt,
    Prompts,
    hanging_together,
    normalised,
    request_of,
)


def test_a_list_of_texts_becomes_prompts_in_order():
    found = Prompts.from_list(["one", "two", "three"])
    assert found.texts == ["one", "two", "three"]
    assert [prompt.id for prompt in found] == ["0", "1", "2"]


def test_a_slice_is_prompts_again_and_keeps_name_and_notes():
    found = Prompts([Prompt(str(n), f"text {n}") for n in range(5)], "file.csv", ["dropped 1"])[1:3]
    assert isinstance(found, Prompts)
    assert (found.texts, found.name, found.notes) == (["text 1", "text 2"], "file.csv", ["dropped 1"])


@pytest.mark.parametrize(
    "other",
    [
        "a caf\u00e9\n",
        " a caf\u00e9",
        "a  caf\u00e9",
        "a cafe\u0301",
        "A caf\u00e9",
        "a\tcaf\u00e9",
        "a caf\u00e9\r\n",
    ],
)
def test_the_hash_knows_every_character_and_the_order(other):
    base = Prompts.from_list(["a caf\u00e9", "b"])
    assert Prompts.from_list([other, "b"]).sha256 != base.sha256
    assert Prompts.from_list(["b", "a caf\u00e9"]).sha256 != base.sha256
    assert Prompts.from_list(["a caf\u00e9", "b"]).sha256 == base.sha256


def test_the_hash_of_plain_lines_is_the_one_that_older_files_hold():
    line = hashlib.sha256(b"user\x1eHow do I knit?").hexdigest()
    assert Prompts.from_list(["How do I knit?"]).sha256 == hashlib.sha256(line.encode()).hexdigest()


def test_no_text_passes_for_a_border_between_turns():
    two = Prompt("0", "b", (Message("user", "a"), Message("assistant", "x"), Message("user", "b")))
    assert Prompt("0", "a\x1fassistant\x1ex\x1fuser\x1eb").sha256 != two.sha256


def test_the_request_of_a_conversation_is_its_last_user_turn():
    turns = [
        Message("system", "s"),
        Message("user", "Hello"),
        Message("assistant", "Hi"),
        Message("user", "Make a lamp"),
        Message("tool", "9"),
    ]
    assert request_of(turns) == "Make a lamp"
    assert request_of(turns[:1]) == ""
    asked = Prompts([Prompt("0", request_of(turns), tuple(turns))])
    assert asked.overlap(Prompts.from_list(["make a  lamp"])) == 1
    assert asked.overlap(Prompts.from_list(["Hello"])) == 0


def test_the_hash_knows_a_system_message_and_turn_borders():
    plain = Prompt("0", "hello")
    assert Prompt("0", "hello", (Message("user", "hello"),)).sha256 == plain.sha256
    assert (
        Prompt("0", "hello", (Message("system", "be kind"), Message("user", "hello"))).sha256 != plain.sha256
    )
    assert Prompts.from_list(["a", "b"]).sha256 != Prompts.from_list(["a b"]).sha256


def test_overlap_counts_prompts_whatever_their_case_and_spaces():
    ours, theirs = (
        Prompts.from_list(["Make a  lamp", "Bake bread", "Sing"]),
        Prompts.from_list(["make a lamp", "Dance", "SING"]),
    )
    assert ours.overlap(theirs) == 2
    assert ours.overlap(theirs.digests) == 2
    assert ours.overlap([]) == 0


def test_overlap_ignores_the_system_message():
    asked = Prompts([Prompt("0", "hello", (Message("system", "be kind"), Message("user", "Hello")))])
    assert asked.overlap(Prompts.from_list(["hello"])) == 1


def test_half_a_surrogate_pair_can_be_hashed():
    assert len(Prompt("0", "a \ud83d b").sha256) == 64


def test_equal_lists_are_equal_and_prompts_add_up():
    one, two = Prompts.from_list(["a"]), Prompts.from_list(["a"], "other")
    assert one == two
    assert hash(one) == hash(two)
    assert (one + Prompts.from_list(["b"])).texts == ["a", "b"]
    with pytest.raises(TypeError):
        one + ["b"]


def test_normalised_text_has_single_spaces():
    assert normalised(" a\t b\u00a0c\n") == "a b c"


def test_what_hangs_together_is_what_paths_of_bonds_reach():
    generator = np.random.default_rng(0)
    for _ in range(40):
        bonds = generator.random((12, 9)) < generator.uniform(0.02, 0.3)  # of items to bonds
        reached = (bonds.astype(int) @ bonds.T + np.eye(12, dtype=int)) > 0
        for _ in range(4):
            reached = (reached.astype(int) @ reached) > 0
        found = hanging_together(np.flatnonzero(row).tolist() for row in bonds)
        assert found == reached.argmax(axis=1).tolist()


def test_groups_are_joined_by_copies_attacks_and_translations():
    def made(text, group=None, **meta):
        return Prompt("0", text, group=group, meta=meta)

    copies = Prompts([made("a", "g"), made("a", "h"), made("b", "h"), made("c", "i"), made("d"), made("d")])
    assert copies.groups[:4] == ["g", "g", "g", "i"]  # as called first
    assert copies.groups[4] == copies.groups[5] not in (None, "g", "i")
    assert (copies[3:5] + copies[3:5]).groups[:2] == ["i", copies.groups[4]]  # a sum has copies of its own
    turns = (Message("user", "a"), Message("assistant", "x"), Message("user", "d"))
    assert Prompts([Prompt("0", "d", turns), made("d")]).groups == [None, None]  # another conversation
    attacked = Prompts([made("a"), made("b"), made("x a", behavior_id="0", goal="a")])
    assert attacked.groups[0] == attacked.groups[2] is not None
    assert attacked.groups[1] is None
    suites = Prompts(
        made(text, suite=suite, kind="harmful", behavior_id=number)
        for text, suite, number in (("a", "s", "0"), ("ein a", "s", "0"), ("b", "s", "1"), ("c", "t", "0"))
    )
    assert suites.groups[0] == suites.groups[1] is not None
    assert suites.groups[2:] == [None, None]  # an id means something within its suite alone
