"""The tables of docs/compare.md from the record of a ranking, and that record without the paths of the
machine it was made on.

safety-neurons compare --organism natural --organism org/natural-1 … --top 0.02 --json > ranking.json
python benchmarks/ranking_tables.py --keep ranking.json NAME  # writes benchmarks/results/ranking/NAME.json
python benchmarks/ranking_tables.py                               # prints the tables of what is there
"""

import argparse
import collections
import json
import pathlib
import statistics
from typing import Any

from safety_neurons.results.run import write_json

RESULTS = pathlib.Path(__file__).parent / "results" / "ranking"
PATHS = ("run", "figure", "completions", "methods")


def kept(record: dict[str, Any]) -> dict[str, Any]:
    """The record without paths, and without what is in it twice."""
    whole = {name: value for name, value in record.items() if name not in PATHS}
    for entry in whole["organisms"]:
        entry.pop("agreement", None)
    return whole


def table(records: list[dict[str, Any]], measure: str) -> str:
    """Every method's value on every organism, with mean and worst, best mean first, as Markdown."""
    values: dict[tuple[str, str], dict[str, float | None]] = collections.defaultdict(dict)
    for record in records:
        for row in record["ranking"]:
            if row["measure"] == measure:
                values[row["group"], row["method"]].update(row["by_organism"])
    lines = []
    for group in dict.fromkeys(group for group, _ in values):
        rows = {
            method: by
            for (one, method), by in values.items()
            if one == group and any(value is not None for value in by.values())
        }
        if not rows:
            continue
        names = sorted({name for by in rows.values() for name in by})
        lines += [
            f"**{group}: {measure.replace('_', ' ')}**",
            "",
            "| method | " + " | ".join(names) + " | mean | worst |",
        ]
        lines.append("|---" * (len(names) + 3) + "|")

        def mean(by: dict[str, float | None]) -> float:
            return statistics.fmean(value for value in by.values() if value is not None)

        sign, worst = (1, max) if measure in ("seconds", "harmless_refused") else (-1, min)
        # The truth is no method and stands last.
        for method, by in sorted(rows.items(), key=lambda item: (item[0] == "truth", sign * mean(item[1]))):
            cells = ["–" if by.get(name) is None else f"{by[name]:.2f}" for name in names]
            last = worst(value for value in by.values() if value is not None)
            lines.append(f"| {method} | " + " | ".join([*cells, f"{mean(by):.2f}", f"{last:.2f}"]) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Keep a record, or print the tables of all that are kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--keep", nargs=2, metavar=("FILE", "NAME"), help="record to keep, and the name to keep it under"
    )
    parser.add_argument("--measures", default="recall,causal_effect,necessity,harmless_refused,seconds")
    options = parser.parse_args()
    if options.keep:
        file, name = options.keep
        write_json(RESULTS / f"{name}.json", kept(json.loads(pathlib.Path(file).read_text(encoding="utf-8"))))
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    for measure in options.measures.split(","):
        print(table(records, measure))


if __name__ == "__main__":
    main()
