"""Runs every benchmark one after the other, writes benchmarks/results/*.json and prints one table.

python benchmarks/run.py    # all, at least 31 repetitions where time is measured: about an hour on one core
python benchmarks/run.py --quick    # few repetitions, to see that everything runs
python benchmarks/run.py --only statistics startup
python benchmarks/peers.py    # beside other tools, in an environment of its own
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from paired import RESULTS, Median, Row, machine, print_rows

HERE = pathlib.Path(__file__).resolve().parent
IMPORTANCE_TARGETS = {64: 1.6, 128: 2.0}
PAIRS = {
    "ia3": "(IA)³ adapters on one base",
    "lora": "LoRA adapters on one base",
    "separate": "two separate models",
}


def call(words: list[str], threads: int) -> str:
    """Output of one benchmark in a process of its own; what it says on the way goes to standard error."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    return subprocess.run(
        [sys.executable, *words], stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd=HERE
    ).stdout


def own(script: str, name: str, repetitions: int | None = None) -> Callable[[argparse.Namespace], list[Row]]:
    """A benchmark that writes its own record."""

    def run(options: argparse.Namespace) -> list[Row]:
        count = 2 if options.quick else min(options.repetitions, repetitions or options.repetitions)
        words = [
            script,
            "--repetitions",
            str(count),
            "--out",
            str(options.out),
            "--clock",
            options.clock,
            "--threads",
            str(options.threads),
        ]
        if options.quick and name == "find_memory":
            words += ["--many", "100"]
        call(words, options.threads)
        return rows_of(json.loads((options.out / f"{name}.json").read_text(encoding="utf-8")))

    return run


def importance(options: argparse.Namespace) -> list[Row]:
    """Exact importance, measured by its own script."""
    count = 2 if options.quick else options.repetitions
    record = json.loads(call(["importance_cost.py", "--repetitions", str(count)], options.threads))
    rows = [
        Row(
            (
                f"exact importance of every neuron, Llama-3-8B layers, {measured['tokens']} tokens ÷ plain "
                "forward"
            ),
            median_of(measured["ratio"]),
            IMPORTANCE_TARGETS.get(measured["tokens"]),
        )
        for measured in record["measured"]
    ]
    return written("importance", rows, record, options)


def patching(options: argparse.Namespace) -> list[Row]:
    """Patched generation, measured by its own script."""
    count = 2 if options.quick else options.repetitions
    target = options.out / "patching_cost.json"
    words = [
        "patching_cost.py",
        "--repetitions",
        str(count),
        "--threads",
        str(options.threads),
        "--clock",
        options.clock,
    ]
    call([*words, *(["--new", "16"] if options.quick else []), "--out", str(target)], options.threads)
    record = json.loads(target.read_text(encoding="utf-8"))
    target.unlink()
    rows = [
        Row(f"patched generation ÷ plain, {PAIRS[kind]}", median_of(result["ratio"]), result["target"])
        for kind, result in record["results"].items()
    ]
    rows += [
        Row("plain generation of twice the rows ÷ plain", median_of(result["twice the rows"]), None)
        for result in record["results"].values()
        if "twice the rows" in result
    ]
    return written("patching", rows, record, options)


def graphics(options: argparse.Namespace) -> list[Row]:
    """The same on a GPU, where there is one."""
    words = [
        "gpu.py",
        "--out",
        str(options.out),
        "--repetitions",
        "2" if options.quick else str(options.repetitions),
    ]
    said = call(words, options.threads).strip()
    target = options.out / "gpu.json"
    if "no GPU" in said or not target.is_file():
        print(said)
        return []
    return rows_of(json.loads(target.read_text(encoding="utf-8")))


def server(what: str, repetitions: int) -> Callable[[argparse.Namespace], list[Row]]:
    """A guard behind HTTP: added time to first token, or throughput."""

    def run(options: argparse.Namespace) -> list[Row]:
        count = 2 if options.quick else min(options.repetitions, repetitions)
        words = [
            "guard_server.py",
            what,
            "--repetitions",
            str(count),
            "--out",
            str(options.out),
            "--clock",
            options.clock,
        ]
        call([*words, *(["--clients", "4", "--layers", "1"] if options.quick else [])], options.threads)
        return rows_of(json.loads((options.out / f"guard_{what}.json").read_text(encoding="utf-8")))

    return run


def soak(options: argparse.Namespace) -> list[Row]:
    """Ten thousand mixed requests to a guard's server."""
    call(
        ["guard_soak.py", "--requests", "300" if options.quick else "10000", "--out", str(options.out)],
        options.threads,
    )
    return rows_of(json.loads((options.out / "guard_soak.json").read_text(encoding="utf-8")))


BENCHMARKS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "statistics": own("statistics_cost.py", "statistics"),
    "importance": importance,
    "patching": patching,
    "hooks": own("hook_cost.py", "hooks"),
    "decoding": own("decoding_cost.py", "decoding", repetitions=5),
    "together": own("together_cost.py", "together", repetitions=5),
    "find_memory": own("find_memory.py", "find_memory", repetitions=3),
    "startup": own("startup.py", "startup"),
    "tuning": own("tuning_cost.py", "tuning"),
    "guard": own("guard_latency.py", "guard"),
    "guard_proxy": server("proxy", repetitions=201),
    "guard_throughput": server("throughput", repetitions=3),
    "guard_soak": soak,
    "gpu": graphics,
}


def median_of(value: dict[str, Any]) -> Median:
    """A median as the other scripts write it."""
    return Median(
        float(value.get("median", value.get("value"))),
        float(value["low"]),
        float(value["high"]),
        int(value["n"]),
    )


def rows_of(record: dict[str, Any]) -> list[Row]:
    """The rows of a written record."""
    return [Row(row["what"], Median(**row["value"]), row["target"], row["unit"]) for row in record["rows"]]


def written(name: str, rows: list[Row], record: dict[str, Any], options: argparse.Namespace) -> list[Row]:
    """Write a record of a script that has its own form, its rows before the rest."""
    whole = {
        "benchmark": name,
        "rows": [row.record() for row in rows],
        "record": record,
        "machine": machine(),
    }
    (options.out / f"{name}.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    return rows


PEERS = ("statistics", "patching", "tokens", "importance", "tuning")
"""What peers.py measures, in an environment of its own, into a folder of its own."""


def table(folder: pathlib.Path, names: Iterable[str] = tuple(BENCHMARKS)) -> str:
    """The written records as a Markdown table."""
    marks = {True: "met", False: "**not met**", None: ""}
    lines = [
        "| what | median [95 % interval] | must reach | | repetitions | load before |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        if not (folder / f"{name}.json").is_file():
            continue
        record = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        load = record["machine"].get("load_at_start", record["machine"]["load"][0])
        for row in rows_of(record):
            target = "" if row.target is None else f"≤ {row.target:g} {row.unit}".strip()
            lines.append(
                f"| {row.what} | {row.value} {row.unit} | {target} | {marks[row.met]} | {row.value.n} | "
                f"{load:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Run what was asked for; the exit code is 0 whether or not targets are met, for a busy machine is no
    failure.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repetitions, into a folder of their own")
    parser.add_argument(
        "--table", action="store_true", help="run nothing; print the written records as Markdown"
    )
    parser.add_argument("--repetitions", type=int, default=31)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS))
    parser.add_argument("--out", type=pathlib.Path, default=None)
    options = parser.parse_args()
    options.out = (
        options.out or (HERE.parent / "runs" / "bench-quick" if options.quick else RESULTS)
    ).resolve()
    if options.table:
        print(table(options.out))
        print(f"\n{table(options.out / 'peers', PEERS)}")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for name in options.only:
        start = time.monotonic()
        print(f"{name} …", file=sys.stderr, flush=True)
        rows += BENCHMARKS[name](options)
        print(
            f"{name} took {time.monotonic() - start:.0f} s, load {os.getloadavg()[0]:.1f}",
            file=sys.stderr,
            flush=True,
        )
    print_rows(rows)


if __name__ == "__main__":
    main()
