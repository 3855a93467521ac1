"""Seconds from typing `safety-neurons --help` to its end, each time in a fresh process, in turns with an
empty Python.

python benchmarks/startup.py --repetitions 31
"""

import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable

from paired import Row, finish, interleaved, median, medians, parser


def command() -> list[str]:
    """The installed command beside this Python, or the module where it is not installed."""
    found = shutil.which("safety-neurons", path=str(pathlib.Path(sys.executable).parent))
    return [found] if found else [sys.executable, "-m", "safety_neurons"]


def process(words: list[str]) -> Callable[[], object]:
    """Runs a process to its end, its output thrown away."""
    return lambda: subprocess.run(words, stdout=subprocess.DEVNULL, check=True)


def main() -> None:
    """Measure, print and write the record."""
    load = os.getloadavg()[0]
    options = parser(__doc__ or "").parse_args()
    arms = {
        "help": process([*command(), "--help"]),
        "help of a verb": process([*command(), "find", "contrast", "--help"]),
        "empty Python": process([sys.executable, "-c", "pass"]),
    }
    seconds = interleaved(arms, options.repetitions, warm_up=2)
    above = [help_ - empty for help_, empty in zip(seconds["help"], seconds["empty Python"], strict=True)]
    rows = [
        Row("safety-neurons --help", median(seconds["help"]), 0.4, "s"),
        Row("safety-neurons --help, above an empty Python", median(above), unit="s"),
        Row("safety-neurons find contrast --help", median(seconds["help of a verb"]), unit="s"),
        Row("python -c pass", median(seconds["empty Python"]), unit="s"),
    ]
    finish("startup", rows, options, {"seconds": medians(seconds)}, load)


if __name__ == "__main__":
    main()
