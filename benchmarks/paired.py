"""Paired measurement: the arms of a comparison take turns in one process, and the ratio is taken repetition
by repetition.

On a shared or throttled machine both halves of a pair see the same weather, so the median of ratios is
steadier than the ratio of medians. A target is met when the median is at most target + 0.02 and the lower end
of the 95 % bootstrap interval at most the target.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
SLACK = 0.02
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Median:
    """Median of paired numbers with its 95 % bootstrap interval."""

    median: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return (
            f"{self.median:.3g} [{self.low:.3g}, {self.high:.3g}]"
            if self.median < 0.1
            else f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"
        )


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: in words.
        value: what was measured.
        target: at most this; None for a number that is shown beside others (a peer, a second clock).
        unit: of the value; empty for a ratio.
    """

    what: str
    value: Median
    target: float | None = None
    unit: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met, with a slack for ratios; None where there is none."""
        if self.target is None:
            return None
        slack = SLACK if not self.unit else SLACK * self.target
        return self.value.median <= self.target + slack and self.value.low <= self.target

    def record(self) -> dict[str, Any]:
        """The row as JSON."""
        return {
            "what": self.what,
            "value": asdict(self.value),
            "target": self.target,
            "unit": self.unit,
            "met": self.met,
        }


def median(values: Sequence[float], seed: int = 0) -> Median:
    """Median and percentile bootstrap interval of independent repetitions."""
    array = np.asarray(values, dtype=np.float64)
    drawn = np.median(np.random.default_rng(seed).choice(array, (4000, len(array))), axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Median(float(np.median(array)), float(low), float(high), len(array))


def interleaved(
    arms: Mapping[str, Callable[[], object]],
    repetitions: int,
    clock: Clock = time.perf_counter,
    warm_up: int = 1,
) -> dict[str, list[float]]:
    """Seconds of every arm, taking turns.

    The order turns by one and is mirrored from one repetition to the next.

    Args:
        arms: what to run, by name.
        repetitions: turns of each arm.
        clock: seconds.
        warm_up: turns that are not counted.
    """
    names = list(arms)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(-warm_up, repetitions):
        turn = repetition % len(names)
        order = names[turn:] + names[:turn]
        for name in order if repetition % 2 == 0 else order[::-1]:
            start = clock()
            arms[name]()
            if repetition >= 0:
                seconds[name].append(clock() - start)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], ours: str, floor: str) -> Median:
    """Median over repetitions of one arm's seconds ÷ another's."""
    return median([a / b for a, b in zip(seconds[ours], seconds[floor], strict=True)])


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    import torch

    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": [round(value, 2) for value in os.getloadavg()],
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def processor() -> str:
    """Name of the processor's model, where the system tells it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def parser(description: str) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    result = argparse.ArgumentParser(description=description.splitlines()[0])
    result.add_argument("--repetitions", type=int, default=31)
    result.add_argument(
        "--threads", type=int, default=1, help="of torch; 1 keeps the clock of a shared machine honest"
    )
    result.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="cpu: this process's own time, for a machine that is shared",
    )
    result.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder for the JSON record")
    return result


def finish(
    name: str, rows: Sequence[Row], options: argparse.Namespace, detail: Mapping[str, Any], load: float
) -> None:
    """Print the rows and write the record.

    Args:
        name: of the benchmark; the file's name.
        rows: what was measured.
        options: as parsed.
        detail: whatever else a reader may want (seconds of the arms, sizes).
        load: of the machine when the benchmark began.
    """
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    record = {
        "benchmark": name,
        "rows": [row.record() for row in rows],
        "settings": settings,
        "machine": {**machine(), "load_at_start": round(load, 2)},
        **detail,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print_rows(rows)


def print_rows(rows: Sequence[Row]) -> None:
    """A table: what, measured, target, met or not."""
    marks = {True: "met", False: "NOT MET", None: ""}
    width = max((len(row.what) for row in rows), default=0)
    for row in rows:
        target = "" if row.target is None else f"≤ {row.target:g}"
        print(f"{row.what:<{width}}  {f'{row.value} {row.unit}'.strip():<28} {target:<8} {marks[row.met]}")


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Median seconds of every arm."""
    return {name: statistics.median(values) for name, values in seconds.items()}
