"""A decoded token of a batch: beside transformers' own cache, which copies all earlier tokens at every step.

    python benchmarks/decoding_cost.py --repetitions 3

The same greedy answers of SmolLM2-135M-Instruct by the same `generate`, of batches of several sizes; the
prompt's own pass is in it. Answers are held to be the same.
"""

import os
import sys
from collections.abc import Callable
from unittest import mock

import torch

from paired import CLOCKS, Row, finish, interleaved, median, medians, parser, ratio
from safety_neurons.model import LanguageModel, load, room
from safety_neurons.model.decoding import Decoding
from safety_neurons.model.language_model import generate

MODEL = "real:smollm2-135m-instruct"
Answers = dict[int, list[int]]


def answering(model: LanguageModel, rows: int, prompt: int, new: int) -> Callable[[], Answers]:
    """Token ids that the model writes to so many random prompts."""
    draw = torch.Generator().manual_seed(rows)
    ids = torch.randint(1000, 40_000, (rows, prompt), generator=draw).tolist()

    def run() -> Answers:
        answers = generate(model, ids, Decoding(new), batch_size=rows)
        return {row: answer.token_ids for row, answer in answers.items()}

    return run


def without_room(run: Callable[[], Answers]) -> Callable[[], Answers]:
    """The same with caches as transformers makes them."""

    def plain() -> Answers:
        with mock.patch.object(room, "_WITH_ROOM", {}):
            return run()

    return plain


def main() -> None:
    """Measure and record."""
    asked = parser(__doc__ or "")
    asked.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128])
    asked.add_argument("--prompt", type=int, default=42)
    asked.add_argument("--new", type=int, default=128)
    asked.add_argument("--dtype", default="float32")
    options = asked.parse_args()
    load_before = os.getloadavg()[0]
    torch.set_num_threads(options.threads)
    model = load(MODEL, dtype=options.dtype, offline=True)
    model.eos_ids = ()  # Every answer is as long as it may be.
    rows, seconds = [], {}
    for size in options.rows:
        run = answering(model, size, options.prompt, options.new)
        arms = {"room": run, "copied": without_room(run)}
        assert arms["room"]() == arms["copied"](), "answers differ"
        took = interleaved(arms, options.repetitions, CLOCKS[options.clock], warm_up=0)
        each = [one / (size * options.new) * 1e3 for one in took["room"]]
        what = f"a decoded token and row, {size} rows, {options.new} tokens behind {options.prompt}"
        rows += [Row(what, median(each), unit="ms"), Row(f"{what} ÷ transformers' cache", ratio(took, *arms))]
        seconds[size] = medians(took)
        print(f"{size} rows done", file=sys.stderr, flush=True)
    finish("decoding", rows, options, {"seconds": seconds}, load_before)


if __name__ == "__main__":
    main()
