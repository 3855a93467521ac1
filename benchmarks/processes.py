"""Several processes that share one command ÷ one process: seconds of the run, processor time of every rank.

    python benchmarks/processes.py --model real:smollm2-135m-instruct --processes 1 2 --repetitions 5

Every process has one thread, so that two processes on two cores are held against one process on one core. The
seconds are those that `run.json` says, loading included and the start of Python left out; the efficiency is
that of one process ÷ that of several, of runs that take turns. On a machine where others work at the same
time the seconds say little: `--clock cpu` compares the processor time of the busiest rank instead, which is
what the seconds would be if every process had a core of its own and never waited.

    python benchmarks/processes.py --machines

runs commands on tiny models by `torchrun` on two machines (namespaces of this one, `tests/machines.py`; needs
Linux, `ip` and the superuser) on one folder: the bytes of one process, and what becomes of the rest and of
the same command when the processes of one machine are killed or its wire is cut.
"""

import argparse
import contextlib
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
import time
from typing import Any

from paired import Row, finish, machine, median, parser

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests"))
import every_verb
from machines import ADDRESSES, WIRE, inside, two_machines

VERBS = {
    "find importance": ["find", "importance", "--prompts", "HARMFUL", "--count", "100"],
    "evaluate": ["evaluate", "--suite", "HARMFUL", "--over-refusal", "HARMLESS", "--max-new-tokens", "32"],
}


def words_of(verb: str, options: argparse.Namespace, folder: pathlib.Path) -> list[str]:
    """The command of a verb, with prompts in files."""
    lists = {name: str(folder / f"{name.lower()}.txt") for name in ("HARMFUL", "HARMLESS")}
    return [
        *(lists.get(word, word) for word in VERBS[verb]),
        "--model",
        options.model,
        "--batch-size",
        options.batch_size,
        "--overwrite",
        "--json",
    ]


def turn(words: list[str], size: int, folder: pathlib.Path) -> tuple[float, list[float]]:
    """Seconds of a run by so many processes, and the processor time of every rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []
    for rank in range(size):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        if size > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-m", "safety_neurons", *words, "--out", str(folder / "run")]
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
    used = []
    for process in running:
        _, status, usage = os.wait4(process.pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0, words
        used.append(usage.ru_utime + usage.ru_stime)
    return float(json.loads((folder / "run" / "run.json").read_text())["timings"]["seconds"]), used


TOGETHER = ("find importance", "evaluate", "guard fit", "tune")
"""One command of each kind of share."""
LONG = "tune"
"""The command whose machines go away."""
MINUTES = 10.0
"""Of waiting for what has to happen."""


class Machines:
    """A command on two machines by `torchrun`, in one folder."""

    def __init__(self, words: list[str], folder: pathlib.Path, machines: list[int]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.machines, self.said = machines, [folder / f"said-{number}" for number in range(len(machines))]
        self.launchers = []
        for number, place in enumerate(machines):
            launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
            launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{ADDRESSES[0]}:{port}"]
            launch += ["--rdzv_conf", f"is_host={int(number == 0)}", "--local_addr", ADDRESSES[number]]
            launch += ["-m", "safety_neurons", *words]
            with self.said[number].open("w") as said:
                self.launchers.append(
                    subprocess.Popen(
                        [*inside(place), *launch],
                        env={**environment(), "GLOO_SOCKET_IFNAME": WIRE},
                        cwd=folder,
                        stdout=said,
                        stderr=said,
                        start_new_session=True,
                    )
                )

    def processes(self, number: int) -> dict[int, str]:
        """What runs the command on a machine: the rank by process; of a launcher none."""
        network = os.stat(f"/proc/{self.machines[number]}/ns/net").st_ino
        found = {}
        for place in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                here = os.stat(place / "ns" / "net").st_ino == network
                if here and b"\0safety_neurons\0" in (place / "cmdline").read_bytes():
                    rank = re.search(rb"(?:^|\0)RANK=(\d+)", (place / "environ").read_bytes())
                    found[int(place.name)] = rank[1].decode() if rank else ""
        return found

    def away(self, number: int, how: str) -> None:
        """Kill the processes of a machine, its launcher among them, or cut its wire."""
        if how == "wire cut":
            subprocess.run([*inside(self.machines[number]), "ip", "link", "set", WIRE, "down"], check=True)
            return
        for process in self.processes(number):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def codes(self) -> list[int | None]:
        """Exit codes, once all have ended; none of what does not end."""
        found: list[int | None] = []
        for launcher in self.launchers:
            try:
                found.append(launcher.wait(MINUTES * 60))
            except subprocess.TimeoutExpired:
                launcher.kill()
                found.append(None)
        return found

    def lines(self, number: int) -> list[str]:
        """What the command itself said on a machine when it failed."""
        return re.findall(
            r"^safety-neurons: .*$", self.said[number].read_text(errors="replace"), re.MULTILINE
        )


def environment() -> dict[str, str]:
    """Of a command whose files are to be the same each time."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "SOURCE_DATE_EPOCH": "1700000000",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def files_in(folder: pathlib.Path) -> dict[str, bytes]:
    """By name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def until(happened: Any, what: str) -> float:
    """Seconds until something is so."""
    start = time.monotonic()
    while not happened():
        assert time.monotonic() - start < MINUTES * 60, what
        time.sleep(0.05)
    return time.monotonic() - start


def on_machines(options: argparse.Namespace) -> None:
    """Run, lose a machine, go on; print and record."""
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        places, machines = every_verb.inputs(folder / "given"), stack.enter_context(two_machines())
        if not machines:
            raise SystemExit("two machines need Linux, its program `ip` and the superuser")
        commands = {verb: every_verb.words_of(verb, places) for verb in TOGETHER}
        long = [*commands[LONG], "--max-steps", str(options.steps), "--epochs", str(options.steps)]
        same, away = {}, []
        for verb, words in commands.items():
            alone = one_process(words, folder, verb)
            shutil.copytree(folder / "given", folder / f"{verb} of two")
            start = time.monotonic()
            codes = Machines(words, folder / f"{verb} of two", machines).codes()
            found = files_in(folder / f"{verb} of two" / every_verb.out_of(verb))
            same[verb] = {"codes": codes, "same_bytes": found == alone, "files": len(found)}
            same[verb]["seconds"] = round(time.monotonic() - start, 1)
            print(verb, json.dumps(same[verb]), flush=True)
        alone = one_process(long, folder, "long")
        for number, how in ((1, "killed"), (0, "killed"), (1, "wire cut")):
            away.append(gone(long, folder, machines, number, how))
            away[-1]["same_bytes"] = files_in(folder / f"{how} {number}" / every_verb.out_of(LONG)) == alone
            print(json.dumps(away[-1]), flush=True)
    record = {"benchmark": "machines", "same": same, "away": away, "settings": {"steps": options.steps}}
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**record, "machine": machine()}, indent=2)
    (options.out / "machines.json").write_text(f"{text}\n", encoding="utf-8")


def one_process(words: list[str], folder: pathlib.Path, name: str) -> dict[str, bytes]:
    """What the command leaves when one process does it."""
    place = folder / f"{name} of one"
    shutil.copytree(folder / "given", place)
    command = [sys.executable, "-m", "safety_neurons", *words]
    subprocess.run(command, env=environment(), cwd=place, check=True, capture_output=True)
    return files_in(place / words[words.index("--out") + 1])


def gone(
    words: list[str], folder: pathlib.Path, machines: list[int], number: int, how: str
) -> dict[str, Any]:
    """Take a machine away in the middle of a command, and give the same command again."""
    place = folder / f"{how} {number}"
    shutil.copytree(folder / "given", place)
    begun = Machines(words, place, machines)
    kept = place / every_verb.out_of(LONG) / "checkpoints"
    until(lambda: kept.is_dir() and any(kept.iterdir()), "a checkpoint")
    rest = [other for other in range(len(machines)) if how == "wire cut" or other != number]
    ranks = {other: max(begun.processes(other).values()) for other in rest}
    begun.away(number, how)
    start = time.monotonic()
    until(lambda: all(begun.lines(other) for other in rest), "a line of every machine that is left")
    said = time.monotonic() - start
    codes = begun.codes()
    ended = time.monotonic() - start
    lines = {other: begun.lines(other) for other in rest}  # before the same command writes there again
    subprocess.run([*inside(machines[number]), "ip", "link", "set", WIRE, "up"], check=True)
    again = Machines(words, place, machines).codes()
    return {
        "machine": number,
        "how": how,
        "seconds_until_all_have_said_so": round(said, 1),
        "seconds_until_the_launchers_have_ended": round(ended, 1),
        "codes": codes,
        "ranks": ranks,
        "lines": lines,
        "again": again,
    }


def main() -> None:
    """Measure and record."""
    options_of = parser(__doc__ or "")
    options_of.add_argument("--model", default="real:smollm2-135m-instruct")
    options_of.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    options_of.add_argument("--prompts", type=int, default=64)
    options_of.add_argument("--batch-size", default="8")
    options_of.add_argument("--verbs", nargs="+", choices=list(VERBS), default=list(VERBS))
    options_of.add_argument("--machines", action="store_true", help="what two machines do instead")
    options_of.add_argument("--steps", type=int, default=400, help="of the command whose machines go away")
    options = options_of.parse_args()
    if options.machines:
        on_machines(options)
        return
    load = os.getloadavg()[0]
    seconds: dict[str, dict[int, list[float]]] = {}
    ranks: dict[str, dict[int, list[list[float]]]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        from safety_neurons import prompts

        for name in ("harmful", "harmless"):
            texts = prompts(f"builtin:{name}", limit=options.prompts).texts
            (folder / f"{name}.txt").write_text("".join(f"{text}\n" for text in texts))
        for verb in options.verbs:
            for repetition in range(options.repetitions):
                order = options.processes if repetition % 2 == 0 else options.processes[::-1]
                for size in order:
                    took, used = turn(words_of(verb, options, folder), size, folder)
                    seconds.setdefault(verb, {}).setdefault(size, []).append(took)
                    ranks.setdefault(verb, {}).setdefault(size, []).append(used)
    rows: list[Row] = []
    for verb, by_size in seconds.items():
        for size, several in by_size.items():
            if size > 1 and 1 in by_size:
                alone = by_size[1]
                if options.clock == "cpu":
                    alone, several = ([max(used) for used in ranks[verb][n]] for n in (1, size))
                pairs: Any = zip(alone, several, strict=True)
                what = f"{verb}: one process ÷ {size} processes"
                rows.append(Row(what, median([one / other for one, other in pairs])))
    finish("processes", rows, options, {"seconds": seconds, "processor_seconds_of_ranks": ranks}, load)


if __name__ == "__main__":
    main()
