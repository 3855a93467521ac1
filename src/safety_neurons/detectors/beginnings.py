"""How refusals begin: the rows that ask whether a prompt's answer sets out to refuse, in whatever words."""

import collections
from collections.abc import Sequence
from dataclasses import replace

from safety_neurons.detectors.gradients import ScoredRow
from safety_neurons.detectors.swap_attribution import contested

USUAL = 0.05
"""Share of the refusals that must go on with a token for it to count as a refusal's for other prompts too."""


def different(told: Sequence[Sequence[ScoredRow]]) -> list[Sequence[ScoredRow]]:
    """The prompts that the two models complete differently."""
    return [pair for pair in told if pair[0].ids != pair[1].ids]


def beginnings(told: Sequence[Sequence[ScoredRow]]) -> list[ScoredRow]:
    """One row for every prompt that the two models complete differently: its score is log p(going on as refusals do) where they part.

    As refusals do: with its own refusal's token, or one with which at least a twentieth of the refusals go on after the same beginning
    and no compliance does.

    Args:
        told: of every prompt its refusal and its compliance.
    """
    pairs = different(told)
    rows = [contested(pair) for pair in pairs]
    starts = [row.ids[pair[0].start : -1] for row, pair in zip(rows, pairs, strict=True)]
    refusing, complying = (collections.defaultdict[tuple[int, ...], collections.Counter[int]](collections.Counter) for _ in range(2))
    for start, row in zip(starts, rows, strict=True):
        refusing[start][row.ids[-1]] += 1
        complying[start][int(row.rival or 0)] += 1
    found = []
    for start, row in zip(starts, rows, strict=True):
        least = USUAL * refusing[start].total()
        usual = {token for token, count in refusing[start].items() if count >= least and token not in complying[start]}
        found.append(replace(row, rival=None, instead=tuple(sorted(usual | {row.ids[-1]}))))
    return found
