"""The named suites on public files in their original formats; skipped where they are not at hand."""

import functools

import pytest

from safety_neurons.errors import InputError
from safety_neurons.suites import suite, verify

COUNTS = {
    "advbench": 520,
    "harmbench-val": 80,
    "harmbench-val-contextual": 19,
    "multijail": 3150,
    "multijail/sw": 315,
    "xstest": 450,
    "xstest-safe": 250,
    "xstest-unsafe": 200,
    "hh-rlhf-harmless": 2312,
    "do-not-answer": 939,
}


@functools.cache
def read(folder, name):
    return suite(name, folder=folder, offline=True)


@pytest.mark.parametrize("name", COUNTS)
def test_every_prompt_of_a_named_suite_is_read_with_the_names_that_judges_and_tables_go_by(shared, name):
    found = read(shared / "data", name)
    assert len(found) == COUNTS[name]
    assert len({prompt.id for prompt in found.prompts}) == len(found)
    for prompt in found.prompts:
        assert {"suite", "kind", "goal", "behavior_id", "method"} <= set(prompt.meta)
        assert prompt.answer is None


@pytest.mark.parametrize("name", ["advbench", "harmbench-val", "multijail", "xstest", "hh-rlhf-harmless"])
def test_the_files_are_the_editions_the_catalogue_knows(shared, name):
    check = verify(name, folder=shared / "data", offline=True)
    assert (check.ok, check.hashes, check.problem) == (True, ("match",), None)


def test_targets_are_kept_apart_from_answers(shared):
    found = read(shared / "data", "advbench")
    assert all(prompt.meta["target"].startswith("Sure, ") for prompt in found.prompts)
    assert not any(prompt.text.startswith("Sure") for prompt in found.prompts)


def test_a_contextual_behaviour_is_asked_with_its_context_and_judged_without(shared):
    for prompt in read(shared / "data", "harmbench-val-contextual").prompts:
        assert prompt.text == f"{prompt.meta['context']}\n\n---\n\n{prompt.meta['goal']}"
        assert prompt.meta["functional_category"] == "contextual"
        assert prompt.meta["behavior_id"] == prompt.id


def test_every_language_has_every_prompt_and_ids_that_say_which(shared):
    found = read(shared / "data", "multijail")
    languages = [prompt.language for prompt in found.prompts]
    tags = ["en", "zh", "it", "vi", "ar", "ko", "th", "bn", "sw", "jv"]
    assert {tag: languages.count(tag) for tag in set(languages)} == dict.fromkeys(tags, 315)
    assert found.prompts[0].id == "0/en"
    assert found.prompts[0].category == "Sexual exploitation & human trafficking"


def test_a_mixed_suite_says_of_every_prompt_whether_it_should_be_answered(shared):
    found = read(shared / "data", "xstest")
    assert (found.kind, len(found.harmless), len(found.harmful)) == ("mixed", 250, 200)
    assert {prompt.meta["kind"] for prompt in read(shared / "data", "xstest-safe").prompts} == {"harmless"}


def test_irregular_pairs_are_counted(shared):
    notes = read(shared / "data", "hh-rlhf-harmless").notes
    notes = [note.partition(" (first")[0] for note in notes]
    assert "5 pairs differ before their last turn; the chosen side is read" in notes
    assert "4 conversations end with an empty answer, taken as no answer" in notes
    assert "joined 8 turns to the turn of the same role before them" in notes


def test_a_git_lfs_pointer_is_refused(shared):
    with pytest.raises(InputError, match="a Git LFS pointer of 131 bytes"):
        suite("hh-rlhf-helpful", folder=shared / "data", offline=True)
    assert not verify("hh-rlhf-helpful", folder=shared / "data", offline=True).ok
