"""Answers of a batch: beside transformers' own cache, which copies all earlier tokens at every step; with the
start that prompts have in common read once; and under several sets of neurons at once.

    python benchmarks/decoding_cost.py --repetitions 3

The same greedy answers of SmolLM2-135M-Instruct by the same `generate`, of batches of several sizes; the
prompt's own pass is in it. Answers are held to be the same, under sets at once by all but one in a hundred
rows: products of more rows are summed in another order.
"""

import os
import sys
from collections.abc import Callable
from unittest import mock

import torch

from paired import CLOCKS, Row, finish, interleaved, median, medians, parser, ratio
from safety_neurons.interventions import deactivated
from safety_neurons.interventions.by_row import SetTreatment
from safety_neurons.model import LanguageModel, decoding, load, room
from safety_neurons.model.decoding import FEWEST, Decoding, TreatedRows
from safety_neurons.model.language_model import generate
from safety_neurons.neurons import NeuronSet

MODEL = "real:smollm2-135m-instruct"
Answers = dict[int, list[int]]


def answering(model: LanguageModel, ids: list[list[int]], new: int) -> Callable[[], Answers]:
    """Token ids that the model writes to some prompts."""

    def run() -> Answers:
        answers = generate(model, ids, Decoding(new), batch_size=len(ids))
        return {row: answer.token_ids for row, answer in answers.items()}

    return run


def without_room(run: Callable[[], Answers]) -> Callable[[], Answers]:
    """The same with caches as transformers makes them."""

    def plain() -> Answers:
        with mock.patch.object(room, "_WITH_ROOM", {}):
            return run()

    return plain


def alike(rows: int, prompt: int, start: int) -> list[list[int]]:
    """Random prompts that begin with the same tokens."""
    draw = torch.Generator().manual_seed(rows)
    ids = torch.randint(1000, 40_000, (rows, prompt), generator=draw)
    ids[:, :start] = ids[0, :start]
    return ids.tolist()


def read_whole(run: Callable[[], Answers]) -> Callable[[], Answers]:
    """The same with every prompt read from its first token on."""

    def plain() -> Answers:
        with mock.patch.object(decoding, "SHARED", 10**9):
            return run()

    return plain


def under_sets(
    model: LanguageModel, ids: list[list[int]], new: int, sets: int
) -> dict[str, Callable[[], Answers]]:
    """Answers with so many random sets off, of a hundredth of the down neurons: all in one batch, and one set
    after the other.
    """
    everything = NeuronSet.all(model.table).only(sites=["down"])
    share = {key: each[: len(each) // 100] for key, each in everything.items()}
    drawn = NeuronSet(share, model.table).random_like(0, n=sets)
    treatments = [SetTreatment(deactivated, (model,), one) for one in drawn]
    which = [number for number in range(sets) for _ in ids]
    treated = TreatedRows(which, lambda rows: treatments[0].in_rows(treatments, rows))

    def together() -> Answers:
        answers = generate(model, ids * sets, Decoding(new, treated=treated), batch_size=len(which))
        return {row: answer.token_ids for row, answer in answers.items()}

    def apart() -> Answers:
        found: Answers = {}
        for number, one in enumerate(treatments):
            with one():
                answers = generate(model, ids, Decoding(new), batch_size=len(ids))
            found |= {number * len(ids) + row: answer.token_ids for row, answer in answers.items()}
        return found

    return {"together": together, "apart": apart}


def main() -> None:
    """Measure and record."""
    asked = parser(__doc__ or "")
    asked.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128])
    asked.add_argument("--prompt", type=int, default=42)
    asked.add_argument("--new", type=int, default=128)
    asked.add_argument("--dtype", default="float32")
    asked.add_argument("--start", type=int, default=31, help="tokens that all prompts begin with")
    asked.add_argument("--sets", type=int, default=8)
    options = asked.parse_args()
    load_before = os.getloadavg()[0]
    torch.set_num_threads(options.threads)
    model = load(MODEL, dtype=options.dtype, offline=True)
    model.eos_ids = ()  # Every answer is as long as it may be.
    rows: list[Row] = []
    seconds: dict[str, dict[str, float]] = {}
    for size in options.rows:
        run = answering(model, alike(size, options.prompt, 0), options.new)
        arms = {"room": run, "copied": without_room(run)}
        assert arms["room"]() == arms["copied"](), "answers differ"
        took = interleaved(arms, options.repetitions, CLOCKS[options.clock], warm_up=0)
        each = [one / (size * options.new) * 1e3 for one in took["room"]]
        what = f"a decoded token and row, {size} rows, {options.new} tokens behind {options.prompt}"
        rows += [Row(what, median(each), unit="ms"), Row(f"{what} ÷ transformers' cache", ratio(took, *arms))]
        seconds[str(size)] = medians(took)
        print(f"{size} rows done", file=sys.stderr, flush=True)
    for size in [size for size in options.rows if size >= FEWEST]:
        run = answering(model, alike(size, options.prompt, options.start), options.new)
        arms = {"once": run, "whole": read_whole(run)}
        assert arms["once"]() == arms["whole"](), "answers differ"
        took = interleaved(arms, options.repetitions, CLOCKS[options.clock], warm_up=0)
        what = (
            f"{size} prompts that share {options.start} of {options.prompt} tokens, {options.new} tokens each"
        )
        rows.append(Row(f"{what}: the start read once ÷ in each", ratio(took, *arms)))
        seconds[f"{size} alike"] = medians(took)
        print(f"{size} alike done", file=sys.stderr, flush=True)
        arms = under_sets(model, alike(size, options.prompt, options.start), options.new, options.sets)
        one, other = arms["together"](), arms["apart"]()
        assert sum(one[row] != other[row] for row in one) <= len(one) / 100, "answers differ"
        took = interleaved(arms, options.repetitions, CLOCKS[options.clock], warm_up=0)
        what = f"{size} such prompts with each of {options.sets} sets off"
        rows.append(Row(f"{what}: all sets in one batch ÷ one after the other", ratio(took, *arms)))
        seconds[f"{size} under sets"] = medians(took)
        print(f"{size} under sets done", file=sys.stderr, flush=True)
    finish("decoding", rows, options, {"seconds": seconds}, load_before)


if __name__ == "__main__":
    main()
