"""Takes finished `study` runs into `benchmarks/results/tuning-organisms/` and prints their tables for docs/tuning-results.md.

python benchmarks/tuning_tables.py unsafe-rsn=runs/study-rsn-… unsafe-stress=runs/study-stress-…
python benchmarks/tuning_tables.py                       # prints the tables of what is committed
"""

import json
import pathlib
import sys
from typing import Any

FOLDER = pathlib.Path(__file__).resolve().parent / "results" / "tuning-organisms"
LEFT_OUT = ("neurons", "run")


def take(name: str, run: pathlib.Path) -> None:
    """Keep a run's result with what it was run with; paths are left out."""
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    arguments = {option: value for option, value in record["arguments"].items() if option != "model"}
    result = {key: value for key, value in record["result"].items() if key not in LEFT_OUT}
    kept = {"verb": record["verb"], "arguments": arguments, "versions": record["versions"], "device": record["device"], "result": result}
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def points(spread: dict[str, Any] | None, worst: str = "highest") -> str:
    """`0.5 [0.0, 1.1], worst 2.0`, in points."""
    if spread is None or spread["value"] is None:
        return "–"
    low, value, high = (100 * spread[name] for name in ("low", "value", "high"))
    tail = f", worst {100 * spread[worst]:.1f}" if worst else ""
    return f"{value:.1f} [{low:.1f}, {high:.1f}]{tail}"


def perplexity(found: dict[str, Any]) -> str:
    """Mean and worst seed."""
    return "–" if found["value"] is None else f"{found['value']:.3f}, worst {found['highest']:.3f}"


def rsn_table(result: dict[str, Any]) -> list[str]:
    """Arms as rows, then differences."""
    steps = result["downstream"]["steps"]
    lines = [
        "| arm | harmful score | harmless answered | perplexity |" + (" harmful score after | answered after | task |" if steps else "")
    ]
    lines.append("|---" * (7 if steps else 4) + "|")
    for arm in result["arms"]:
        before, after = arm["before"], arm["after"]
        row = [arm["arm"], points(before["harmful"]), points(before["harmless"], "lowest"), perplexity(before["perplexity"])]
        if steps:
            row += [points(after["harmful"]), points(after["harmless"], "lowest"), points(after["task"], "lowest")]
        lines.append("| " + " | ".join(row) + " |")
    lines += ["", "| paired difference of harmful scores | before | after |", "|---|---|---|"]
    for pair, found in result["differences"].items():
        cells = [f"{points(found[when], '')}{' (clear)' if found[when]['clear'] else ''}" for when in ("before", "after")]
        lines.append(f"| {pair} | {' | '.join(cells)} |")
    return lines


def stress_table(result: dict[str, Any]) -> list[str]:
    """Attacks as rows."""
    lines = ["| attack | how much | untuned | after SN-Tune | difference |", "|---|---|---|---|---|"]
    for point in result["curves"]:
        amount = f"{point['amount']:g}" + (" of the set" if "prune" in point["attack"] else " steps")
        clear = " (clear)" if point["difference"]["clear"] else ""
        shown = [points(point["before"]), points(point["after"]), points(point["difference"], "") + clear]
        lines.append(f"| {point['attack']} | {amount} | {' | '.join(shown)} |")
    return lines


def main() -> None:
    """Take what was named, print everything."""
    for word in sys.argv[1:]:
        name, _, run = word.partition("=")
        take(name, pathlib.Path(run))
    for path in sorted(FOLDER.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        lines = rsn_table(record["result"]) if record["verb"] == "study-rsn" else stress_table(record["result"])
        sys.stdout.write("\n".join([f"## {path.stem}", "", *lines, "", ""]))


if __name__ == "__main__":
    main()
