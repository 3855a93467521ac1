"""Files are the same to the byte when the same is made again: in another process, with another order of
hashes, elsewhere.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from running import done
from test_streams import CHATTER

PROGRAM = """
import json, sys
folders, chatter, commands = map(json.loads, sys.argv[1:])

class Talking:
    def find_spec(self, name, *_):
        if name in ("transformers", "peft", "bitsandbytes", "accelerate", "huggingface_hub"):
            exec(chatter, {"__name__": name})
            talked.append(name)

talked = []
sys.meta_path.insert(0, Talking())
sys.path[:0] = folders
from running import done
assert not talked, talked
for words in commands:
    done(*words)
print(len(talked))
"""


def lines(pair, labelled):
    asked = ["--harmful", pair.harmful, "--harmless", pair.harmless, "--limit", "3", "--max-new-tokens", "3"]
    return [
        [
            "find",
            "contrast",
            *pair.models,
            "--prompts",
            pair.harmful,
            "--max-new-tokens",
            "3",
            "--top",
            "0.1",
            "--out",
            "find",
        ],
        [
            "verify",
            "patch",
            *pair.models,
            "--neurons",
            "find",
            *asked,
            "--text",
            "none",
            "--random",
            "2",
            "--out",
            "verify",
        ],
        [
            "guard",
            "fit",
            "--model",
            pair.base,
            "--neurons",
            "find",
            "--labelled",
            labelled,
            "--pooling",
            "last",
            "--out",
            "guard",
        ],
        ["analyze", "layers", "find", "--out", "layers"],
        ["report", "find", "verify", "layers", "--out", "report.html"],
    ]


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(tiny_pair, tmp_path_factory):
    """What the same commands write here and in another process, by name, and what that process has said."""
    words = ("make", "open", "steal", "tell", "show", "write", "lock", "explain")
    things = (("bomb", "unsafe"), ("cake", "safe"), ("key", "unsafe"), ("tree", "safe"))
    rows = [{"prompt": f"{word} the {what}", "label": kind} for word in words for what, kind in things]
    root = tmp_path_factory.mktemp("same-bytes")
    labelled = root / "labelled.jsonl"
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    commands = lines(tiny_pair, str(labelled))
    here, there = root / "here", root / "there"
    for folder in (here, there):
        folder.mkdir()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SOURCE_DATE_EPOCH", "1700000000")
        patched.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
        patched.chdir(here)
        for line in commands:
            done(*line)
        folders = [str(folder) for folder in pathlib.Path(__file__).parents[:2]]
        # This process has the order of hashes that PYTHONHASHSEED asks for, or any.
        patched.setenv("PYTHONHASHSEED", "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2")
        program = [sys.executable, "-c", PROGRAM, *map(json.dumps, (folders, CHATTER, commands))]
        run = subprocess.run(program, cwd=there, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return files_in(here), files_in(there), run


def test_another_process_with_another_order_of_hashes_writes_the_same_bytes(made):
    here, there, _ = made
    assert here.keys() == there.keys()
    assert {
        "find/scores.safetensors",
        "verify/completions.jsonl",
        "guard/guard/guard.json",
        "layers/figure.svg",
        "report.html",
    } <= here.keys()
    for name, content in here.items():
        assert content == there[name], name
    assert json.loads(here["find/run.json"])["timings"]["started"] == "2023-11-14T22:13:20+00:00"


def test_what_libraries_write_while_they_are_imported_is_seen_by_nobody(made):
    """Its commands had nothing but one object on standard output; its own streams have nothing."""
    run = made[2]
    assert int(run.stdout) > 2
    assert run.stderr == ""
