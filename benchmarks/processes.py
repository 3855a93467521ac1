"""Several processes that share one command ÷ one process: seconds of the run, processor time of every rank.

    python benchmarks/processes.py --model real:smollm2-135m-instruct --processes 1 2 --repetitions 5

Every process has one thread, so that two processes on two cores are held against one process on one core. The
seconds are those that `run.json` says, loading included and the start of Python left out; the efficiency is
that of one process ÷ that of several, of runs that take turns. On a machine where others work at the same
time the seconds say little: `--clock cpu` compares the processor time of the busiest rank instead, which is
what the seconds would be if every process had a core of its own and never waited.
"""

import argparse
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
from typing import Any

from paired import Row, finish, median, parser

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


def main() -> None:
    """Measure and record."""
    options_of = parser(__doc__ or "")
    options_of.add_argument("--model", default="real:smollm2-135m-instruct")
    options_of.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    options_of.add_argument("--prompts", type=int, default=64)
    options_of.add_argument("--batch-size", default="8")
    options_of.add_argument("--verbs", nargs="+", choices=list(VERBS), default=list(VERBS))
    options = options_of.parse_args()
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
