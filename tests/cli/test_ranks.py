"""Several processes do one command as one does: the same bytes, one voice; others go on from what is left.

One child process imports everything, is the reference of one process, and forks the others: a start costs
more than their work.
"""

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any

import pytest
import torch
from running import Outcome

from tiny_pair import HARMFUL, HARMLESS

PROGRAM = """
import gc, json, os, pathlib, signal, sys
here, tests, plan = json.loads(sys.argv[1])
sys.path[:0] = tests
from running import command
from safety_neurons.model import ranks

def done(lines):
    return [[*vars(command(*words)).values()] for words in lines]

def share(scene, rank):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(scene["size"]))
    os.chdir(scene["folder"])
    said = []
    kept = ranks._attempt
    def attempt(work, calls=[]):
        calls.append(work)
        if [rank, len(calls)] == scene["dies"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return kept(work)
    ranks._attempt = attempt
    for port, words in zip(scene["ports"], scene["lines"]):
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        said += done([words])
        pathlib.Path(here, f"{scene['name']}-{rank}.json").write_text(json.dumps(said))

for scene in plan:
    children = []
    gc.freeze()  # Searching for garbage in all that was imported takes longer than a command.
    for rank in range(scene["size"] if scene["size"] > 1 else 0):
        child = os.fork()
        if not child:
            try:
                share(scene, rank)
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    if not children:
        os.chdir(scene["folder"])
        pathlib.Path(here, f"{scene['name']}-0.json").write_text(json.dumps(done(scene["lines"])))
"""


@dataclasses.dataclass
class Scene:
    """Commands that some processes do together in a folder."""

    name: str
    size: int
    lines: list[list[str]]
    folder: pathlib.Path
    dies: tuple[int, int] = (-1, 0)
    """The rank that is killed, at its which share."""

    def plan(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "folder": str(self.folder), "ports": [port() for _ in self.lines]}

    def said(self, rank: int = 0) -> list[Outcome]:
        text = (self.folder.parent / f"{self.name}-{rank}.json").read_text()
        return [Outcome(*one) for one in json.loads(text.replace(str(self.folder), "…"))]

    def files(self, *runs: str) -> dict[str, bytes]:
        paths = [path for run in runs for path in sorted((self.folder / run).rglob("*")) if path.is_file()]
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in paths}


def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


RUNS = ("importance", "contrast", "probe", "mask", "verify", "evaluate", "guard", "guarded")


def lines(pair, root: pathlib.Path) -> list[list[str]]:
    """A command of every kind of sharing: sums, votes, rows, texts, one process alone, verdicts."""
    unsafe, safe = root / "unsafe.txt", root / "safe.txt"
    for path, texts in ((unsafe, HARMFUL), (safe, HARMLESS)):
        path.write_text("".join(f"{text}{end}\n" for text in texts for end in ("", " ?", " .")))
    one, asked = ["--model", pair.aligned], ["--harmful", pair.harmful, "--harmless", pair.harmless]
    short = ["--batch-size", "2", "--max-new-tokens", "3"]
    shown = ["--prompts", pair.harmful, "--batch-size", "2"]
    labelled = ["--unsafe", str(unsafe), "--safe", str(safe), "--batch-size", "4"]
    commands = [
        ["find", "importance", *one, *shown, "--agreement", "0.5"],
        ["find", "contrast", *pair.models, *shown, "--max-new-tokens", "3"],
        ["find", "probe", *one, *shown, "--harmless", pair.harmless],
        ["find", "mask", *pair.models, *shown, "--harmless", pair.harmless, "--rounds", "2"],
        [
            "verify",
            "deactivate",
            *one,
            "--neurons",
            "contrast",
            *asked,
            "--text",
            pair.text,
            "--random",
            "1",
            *short,
        ],
        [
            "evaluate",
            *one,
            "--deactivate",
            "contrast",
            "--suite",
            pair.harmful,
            "--over-refusal",
            pair.harmless,
            *short,
            "--temperature",
            "0.9",
        ],
        [
            "guard",
            "fit",
            *one,
            "--neurons",
            "contrast",
            *labelled,
            "--other-unsafe",
            "none",
            "--other-safe",
            "none",
        ],
        [
            "guard",
            "evaluate",
            *one,
            "--guard",
            "guard/guard",
            *labelled,
            "--random",
            "1",
            "--perturbations",
            "none",
        ]
        + ["--outputs", "2", "--max-new-tokens", "3"],
    ]
    return [[*words, "--out", out] for words, out in zip(commands, RUNS, strict=True)]


def wrong(pair) -> list[list[str]]:
    """Commands that fail: in a word, by their verb, before and behind the start."""
    find = ["find", "importance", "--model", pair.plain, "--prompts"]
    return [
        ["find", "importances"],
        ["report", "importance", "--out", "page.html"],
        [*find, pair.harmful, "--top", "2", "--out", "w1"],
        [*find, pair.harmful, "--model", "nowhere/to-be-found", "--out", "w2"],
        [*find, pair.harmful, "--threshold", "1e9", "--agreement", "1", "--out", "w3"],
    ]


@pytest.fixture(scope="module")
def scenes(tiny_pair, tmp_path_factory) -> dict[str, Scene]:
    root = tmp_path_factory.mktemp("ranks")
    commands = lines(tiny_pair, root)
    scenes = [
        Scene("one", 1, commands, root / "one"),
        Scene("two", 2, commands, root / "two"),
        Scene("wrong", 2, wrong(tiny_pair), root / "wrong"),
        Scene("dying", 2, commands[:1], root / "dying", dies=(1, 2)),
        Scene("three", 3, commands[:1], root / "dying"),
        Scene("killed", 3, commands[:1], root / "killed", dies=(0, 3)),
        Scene("four", 4, commands[:1], root / "killed"),
    ]
    for scene in scenes:
        scene.folder.mkdir(exist_ok=True)
    folders = [str(folder) for folder in pathlib.Path(__file__).parents[:2]]
    told = json.dumps([str(root), folders, [scene.plan() for scene in scenes]])
    environment = {
        **os.environ,
        "SOURCE_DATE_EPOCH": "1700000000",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, told], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return {scene.name: scene for scene in scenes}


@pytest.mark.whole
def test_two_processes_write_the_bytes_of_one_and_one_of_them_speaks(scenes):
    one, two = scenes["one"], scenes["two"]
    assert [said.code for said in one.said()] == [0] * len(RUNS), one.said()
    assert two.said() == one.said()
    assert two.said(1) == [Outcome(0, "", "")] * len(RUNS)
    expected, found = one.files(*RUNS), two.files(*RUNS)
    assert {"verify/completions.jsonl", "guard/guard/guard.json"} <= expected.keys() == found.keys()
    assert not [name for name, content in expected.items() if found[name] != content]


@pytest.mark.whole
def test_what_is_wrong_is_said_once(scenes):
    first, other = scenes["wrong"].said(), scenes["wrong"].said(1)
    assert [said.code for said in first] == [said.code for said in other] == [2, 2, 2, 1, 1]
    assert not any(said.out or said.err for said in other)
    assert all(said.err.count("\n") == 1 for said in first)
    assert "report is done by one process, and 2 were started" in first[1].err
    assert not any("mktemp" in said.err or "/tmp/safety-neurons" in said.err for said in first)


@pytest.mark.whole
@pytest.mark.parametrize(("dying", "survivor", "then"), [("dying", 0, "three"), ("killed", 1, "four")])
def test_another_number_of_processes_goes_on_from_what_a_killed_one_left(scenes, dying, survivor, then):
    (said,) = scenes[dying].said(survivor)
    assert said.code == 1
    assert "has ended" in said.err
    assert "nothing finished is lost" in said.err
    assert said.err.count("\n") == 1
    assert [outcome.code for outcome in scenes[then].said()] == [0]
    expected = scenes["one"].files("importance")
    assert not [
        name for name, content in scenes[then].files("importance").items() if expected[name] != content
    ]
