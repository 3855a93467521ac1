"""How time grows with prompts, layers, width and length: one of them changes at a time, on random Llamas.

    python benchmarks/scaling.py --clock cpu --repetitions 3
    python benchmarks/scaling.py --table      # rows of the record, and the figure of docs/scale.md

The base is 4 layers of width 512 and 16 prompts of 64 tokens, in batches of 8 on one thread. Loading is left
out; how time shrinks with processes is measured by `processes.py`.
"""

import itertools
import json
import math
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from find_memory import WORDS, model_of
from paired import CLOCKS, RESULTS, Row, finish, interleaved, median, parser

BASE = {"prompts": 16, "layers": 4, "width": 512, "length": 64}
AXES = {
    "prompts": (8, 16, 32, 64),
    "layers": (2, 4, 8, 16),
    "width": (128, 256, 512, 1024),
    "length": (16, 32, 64, 128, 256),
}
PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "figures" / "scaling.svg"


def works() -> dict[str, Callable[[Any, list[str]], object]]:
    """What is timed, by name: of a model and its prompts."""
    from safety_neurons import detectors
    from safety_neurons.model.decoding import Decoding
    from safety_neurons.model.language_model import generate
    from safety_neurons.prompt_lists import Prompts

    return {
        "find importance": lambda model, texts: detectors.find_importance(
            model, Prompts.from_list(texts), batch_size=8
        ),
        "find effect-size": lambda model, texts: detectors.find_effect_size(
            model, Prompts.from_list(texts), harmless=Prompts.from_list(texts[::-1]), batch_size=8
        ),
        "answers of 16 tokens": lambda model, texts: generate(
            model,
            [one.ids for one in model.encode_raw(texts)],
            Decoding(16, others={"min_new_tokens": 16}),
            batch_size=8,
        ),
    }


def points() -> dict[tuple[str, int], dict[str, int]]:
    """Shapes by what changes and its value; the base is one of every axis."""
    return {(axis, value): BASE | {axis: value} for axis, values in AXES.items() for value in values}


def texts_of(shape: Mapping[str, int]) -> list[str]:
    """As many prompts of as many words, no two alike."""
    words = itertools.cycle(WORDS)
    return [" ".join(itertools.islice(words, shape["length"])) for _ in range(shape["prompts"])]


def exponents(seconds: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """By axis the power of the largest value's step: 1 where twice as much takes twice as long."""
    found = {}
    for axis, by_value in seconds.items():
        (one, before), (two, after) = list(by_value.items())[-2:]
        found[axis] = math.log(after / before) / math.log(int(two) / int(one))
    return found


def table(record: Mapping[str, Any]) -> list[str]:
    """Rows of the page: seconds of the base, powers by axis, times the base at both ends of each."""
    lines = []
    for work, by_axis in record["seconds"].items():
        powers = exponents(by_axis)
        cells = []
        for axis, by_value in by_axis.items():
            base = by_value[str(BASE[axis])]
            (low, *_, high) = by_value.values()
            cells.append(f"{low / base:.2f} … {high / base:.1f} ({powers[axis]:.2f})")
        base = by_axis["prompts"][str(BASE["prompts"])]
        lines.append(f"| {work} | {base:.2f} | " + " | ".join(cells) + " |")
    return lines


def figure(record: Mapping[str, Any]) -> str:
    """Doublings of the time over doublings of what changed, a picture for each work."""
    from safety_neurons.display.charts import Line, Plane, line_figure, standalone

    plane = Plane("times as much, in doublings", "times as long, in doublings", (-3, 3), (-4, 5))
    drawn = []
    for work, by_axis in record["seconds"].items():
        lines = []
        for axis, by_value in by_axis.items():
            base = by_value[str(BASE[axis])]
            drawn_points = [
                (math.log2(int(value) / BASE[axis]), math.log2(took / base))
                for value, took in by_value.items()
            ]
            lines.append(Line(axis, drawn_points, marked=True))
        drawn.append((line_figure(lines, plane), work))
    return standalone(drawn)


def main() -> None:
    """Measure and record."""
    options_of = parser(__doc__ or "")
    options_of.add_argument("--table", action="store_true")
    options = options_of.parse_args()
    if options.table:
        record = json.loads((RESULTS / "scaling.json").read_text(encoding="utf-8"))
        PAGE.write_text(figure(record), encoding="utf-8")
        print("\n".join(table(record)))
        return
    import os

    import torch

    load = os.getloadavg()[0]
    torch.set_num_threads(options.threads)
    seconds: dict[str, dict[str, dict[str, float]]] = {}
    rows = []
    for work, action in works().items():
        arms = {}
        for (axis, value), shape in points().items():
            model = model_of(0, layers=shape["layers"], width=shape["width"], context=512)
            arms[f"{axis} {value}"] = lambda model=model, shape=shape, action=action: action(
                model, texts_of(shape)
            )
        took = interleaved(arms, options.repetitions, CLOCKS[options.clock])
        print(work, file=sys.stderr)
        for name, several in took.items():
            axis, _, value = name.partition(" ")
            found = median(several)
            seconds.setdefault(work, {}).setdefault(axis, {})[value] = found.median
            rows.append(Row(f"{work}, {name}", found, unit="s"))
    finish("scaling", rows, options, {"seconds": seconds}, load)


if __name__ == "__main__":
    main()
