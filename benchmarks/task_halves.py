"""Part the questions of GSM8K into some to fine-tune on and some to ask.

    python benchmarks/task_halves.py --data FOLDER --out FOLDER

FOLDER of `--data` holds `gsm8k/test.jsonl` in its public shape. Writes `train.jsonl` (the first questions),
`test.jsonl` (the last ones) and `counts.json`.
"""

import argparse
import pathlib

from safety_neurons.results.run import write_json


def main() -> None:
    """Write both parts; no question is in both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, type=pathlib.Path)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--train", type=int, default=600)
    parser.add_argument("--test", type=int, default=64)
    given = parser.parse_args()
    lines = (given.data / "gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()
    if given.train + given.test > len(lines):
        parser.error(f"{len(lines)} questions arrived, {given.train + given.test} were expected at least")
    given.out.mkdir(parents=True, exist_ok=True)
    parts = {"train": lines[: given.train], "test": lines[-given.test :]}
    for name, part in parts.items():
        (given.out / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
    write_json(given.out / "counts.json", {name: len(part) for name, part in parts.items()})


if __name__ == "__main__":
    main()
