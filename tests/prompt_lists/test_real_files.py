"""The readers on public files in their original formats; skipped where they are not at hand."""

import functools

import pytest

from safety_neurons.errors import InputError
from safety_neurons.prompt_lists import Prompts, prompts

COUNTS = {
    "advbench/harmful_behaviors.csv": (520, 520),
    "harmbench/harmbench_behaviors_text_val.csv": (80, 0),
    "xstest/xstest_prompts.csv": (450, 0),
    "xstest/xstest_v2_completions_llama2orig.csv": (450, 450),
    "refusal_direction/harmful_train.json": (260, 0),
    "refusal_direction/harmful_val.json": (39, 0),
    "refusal_direction/harmless_train.json": (18793, 0),
    "hh_rlhf/harmless-base/test.jsonl.gz": (2312, 2308),
    "safety_tuned_llamas/safety_only_data_Instructions.json": (2483, 2483),
    "llama_factory/alpaca_en_demo.json": (999, 999),
    "llama_factory/dpo_en_demo.json": (300, 300),
    "gsm8k/test.jsonl": (1319, 1319),
    "neuron_corpora/english.txt": (10000, 0),
    "neuron_corpora/do_not_answer.txt": (939, 0),
}


@functools.cache
def read(path) -> Prompts:
    return prompts(path)


@pytest.mark.parametrize("name", COUNTS)
def test_every_row_of_a_real_file_is_read(shared, name):
    found = read(shared / "data" / name)
    assert (len(found), sum(answer is not None for answer in found.answers)) == COUNTS[name]
    assert not any("dropped" in note for note in found.notes)


@pytest.mark.parametrize("language", ["en", "zh", "it", "vi", "ar", "ko", "th", "bn", "sw", "jv"])
def test_every_language_of_a_wide_table_can_be_named(shared, language):
    assert len(prompts(shared / "data/multijail/MultiJail.csv", column=language)) == 315


def test_a_wide_table_without_a_named_column_lists_its_languages(shared):
    with pytest.raises(InputError, match="it has 'id', 'source', 'tags', 'en', 'zh'"):
        prompts(shared / "data/multijail/MultiJail.csv")


def test_irregular_conversations_are_counted(shared):
    notes = read(shared / "data/hh_rlhf/harmless-base/test.jsonl.gz").notes
    notes = [note.partition(" (first")[0] for note in notes]
    assert "5 pairs differ before their last turn; the chosen side is read" in notes
    assert "4 conversations end with an empty answer, taken as no answer" in notes
    assert "joined 8 turns to the turn of the same role before them" in notes


def test_a_git_lfs_pointer_is_refused(shared):
    with pytest.raises(InputError, match="a Git LFS pointer of 131 bytes"):
        prompts(shared / "data/hh_rlhf/helpful-base/test.jsonl.gz")


def test_known_overlaps_between_files_are_counted(shared):
    advbench, train = (
        prompts(shared / "data/advbench/harmful_behaviors.csv"),
        prompts(shared / "data/refusal_direction/harmful_train.json"),
    )
    assert advbench.overlap(prompts(shared / "data/harmbench/harmbench_behaviors_text_val.csv")) == 0
    assert train.overlap(advbench) == 117


def test_no_built_in_prompt_is_in_a_public_file(shared):
    public = [set(read(shared / "data" / name).digests) for name in COUNTS]
    for name in ("harmful", "harmful-test", "harmless", "harmless-test", "general", "general-test"):
        ours = prompts(f"builtin:{name}")
        assert [ours.overlap(theirs) for theirs in public] == [0] * len(public)


def test_a_target_column_taken_as_prompts_is_noticed(shared):
    assert any(
        "520 of 520 prompts begin like an answer" in note
        for note in prompts(shared / "data/advbench/harmful_behaviors.csv", column="target").notes
    )
