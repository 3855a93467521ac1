"""Recall of planted units by every detector at equal count, on organisms of several seeds and kinds, and the
table over them.

for seed in 0 1 2 3 4; do
    safety-neurons organism build --name planted --seed $seed --out org/planted-$seed
done
python benchmarks/planted_recall.py org/*

The last writes benchmarks/results/planted/NAME.json, one per folder.
python benchmarks/planted_recall.py --table          # prints the table of what is there

Every detector sees the find half of the organism's English harmful requests and searches all sites; as many
units are taken as work in English (`truth.safetensors`). The truth is never seen. Held-out prompts play no
part: what is measured is recall, not refusal.
"""

import argparse
import collections
import json
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any, Literal

from safety_neurons.detectors import METHODS, find
from safety_neurons.detectors.methods import with_options
from safety_neurons.model import load_pair
from safety_neurons.neurons import SITES, NeuronSet
from safety_neurons.prompt_lists import prompts
from safety_neurons.results.run import write_json
from safety_neurons.studies.comparison import unit_recall, whole_units

RESULTS = pathlib.Path(__file__).parent / "results" / "planted"
DESIGNED_ON = ("planted-0", "planted-1")
"""Organisms that were looked at while swap-attribution was made; the others were not."""


def units(neurons: NeuronSet, folder: pathlib.Path) -> dict[str, int]:
    """How many units of a set are true, planted but below one hundredth in English, decoys, or neither."""
    counts, rest = {}, neurons
    for kind in ("truth", "planted", "decoys"):
        known = NeuronSet.load(folder / f"{kind}.safetensors", table=neurons.table)
        counts["other planted" if kind == "planted" else kind] = (rest & known).n_units
        rest = rest - known
    return counts | {"neither": rest.n_units}


def measure(
    folder: pathlib.Path, limit: int, wanted: Sequence[str], batch_size: int | Literal["auto"]
) -> dict[str, Any]:
    """The record of one organism."""
    record = json.loads((folder / "organism.json").read_text(encoding="utf-8"))
    pair = load_pair(str(folder / record["base"]), str(folder / record["aligned"]))
    truth = NeuronSet.load(folder / "truth.safetensors", table=pair.base.table)
    harmful = prompts("builtin:harmful", folder=folder / "prompts", limit=limit)
    rows = {}
    harmless = prompts("builtin:harmless", folder=folder / "prompts", limit=limit)
    for name in wanted:
        started = time.perf_counter()
        method = with_options(name, sites=SITES, units=truth.n_units)
        shown = {"harmless": harmless} if method.HARMLESS != "none" else {}
        models = [pair.base, pair.aligned] if method.PAIR else [pair.aligned]
        scores = find(method, models, harmful, batch_size=batch_size, **shown).scores
        seconds = time.perf_counter() - started
        found = whole_units(scores.top_units(truth.n_units), SITES)
        rows[name] = {
            "recall": unit_recall(found, truth),
            "taken": units(found, folder),
            "seconds": round(seconds, 2),
        }
    return {
        "organism": record["name"],
        "seed": record["seed"],
        "recipe": record["recipe"],
        "versions": record["versions"],
        "prompts": len(harmful),
        "units": truth.n_units,
        "edge": [
            unit["shares"]["en"] for unit in record["truth"]["units"] if 0.005 <= unit["shares"]["en"] < 0.015
        ],
        "methods": rows,
    }


def joined(record: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """A record, with the methods that an earlier one of the same organism and prompts has beside.

    Raises:
        ValueError: it is of another organism, or of other prompts.
    """
    for name in ("recipe", "units", "prompts"):
        if record[name] != before[name]:
            raise ValueError(
                f"the record there has other {name} ({before[name]}, now {record[name]}), so its methods "
                "cannot stand beside these; expected another --out"
            )
    return record | {"methods": before["methods"] | record["methods"]}


def table(records: Sequence[dict[str, Any]]) -> str:
    """Recall by method and organism, with mean and worst over all and over those no detector was made on, as
    Markdown.
    """
    names = [f"{record['organism']}-{record['seed']}" for record in records]
    unseen = [number for number, name in enumerate(names) if name not in DESIGNED_ON]
    lines = [
        "| method | " + " | ".join(names) + " | mean | worst | mean, unseen |",
        "|---" * (len(names) + 4) + "|",
    ]
    recalls = collections.defaultdict(list)
    for record in records:
        for name in {name for one in records for name in one["methods"]}:
            recalls[name].append(record["methods"].get(name, {}).get("recall"))
    for name, values in sorted(recalls.items(), key=lambda item: -_mean(item[1])):
        known = [value for value in values if value is not None]
        numbers = (*values, _mean(values), min(known), _mean([values[number] for number in unseen]))
        lines.append(
            f"| {name} | " + " | ".join("–" if value is None else f"{value:.2f}" for value in numbers) + " |"
        )
    return "\n".join(lines)


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else float("nan")


def main() -> None:
    """Measure the folders given, then print the table of all records."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=pathlib.Path, help="folders of planted organisms")
    parser.add_argument("--limit", type=int, default=60, help="find prompts")
    parser.add_argument(
        "--methods",
        default=",".join(METHODS),
        help="comma-separated; others keep what an earlier record says of them",
    )
    parser.add_argument("--batch-size", type=int, default=None, help="prompts a batch")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    for folder in [] if options.table else options.folders:
        record = measure(folder, options.limit, options.methods.split(","), options.batch_size or "auto")
        file = options.out / f"recall-{record['organism']}-{record['seed']}.json"
        if file.exists():
            try:
                record = joined(record, json.loads(file.read_text(encoding="utf-8")))
            except ValueError as error:
                parser.exit(2, f"{file}: {error}\n")
        write_json(file, record)
    records = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(options.out.glob("recall-*.json"))
    ]
    print(table(sorted(records, key=lambda one: (one["organism"], one["seed"]))))


if __name__ == "__main__":
    main()
