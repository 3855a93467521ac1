"""Time that patching's hooks take per decoded token and layer, read inside decoding steps.

    python benchmarks/hook_cost.py --repetitions 31

    python benchmarks/hook_cost.py --counting --clock cpu     # only what it costs to count the hooks

A clock hook in front of the hook that copies columns and one behind it: dispatch and one reading of the clock
are in the number. What two clock hooks read with a hook between them that does nothing is the row beside it.
(A difference of whole passes is of no use here: one pass varies by more than all its hooks take.)

What it costs to count how often each site comes by is a paired ratio of decoding steps of one row with a hook
at every site of every layer, which do nothing, once with the count and once without it.
"""

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import torch
import transformers

import patching_cost
from paired import CLOCKS, Clock, Row, finish, median, parser
from safety_neurons.interventions.columns import columns
from safety_neurons.interventions.patch import StackedPass
from safety_neurons.interventions.targets import Subject
from safety_neurons.model import hooks
from safety_neurons.model.hooks import editing

TARGET_MS = 0.03
STEPS = 15


def step_times(
    subject: Subject,
    editors: Mapping[str, Callable[[Any], Any]],
    ids: torch.Tensor,
    repetitions: int,
    clock: Clock = time.perf_counter,
) -> list[float]:
    """Milliseconds a layer between the clock hooks, the median of some decoding steps a repetition."""
    cache = transformers.DynamicCache(config=subject.body.config)
    moments: list[float] = []
    places = [subject.anatomy.places[key].hooked for key in editors]

    def note(*_: Any) -> None:
        moments.append(clock())

    def step() -> float:
        moments.clear()
        subject.model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
        cache.crop(-1)
        return (
            1000
            * sum(after - before for before, after in zip(moments[::2], moments[1::2], strict=True))
            / len(places)
        )

    with torch.no_grad(), contextlib.ExitStack() as stack:
        subject.model(input_ids=ids, past_key_values=cache, use_cache=True)
        for place in places:
            stack.callback(place.register_forward_pre_hook(note).remove)
        stack.enter_context(editing(subject.anatomy, editors))
        for place in places:
            stack.callback(place.register_forward_pre_hook(note).remove)
        step()
        return [statistics.median(step() for _ in range(STEPS)) for _ in range(repetitions)]


def counting(subject: Subject, ids: torch.Tensor, repetitions: int, clock: Clock) -> list[float]:
    """Time of decoding steps whose hooks are counted ÷ of those whose hooks are not, a repetition each."""
    editors = {key: lambda activation: activation for key in subject.anatomy.places}

    def seconds(counts: bool) -> float:
        plain = mock.patch.object(hooks, "_counted", return_value=contextlib.nullcontext())
        cache = transformers.DynamicCache(config=subject.body.config)
        with (
            torch.no_grad(),
            contextlib.nullcontext() if counts else plain,
            editing(subject.anatomy, editors),
        ):
            subject.model(input_ids=ids, past_key_values=cache, use_cache=True)
            start = clock()
            for _ in range(STEPS):
                subject.model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
                cache.crop(-1)
            return clock() - start

    seconds(True), seconds(False)
    pairs = []
    for repetition in range(repetitions):
        first = repetition % 2 == 0
        one, other = seconds(first), seconds(not first)
        pairs.append(one / other if first else other / one)
    return pairs


def main() -> None:
    """Measures and writes the record."""
    options_of = parser(__doc__)
    options_of.add_argument("--counting", action="store_true", help="only the count of hooks")
    options = options_of.parse_args()
    load = os.getloadavg()[0]
    torch.set_num_threads(options.threads)
    shape = argparse.Namespace(
        layers=8,
        hidden=512,
        intermediate=1376,
        vocabulary=32000,
        prompt=64,
        new=128,
        device="cpu",
        dtype="float32",
        share=0.05,
        model="",
        apart=0.01,
    )
    ids = torch.randint(3, shape.vocabulary, (8, shape.prompt), generator=torch.Generator().manual_seed(1))
    base, _ = patching_cost.pair_of("ia3", shape)
    subject = Subject.of(base)
    clock = CLOCKS[options.clock]
    with base.active():
        counted = counting(subject, ids[:1], options.repetitions, clock)
    what = f"hooks counted ÷ not, {len(subject.anatomy.places)} sites, decoding steps of one row"
    rows = [Row(what, median(counted))]
    if options.counting:
        finish("hook_counts", rows, options, {"shape": vars(shape), "ratios": counted}, load)
        return
    state = StackedPass(
        subject, subject, columns(subject.anatomy, patching_cost.chosen_neurons(base, shape.share))
    )
    idle = dict.fromkeys(state.editors(), lambda activation: activation)
    with base.active():
        copying = step_times(subject, state.editors(), ids, options.repetitions, clock)
        nothing = step_times(subject, idle, ids, options.repetitions, clock)
    rows += [
        Row(
            "hooks per decoded token and layer, 8 rows, 5 % of the down neurons",
            median(copying),
            TARGET_MS,
            "ms",
        ),
        Row("the same with a hook that does nothing", median(nothing), None, "ms"),
    ]
    finish("hooks", rows, options, {"shape": vars(shape)}, load)


if __name__ == "__main__":
    main()
