"""Kill commands at random moments and at random file operations: whether what they leave is whole, and
whether the same command goes on to the same bytes.

One process imports everything and runs every command once undisturbed; each trial is a fork of it, so that a
trial costs what the command costs. Two kinds of moments take turns: a time drawn from the length of the
undisturbed command, and one of its file operations (open for writing, sync, rename, remove, make a folder),
drawn evenly. At a sync the end of the written file is cut off as well, as if the system had written only a
part of it. Every third trial is killed a second time while it goes on.

With `--processes 2` two forks share each command (`report` aside, which one process does) and one of them,
drawn, is killed: the other has to end within a minute by itself, with one line that says who is gone, and
two again go on to the bytes that one process leaves.

SOURCE_DATE_EPOCH=1700000000 python benchmarks/faults.py --kills 50 --processes 1 2
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

os.environ.setdefault("SOURCE_DATE_EPOCH", "1700000000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from safetensors import safe_open

from paired import RESULTS, machine

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests" / "cli"))
import running

import tiny
import tiny_pair
from safety_neurons.model import load, ranks
from safety_neurons.neurons import NeuronSet
from safety_neurons.results.run import PARTIAL, Checkpoint

UNCOMPARED = ("judgements.sqlite",)
"""Files of which docs/files.md says that their bytes differ from run to run."""
LIMIT = 300.0
"""Seconds after which a command counts as hung."""
MINUTE = 70.0
"""Seconds in which a process has to end after another of the same command was killed: a minute is waited for
one that does not come.
"""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass
class Verb:
    """A command, what it leaves undisturbed, and what became of its kills."""

    name: str
    words: list[str]
    processes: int = 1
    seconds: float = 0.0
    processor_seconds: float = 0.0
    """Of a trial: its kills, and the run to the end."""
    operations: int = 0
    expected: dict[str, bytes] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """The line of the table."""
        return {
            "verb": self.name,
            "processes": self.processes,
            "seconds": round(self.seconds, 3),
            "processor_seconds_a_trial": round(self.processor_seconds, 2),
            "file_operations": self.operations,
            **{name: self.counts[name] for name in ("kills", "at_a_time", "at_an_operation", "half_lines")},
            "went_on_to_the_same_bytes": self.counts["same"],
            "faults": self.faults,
        }


def inputs(folder: pathlib.Path) -> list[Verb]:
    """A tiny base with two adapters, prompts, a neuron set, and the commands on them."""
    base = tiny.tiny_llama_folder(folder / "plain")
    adapters = [tiny.tiny_adapter_folder(base, folder / name, seed=n) for n, name in ((1, "sft"), (2, "dpo"))]
    plain, first = str(base), f"{base}+{adapters[0]}"
    harmful, harmless = (
        tiny_pair.lines(folder / f"{name}.txt", texts)
        for name, texts in (("harmful", tiny_pair.HARMFUL), ("harmless", tiny_pair.HARMLESS))
    )
    neurons = folder / "neurons.safetensors"
    members = {"layers.0.up": [0, 1, 2, 3], "layers.0.q": [5], "layers.1.down": [7, 9], "layers.1.o": [1]}
    NeuronSet(members, load(plain).table).save(neurons)
    rows = {"refusals": [], "answers": [], "labelled": []}
    for how in ("how do i", "please explain how to", "tell me how to", "why"):
        for bad, good in (("kill", "grow"), ("steal", "open"), ("make a bomb", "make a cake")):
            rows["refusals"].append({"prompt": f"{how} {bad}", "response": "sorry i cannot help"})
            rows["answers"].append({"prompt": f"{how} {good}", "response": "sure here"})
            rows["labelled"] += [
                {"prompt": f"{how} {bad}", "label": "unsafe"},
                {"prompt": f"{how} {good}", "label": "safe"},
            ]
    files = {name: folder / f"{name}.jsonl" for name in rows}
    for name, file in files.items():
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]), encoding="utf-8")
    pair = ["--base", first, "--aligned", f"{first}+{adapters[1]}"]
    asked = ["--harmful", harmful, "--harmless", harmless, "--limit", "3", "--max-new-tokens", "3"]
    short = ["--batch-size", "2", "--max-new-tokens", "3"]
    tests = ["--test-harmful", harmful, "--test-harmless", harmless, "--text", "none"]
    tuned = ["--data", str(files["refusals"]), "--harmless", str(files["answers"]), *tests]
    suite = ["--suite", harmful, "--over-refusal", harmless, "--limit", "4", "--deactivate", str(neurons)]
    methods = ["--methods", "contrast,weight-change", "--random", "1"]
    return [
        Verb("find", ["find", "contrast", *pair, "--prompts", harmful, *short, "--top", "0.1"]),
        Verb("evaluate", ["evaluate", "--model", plain, *suite, *short]),
        Verb("compare", ["compare", *pair, "--prompts", harmful, *asked, *methods]),
        Verb("tune", ["tune", "--model", plain, "--neurons", str(neurons), *tuned, "--epochs", "2", *short]),
        Verb("guard fit", ["guard", "fit", "--model", plain, "--neurons", str(neurons), "--labelled",
                           str(files["labelled"]), "--pooling", "last"]),
        Verb("report", ["report", str(folder / "find")]),
    ]  # fmt: skip


def out_of(verb: Verb) -> list[str]:
    """What the command is told to write, in the folder that it runs in."""
    return ["--out", "report.html" if verb.name == "report" else "run"]


def run(verb: Verb, folder: pathlib.Path) -> running.Outcome:
    """The command in a folder, in this process."""
    earlier = pathlib.Path.cwd()
    os.chdir(folder)
    try:
        return running.command(*verb.words, *out_of(verb))
    finally:
        os.chdir(earlier)


@dataclass(frozen=True)
class Kill:
    """The file operation of a process at which it kills itself; at none where `at` is 0."""

    rank: int = 0
    at: int = 0
    seed: int = 0
    """Of where a written file is cut off."""


def started(verb: Verb, folder: pathlib.Path, kill: Kill = Kill()) -> list[int]:
    """Start the command in forks that every save is due in; process ids by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(verb.processes):
        child = os.fork()
        if not child:
            _work(verb, folder, kill if kill.rank == rank else Kill(), rank, port)
        children.append(child)
    return children


def _work(verb: Verb, folder: pathlib.Path, kill: Kill, rank: int, port: int) -> None:
    """One of the forks, to its end."""
    place = folder.parent / f"{folder.name}.{rank}.err"
    place.unlink(missing_ok=True)
    try:
        if verb.processes > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(verb.processes))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            ranks.waiting = lambda: False  # what was said is still to be written down
        operations = Operations(kill.at, kill.seed)
        outcome = run(verb, folder)
        place.with_suffix(".seen").write_text(str(operations.seen))
        if outcome.code:
            place.write_text(outcome.err + outcome.out)
        os._exit(outcome.code)
    except BaseException as error:  # a fork must not go on as if it were the harness
        place.write_text(repr(error))
        os._exit(99)


class Operations:
    """Counts this process's file operations and ends it, as a kill does, at one of them."""

    def __init__(self, kill_at: int, seed: int) -> None:
        self.kill_at, self.seen, self.random = kill_at, 0, random.Random(seed)
        self.sync = os.fsync
        os.fsync = self.synced
        sys.addaudithook(self.audited)

    def audited(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit event of the interpreter."""
        if event == "open":
            if isinstance(arguments[2], int) and arguments[2] & WRITES:
                self.step()
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            self.step()

    def synced(self, descriptor: int) -> None:
        """In the place of `os.fsync`: everything is written, and perhaps not all of it on the disk."""
        self.step(descriptor)

    def step(self, descriptor: int | None = None) -> None:
        """One more; at the one that was drawn the process ends."""
        self.seen += 1
        if self.seen != self.kill_at:
            return
        if descriptor is not None and (size := os.fstat(descriptor).st_size):
            os.truncate(descriptor, size - self.random.randrange(min(size, 40)))
        os.kill(os.getpid(), signal.SIGKILL)


def ended(child: int, limit: float) -> int | None:
    """The exit status of a process, the negative signal where one ended it; None where it runs on."""
    until = time.monotonic() + limit
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(0.002)


def killed(verb: Verb, folder: pathlib.Path, draw: random.Random, *, by_time: bool) -> bool:
    """Run the command and kill it, or one of its processes; whether that came before its end."""
    rank = draw.randrange(verb.processes)
    if by_time:
        children = started(verb, folder)
        status = ended(children[rank], draw.random() * verb.seconds)
    else:
        kill = Kill(rank, draw.randint(1, verb.operations), draw.randrange(2**32))
        children = started(verb, folder, kill)
        status = ended(children[rank], LIMIT)
        if status is None:
            verb.faults.append("hung")
    if status is None:
        os.kill(children[rank], signal.SIGKILL)
        status = ended(children[rank], LIMIT)
    if status not in (0, -signal.SIGKILL):
        verb.faults.append(f"failed by itself with {status}: {said(folder, rank)}")
    for other, child in enumerate(children):
        if other != rank:
            _survived(
                verb, folder, other, ended(child, MINUTE if status else LIMIT), child, gone=bool(status)
            )
    return status == -signal.SIGKILL


def _survived(
    verb: Verb, folder: pathlib.Path, rank: int, status: int | None, child: int, *, gone: bool
) -> None:
    """Hold the process that was not killed to its end in time and its one line."""
    if status is None:
        os.kill(child, signal.SIGKILL)
        ended(child, LIMIT)
        verb.faults.append(f"process {rank} did not end within a minute of the other")
    elif status:
        text = said(folder, rank)
        if not gone or "\n" in text or not ("has ended" in text or "did not meet" in text):
            verb.faults.append(f"process {rank} ended with {status}: {text}")


def said(folder: pathlib.Path, rank: int = 0) -> str:
    """What a process that failed said."""
    file = folder.parent / f"{folder.name}.{rank}.err"
    return file.read_text()[-300:].strip() if file.is_file() else ""


def finished(verb: Verb, folder: pathlib.Path) -> int:
    """Run the command to its end: its exit code, the worst of its processes'."""
    children = started(verb, folder)
    statuses = [ended(child, LIMIT) for child in children]
    for child, status in zip(children, statuses, strict=True):
        if status is None:
            os.kill(child, signal.SIGKILL)
            ended(child, LIMIT)
    return max((99 if status is None else abs(status)) for status in statuses)


def files_in(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Every file by its place, without what says of itself that it is unfinished."""
    return {
        str(path.relative_to(folder)): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.endswith(PARTIAL) for part in path.relative_to(folder).parts)
    }


def half_written(verb: Verb, folder: pathlib.Path) -> list[str]:
    """Files that would be read as whole and are not. Cut last lines of completions, which their reader drops,
    are counted alone.
    """
    found = []
    for name, path in files_in(folder).items():
        content = path.read_bytes()
        try:
            if path.suffix == ".jsonl":
                *lines, last = content.split(b"\n")
                for line in lines:
                    json.loads(line)
                verb.counts["half_lines"] += bool(last)
            elif path.suffix == ".json":
                json.loads(content)
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="numpy") as opened:
                    for key in opened.keys():  # noqa: SIM118 - not a mapping
                        opened.get_tensor(key)
            elif path.suffix == ".sqlite":
                with sqlite3.connect(path) as store:
                    if store.execute("PRAGMA integrity_check").fetchone() != ("ok",):
                        raise ValueError("not whole")
            elif name in verb.expected and content != verb.expected[name] and path.name != ".lock":
                raise ValueError(f"{len(content)} of {len(verb.expected[name])} bytes")
        except Exception as error:
            found.append(f"{name}: {type(error).__name__} {error}"[:200])
    return found


def bytes_in(folder: pathlib.Path) -> dict[str, bytes]:
    """What is compared: everything, unfinished files included."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in UNCOMPARED
    }


def trial(verb: Verb, folder: pathlib.Path, draw: random.Random, number: int) -> None:
    """Kill the command once or twice, look at what it left, and let it go on."""
    folder.mkdir()
    for again in range(2 if number % 3 == 2 else 1):
        by_time = number % 2 == 0
        if killed(verb, folder, draw, by_time=by_time):
            verb.counts.update(("kills", "at_a_time" if by_time else "at_an_operation"))
        verb.faults += [
            f"trial {number}.{again}: half written: {name}" for name in half_written(verb, folder)
        ]
    status = finished(verb, folder)
    if status:
        verb.faults.append(f"trial {number}: did not go on ({status}): {said(folder)}")
        return
    made = bytes_in(folder)
    other = sorted(name for name in {*made, *verb.expected} if made.get(name) != verb.expected.get(name))
    verb.counts["same"] += not other
    verb.counts["trials"] += 1
    if other:
        verb.faults.append(f"trial {number}: other bytes: {', '.join(other)[:200]}")
    else:
        shutil.rmtree(folder)


def undisturbed(verb: Verb, folder: pathlib.Path) -> None:
    """What the command leaves when one process does it, and seconds and file operations of its processes."""
    folder.mkdir()
    outcome = run(verb, folder)  # warms this process
    if outcome.code:
        raise SystemExit(f"{verb.name}: {outcome.err}")
    verb.expected = bytes_in(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    start = time.monotonic()
    status = finished(verb, folder)
    verb.seconds = time.monotonic() - start
    if status:
        raise SystemExit(f"{verb.name}: {status} {said(folder)}")
    if bytes_in(folder) != verb.expected:
        verb.faults.append("other bytes undisturbed")
    verb.operations = int((folder.parent / f"{folder.name}.0.seen").read_text())


def used() -> float:
    """Processor seconds of all forks that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def main(words: Sequence[str] | None = None) -> int:
    """Kill every command, print the table, write the record; 1 where there was a fault."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--kills", type=int, default=50, help="trials of each command")
    options.add_argument("--verbs", default="", help="a part of them, by name, with commas")
    options.add_argument("--processes", type=int, nargs="+", default=[1], help="that share a command")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder for the JSON record")
    chosen = options.parse_args(words)
    begun = time.monotonic()
    work = pathlib.Path(tempfile.mkdtemp(prefix="faults-"))
    (work / "inputs").mkdir()
    verbs = inputs(work / "inputs")
    wanted = chosen.verbs.split(",") if chosen.verbs else [verb.name for verb in verbs]
    Checkpoint.due = True  # commands of a second would save nothing otherwise
    done = [
        replace(verb, processes=size, counts=Counter(), faults=[])
        for size in chosen.processes
        for verb in verbs
        if verb.name in wanted and (size == 1 or verb.name != "report")
    ]
    if "report" in wanted:
        found = running.command(*verbs[0].words, "--out", work / "inputs" / verbs[0].name)
        assert found.code == 0, found.err
    for verb in done:
        name = f"{verb.name} of {verb.processes}"
        undisturbed(verb, work / name)
        draw, before = random.Random(f"{chosen.seed} {name}"), used()
        for number in range(chosen.kills):
            trial(verb, work / f"{name} {number}", draw, number)
        verb.processor_seconds = (used() - before) / max(1, chosen.kills)
        print(json.dumps(verb.row()), flush=True)
    record = {
        "benchmark": "faults",
        "rows": [verb.row() for verb in done],
        "settings": {"kills": chosen.kills, "processes": chosen.processes, "seed": chosen.seed},
        "machine": machine(),
        "seconds": round(time.monotonic() - begun),
    }
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "faults.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    faults = sum(len(verb.faults) for verb in done)
    if faults:
        print(f"{faults} faults; what they left lies in {work}")
    else:
        shutil.rmtree(work)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
