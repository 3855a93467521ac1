import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from safety_neurons.errors import InputError, RunError
from safety_neurons.results import plain, rate, read_json, write_bytes, write_json


def left_in(folder):
    return sorted(entry.name for entry in folder.iterdir())


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
        "a": 0.5, "b": [0, 1], "c": {"value": None, "where": "x"}, "d": [1, 3], "5": [True, None], "r": rate([True]).to_json(),
    }  # fmt: skip


@pytest.mark.parametrize("content", [b"", b"{", b"\xff"])
def test_damaged_json_is_an_input_error(tmp_path, content):
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(InputError, match="is not JSON"):
        read_json(tmp_path / "r.json")
    with pytest.raises(InputError, match="cannot read"):
        read_json(tmp_path / "none.json")
