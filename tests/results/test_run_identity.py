"""Which run a folder holds, who may write in it, and what a kill leaves there."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from safety_neurons.errors import InputError, RunError
from safety_neurons.results import RunFolder
from safety_neurons.results.files import PARTIAL, contents_of, plain_name, remove_partial, safetensors_bytes, whole_folder

CONFIG = {"prompts": "harm.txt", "top": 0.05}


def opened(out, prompts, **changed):
    return RunFolder(out, "find", CONFIG | {"prompts": str(prompts)} | changed, inputs={"prompts": contents_of(prompts)})


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
    with pytest.raises(RunError, match=r"another prompts: .*harm.txt.* has changed since; choose another out, or pass overwrite"):
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
        (lambda folder: [(folder / name).write_text("new") for name in ("a.json", "b.safetensors")], "a.json and 1 more files"),
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


WRITE = """
import os, pathlib, sys, time
from safety_neurons.results import RunFolder
from safety_neurons.results.files import whole_folder, write_bytes
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
    assert sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()) == [".mine", "model/weights", "run.json"]
    assert (run / "model" / "weights").read_text() == "old"


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
        "import sys, numpy as np\n"
        "from safety_neurons.results.files import safetensors_bytes\n"
        "sys.stdout.buffer.write(safetensors_bytes({'b': np.ones(3), 'a': np.ones(2)}, {k: k for k in 'zyxwvutsrq'}))\n"
    )
    made = {
        subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed}).stdout
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
    assert json.loads((tmp_path / "run.json").read_text())["timings"]["started"] == "1970-01-02T00:00:00+00:00"
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
