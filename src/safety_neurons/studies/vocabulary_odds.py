"""The refusal's log-odds of every prompt: mean log p(refusal) − mean log p(compliance), teacher-forced."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from safety_neurons.detectors.attribution import SCORED_TOKENS, ScoredRow, explained
from safety_neurons.detectors.methods import Attribution
from safety_neurons.errors import InputError
from safety_neurons.model import LanguageModel, token_log_probabilities
from safety_neurons.model.batches import BatchSize
from safety_neurons.prompts import Prompts

Treatment = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclasses.dataclass(frozen=True)
class RefusalOdds:
    """Texts to score, prompt by prompt.

    Attributes:
        rows: for every prompt its refusals and compliances behind it.
        texts: what they are, as JSON values.
        batch_size: rows per pass.
        notes: prompts that were left out.
        groups: what the prompts share.
    """

    rows: tuple[tuple[ScoredRow, ...], ...]
    texts: dict[str, Any]
    batch_size: BatchSize = "auto"
    notes: tuple[str, ...] = ()
    groups: tuple[str | None, ...] | None = None

    @staticmethod
    def of(
        model: LanguageModel,
        base: LanguageModel | None,
        prompts: Prompts,
        refusal: str | None = None,
        compliance: str | None = None,
        batch_size: BatchSize = "auto",
    ) -> "RefusalOdds":
        """Of a pair both models' own greedy answers, of one model the given texts or the built-in ones; 16 tokens of each at most.

        Raises:
            InputError: no prompt on which the two models part.
        """
        encoded = model.encode(prompts, reserve=SCORED_TOKENS)
        if base is None:
            sides = list(Attribution(refusal=refusal, compliance=compliance).texts.values())
            rows = [explained(one.ids, *([_tokens(model, one.ids, text) for text in side] for side in sides)) for one in encoded]
            texts = {"refusal": sides[0], "compliance": sides[1]}
            return RefusalOdds(tuple(map(tuple, rows)), texts, batch_size, groups=tuple(prompts.groups))
        written = [
            [list(answer.token_ids) for answer in writer.complete(prompts, max_new_tokens=SCORED_TOKENS, batch_size=batch_size)]
            for writer in (model, base)
        ]
        parted = [bool(mine and theirs and mine != theirs) for mine, theirs in zip(*written, strict=True)]
        pairs = zip(encoded, *written, parted, strict=True)
        rows = [explained(one.ids, [mine], [theirs]) for one, mine, theirs, apart in pairs if apart]
        if not rows:
            raise InputError(f"both models answer all {len(encoded)} prompts alike; expected prompts that only the aligned model refuses")
        left = len(encoded) - len(rows)
        notes = (f"{left} of {len(encoded)} prompts are answered alike by both models and say nothing of log-odds",) if left else ()
        texts = {"refusal": "the aligned model's", "compliance": "the base model's"}
        shared = tuple(group for group, apart in zip(prompts.groups, parted, strict=True) if apart)
        return RefusalOdds(tuple(map(tuple, rows)), texts, batch_size, notes, shared)

    def measure(self, model: LanguageModel, treatment: Treatment = contextlib.nullcontext) -> Float64[np.ndarray, " prompt"]:
        """Log-odds of every prompt that counts, in nats per token."""
        flat = [row for rows in self.rows for row in rows]
        spans = [(row.start, len(row.ids)) for row in flat]
        with treatment():
            found = token_log_probabilities(model, [list(row.ids) for row in flat], spans, batch_size=self.batch_size)
        values = [row.weight * float(part.mean()) for row, part in zip(flat, found, strict=True)]
        ends = np.cumsum([len(rows) for rows in self.rows])[:-1]
        return np.array([part.sum() for part in np.split(np.array(values), ends)])


def _tokens(model: LanguageModel, prompt: Sequence[int], text: str) -> list[int]:
    """Tokens of a text behind a prompt, with a space between where the prompt ends in a visible character."""
    end = model.decode([prompt[-1]])
    space = " " if end and not end[-1].isspace() else ""
    ids = model.tokenizer(space + text.strip(), add_special_tokens=False)["input_ids"]
    if not ids:
        raise InputError(f"the text {text!r} has no tokens; expected a sentence to score")
    return [int(number) for number in ids]
