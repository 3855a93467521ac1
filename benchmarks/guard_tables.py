"""Takes finished `guard evaluate` runs into `benchmarks/results/guard-organisms/` and prints their tables for
docs/guard-results.md.

python benchmarks/guard_tables.py few=runs/guard-evaluate-… many=runs/guard-evaluate-…
python benchmarks/guard_tables.py                        # prints the tables of what is committed
"""

import json
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from safety_neurons.results import family, holm_in, is_clear

FOLDER = pathlib.Path(__file__).resolve().parent / "results" / "guard-organisms"
PATHS = ("guard", "model", "detectors", "unsafe", "safe", "fit_unsafe", "fit_safe", "over_refusal")
LEFT_OUT = ("curves", "run")
SHORT = {
    "TF-IDF words": "words",
    "TF-IDF characters": "letters",
    "residual stream": "residual",
    "refusal direction": "direction",
}
SHORT |= {"guard's neurons": "neurons", "random neurons": "random"}


def take(name: str, run: pathlib.Path) -> None:
    """Keep a run's result with what it was run with; of paths only the last part is kept."""
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    arguments = {
        option: short(value) if option in PATHS else value for option, value in record["arguments"].items()
    }
    result = {key: value for key, value in record["result"].items() if key not in LEFT_OUT}
    if result.get("outputs"):
        result["outputs"] = {key: value for key, value in result["outputs"].items() if key != "completions"}
    notes = [note for note in record.get("notes") or [] if "/" not in note.partition(":")[0]]
    kept = {
        "verb": record["verb"],
        "arguments": arguments,
        "versions": record["versions"],
        "device": record["device"],
        "notes": notes,
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**kept, "result": result}, indent=1, ensure_ascii=False)
    (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def short(value: Any) -> Any:
    """`NAME=…/folder/file` as `NAME=folder/file`; a model's address as it is."""
    if not isinstance(value, str) or value.startswith("organism:"):
        return value
    parts = []
    for part in value.split(","):
        name, sign, path = part.rpartition("=")
        parts.append(name + sign + "/".join(pathlib.Path(path).parts[-2:]))
    return ",".join(parts)


def rate(found: dict[str, Any] | None, digits: int = 3) -> str:
    """`0.981 [0.975, 0.986]`."""
    if found is None or found["value"] is None:
        return "–"
    return f"{found['value']:.{digits}f} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"


def value(found: dict[str, Any] | None) -> str:
    """`0.981`."""
    return "–" if found is None or found["value"] is None else f"{found['value']:.3f}"


def mark(difference: dict[str, Any] | None) -> str:
    """`+` where it is clearly above 0, `−` where it is clearly below."""
    return "" if not is_clear(difference) or difference is None else " +" if difference["value"] > 0 else " −"


def signed(found: dict[str, Any] | None) -> str:
    """`+0.012 [+0.004, +0.020] (clear)`."""
    if found is None or found["value"] is None:
        return "–"
    clear = " (clear)" if is_clear(found) else ""
    return f"{found['value']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]{clear}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Markdown."""
    return [
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def overall(result: dict[str, Any]) -> list[str]:
    """Every classifier on the requests as written."""
    ours = {
        "name": "**guard**",
        **{
            key: result[key]
            for key in ("auroc", "average_precision", "tpr_at_fpr", "expected_calibration_error")
        },
    }
    rows = [
        [
            row["name"],
            rate(row["auroc"]),
            rate(row["average_precision"]),
            rate(row["tpr_at_fpr"]["0.05"]),
            rate(row["tpr_at_fpr"]["0.01"]),
            f"{row['expected_calibration_error']:.3f}",
            signed(row.get("difference")),
        ]
        for row in (ours, *result["baselines"])
    ]
    head = [
        "classifier",
        "AUROC",
        "average precision",
        "TPR at FPR 5 %",
        "TPR at FPR 1 %",
        "ECE",
        f"{result['compared']} − this one",
    ]
    line = (
        f"At its threshold ({result['in_force']}) the guard flags {rate(result['flagged_unsafe'])} of "
        f"{result['n_unsafe']:,} unsafe and "
    )
    return [
        *table(head, rows),
        f"{line}{rate(result['flagged_safe'])} of {result['n_safe']:,} safe requests.",
        "",
    ]


def slices(title: str, rows: Sequence[dict[str, Any]], reference: str, *, flags: bool = True) -> list[str]:
    """One row a slice: areas, a mark where the reference is clearly better (+) or worse (−), held over the
    table where it is long.
    """
    if not rows:
        return []
    rows = holm_in(rows)
    names = list(
        dict.fromkeys(
            name for row in rows for name in row["auroc"] if name != "guard" or reference == "guard"
        )
    )
    names.sort(key=lambda name: name != reference)

    def area(row: dict[str, Any], name: str) -> str:
        return value(row["auroc"].get(name)) + mark(row["difference"].get(name))

    cells = [
        [
            row["value"] + (f" (against {row['against']})" if row["against"] else ""),
            f"{row['n_unsafe']:,} / {row['n_safe']:,}",
        ]
        + [area(row, name) for name in names]
        + ([value(row["flagged_unsafe"]), value(row["flagged_safe"])] if flags else [])
        for row in rows
    ]
    head = [
        title,
        "unsafe / safe",
        *(SHORT.get(name, name) for name in names),
        *(["unsafe flagged", "safe flagged"] if flags else []),
    ]
    return [*table(head, cells), *said(rows)]


def said(rows: Any) -> list[str]:
    """The line under a table of many comparisons."""
    return [family(rows), ""] if family(rows) else []


def counts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Sizes by setting: area (mean of the random sets), and whether the difference is clear."""
    rows = holm_in(rows)
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    by = {(row["method"], row["count"], row["setting"]): row for row in rows}
    cells = []
    for method, count in dict.fromkeys((row["method"], row["count"]) for row in rows):
        found = [by[method, count, setting] for setting in settings]
        shown = []
        for row in found:
            shown.append(
                f"{row['auroc']:.3f} ({sum(row['random']) / len(row['random']):.3f}){mark(row['difference'])}"
            )
        cells.append([method, f"{count:,}", *shown])
    return [*table(["neurons by", "count", *settings], cells), *said(rows)] if cells else []


def outputs(found: dict[str, Any]) -> list[str]:
    """Unsafe outputs without and with the guard."""
    rows = [{"language": "all", **found}, *found["by"]]
    names = ("before", "after", "cut", "blocked")
    lines = table(
        ["", "unsafe outputs", "with the guard", "cut by", "safe requests blocked"],
        [[row["language"], *(rate(row[name]) for name in names)] for row in rows],
    )
    said = (
        f"AUROC for what requests ask {rate(found['asked'])}, for what the model writes "
        f"{rate(found['written'])}; "
    )
    said += f"{found['refused_by_model']:,} unsafe requests have no unsafe answer to begin with; "
    return [
        *lines,
        said
        + (
            f"{found['changed']} answers that passed differ from those without the guard. Judge: "
            f"{found['judge']}."
        ),
        "",
    ]


def tables(record: dict[str, Any]) -> list[str]:
    """Everything of one run."""
    result, lines = record["result"], overall(record["result"])
    for column, rows in result["tables"].items():
        lines += slices(column, rows, result["compared"])
    for title in ("over_refusal", "attacks", "perturbations", "lengths"):
        lines += slices(title.replace("_", "-"), result[title], result["compared"])
    for column, rows in result["leave_out"].items():
        lines += slices(f"{column} left out", rows, "guard's neurons", flags=False)
        lines += slices(
            f"{column} left out, look-alikes",
            [row["look_alikes"] | {"value": row["value"]} for row in rows if "look_alikes" in row],
            "guard's neurons",
            flags=False,
        )
    lines += counts(result["counts"] or [])
    return lines + (outputs(result["outputs"]) if result["outputs"] else [])


def main() -> None:
    """Take what was named, print everything."""
    for word in sys.argv[1:]:
        name, _, run = word.partition("=")
        take(name, pathlib.Path(run))
    for path in sorted(FOLDER.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        sys.stdout.write("\n".join([f"## {path.stem}", "", *tables(record), "", ""]))


if __name__ == "__main__":
    main()
