"""Files are the same to the byte when the same is made again: in another process, with another order of
hashes, elsewhere.
"""

import json
import os
import pathlib
import subprocess
import sys

import torch
from running import done

PROGRAM = """
import json, os, sys
sys.path[:0] = json.loads(sys.argv[1])
from running import done
for words in json.loads(sys.argv[2]):
    done(*words)
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


def test_another_process_with_another_order_of_hashes_writes_the_same_bytes(tiny_pair, tmp_path, monkeypatch):
    words = ("make", "open", "steal", "tell", "show", "write", "lock", "explain")
    things = (("bomb", "unsafe"), ("cake", "safe"), ("key", "unsafe"), ("tree", "safe"))
    rows = [{"prompt": f"{word} the {what}", "label": kind} for word in words for what, kind in things]
    labelled = tmp_path / "labelled.jsonl"
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    commands = lines(tiny_pair, str(labelled))
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    monkeypatch.chdir(here)
    for line in commands:
        done(*line)
    folders = [str(folder) for folder in pathlib.Path(__file__).parents[:2]]
    # This process has the order of hashes that PYTHONHASHSEED asks for, or any.
    environment = {**os.environ, "PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"}
    program = [sys.executable, "-c", PROGRAM, json.dumps(folders), json.dumps(commands)]
    run = subprocess.run(program, cwd=there, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    made = [
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (here, there)
    ]
    assert made[0].keys() == made[1].keys()
    assert {
        "find/scores.safetensors",
        "verify/completions.jsonl",
        "guard/guard/guard.json",
        "layers/figure.svg",
        "report.html",
    } <= made[0].keys()
    for name, content in made[0].items():
        assert content == made[1][name], name
    assert json.loads(made[0]["find/run.json"])["timings"]["started"] == "2023-11-14T22:13:20+00:00"
