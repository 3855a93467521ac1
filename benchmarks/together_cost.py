"""Answers of one batch beside the same answers apart: the start that prompts have in common read once, and
several sets of neurons off, each in rows of its own.

    python benchmarks/together_cost.py --repetitions 3

Greedy answers of SmolLM2-135M-Instruct to random prompts that share as many tokens as its chat template has.
Answers are held to be the same, under sets at once in all but one of a hundred rows: products of more rows
are summed in another order.
"""

import os
import sys
from collections.abc import Callable
from unittest import mock

import torch

from paired import CLOCKS, Row, finish, interleaved, medians, parser, ratio
from safety_neurons.interventions import deactivated
from safety_neurons.interventions.by_row import SetTreatment
from safety_neurons.model import LanguageModel, decoding, load
from safety_neurons.model.decoding import Decoding, TreatedRows
from safety_neurons.model.language_model import generate
from safety_neurons.neurons import NeuronSet

MODEL = "real:smollm2-135m-instruct"
Answers = dict[int, list[int]]


def prompts(rows: int, tokens: int, start: int) -> list[list[int]]:
    """Random ones that begin with the same tokens."""
    draw = torch.Generator().manual_seed(rows)
    ids = torch.randint(1000, 40_000, (rows, tokens), generator=draw)
    ids[:, :start] = ids[0, :start]
    return ids.tolist()


def with_a_start(model: LanguageModel, ids: list[list[int]], new: int) -> dict[str, Callable[[], Answers]]:
    """What prompts begin with read once, and in each."""

    def once() -> Answers:
        answers = generate(model, ids, Decoding(new), batch_size=len(ids))
        return {row: answer.token_ids for row, answer in answers.items()}

    def whole() -> Answers:
        with mock.patch.object(decoding, "SHARED", 10**9):
            return once()

    return {"once": once, "whole": whole}


def under_sets(
    model: LanguageModel, ids: list[list[int]], new: int, sets: int
) -> dict[str, Callable[[], Answers]]:
    """Random sets of a hundredth of the down neurons off: all in one batch, and one after the other."""
    everything = NeuronSet.all(model.table).only(sites=["down"])
    share = {key: each[: len(each) // 100] for key, each in everything.items()}
    treatments = [
        SetTreatment(deactivated, (model,), one)
        for one in NeuronSet(share, model.table).random_like(0, n=sets)
    ]
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
    asked.add_argument("--rows", type=int, default=32)
    asked.add_argument("--prompt", type=int, default=42)
    asked.add_argument("--start", type=int, default=31, help="tokens that all prompts begin with")
    asked.add_argument("--new", type=int, default=32)
    asked.add_argument("--sets", type=int, default=8)
    options = asked.parse_args()
    load_before = os.getloadavg()[0]
    torch.set_num_threads(options.threads)
    model = load(MODEL, offline=True)
    model.eos_ids = ()  # Every answer is as long as it may be.
    ids = prompts(options.rows, options.prompt, options.start)
    alike = f"{options.start} of {options.prompt} tokens of a prompt alike"
    what = f"{options.rows} answers of {options.new} tokens, {alike}"
    measured = {
        f"{what}: the start read once ÷ in each": (with_a_start(model, ids, options.new), 0.0),
        f"{what}, with each of {options.sets} sets off: in one batch ÷ one set after the other": (
            under_sets(model, ids, options.new, options.sets),
            0.01,
        ),
    }
    rows: list[Row] = []
    seconds: dict[str, dict[str, float]] = {}
    for label, (arms, unlike) in measured.items():
        one, other = (run() for run in arms.values())
        assert sum(one[row] != other[row] for row in one) <= unlike * len(one), "answers differ"
        took = interleaved(arms, options.repetitions, CLOCKS[options.clock], warm_up=0)
        rows.append(Row(label, ratio(took, *arms)))
        seconds[label] = medians(took)
        print(label, file=sys.stderr, flush=True)
    finish("together", rows, options, {"seconds": seconds}, load_before)


if __name__ == "__main__":
    main()
