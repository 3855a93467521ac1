"""Files are the same to the byte when the same is made again: in another process, with another order of hashes, elsewhere."""

import json
import os
import subprocess
import sys

PROGRAM = """
import json, os, sys
from safety_neurons.cli.app import build
for words in json.loads(sys.argv[1]):
    try:
        build()(words, standalone_mode=False)
    except SystemExit as stop:
        assert not stop.code, words
"""


def lines(pair, labelled):
    asked = ["--harmful", pair.harmful, "--harmless", pair.harmless, "--limit", "3", "--max-new-tokens", "3"]
    return [
        ["find", "contrast", *pair.models, "--prompts", pair.harmful, "--max-new-tokens", "3", "--top", "0.1", "--out", "find"],
        ["verify", "patch", *pair.models, "--neurons", "find", *asked, "--text", "none", "--random", "2", "--out", "verify"],
        ["guard", "fit", "--model", pair.base, "--neurons", "find", "--labelled", labelled, "--pooling", "last", "--out", "guard"],
        ["analyze", "layers", "find", "--out", "layers"],
        ["report", "find", "verify", "layers", "--out", "report.html"],
    ]


def test_two_processes_write_the_same_bytes(tiny_pair, tmp_path):
    words = ("make", "open", "steal", "tell", "show", "write", "lock", "explain")
    things = (("bomb", "unsafe"), ("cake", "safe"), ("key", "unsafe"), ("tree", "safe"))
    rows = [{"prompt": f"{word} the {what}", "label": kind} for word in words for what, kind in things]
    labelled = tmp_path / "labelled.jsonl"
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = []
    for seed in ("0", "1"):
        folder = tmp_path / seed
        folder.mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": seed, "SOURCE_DATE_EPOCH": "1700000000", "OMP_NUM_THREADS": "1"}
        commands = json.dumps(lines(tiny_pair, str(labelled)))
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM, commands], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr[-2000:]
        made.append({str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()})
    assert made[0].keys() == made[1].keys()
    assert {"find/scores.safetensors", "verify/completions.jsonl", "guard/guard/guard.json", "layers/figure.svg", "report.html"} <= made[
        0
    ].keys()
    for name, content in made[0].items():
        assert content == made[1][name], name
    assert json.loads(made[0]["find/run.json"])["timings"]["started"] == "2023-11-14T22:13:20+00:00"
