"""Takes finished `study` runs into `benchmarks/results/tuning-organisms/` and prints their tables for
docs/tuning-results.md.

python benchmarks/tuning_tables.py unsafe-rsn=runs/study-rsn-… unsafe-stress=runs/study-stress-…
python benchmarks/tuning_tables.py                       # prints the tables of what is committed
"""

import json
import pathlib
import sys
from typing import Any

from safety_neurons.results import clear_word, difference_over_seeds, holm, rate_over_seeds
from safety_neurons.results.estimates import family

FOLDER = pathlib.Path(__file__).resolve().parent / "results" / "tuning-organisms"
LEFT_OUT = ("neurons", "run")


def take(name: str, run: pathlib.Path) -> None:
    """Keep a run's result with what it was run with; paths are left out."""
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    arguments = {option: value for option, value in record["arguments"].items() if option != "model"}
    result = {key: value for key, value in record["result"].items() if key not in LEFT_OUT}
    kept = {
        "verb": record["verb"],
        "arguments": arguments,
        "versions": record["versions"],
        "device": record["device"],
        "result": result,
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.json").write_text(
        json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def again(spread: dict[str, Any], *, signed: bool = False) -> Any:
    """The estimate by today's rules from what every seed gave: of records that were made before these rules
    and know no deeds.

    Verdicts on single prompts are not in the files: the same prompts are taken to change with every seed,
    which is as wide as it can be.
    """
    shares = [value for value in spread["by_seed"] if value is not None]
    if not shares:
        return rate_over_seeds([[None]])
    n = (spread["n"] + spread["unscored"]) // len(shares)
    rows = [
        [(1.0 if share > 0 else -1.0) if place < round(abs(share) * n) else 0.0 for place in range(n)]
        for share in shares
    ]
    return difference_over_seeds(rows, [[0.0] * n] * len(rows)) if signed else rate_over_seeds(rows)


def told(difference: dict[str, Any]) -> str:
    """A difference in points and whether it is clear."""
    return f"{points(difference, '')} ({clear_word(difference)})"


def points(spread: dict[str, Any] | None, worst: str = "highest") -> str:
    """`0.5 [0.0, 1.1], worst 2.0`, in points."""
    if spread is None or spread["value"] is None:
        return "–"
    if spread["low"] is None:
        return f"{100 * spread['value']:.1f}"
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
        "| arm | harmful score | harmless answered | perplexity |"
        + (" harmful score after | answered after | task |" if steps else "")
    ]
    lines.append("|---" * (7 if steps else 4) + "|")
    for arm in result["arms"]:
        before, after = arm["before"], arm["after"]
        row = [
            arm["arm"],
            points(before["harmful"]),
            points(before["harmless"], "lowest"),
            perplexity(before["perplexity"]),
        ]
        if steps:
            row += [
                points(after["harmful"]),
                points(after["harmless"], "lowest"),
                points(after["task"], "lowest"),
            ]
        lines.append("| " + " | ".join(row) + " |")
    lines += ["", "| paired difference of harmful scores | before | after |", "|---|---|---|"]
    names = [
        (pair, when)
        for pair, found in result["differences"].items()
        for when, value in found.items()
        if value is not None
    ]
    differences = {(pair, when): result["differences"][pair][when] for pair, when in names}
    if not all("p" in found for found in differences.values()):
        held = holm([again(found, signed=True) for found in differences.values()])
        differences = {name: found.to_json() for name, found in zip(names, held, strict=True)}
    for pair in result["differences"]:
        lines.append(
            f"| {pair} | {' | '.join(told(differences[pair, when]) for when in ('before', 'after'))} |"
        )
    return [*lines, "", family(len(names))]


def share(spread: dict[str, Any] | None, worst: str = "highest") -> str:
    """A rate over seeds in points, with its worst seed."""
    return points(None if spread is None else again(spread).to_json(), worst)


UNITS = {
    "prune": " of the set",
    "prune random": " of the set",
    "abliteration": " directions",
    "abliteration, norms kept": " directions",
    "subtraction": " of the change left",
}


def stress_table(result: dict[str, Any]) -> list[str]:
    """Attacks as rows."""
    lines = ["| attack | how much | untuned | after SN-Tune | difference |", "|---|---|---|---|---|"]
    held = holm([again(point["difference"], signed=True) for point in result["curves"]])
    for point, found in zip(result["curves"], held, strict=True):
        amount = f"{point['amount']:g}{UNITS.get(point['attack'], ' steps')}"
        difference = found.to_json()
        shown = [
            share(point["before"]),
            share(point["after"]),
            points(difference, "") + (" (clear)" if found.clear else ""),
        ]
        lines.append(f"| {point['attack']} | {amount} | {' | '.join(shown)} |")
    return lines


def main() -> None:
    """Take what was named, print everything."""
    for word in sys.argv[1:]:
        name, _, run = word.partition("=")
        take(name, pathlib.Path(run))
    for path in sorted(FOLDER.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        lines = (
            rsn_table(record["result"]) if record["verb"] == "study-rsn" else stress_table(record["result"])
        )
        sys.stdout.write("\n".join([f"## {path.stem}", "", *lines, "", ""]))


if __name__ == "__main__":
    main()
