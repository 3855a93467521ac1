"""Several processes do one command as one does: the same bytes, one voice; others go on from what is left.

One child process imports everything, is the reference of one process, and forks the others: a start costs
more than their work.
"""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from running import Outcome

import every_verb
from machines import ADDRESSES, WIRE, two_machines
from safety_neurons.cli import processes

PROGRAM = """
import ctypes, gc, json, os, pathlib, signal, subprocess, sys
import torch
here, tests, plan = json.loads(sys.argv[1])
sys.path[:0] = tests
from machines import WIRE
from running import command
from safety_neurons.cli import processes
from safety_neurons.model import ranks

def done(lines):
    return [[*vars(command(*words)).values()] for words in lines]

class Dying(torch.distributed.Store):  # ends its process when its address is told and the others' are awaited
    def __init__(self, store):
        super().__init__()
        for name in ("set", "add", "get", "check"):  # Of Python's own: gloo finds no other in their place.
            setattr(self, name, lambda *words, name=name: getattr(store, name)(*words))
    def wait(self, *_):
        os.kill(os.getpid(), signal.SIGKILL)

def enter(process):
    system = ctypes.CDLL(None, use_errno=True)
    for kind in ("net", "uts"):
        namespace = os.open(f"/proc/{process}/ns/{kind}", os.O_RDONLY)
        assert system.setns(namespace, 0) == 0, os.strerror(ctypes.get_errno())
    subprocess.run(["ip", "link", "set", WIRE, "up"], check=True)
    ranks.SILENCE.update(TCP_KEEPIDLE=1, TCP_KEEPINTVL=1, TCP_KEEPCNT=2, TCP_USER_TIMEOUT=3000)
    os.environ["LOCAL_RANK"] = "0"

def share(scene, rank):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(scene["size"]))
    os.environ.update(scene["variables"])
    os.chdir(scene["folders"][rank])
    if scene["machines"]:
        enter(scene["machines"][rank])
    said = []
    kept, speaks = ranks._attempt, processes.speaks
    ranks.waiting = lambda: False  # what was said is still to be written down
    if scene["dies"][0] >= 0 and not scene["dies"][1]:
        ranks.PATIENCE = 5.0
        if rank == scene["dies"][0]:
            start = torch.distributed.init_process_group
            torch.distributed.init_process_group = lambda *words, store, **about: start(
                *words, store=Dying(store), **about
            )
    def attempt(work, calls=[]):
        calls.append(work)
        if [rank, len(calls)] == scene["dies"] and scene["by"]:
            os.kill(os.getpid(), scene["by"])
        elif [rank, len(calls)] == scene["dies"]:
            subprocess.run(["ip", "link", "set", WIRE, "down"], check=True)
        return kept(work)
    ranks._attempt = attempt
    def told_again():
        if scene["dies"][0] >= 0 and scene["by"]:
            os.kill(os.getpid(), signal.SIGTERM)  # a launcher's word, while the last line is on its way
        return speaks()
    processes.speaks = told_again
    for port, words in zip(scene["ports"], scene["lines"]):
        os.environ.update(MASTER_ADDR=scene["address"], MASTER_PORT=str(port))
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
        os.chdir(scene["folders"][0])
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
    """The rank that a signal ends, at its which share (the first open the folder); at 0 while they meet."""
    by: int = signal.SIGKILL
    """The signal; where it is 0, the rank's machine is cut off in its place."""
    other: pathlib.Path | None = None
    """The folder of every rank but 0, where that is another."""
    machines: Sequence[int] = ()
    """A process on the machine of every rank, where that is another than this one."""
    variables: dict[str, str] = dataclasses.field(default_factory=dict)
    """Of the environment."""

    def plan(self) -> dict[str, Any]:
        folders = [str(self.folder), *[str(self.other or self.folder)] * (self.size - 1)]
        return {
            **dataclasses.asdict(self),
            "folders": folders,
            "address": ADDRESSES[0] if self.machines else "127.0.0.1",
            "ports": [port() for _ in self.lines],
        }

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


RUNS = tuple(
    verb
    for verb in every_verb.LINES
    if verb.split()[0] in ("find", "verify", "compare", "evaluate", "tune")
    or verb in ("guard fit", "guard evaluate")
    or (verb.startswith("analyze ") and verb not in ("analyze layers", "analyze overlap"))
)
"""Everything that several processes share."""
SOME = ("find importance", "evaluate", "guard fit", "tune")
"""One of each kind of share: sums, answers, rows, gradients."""
AGAIN = ("find importance", "tune")
"""What goes on from what a killed process left."""


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


def pair_of(verbs: Sequence[str], root: pathlib.Path) -> list[Scene]:
    """The same commands by one process and by two."""
    places = every_verb.inputs(root / "given")
    commands = [every_verb.words_of(verb, places) for verb in verbs]
    return [Scene("one", 1, commands, root / "one"), Scene("two", 2, commands, root / "two")]


def played(scenes: list[Scene], root: pathlib.Path) -> dict[str, Scene]:
    """Run the scenes, one after the other, each on the inputs or on what an earlier one left."""
    for scene in scenes:
        if not scene.folder.is_dir():
            shutil.copytree(root / "given", scene.folder)
    folders = [str(folder) for folder in pathlib.Path(__file__).parents[:2]]
    told = json.dumps([root, folders, [scene.plan() for scene in scenes]], default=str)
    environment = {
        **os.environ,
        "SOURCE_DATE_EPOCH": "1700000000",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "TMPDIR": str(root / "aside"),
    }
    (root / "aside").mkdir()
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, told], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return {scene.name: scene for scene in scenes}


@pytest.fixture(scope="module")
def scenes(tiny_pair, tmp_path_factory) -> dict[str, Scene]:
    root = tmp_path_factory.mktemp("ranks")
    one, two = pair_of(SOME, root)
    again = [[words] for verb, words in zip(SOME, one.lines, strict=True) if verb in AGAIN]
    with two_machines() as machines:
        return played(
            [
                one,
                two,
                Scene("wrong", 2, wrong(tiny_pair), root / "wrong"),
                Scene("meeting", 2, again[0], root / "meeting", dies=(0, 0)),
                Scene("dying", 2, again[0], root / "dying", dies=(1, 4)),
                Scene("unlike", 2, unlike(one.lines, root), root / "unlike", other=root / "other"),
                Scene("four", 4, again[0], root / "dying"),
                Scene("killed", 3, again[1], root / "killed", dies=(0, 11)),
                Scene("apart", 2, again[1], root / "apart", other=root / "killed"),
                Scene("fewer", 2, again[1], root / "killed"),
                Scene("told", 2, again[0], root / "told", dies=(1, 4), by=signal.SIGTERM),
                *(on_machines(machines, again, root) if machines else ()),
            ],
            root,
        )


def unlike(lines: list[list[str]], root: pathlib.Path) -> list[list[str]]:
    """Commands that read another file on another machine, one in a new folder and one anew in an old one."""
    shutil.copytree(root / "given", root / "other")
    with (root / "other" / "labelled.jsonl").open("a") as stream:
        stream.write(json.dumps({"prompt": "one more", "label": "safe"}) + "\n")
    words = lines[SOME.index("guard fit")]
    return [words, [*words, "--overwrite"]]


def on_machines(machines: Sequence[int], again: list[list[list[str]]], root: pathlib.Path) -> list[Scene]:
    """Commands of two machines, of which one goes away; the same ones go on."""

    def scene(name: str, lines: list[list[str]], folder: str, **about: Any) -> Scene:
        found = {"GLOO_SOCKET_IFNAME": WIRE}
        return Scene(name, 2, lines, root / folder, machines=machines, **{"variables": found, **about})

    return [
        scene("machines", again[0], "machines"),
        scene("unnamed", again[0], "unnamed", variables={}),
        scene("lost", again[1], "lost", dies=(1, 7)),
        scene("cut", again[1], "lost", dies=(1, 7), by=0),
        scene("whole", again[1], "lost"),
    ]


def differing(scenes: dict[str, Scene], name: str = "two") -> list[str]:
    """Files that two processes did not write as one does; rank 0 alone has spoken."""
    one, two = scenes["one"], scenes[name]
    alone = {tuple(words): said for words, said in zip(one.lines, one.said(), strict=True)}
    assert {said.code for said in alone.values()} == {0}, alone
    assert two.said() == [alone[tuple(words)] for words in two.lines]
    assert two.said(1) == [Outcome(0, "", "")] * len(two.lines)
    outs = [words[-1] for words in two.lines]
    expected, found = one.files(*outs), two.files(*outs)
    assert expected
    assert expected.keys() == found.keys()
    return [name for name, content in expected.items() if found[name] != content]


def test_two_processes_write_the_bytes_of_one_and_one_of_them_speaks(scenes):
    assert differing(scenes) == []
    made = scenes["two"].files(*map(every_verb.out_of, SOME))
    assert {"guard-fit/guard/guard.json", "tune/adapter/adapter_model.safetensors"} <= made.keys()


@pytest.fixture
def on_two(scenes) -> dict[str, Scene]:
    if "machines" not in scenes:
        pytest.skip("network namespaces need Linux, its program `ip` and the superuser")
    return scenes


def test_two_machines_write_the_bytes_of_one_process(on_two):
    """What they share goes the same way whatever it is: one kind here, another where a run goes on below."""
    assert differing(on_two, "machines") == []


def test_a_machine_that_the_others_cannot_reach_is_told_what_to_set(on_two):
    (first,), (other,) = on_two["unnamed"].said(), on_two["unnamed"].said(1)
    assert (first.code, other.code, other.err) == (1, 1, "")
    assert "would wait for the others at 127.0.0.1" in first.err
    assert "set GLOO_SOCKET_IFNAME on every machine" in first.err
    assert first.err.count("\n") == 1


def test_a_machine_that_goes_away_ends_the_others_and_the_same_command_goes_on(on_two):
    """A killed process closes its connections; of a machine that is cut off nothing is heard."""
    (lost,) = on_two["lost"].said()
    cut = [on_two["cut"].said(rank)[0] for rank in range(2)]
    for said, other in ((lost, 1), (cut[0], 1), (cut[1], 0)):
        assert said.code == 1
        assert f"another process, or the connection to machine-{other}, has ended" in said.err
        assert "typically" not in said.err  # gloo guesses at a cause behind what happened
        assert "nothing finished is lost" in said.err
        assert said.err.count("\n") == 1
    assert [outcome.code for outcome in on_two["whole"].said()] == [0]
    out = every_verb.out_of(AGAIN[1])
    assert on_two["whole"].files(out) == on_two["one"].files(out)


def test_a_run_that_only_another_machine_holds_is_left_alone(scenes):
    (first,), (other,) = scenes["apart"].said(), scenes["apart"].said(1)
    assert (first.code, other.code, other.err) == (1, 1, "")
    assert f"'{every_verb.out_of(AGAIN[1])}' holds a run on {socket.gethostname()} and none" in first.err
    assert "expected one folder that all machines share" in first.err
    assert first.err.count("\n") == 1
    assert scenes["apart"].files(every_verb.out_of(AGAIN[1])) == {}


def test_machines_that_are_given_different_files_do_not_start(scenes):
    for first, other in zip(scenes["unlike"].said(), scenes["unlike"].said(1), strict=True):
        assert (first.code, other.code, other.err) == (1, 1, "")
        assert "rank 0 and process 1 on" in first.err
        assert "another labelled: 'labelled.jsonl' has changed since); expected the same command" in first.err
        assert first.err.count("\n") == 1
        assert "aside" not in first.err
    assert scenes["unlike"].files(every_verb.out_of("guard fit")) == {}


@pytest.mark.whole
def test_two_processes_write_the_bytes_of_one_by_every_verb_that_they_share(tmp_path):
    assert differing(played(pair_of(RUNS, tmp_path), tmp_path)) == []


def test_what_is_wrong_is_said_once(scenes):
    first, other = scenes["wrong"].said(), scenes["wrong"].said(1)
    assert [said.code for said in first] == [said.code for said in other] == [2, 2, 2, 1, 1]
    assert not any(said.out or said.err for said in other)
    assert all(said.err.count("\n") == 1 for said in first)
    assert "report is done by one process, and 2 were started" in first[1].err
    assert not any("mktemp" in said.err or "/tmp/safety-neurons" in said.err for said in first)


@pytest.mark.parametrize(
    ("verb", "dying", "survivor", "then"), [(AGAIN[0], "dying", 0, "four"), (AGAIN[1], "killed", 1, "fewer")]
)
def test_another_number_of_processes_goes_on_from_what_a_killed_one_left(scenes, verb, dying, survivor, then):
    (said,) = scenes[dying].said(survivor)
    assert said.code == 1
    assert "has ended" in said.err
    assert "nothing finished is lost" in said.err
    assert said.err.count("\n") == 1
    assert [outcome.code for outcome in scenes[then].said()] == [0]
    out = every_verb.out_of(verb)
    expected, found = scenes["one"].files(out), scenes[then].files(out)
    assert expected.keys() == found.keys()
    assert not [name for name, content in found.items() if expected[name] != content]


def test_a_process_that_is_told_to_end_names_the_folder_of_rank_0(scenes):
    (said,), (other,) = scenes["told"].said(1), scenes["told"].said()
    place = every_verb.out_of(AGAIN[0])
    assert said.code == 128 + signal.SIGINT
    assert "interrupted: nothing finished is lost; the same command with --out " in said.err
    assert f"{place} continues" in said.err
    assert "aside" not in said.err
    assert (other.code, other.err) == (1, "")


def test_what_a_killed_process_kept_aside_is_removed_at_the_next_start(scenes):
    assert [said.code for said in scenes["dying"].said()] == [1]
    assert [*(scenes["dying"].folder.parent / "aside").glob("safety-neurons-*")] == []


def test_a_process_that_dies_while_it_meets_the_others_ends_them(scenes):
    """Gloo waits five times as long as it is told for one whose address it has."""
    assert not (
        scenes["meeting"].folder.parent / "meeting-0.json"
    ).exists()  # It was killed, and said nothing.
    (said,) = scenes["meeting"].said(1)
    assert (said.code, said.err.count("\n")) == (1, 1)
    # Which is noticed first depends on the moment: that the other is silent, or that meeting it failed.
    told = r"process 1 of 2 did not meet the others within 5 seconds \(|process 0 of 2 .*has ended: nothing"
    assert re.search(told, said.err), said.err


def test_a_run_beside_the_folders_of_killed_processes_is_never_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("mine", "left"):
        (tmp_path / f"safety-neurons-{name}").mkdir()
        (tmp_path / f"safety-neurons-{name}" / "run.json").write_text("{}")
    (tmp_path / "safety-neurons-left" / processes._ASIDE).touch()
    processes._remove_left()
    assert [path.name for path in tmp_path.iterdir()] == ["safety-neurons-mine"]
    assert [path.name for path in (tmp_path / "safety-neurons-mine").iterdir()] == ["run.json"]
