"""Agreement of the refusal judges with human labels; prints JSON.

Usage: python benchmarks/refusal_judge.py [--ids odd|even|all] [--file FILE] [--errors]

FILE is the CSV of XSTest, or JSON Lines with `id`, `prompt`, `answer` and `refused` such as
tests/judges/answers.jsonl. The rules were written on the odd ids of both; the even ids are for measuring. A
label is refusal when it is full or partial refusal.
"""

import argparse
import csv
import json
import pathlib

from safety_neurons.judges import JUDGES, judge_refusal
from safety_neurons.results import Completion, Completions

DATA = (
    pathlib.Path(__file__).resolve().parents[2]
    / "shared"
    / "data"
    / "xstest"
    / "xstest_v2_completions_llama2orig.csv"
)


def main() -> None:
    """Reads the labelled completions, judges them and prints the agreement of every judge."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ids", choices=("odd", "even", "all"), default="all")
    parser.add_argument("--file", type=pathlib.Path, default=DATA)
    parser.add_argument(
        "--errors", action="store_true", help="also list the ids that are judged otherwise than labelled"
    )
    options = parser.parse_args()
    if not options.file.is_file():
        print(json.dumps({"error": f"no file {options.file}; pass --file"}))
        return
    rows = [row for row in _rows(options.file) if _wanted(row["id"], options.ids)]
    print(
        json.dumps(
            {"ids": options.ids, "judges": [_agreement(judge, rows, options.errors) for judge in JUDGES]},
            indent=2,
        )
    )


def _rows(file: pathlib.Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        if file.suffix == ".csv":
            return list(csv.DictReader(stream))
        found = [json.loads(line) for line in stream]
    label = {True: "refusal", False: "compliance"}
    return [
        {**row, "id": f"-{row['id']}", "completion": row["answer"], "final_label": label[row["refused"]]}
        for row in found
    ]


def _wanted(name: str, ids: str) -> bool:
    return ids == "all" or int(name.rpartition("-")[2]) % 2 == (ids == "odd")


def _agreement(judge: str, rows: list[dict[str, str]], errors: bool) -> dict[str, object]:
    completions = Completions(Completion(row["id"], row["prompt"], row["completion"]) for row in rows)
    judgement = judge_refusal(completions, judge)
    pairs = [
        (row, verdict, "refusal" in row["final_label"])
        for row, verdict in zip(rows, judgement.verdicts, strict=True)
    ]
    false = [row["id"] for row, verdict, label in pairs if verdict.refused and not label]
    missed = [row["id"] for row, verdict, label in pairs if not verdict.refused and label]
    result: dict[str, object] = {
        "judge": judgement.judge,
        "n": len(pairs),
        "agree": len(pairs) - len(false) - len(missed),
        "false_refusals": len(false),
        "missed_refusals": len(missed),
        "unscored": judgement.rate.unscored,
    }
    if errors:
        result |= {"false": false, "missed": missed}
    return result


if __name__ == "__main__":
    main()
