"""Files and run folders: whole or not at all, the same run goes on, another is refused, one process writes, a
checkpoint is whole.
"""

import dataclasses
import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import save

from conforming import misfits
from safety_neurons.errors import InputError, RunError
from safety_neurons.results import Checkpoint, RunFolder, plain, rate, read_json, write_bytes, write_json
from safety_neurons.results.records import RunRecord, plain_name
from safety_neurons.results.run import (
    PARTIAL,
    Cache,
    contents_of,
    elapsed,
    remove_partial,
    safetensors_bytes,
    whole_folder,
)


def left_in(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_what_a_killed_process_left_of_a_file_goes_at_the_next_write_and_no_living_ones_does(
    tmp_path,
):
    program = (
        "import os, signal, sys\n"
        "from safety_neurons.results import write_json\n"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_json(sys.argv[1], {})\n"
    )
    target = tmp_path / "report.html"
    subprocess.run([sys.executable, "-c", program, str(target)], check=False)
    (left,) = left_in(tmp_path)
    theirs = f".report.html.{left.split('.')[3].partition('-')[0]}-{os.getppid()}-abc{PARTIAL}"
    (tmp_path / theirs).touch()
    write_json(target, {})
    assert left_in(tmp_path) == [theirs, "report.html"]


@pytest.mark.parametrize("call", ["os.fsync", "os.replace", "os.fdopen", "tempfile.mkstemp"])
def test_a_full_disk_at_any_step_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    target = tmp_path / "r.json"
    write_json(target, {"old": 1})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(call, full)
        with pytest.raises(RunError, match="No space left on device"):
            write_json(target, {"new": 2})
    assert read_json(target) == {"old": 1}
    assert left_in(tmp_path) == ["r.json"]


def test_an_interruption_between_write_and_rename_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "r.json"
    write_json(target, {"old": 1})

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr("os.replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_json(target, {"new": 2})
    assert read_json(target) == {"old": 1}
    assert left_in(tmp_path) == ["r.json"]


def test_a_kill_between_write_and_rename_leaves_the_old_file_readable(tmp_path):
    target = tmp_path / "r.json"
    write_json(target, {"old": 1})
    program = (
        "import os, signal, sys\n"
        "from safety_neurons.results import write_json\n"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_json(sys.argv[1], {'new': 2})\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(target)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert read_json(target) == {"old": 1}
    write_json(target, {"new": 2})
    assert read_json(target) == {"new": 2}


def test_a_place_that_cannot_be_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write") as refused:
        write_bytes(tmp_path / "file" / "r.json", b"")
    assert "\n" not in str(refused.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="Permission denied"):
        write_bytes(tmp_path / "r.json", b"")


def test_files_are_readable_by_others_as_usual(tmp_path):
    write_bytes(tmp_path / "r", b"x")
    (tmp_path / "plain").write_bytes(b"x")
    assert (tmp_path / "r").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_records_numpy_paths_and_what_is_no_number_become_json():
    @dataclasses.dataclass
    class Record:
        value: float
        where: pathlib.Path

    content = {
        "a": np.float32(0.5),
        "b": np.arange(2),
        "c": Record(float("nan"), pathlib.Path("x")),
        "d": {3, 1},
        5: (True, None),
        "r": rate([True]),
    }
    assert json.loads(json.dumps(plain(content), allow_nan=False)) == {
        "a": 0.5,
        "b": [0, 1],
        "c": {"value": None, "where": "x"},
        "d": [1, 3],
        "5": [True, None],
        "r": rate([True]).to_json(),
    }


@pytest.mark.parametrize("content", [b"", b"{", b"\xff"])
def test_damaged_json_is_an_input_error(tmp_path, content):
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(InputError, match="is not JSON"):
        read_json(tmp_path / "r.json")
    with pytest.raises(InputError, match="cannot read"):
        read_json(tmp_path / "none.json")


ARRAYS = {
    "sum.layers.0.q": np.arange(3.0),
    "count": np.array([7]),
    "none": np.zeros((0, 2)),
    "mask": np.array([True, False]),
}


def test_a_checkpoint_gives_back_arrays_and_state(tmp_path):
    checkpoint = Checkpoint(tmp_path / "deep" / "c.safetensors")
    assert checkpoint.load() is None
    checkpoint.save(ARRAYS, {"batch": 3, "notes": ["ü"]})
    loaded = checkpoint.load()
    assert loaded.state == {"batch": 3, "notes": ["ü"]}
    assert loaded.arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert np.array_equal(loaded.arrays[name], array)
        assert loaded.arrays[name].dtype == array.dtype
    checkpoint.delete()
    checkpoint.delete()
    assert checkpoint.load() is None


def test_a_strided_array_is_saved_as_it_reads(tmp_path):
    Checkpoint(tmp_path / "c").save({"a": np.arange(6).reshape(2, 3).T}, {})
    assert Checkpoint(tmp_path / "c").load().arrays["a"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_failed_save_leaves_the_previous_state(tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path / "c")
    checkpoint.save(ARRAYS, {"batch": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(RunError, match="No space left"):
        checkpoint.save(ARRAYS, {"batch": 2})
    assert checkpoint.load().state == {"batch": 1}


def test_a_damaged_checkpoint_is_an_error_that_says_what_to_do(tmp_path):
    checkpoint = Checkpoint(tmp_path / "c")
    checkpoint.save(ARRAYS, {})
    whole = (tmp_path / "c").read_bytes()
    for content in (b"", whole[:-1], whole[: len(whole) // 2], b"\x00" * 40):
        (tmp_path / "c").write_bytes(content)
        with pytest.raises(RunError, match="overwrite"):
            checkpoint.load()


@pytest.mark.parametrize(
    "state",
    ["[" * 5000 + "]" * 5000, "9" * 5000, "[1]", '"text"', "{", '{"a": 1, "a": 2}'],
    ids=lambda text: text[:8],
)
def test_a_state_that_cannot_be_read_is_a_run_error(tmp_path, state):
    path = tmp_path / "c.safetensors"
    path.write_bytes(save({"a": np.zeros(1, np.float32)}, metadata={"state": state}))
    with pytest.raises(RunError, match="cannot read checkpoint"):
        Checkpoint(path).load()


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


@pytest.mark.parametrize(
    "changed", [{"progress": False}, {"json": True}, {"debug": True}, {"sites": ["q", "down"]}, {"new": None}]
)
def test_arguments_that_cannot_change_a_result_do_not_matter(tmp_path, changed):
    RunFolder(tmp_path, "find", CONFIG)
    assert RunFolder(tmp_path, "find", CONFIG | changed).resumed


@pytest.mark.parametrize(
    "changed", [{"top": 0.1}, {"model": "n"}, {"sites": ["down"]}, {"new": 1}, {"seed": 4}]
)
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
    record = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**record, "files": ["é" * 300]}))
    with pytest.raises(RunError, match="its file 'é+' is not there; put it back"):
        RunFolder(tmp_path, "find", CONFIG)  # no file system takes a name as long as that
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
    assert sorted(name for name in os.listdir(tmp_path) if not name.startswith(".lock")) == [
        "notes.txt",
        "run.json",
    ]


def test_a_record_cannot_make_overwriting_remove_files_outside_the_folder(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    RunFolder(tmp_path / "run", "find", CONFIG)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(
        json.dumps(record | {"files": ["../mine.txt", str(tmp_path / "mine.txt")]})
    )
    RunFolder(tmp_path / "run", "find", CONFIG, overwrite=True)
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["../x", "/x", "run.json", "a/../../x"])
def test_a_name_outside_the_folder_is_refused(tmp_path, name):
    with pytest.raises(RunError, match="not a file of the run"):
        RunFolder(tmp_path / "run", "find", CONFIG).path(name)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"schema": "other"}',
        '{"verb": 3, "status": "running", "arguments": {}, "files": [], "timings": {}}',
    ],
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
    "text",
    ["[" * 5000 + "]" * 5000, '{"timings": {"seconds": 1e999}}', '{"a": 1, "a": 2}', "9" * 5000],
    ids=lambda text: text[:8],
)
def test_a_record_that_cannot_be_read_is_a_run_error(tmp_path, text):
    RunFolder(tmp_path / "run", "verb", {"a": 1})
    (tmp_path / "run" / "run.json").write_text(text)
    with pytest.raises(RunError, match="damaged"):
        RunFolder(tmp_path / "run", "verb", {"a": 1})


ON_PROMPTS = {"prompts": "harm.txt", "top": 0.05}


def opened(out, prompts, **changed):
    return RunFolder(
        out,
        "find",
        ON_PROMPTS | {"prompts": str(prompts)} | changed,
        inputs={"prompts": contents_of(prompts)},
    )


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "harm.txt").write_text("how do i kill")
    return tmp_path / "harm.txt"


# Identity


@pytest.mark.parametrize("finished", [True, False])
def test_other_content_under_the_same_name_is_another_run(tmp_path, prompts, finished):
    run = opened(tmp_path / "run", prompts)
    if finished:
        run.finish({"n": 1})
    del run
    prompts.write_text("how do i cook")
    with pytest.raises(
        RunError,
        match=r"another prompts: .*harm.txt.* has changed since; choose another out, or pass overwrite",
    ):
        opened(tmp_path / "run", prompts)


def test_a_file_deep_down_is_named_by_its_end(tmp_path, prompts):
    deep = tmp_path.joinpath(*["a folder with a long name"] * 14)
    deep.mkdir(parents=True)
    moved = prompts.rename(deep / "harm.txt")
    opened(tmp_path / "run", moved).finish({})
    moved.write_text("how do i cook")
    with pytest.raises(RunError, match=r"….*/harm.txt' has changed since"):
        opened(tmp_path / "run", moved)


def test_an_edit_that_keeps_size_and_time_is_seen(tmp_path, prompts):
    opened(tmp_path / "run", prompts).finish({})
    before = prompts.stat()
    prompts.write_text("how do i bill")
    os.utime(prompts, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(RunError, match="has changed"):
        opened(tmp_path / "run", prompts)


@pytest.mark.parametrize("odd", [None, 0, "", float("nan"), [], {}])
def test_a_damaged_record_of_what_was_read_is_another_content(tmp_path, prompts, odd):
    opened(tmp_path / "run", prompts).finish({})
    file = tmp_path / "run" / "run.json"
    record = json.loads(file.read_text())
    for inputs in ({"": odd}, {**record["inputs"]["prompts"], "more": odd}, {"more": odd}, odd):
        file.write_text(json.dumps({**record, "inputs": {"prompts": inputs}}))
        with pytest.raises(RunError) as raised:
            opened(tmp_path / "run", prompts)
        assert "\n" not in str(raised.value)


def test_the_same_content_under_another_name_is_the_same_run(tmp_path, prompts):
    opened(tmp_path / "run", prompts).finish({"n": 1})
    renamed = prompts.rename(tmp_path / "renamed.txt")
    assert opened(tmp_path / "run", renamed).record["result"] == {"n": 1}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "a.json").write_text("other"), "other content: a.json"),
        (lambda folder: (folder / "c.json").write_text("{}"), "new: c.json"),
        (lambda folder: (folder / "b.safetensors").unlink(), "gone: b.safetensors"),
        (
            lambda folder: [(folder / name).write_text("new") for name in ("a.json", "b.safetensors")],
            "a.json and 1 more file",
        ),
    ],
)
def test_of_a_folder_it_is_said_which_file_changed(tmp_path, change, said):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.json").write_text("{}")
    (folder / "b.safetensors").write_bytes(b"weights")
    (folder / ".cache").write_text("no content")
    opened(tmp_path / "run", folder).finish({})
    (folder / ".cache").write_text("changed, and still no content")
    assert opened(tmp_path / "run", folder).finished
    change(folder)
    with pytest.raises(RunError, match=said):
        opened(tmp_path / "run", folder)


def test_a_run_of_another_version_is_not_taken_for_this_ones(tmp_path, prompts):
    opened(tmp_path / "run", prompts).finish({})
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["versions"]["safety-neurons"] = "0.0.1"
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"of version 0.0.1, this is version"):
        opened(tmp_path / "run", prompts)


# A moved folder


def test_a_file_that_is_written_for_a_run_names_its_paths_within_the_folder(tmp_path):
    run = RunFolder(tmp_path / "a", "find", {})
    run.write_json("r.json", {"sets": [str(run.path("n.safetensors")), "/elsewhere"]})
    assert read_json(tmp_path / "a" / "r.json") == {"sets": ["n.safetensors", "/elsewhere"]}


def test_no_time_is_said_where_files_are_to_be_the_same_and_a_clock_that_goes_back_says_none(monkeypatch):
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    assert elapsed(time.monotonic() - 5) >= 5
    assert elapsed(time.monotonic() + 5) == 0
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert elapsed(time.monotonic() - 5) == 0


def test_paths_in_a_result_follow_the_folder(tmp_path):
    run = RunFolder(tmp_path / "a", "find", {})
    result = {
        "neurons": str(run.path("neurons.safetensors")),
        "sets": {"x": [1, str(run.path("x/y.json"))]},
        "model": "x/y.json",
        "o": "/o",
    }
    run.finish(result)
    assert str(tmp_path) not in (tmp_path / "a" / "run.json").read_text()
    (tmp_path / "a").rename(tmp_path / "b")
    moved = tmp_path / "b"
    again = RunFolder(moved, "find", {})
    assert again.finished
    expected = {
        "neurons": str(moved / "neurons.safetensors"),
        "sets": {"x": [1, str(moved / "x" / "y.json")]},
        "model": "x/y.json",
        "o": "/o",
    }
    assert again.record["result"] == expected


@pytest.mark.parametrize("paths", [None, 3, [["result"]], [["n", 5, "x"]], [[[]]], [3], [["up"]], [["root"]]])
def test_a_record_whose_paths_are_no_paths_gives_what_it_says(tmp_path, paths):
    RunFolder(tmp_path / "a", "find", {}).finish({"n": [1], "up": "../x", "root": "/x"})
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    (tmp_path / "a" / "run.json").write_text(json.dumps(record | {"paths": paths}))
    assert RunFolder(tmp_path / "a", "find", {}).record["result"] == {"n": [1], "up": "../x", "root": "/x"}


# Two processes, and killed ones

HOLD = """
import pathlib, sys, time
from safety_neurons.results import RunFolder
run = RunFolder(sys.argv[1], "find", {})
run.checkpoint("sums").save({}, {"batch": 4})
pathlib.Path(sys.argv[2]).touch()
time.sleep(600)
"""


def started(program, *words, signalled):
    """A process that has come to the point where it writes a file and waits."""
    running = subprocess.Popen([sys.executable, "-c", program, *map(str, words)])
    while not signalled.exists():
        assert running.poll() is None, "the process ended by itself"
        time.sleep(0.01)
    return running


def killed(running):
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL


def test_a_second_process_is_told_who_is_at_work_and_goes_on_when_that_is_dead(tmp_path):
    running = started(HOLD, tmp_path / "run", tmp_path / "there", signalled=tmp_path / "there")
    try:
        for overwrite in (False, True):
            with pytest.raises(RunError, match=rf"in use by process {running.pid} on .+ since 2\d\d\d-"):
                RunFolder(tmp_path / "run", "find", {}, overwrite=overwrite)
    finally:
        killed(running)
    again = RunFolder(tmp_path / "run", "find", {})
    assert again.checkpoint("sums").load().state == {"batch": 4}
    again.finish({})
    assert sorted(os.listdir(tmp_path / "run")) == ["run.json"]


def test_a_finished_run_is_read_where_nothing_can_be_written(tmp_path, monkeypatch):
    RunFolder(tmp_path / "run", "find", {}).finish({"n": 1})

    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("filelock.FileLock.acquire", read_only)
    assert RunFolder(tmp_path / "run", "find", {}).record["result"] == {"n": 1}
    with pytest.raises(RunError, match="cannot write in .*Read-only file system"):
        RunFolder(tmp_path / "other", "find", {})


@pytest.mark.parametrize(
    "missing", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("flock")]
)
def test_where_the_file_system_knows_no_locks_a_run_says_so_and_goes_on(tmp_path, monkeypatch, missing):
    def without(*_, **__):
        raise missing

    monkeypatch.setattr("filelock.FileLock.acquire", without)
    run = RunFolder(tmp_path / "run", "find", {})
    assert "knows no locks: a second process on the same --out is not noticed" in run.notes[0]
    run.finish({"n": 1})
    assert RunFolder(tmp_path / "run", "find", {}).record["result"] == {"n": 1}


WRITE = """
import os, pathlib, sys, time
from safety_neurons.results import RunFolder
from safety_neurons.results.run import whole_folder, write_bytes
folder, there, how = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]
run = RunFolder(folder, "find", {})
wait = lambda *_: (there.touch(), time.sleep(600))
if how == "file":
    os.replace = wait
    write_bytes(folder / "sub" / "scores.bin", b"x")
with whole_folder(folder / "model") as partial:
    (partial / "weights").write_text("new")
    if how == "folder":
        wait()
    rename = pathlib.Path.rename
    pathlib.Path.rename = lambda self, to: (rename(self, to), wait() if how == "between" else None)
"""


@pytest.mark.parametrize("how", ["file", "folder", "between"])
def test_what_a_kill_left_unfinished_is_gone_at_the_next_start_and_nothing_else(tmp_path, how):
    run, there = tmp_path / "run", tmp_path / "there"
    (run / "model").mkdir(parents=True)
    (run / "model" / "weights").write_text("old")
    (run / ".mine").write_text("mine")
    killed(started(WRITE, run, there, how, signalled=there))
    assert [path for path in run.rglob("*") if path.name.endswith(PARTIAL)]
    RunFolder(run, "find", {}).finish({})
    assert sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()) == [
        ".mine",
        "model/weights",
        "run.json",
    ]
    assert (run / "model" / "weights").read_text() == "old"


def test_a_run_that_was_killed_between_its_last_record_and_its_end_is_tidied_by_who_comes_next(tmp_path):
    child = os.fork()
    if not child:
        run = RunFolder(tmp_path, "find", {})
        run.checkpoint("sums").save({}, {"batch": 4})
        RunFolder._remove = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        run.finish({"n": 1})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert {path.name for path in tmp_path.rglob("*")} >= {"run.json", ".lock", "sums.safetensors"}
    again = RunFolder(tmp_path, "find", {})
    assert again.finished
    assert again.record["result"] == {"n": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_an_exception_leaves_the_old_folder_and_a_success_the_new_one(tmp_path):
    for number in range(2):
        with whole_folder(tmp_path / "model") as partial:
            (partial / "weights").write_text(str(number))

    def interrupted():
        with whole_folder(tmp_path / "model") as partial:
            (partial / "weights").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == "1"
    remove_partial(tmp_path)
    assert (tmp_path / "model" / "weights").read_text() == "1"


# Bytes


def test_a_header_is_in_order_whatever_the_hash_seed(tmp_path):
    program = (
        "import sys, numpy as np\nfrom safety_neurons.results.run import "
        "safetensors_bytes\nsys.stdout.buffer.write(safetensors_bytes({'b': np.ones(3), 'a': np.ones(2)}, "
        "{k: k for k in 'zyxwvutsrq'}))\n"
    )
    made = {
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(made) == 1
    (tmp_path / "x.safetensors").write_bytes(made.pop())
    from safetensors import safe_open

    with safe_open(tmp_path / "x.safetensors", framework="numpy") as read:
        assert list(read.metadata()) == sorted("zyxwvutsrq") or set(read.metadata()) == set("zyxwvutsrq")
        assert read.get_tensor("b").tolist() == [1, 1, 1]


@pytest.mark.parametrize("size", range(9))
def test_tensors_stay_at_multiples_of_eight(size):
    made = safetensors_bytes({"a": np.arange(3.0)}, {"k": "é" * size})
    assert int.from_bytes(made[:8], "little") % 8 == 0
    from safetensors.numpy import load

    assert load(made)["a"].tolist() == [0, 1, 2]


def test_the_time_is_that_of_source_date_epoch(tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    RunFolder(tmp_path, "find", {})
    assert (
        json.loads((tmp_path / "run.json").read_text())["timings"]["started"] == "1970-01-02T00:00:00+00:00"
    )
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "soon")
    with pytest.raises(InputError, match="SOURCE_DATE_EPOCH 'soon' is no time"):
        RunFolder(tmp_path / "b", "find", {})


# Names


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "/",
        "/etc",
        "a/b",
        "..\\a",
        "C:",
        "a\0b",
        "a\nb",
        "\x1b[31m",
        ".hidden",
        " a",
        "nul",
        "COM1.txt",
        "x" * 300,
        "a\ud800",
    ],
)
def test_a_name_that_is_a_path_or_no_name_is_refused(name):
    with pytest.raises(InputError, match="is not a plain name") as refused:
        plain_name(name, "step")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["a", "Größe 2", "a.b-c_d", "名前", pathlib.PurePosixPath("x")])
def test_a_plain_name_is_given_back(name):
    assert plain_name(name, "step") == str(name)


@dataclasses.dataclass(frozen=True)
class Key:
    weights: str
    settings: dict


def test_a_result_is_computed_once_for_all_that_it_depends_on(tmp_path):
    run, calls, file = RunFolder(tmp_path / "run", "compare", {}), [], tmp_path / "run" / "scores"

    def result(weights="a", content="whole"):
        def compute():
            calls.append(weights)
            file.write_text(content)
            return {"seconds": 1.5, "verdicts": (True, None), "of": weights}

        return run.cached(Key(weights, {"top": 0.1}), compute, [file])

    assert result() == result() == {"seconds": 1.5, "verdicts": [True, None], "of": "a"}
    assert result("b", "other")["of"] == "b"
    assert calls == ["a", "b"]
    assert result()["of"] == "a"  # its file was written over
    assert result()["of"] == "a"
    entries = list((tmp_path / "run" / "cached").iterdir())
    assert len(entries) == 2
    for damage in (b"", b"[1]", b'{"key": {}}', entries[0].read_bytes()[:-9]):
        for entry in entries:
            entry.write_bytes(damage)
        assert result()["of"] == "a"
    assert calls == ["a", "b", "a", "a", "a", "a", "a"]
    run.finish()
    assert misfits(run.record, RunRecord) == []
    assert {path.name for path in entries} <= {pathlib.Path(name).name for name in run.record["files"]}
    RunFolder(tmp_path / "run", "compare", {}, overwrite=True)
    assert not (tmp_path / "run" / "cached").exists()


def test_without_a_place_nothing_is_kept(tmp_path):
    assert [Cache().cached(Key("a", {}), lambda value=value: value) for value in (1, 2)] == [1, 2]
