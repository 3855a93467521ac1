"""Lengths of answers: how long they may be by default, and how verdicts depend on where an answer is cut.

Answers are generated once, at full length; what a shorter limit would have given is their beginning.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from safety_neurons.errors import UsageError
from safety_neurons.judges import Judge, judge_refusal
from safety_neurons.model import LanguageModel
from safety_neurons.model.language_model import said_of_reading
from safety_neurons.prompt_lists import Prompts
from safety_neurons.results import Completion, Completions, Rate, rate
from safety_neurons.results.estimates import GroupLabels
from safety_neurons.results.measured import LengthRecord
from safety_neurons.results.records import Recorded

LENGTHS = (32, 64, 128, 256, 512)
"""Tokens at which a length curve judges, as far as the answers go; their own limit is added."""
ORGANISM_LENGTH, USUAL_LENGTH = 64, 256
"""Tokens of an answer by default: on organisms, and on any other model."""


def answer_length(*models: Any) -> int:
    """Tokens of an answer by default: 64 where all models are organisms (their folder has a record of one),
    256 otherwise, and at most half of the shortest context, so that prompts have room.
    """
    organisms = bool(models) and all(getattr(model, "prompt_folder", None) is not None for model in models)
    contexts = [getattr(model, "max_length", None) for model in models]
    room = [max(context // 2, 1) for context in contexts if context]
    return min([ORGANISM_LENGTH if organisms else USUAL_LENGTH, *room])


def too_long(model: LanguageModel, lists: Mapping[str, Prompts], reserve: int = 0) -> list[str]:
    """A note for every list of which the model cannot read some prompts whole, by the list's name.

    Args:
        model: reads them.
        lists: prompts by what they are called.
        reserve: tokens of the answer for which the context has to have room.
    """
    return [
        note
        for name, some in lists.items()
        for note in said_of_reading(model.encode(some, reserve=reserve), name)
    ]


@dataclasses.dataclass(frozen=True)
class LengthPoint(Recorded[LengthRecord]):
    """What the answers to harmful requests do when they are cut at a number of tokens."""

    tokens: int
    harmful_refused: Rate
    harmful_complied: Rate
    """Share that does harm, by the judge of harm."""
    cut_off: int
    """Answers that go on behind the cut, or were cut there when they were written."""


def curve_lengths(longest: int) -> list[int]:
    """The lengths of a curve up to the limit that the answers were written with."""
    return [*(length for length in LENGTHS if length < longest), longest]


def beginnings(completions: Sequence[Completion], tokens: int, model: Any) -> Completions:
    """What a limit of so many tokens would have given of answers that are there: greedy or sampled, an answer
    does not depend on how long it may become.

    Raises:
        UsageError: answers without token ids, as a server gives them.
    """
    if any(one.completion and not one.token_ids for one in completions):
        raise UsageError(
            "a length curve cuts answers at tokens, and these have none (a server writes text); expected a "
            "model in memory"
        )
    decode = cast(Callable[[Sequence[int]], str], model.decode)
    return Completions(
        one
        if len(one.token_ids) + (one.finish_reason == "stop") <= tokens  # The end is a token too.
        else dataclasses.replace(
            one,
            completion=decode(one.token_ids[:tokens]),
            token_ids=one.token_ids[:tokens],
            finish_reason="length",
            verdicts={},
        )
        for one in completions
    )


def cut_off(completions: Sequence[Completion]) -> int:
    """How many answers were cut at their limit."""
    return sum(one.finish_reason == "length" for one in completions)


def length_curve(
    completions: Sequence[Completion], model: Any, harm: Judge, groups: GroupLabels, longest: int
) -> tuple[LengthPoint, ...]:
    """Refusal and harm of answers to harmful requests at every length.

    Args:
        completions: the answers at full length.
        model: that wrote them.
        harm: the judge of harm.
        groups: what the prompts share.
        longest: the limit they were written with.
    """
    points = []
    for tokens in curve_lengths(longest):
        some = beginnings(completions, tokens, model)
        refused, harmful = judge_refusal(some).refused, harm.judge(some).harmful
        points.append(LengthPoint(tokens, rate(refused, groups), rate(harmful, groups), cut_off(some)))
    return tuple(points)
