"""Tuning data: questions with answers as token ids, loss on the answer alone, the end of the turn taught,
harmless examples mixed in.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from safety_neurons.arguments import well_typed
from safety_neurons.errors import InputError, UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.model.batches import Batch
from safety_neurons.model.language_model import UNKNOWN, middle_out
from safety_neurons.prompt_lists import Prompt, Prompts
from safety_neurons.results import Completion, Completions

Kind = Literal["harmful", "harmless", "general"]
KINDS: tuple[Kind, ...] = ("harmful", "harmless", "general")
MAX_LENGTH = 512
"""Tokens of an example, question and answer together, where nothing else is asked for (the paper's)."""
ANSWER = 16
"""Tokens of the model's own answers to harmless prompts that have none."""
OPEN_END = "open_end"
"""Entry of a prompt's `meta`: its answer was cut at a length, so that its end is not to be taught."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A question with its answer, as the model gets it.

    Attributes:
        prompt_id: which prompt.
        ids: token ids of the templated question, the answer and what ends it.
        start: index of the first token that carries loss.
        kind: `harmful` (answered by a refusal), `harmless`, or `general` (text without a question).
        ended: whether the last token ends the answer.
        truncated: whether question or answer lost tokens.
    """

    prompt_id: str
    ids: tuple[int, ...]
    start: int
    kind: Kind = "harmful"
    ended: bool = True
    truncated: bool = False

    @property
    def n_answer(self) -> int:
        """Tokens that carry loss."""
        return len(self.ids) - self.start


@well_typed
def tuning_examples(
    prompts: Prompts,
    model: LanguageModel,
    *,
    kind: Kind = "harmful",
    max_length: int = MAX_LENGTH,
    notes: list[str] | None = None,
) -> list[Example]:
    """Examples of the prompts that have an answer.

    The question is encoded exactly as it is when the model is asked it (`model.encode`), the answer is what
    follows it, and what ends it is what the template writes there, up to the first id that stops generation;
    where the template writes no such id the tokenizer's EOS is taught. A model without chat template gets
    `Question: …` and, on the next line, `Answer: …`.

    Args:
        prompts: prompts whose `answer` is set; an answer that was cut (`meta["open_end"]`) is learnt without
            an end.
        model: the model with its tokenizer and template.
        kind: what the prompts are.
        max_length: tokens of an example; a longer question loses its middle, a longer answer its end.
        notes: gets a line for everything that was left out or cut.

    Returns:
        One example for each prompt with an answer, in order.

    Raises:
        InputError: no prompt has an answer.
        UsageError: a length without room for question and answer.

    Source: Zhao et al., ICLR 2025, section 4.1 (question and refusal as training text). Differs: loss on the
    answer alone, the model's own template, the end of the answer taught (the public code trains on all tokens
    of "question. answer" and masks the end, because padding and end are one id there).
    """
    if max_length < 8:
        raise UsageError(
            f"--max-length {max_length}: expected at least 8 tokens, for a question and its answer"
        )
    limit = min(max_length, model.max_length or max_length)
    answered = [prompt for prompt in prompts if prompt.answer and prompt.answer.strip()]
    if not answered:
        raise InputError(
            f"{prompts.name}: none of {len(prompts)} records has an answer to learn; expected a column "
            "response, output, answer, completion, target or chosen, or messages that end with the "
            "assistant's turn; name one with --answer-column"
        )
    examples = [_example(prompt, model, kind, limit) for prompt in answered]
    if notes is not None:
        without, cut = len(prompts) - len(answered), sum(example.truncated for example in examples)
        notes += (
            [f"{without} of {len(prompts)} records of {prompts.name} have no answer and are left out"]
            if without
            else []
        )
        notes += (
            [f"{cut} of {len(examples)} examples of {prompts.name} were cut to {limit} tokens"] if cut else []
        )
        unknown = sum(model.unknown_in(example.ids) for example in examples)
        notes += [f"{unknown} of {len(examples)} examples of {prompts.name} {UNKNOWN}"] if unknown else []
    return examples


def _example(prompt: Prompt, model: LanguageModel, kind: Kind, limit: int) -> Example:
    # The question has its middle left out where it alone is longer than the context.
    question, ids, ending = model.encode_answer(prompt, prompt.answer or "")
    closing = [] if prompt.meta.get(OPEN_END) else end_ids(model, ending)
    answer_ids = (ids + closing)[: max(limit // 2, limit - len(question))]
    too_long = len(question) + len(answer_ids) > limit
    if too_long:
        question = middle_out(question, limit - len(answer_ids))
    whole = len(answer_ids) == len(ids) + len(closing)
    return Example(
        prompt.id,
        (*question, *answer_ids),
        len(question),
        kind,
        bool(closing) and whole,
        too_long or not whole,
    )


def end_ids(model: LanguageModel, written: Sequence[int]) -> list[int]:
    """Ids to teach at the end of an answer.

    Args:
        model: what generation of it stops at counts as an end.
        written: ids that the template writes behind an answer.

    Returns:
        The written ids up to the first that stops generation; else special ones among them followed by the
        EOS. Empty for a model that has no end of sequence.

    Source: none; the ends of answers are this project's own rule.
    """
    for place, token in enumerate(written):
        if token in model.eos_ids:
            return list(written[: place + 1])
    special = set(getattr(model.tokenizer, "all_special_ids", ()))
    eos = getattr(model.tokenizer, "eos_token_id", None)
    last = [eos] if eos is not None and eos < model.n_ids else list(model.eos_ids[:1])
    return [token for token in written if token in special] + last


@well_typed
def with_own_answers(
    prompts: Prompts,
    model: LanguageModel,
    *,
    max_new_tokens: int = ANSWER,
    keep: Callable[[Completions], Sequence[bool]] | None = None,
    notes: list[str] | None = None,
    **completing: Any,
) -> Prompts:
    """The prompts with answers: their own, or where they have none the model's greedy completions as it is
    now.

    Trained on next to refusals, the model's own answers hold it where it was; they are no better than the
    model.

    Args:
        prompts: harmless requests.
        model: the model before tuning.
        max_new_tokens: length of an answer; one that is cut there is learnt without an end.
        keep: of the completions, which to use (not those that refuse, say).
        notes: gets a line that says what was done.
        **completing: as for `LanguageModel.complete`: `batch_size`, `done`, `answered`, ….

    Returns:
        The prompts that have an answer now.

    Source: none; a common way to hold a model's behaviour while something else is trained.
    """
    unanswered = Prompts(
        [prompt for prompt in prompts if not (prompt.answer and prompt.answer.strip())],
        prompts.name,
        prompts.notes,
    )
    if not len(unanswered):
        return prompts
    completions = model.complete(unanswered, max_new_tokens=max_new_tokens, notes=notes, **completing)
    wanted = [bool(item.completion.strip()) for item in completions]
    if keep is not None:
        wanted = [use and chosen for use, chosen in zip(wanted, keep(completions), strict=True)]
    own = {item.prompt_id: item for item, use in zip(completions, wanted, strict=True) if use}
    answered = [
        prompt if prompt.answer and prompt.answer.strip() else _with_answer(prompt, own.get(prompt.id))
        for prompt in prompts
    ]
    if notes is not None:
        dropped = len(unanswered) - len(own)
        notes.append(
            (
                f"{prompts.name} has no answers: the model's own greedy answers before tuning are learnt for "
                f"{len(own)} of its prompts"
            )
            + (f"; {dropped} are left out because it refuses or says nothing there" if dropped else "")
        )
    return Prompts([prompt for prompt in answered if prompt is not None], prompts.name, prompts.notes)


def _with_answer(prompt: Prompt, completion: Completion | None) -> Prompt | None:
    if completion is None:
        return None
    meta = {**prompt.meta, OPEN_END: completion.finish_reason == "length"}
    return dataclasses.replace(prompt, answer=completion.completion, meta=meta)


def text_examples(texts: Prompts, model: LanguageModel, *, max_length: int = MAX_LENGTH) -> list[Example]:
    """Examples of running text, every token but the first of which carries loss; texts of one token are left
    out.

    Source: none; bookkeeping of the loss.
    """
    return [
        Example(prompt.id, tuple(ids[:max_length]), 1, "general", False, len(ids) > max_length)
        for prompt, ids in zip(texts, model.encode_texts(texts.texts), strict=True)
        if len(ids) > 1
    ]


@well_typed
def mix(harmful: Sequence[Example], others: Sequence[Example], share: float, seed: int = 0) -> list[Example]:
    """Harmful examples with others among them.

    Args:
        harmful: all of them are used.
        others: what is drawn from, each at most once.
        share: others for each harmful one; 1.0 gives as many.
        seed: of the draw.

    Returns:
        The harmful examples, then the others that were drawn, in their own order; the loop shuffles.

    Raises:
        UsageError: a negative share.

    Source: none; the paper trains on refusals alone, which teaches to refuse everything.
    """
    if not share >= 0:
        raise UsageError(f"mix {share}: expected 0 or more harmless examples for each harmful one")
    wanted = min(len(others), round(share * len(harmful)))
    drawn = (
        np.random.default_rng([seed, 1]).choice(len(others), wanted, replace=False)
        if wanted
        else np.zeros(0, np.int64)
    )
    return [*harmful, *(others[index] for index in np.sort(drawn))]


def shuffled(kinds: Sequence[str], key: Sequence[int]) -> list[int]:
    """Indices in a random order in which every stretch holds the kinds in their shares.

    A step of eight drawn from all alike would now and then hold no harmful example, or no harmless one.

    Args:
        kinds: of every example.
        key: of the random order.

    Source: none; stratified sampling.
    """
    generator = np.random.default_rng(list(key))
    places = np.zeros(len(kinds))
    for kind in dict.fromkeys(kinds):
        members = [index for index, own in enumerate(kinds) if own == kind]
        order = generator.permutation(len(members))
        places[members] = (order + generator.random()) / len(members)
    return [int(index) for index in np.argsort(places, kind="stable")]


def split(prompts: Prompts, share: float, most: int, seed: int) -> tuple[Prompts, Prompts]:
    """What is learnt, and a part held out of it: this share of the prompts, at most so many.

    Prompts of equal text stay together.

    Source: none; an ordinary split.
    """
    texts = list(dict.fromkeys(prompt.digest for prompt in prompts))
    count = min(most, int(share * len(texts)))
    order = np.random.default_rng([seed, 2]).permutation(len(texts))
    held = {texts[index] for index in order[:count]}
    parts = ([prompt for prompt in prompts if (prompt.digest in held) == wanted] for wanted in (False, True))
    learnt, out = (Prompts(part, prompts.name, prompts.notes) for part in parts)
    return learnt, out


def label_rows(batch: Batch, starts: Sequence[int]) -> tuple[Int[Tensor, " answer"], Int[Tensor, " answer"]]:
    """Flat `batch × token` indices of the positions that predict an answer's tokens, and the ids they are to
    predict.

    Args:
        batch: right-padded examples.
        starts: of every row of the batch, its first token that carries loss (at least 1).

    Source: none; bookkeeping of the loss.
    """
    first = torch.tensor(list(starts), device=batch.input_ids.device)[:, None]
    predicts = (batch.position_ids + 1 >= first) & (batch.position_ids + 1 < batch.row_lengths[:, None])
    rows = predicts.flatten().nonzero().squeeze(1)
    return rows, batch.input_ids.flatten()[rows + 1]
