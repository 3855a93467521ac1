import json
import os

import numpy as np
import pytest

from safety_neurons.errors import RunError
from safety_neurons.results import RunFolder

CONFIG = {"model": "m", "top": 0.05, "sites": ("q", "down"), "seed": 3, "progress": True, "json": False}


def test_a_new_run_is_written_down_at_once_with_arguments_versions_and_seeds(tmp_path):
    run = RunFolder(tmp_path / "a" / "b", "find contrast", CONFIG)
    record = json.loads((tmp_path / "a" / "b" / "run.json").read_text())
    assert not run.finished
    assert not run.resumed
    assert record["status"] == "running"
    assert record["arguments"]["sites"] == ["q", "down"]
    assert record["seeds"] == {"seed": 3}
    assert {"python", "numpy", "safety-neurons"} <= record["versions"].keys()


def test_the_same_configuration_goes_on_where_the_last_one_was_killed(tmp_path):
    RunFolder(tmp_path, "find", CONFIG).checkpoint("sums").save({"a": np.ones(2)}, {"batch": 4})
    again = RunFolder(tmp_path, "find", dict(CONFIG))
    assert again.resumed
    assert again.checkpoint("sums").load().state == {"batch": 4}


@pytest.mark.parametrize("changed", [{"progress": False}, {"json": True}, {"debug": True}, {"sites": ["q", "down"]}, {"new": None}])
def test_arguments_that_cannot_change_a_result_do_not_matter(tmp_path, changed):
    RunFolder(tmp_path, "find", CONFIG)
    assert RunFolder(tmp_path, "find", CONFIG | changed).resumed


@pytest.mark.parametrize("changed", [{"top": 0.1}, {"model": "n"}, {"sites": ["down"]}, {"new": 1}, {"seed": 4}])
def test_another_configuration_is_an_error_that_names_the_argument(tmp_path, changed):
    RunFolder(tmp_path, "find", CONFIG)
    with pytest.raises(RunError, match=next(iter(changed))) as refused:
        RunFolder(tmp_path, "find", CONFIG | changed)
    assert "\n" not in str(refused.value)


def test_another_verb_is_an_error(tmp_path):
    RunFolder(tmp_path, "find", CONFIG)
    with pytest.raises(RunError, match="verify"):
        RunFolder(tmp_path, "verify", CONFIG)


def test_a_finished_run_says_so_keeps_its_result_and_drops_its_checkpoints(tmp_path):
    run = RunFolder(tmp_path, "find", CONFIG)
    run.checkpoint("sums").save({}, {})
    run.path("scores.safetensors").write_bytes(b"x")
    run.path("never-written.json")
    run.finish({"n_neurons": 5}, device="cpu", hashes={"prompts": "ab"})
    again = RunFolder(tmp_path, "find", CONFIG)
    assert again.finished
    assert again.record["result"] == {"n_neurons": 5}
    assert again.record["device"] == "cpu"
    assert again.record["timings"]["seconds"] >= 0
    assert sorted(os.listdir(tmp_path)) == ["run.json", "scores.safetensors"]


def test_a_finished_run_whose_files_are_gone_is_not_taken_for_whole(tmp_path):
    run = RunFolder(tmp_path, "find", CONFIG)
    run.path("scores.safetensors").write_bytes(b"x")
    run.finish({})
    (tmp_path / "scores.safetensors").rename(tmp_path / "away")
    with pytest.raises(RunError, match=r"its file 'scores\.safetensors' is not there; put it back"):
        RunFolder(tmp_path, "find", CONFIG)
    assert not RunFolder(tmp_path, "find", CONFIG, overwrite=True).finished


def test_overwriting_starts_anew_and_removes_only_what_the_run_wrote(tmp_path):
    run = RunFolder(tmp_path, "find", CONFIG)
    run.path("completions.jsonl").write_text("old")
    run.checkpoint("sums").save({}, {})
    run.finish({})
    (tmp_path / "notes.txt").write_text("mine")
    again = RunFolder(tmp_path, "verify", {"other": 1}, overwrite=True)
    assert not again.finished
    assert not again.resumed
    assert sorted(name for name in os.listdir(tmp_path) if not name.startswith(".lock")) == ["notes.txt", "run.json"]


def test_a_record_cannot_make_overwriting_remove_files_outside_the_folder(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    RunFolder(tmp_path / "run", "find", CONFIG)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(record | {"files": ["../mine.txt", str(tmp_path / "mine.txt")]}))
    RunFolder(tmp_path / "run", "find", CONFIG, overwrite=True)
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["../x", "/x", "run.json", "a/../../x"])
def test_a_name_outside_the_folder_is_refused(tmp_path, name):
    with pytest.raises(RunError, match="not a file of the run"):
        RunFolder(tmp_path / "run", "find", CONFIG).path(name)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"schema": "other"}', '{"verb": 3, "status": "running", "arguments": {}, "files": [], "timings": {}}']
)
def test_a_damaged_record_is_an_error_until_it_is_overwritten(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunError, match="overwrite"):
        RunFolder(tmp_path, "find", CONFIG)
    assert not RunFolder(tmp_path, "find", CONFIG, overwrite=True).finished


def test_a_folder_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="choose"):
        RunFolder(tmp_path / "file", "find", CONFIG)
    with pytest.raises(RunError, match="choose"):
        RunFolder(tmp_path / "file" / "deeper", "find", CONFIG)


def test_a_full_disk_while_finishing_leaves_a_run_that_goes_on(tmp_path, monkeypatch):
    run = RunFolder(tmp_path, "find", CONFIG)
    run.checkpoint("sums").save({}, {"batch": 9})

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("os.replace", full)
        with pytest.raises(RunError, match="No space left"):
            run.finish({"n": 1})
    again = RunFolder(tmp_path, "find", CONFIG)
    assert not again.finished
    assert again.checkpoint("sums").load().state == {"batch": 9}


@pytest.mark.parametrize(
    "change",
    [
        {"timings": {"seconds": "12"}},
        {"timings": {"seconds": True}},
        {"timings": {"seconds": [1]}},
        {"timings": {"seconds": None}},
        {"files": [1]},
        {"files": [["a"]]},
        {"status": "paused"},
        {"arguments": [1]},
        {"notes": 5},
        {"notes": "a"},
        {"notes": [["a"]]},
        {"status": "finished", "result": [1]},
        {"status": "finished", "result": None},
    ],
    ids=str,
)
def test_a_record_of_other_types_is_refused_before_any_work(tmp_path, change):
    RunFolder(tmp_path / "run", "verb", {"a": 1})
    record = tmp_path / "run" / "run.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), **change}))
    with pytest.raises(RunError, match="not a run record"):
        RunFolder(tmp_path / "run", "verb", {"a": 1})


@pytest.mark.parametrize(
    "text", ["[" * 5000 + "]" * 5000, '{"timings": {"seconds": 1e999}}', '{"a": 1, "a": 2}', "9" * 5000], ids=lambda text: text[:8]
)
def test_a_record_that_cannot_be_read_is_a_run_error(tmp_path, text):
    RunFolder(tmp_path / "run", "verb", {"a": 1})
    (tmp_path / "run" / "run.json").write_text(text)
    with pytest.raises(RunError, match="damaged"):
        RunFolder(tmp_path / "run", "verb", {"a": 1})
