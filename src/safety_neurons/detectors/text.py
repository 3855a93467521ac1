"""Which text a contrast detector feeds, and which of its positions count.

One model writes (greedily), both read: the ids are kept as they were generated, cut before the
end-of-sequence token, and fed unchanged to both models.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from safety_neurons.counting import numbered
from safety_neurons.detectors.reading import writer_of
from safety_neurons.detectors.runner import Progress, PromptCounts, Stream
from safety_neurons.errors import InputError, MismatchError, NumericalError, UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.model.batches import BatchSize
from safety_neurons.model.decoding import Answer, Decoding
from safety_neurons.model.language_model import generate as complete
from safety_neurons.model.language_model import said_of_reading
from safety_neurons.prompt_lists import Prompts
from safety_neurons.prompt_lists.records import normalised
from safety_neurons.results import Completion, Completions

POSITIONS = ("completion", "completion-predicting", "prompt", "prompt-last")


@dataclass(frozen=True)
class Span:
    """One sequence to feed and the half-open range of its positions that count.

    Attributes:
        prompt_id: of which prompt.
        ids: tokens to feed: the prompt, and the completion where it is needed.
        start: first position that counts.
        stop: one behind the last.
    """

    prompt_id: str
    ids: tuple[int, ...]
    start: int
    stop: int

    @property
    def n_tokens(self) -> int:
        """How many positions count."""
        return self.stop - self.start


@dataclass(frozen=True)
class Texts:
    """What will be fed, and what became of the prompts on the way."""

    spans: tuple[Span, ...]
    counts: PromptCounts
    notes: tuple[str, ...] = ()

    @property
    def n_tokens(self) -> int:
        """How many positions count, over all prompts."""
        return sum(span.n_tokens for span in self.spans)


def cut_at_end(ids: Sequence[int], ends: Collection[int]) -> list[int]:
    """The ids before the first end-of-sequence token, which itself is excluded."""
    for position, token in enumerate(ids):
        if token in ends:
            return [int(before) for before in ids[:position]]
    return [int(before) for before in ids]


def span(prompt_id: str, prompt: Sequence[int], completion: Sequence[int], positions: str) -> Span:
    """The sequence and range for one prompt.

    `completion` counts the positions of the completion tokens, `completion-predicting` those one to the left
    (the last prompt token included, the last completion token excluded), `prompt` every prompt token,
    `prompt-last` its last.

    Raises:
        UsageError: unknown `positions`.
    """
    if positions not in POSITIONS:
        raise UsageError(f"positions {positions!r} is unknown: use one of {', '.join(POSITIONS)}")
    length, new = len(prompt), len(completion)
    if positions == "completion":
        return Span(prompt_id, (*prompt, *completion), length, length + new)
    if positions == "completion-predicting":
        return Span(prompt_id, (*prompt, *completion), length - 1, length + new - 1)
    return Span(prompt_id, tuple(prompt), 0 if positions == "prompt" else length - 1, length)


def generate(
    lm: LanguageModel,
    prompts: Prompts,
    name: str,
    max_new_tokens: int,
    stream: Stream,
    *,
    batch_size: BatchSize = "auto",
    progress: Progress | None = None,
) -> list[list[int] | None]:
    """Greedy completions of `prompts` as ids without the end token, None where the model gave NaN; what the
    stream holds is not redone.
    """
    written = _written(stream.named(f"text/{name}"))
    sequences = [row.ids for row in lm.encode(prompts, reserve=max_new_tokens)]

    def keep(index: int, answer: Answer) -> None:
        written[index] = None if answer.finish_reason == "failed" else answer.token_ids

    def prepare() -> None:
        ids = [np.array(row or (), np.int64) for row in written.values()]
        lengths = [-1 if row is None else len(row) for row in written.values()]
        arrays = {"indices": np.array(list(written), np.int64), "lengths": np.array(lengths, np.int64)}
        stream.put(f"text/{name}", {**arrays, "ids": np.concatenate([np.zeros(0, np.int64), *ids])})

    def went_on(done: int, whole: int, tokens: int) -> None:
        stream.went_on(prepare)
        if progress is not None:
            progress(done, whole, tokens)

    with stream.kept(prepare):
        options: dict[str, Any] = {
            "batch_size": batch_size,
            "skip": sorted(written),
            "answered": keep,
            "progress": went_on,
        }
        complete(lm, sequences, Decoding(max_new_tokens), **options)
    prepare()
    stream.save()
    return [written[index] for index in range(len(sequences))]


def _written(arrays: Mapping[str, np.ndarray]) -> dict[int, list[int] | None]:
    """The completions that a stream holds, by the number of the prompt."""
    if not arrays:
        return {}
    lengths = arrays["lengths"]
    parts = np.split(arrays["ids"], np.cumsum(np.maximum(lengths, 0))[:-1])
    rows = zip(arrays["indices"].tolist(), lengths.tolist(), parts, strict=True)
    return {index: None if length < 0 else part.tolist() for index, length, part in rows}


def given(
    lm: LanguageModel, prompts: Prompts, completions: Completions, notes: list[str] | None = None
) -> list[list[int] | None]:
    """The completions of a file as ids, matched by prompt id and text; None where a prompt has none.

    Of a file with several arms, such as `verify` writes, only the untreated one is read, and `notes` gets a
    line that says so.

    Raises:
        InputError: no prompt of the list has a completion in the file, its text is another, or it has several
        that differ. MismatchError: the ids are another tokenizer's.
    """
    ends = lm.eos_ids
    by_id: dict[str, list[Completion]] = {}
    for answer in _untreated(completions, notes):
        by_id.setdefault(answer.prompt_id, []).append(answer)
    chosen = _matched(prompts, by_id)
    answers: list[list[int] | None] = []
    with_ids = readable = 0
    for one in chosen:
        if one is None:
            answers.append(None)
            continue
        ids = one.token_ids or tuple(lm.tokenizer(one.completion, add_special_tokens=False)["input_ids"])
        if ids and not 0 <= min(ids) <= max(ids) < lm.n_ids:
            raise MismatchError(
                f"the completion of prompt {one.prompt_id!r} holds id {max(ids)} and {lm.name} has "
                f"{lm.n_ids} embeddings; expected ids of this model's tokenizer"
            )
        if one.token_ids and one.completion.strip():
            with_ids += 1
            readable += lm.decode(one.token_ids).split() == one.completion.split()
        answers.append(cut_at_end(ids, ends))
    if with_ids and not readable:
        raise MismatchError(
            f"none of {with_ids} completions reads as its text with the tokenizer of {lm.name}: their ids "
            "are another tokenizer's; leave token_ids out of the file, or write it with this model"
        )
    return answers


def _untreated(completions: Completions, notes: list[str] | None) -> Completions:
    """The completions of the untreated model where a file has more than one arm.

    All of them where it has one.
    """
    mine = [name for name in completions.arms if name.split("/")[0] == "untreated"]
    others = [name for name in completions.arms if name not in mine]
    if not mine or not others:
        return completions
    if notes is not None:
        notes.append(
            f"of {len(completions.arms)} arms in the completions file only {', '.join(mine)} is read"
        )
    return Completions(one for one in completions if one.arm in mine)


def _matched(prompts: Prompts, by_id: Mapping[str, Sequence[Completion]]) -> list[Completion | None]:
    """The one completion of every prompt, by id and text."""
    chosen: list[Completion | None] = []
    other_text = []
    for prompt in prompts:
        same_id = by_id.get(prompt.id, [])
        answers = [one for one in same_id if normalised(one.prompt) == normalised(prompt.text)]
        if same_id and not answers:
            other_text.append((prompt, same_id[0]))
        if len({(one.token_ids, one.completion) for one in answers}) > 1:
            arms = ", ".join(sorted({f"{one.arm} (seed {one.seed})" for one in answers}))
            raise InputError(
                f"prompt {prompt.id!r} has {len(answers)} completions in the file given, of {arms}; "
                "leave one of them in it"
            )
        chosen.append(answers[0] if answers else None)
    if other_text:
        prompt, answer = other_text[0]
        raise InputError(
            f"prompt {prompt.id!r} is {short(prompt.text)} in the list and {short(answer.prompt)} in the "
            f"completions file ({len(other_text)} of {len(prompts)} differ): pass the prompts it was made "
            "from"
        )
    if not any(chosen):
        raise InputError(
            f"none of the {len(prompts)} prompts has a completion in the file given: pass the prompts it "
            "was made from"
        )
    return chosen


def short(text: str) -> str:
    """A text in quotes on one line, its end left out where it is long."""
    line = normalised(text)
    return repr(line if len(line) <= 40 else f"{line[:39]}…")


def texts_of(method: Any, run: Any) -> Texts:
    """What the two models of a run read, by the options of the method (`methods.Writing`).

    It is noted what is left out and why.
    """
    text = texts(
        writer_of(run.base, run.aligned, method.generate_with),
        run.prompts,
        positions=method.positions,
        max_new_tokens=method.max_new_tokens,
        completions=run.completions,
        **run.told(),
    )
    run.notes += text.notes
    return text


def texts(
    writer: LanguageModel,
    prompts: Prompts,
    *,
    positions: str,
    max_new_tokens: int,
    stream: Stream,
    completions: Completions | None = None,
    name: str = "writer",
    **told: Any,
) -> Texts:
    """The sequences to feed, with the positions that count.

    Prompts with an empty completion, or none, are counted as failed.

    Args:
        writer: writes the completions, and its tokenizer and template encode the prompts.
        prompts: what to encode.
        positions: one of `POSITIONS`.
        max_new_tokens: length limit of a completion.
        stream: keeps what was generated.
        completions: used instead of generating.
        name: under which the stream keeps what was generated.
        **told: of generation: `batch_size`, and `progress`, called with (prompts done, prompts in all, tokens
            written).

    Raises:
        UsageError: unknown `positions`.
        InputError: no prompt is left.
    """
    span("", [0], [], positions)
    wanted = positions.startswith("completion")
    notes: list[str] = []
    answers: list[list[int] | None] = [[] for _ in prompts]
    missing, broken = 0, 0
    room = max_new_tokens if wanted else 0
    if wanted and completions is not None:
        answers = given(writer, prompts, completions, notes)
        room = max(len(answer or ()) for answer in answers)
        missing = sum(answer is None for answer in answers)
    elif wanted:
        answers = generate(writer, prompts, name, max_new_tokens, stream, **told)
        broken = sum(answer is None for answer in answers)
    encoded = writer.encode(prompts, reserve=room)
    paired = zip(encoded, answers, strict=True)
    spans = [
        span(row.prompt_id, row.ids, answer or (), positions)
        for row, answer in paired
        if answer or not wanted
    ]
    spans = [one for one in spans if one.n_tokens > 0]
    empty = len(encoded) - len(spans) - missing - broken
    if not spans and broken:
        raise NumericalError(
            f"{broken} of {len(encoded)} prompts gave NaN or infinity, and no other has a completion: "
            "check the weights"
        )
    if not spans:
        raise InputError(
            f"none of the {len(encoded)} prompts left a token to compare: their completions are empty; "
            "check the template"
        )
    notes += (
        [f"{numbered(missing, 'prompt has', 'prompts have')} no completion in the file given"]
        if missing
        else []
    )
    notes += [f"{numbered(broken, 'prompt')} gave NaN or infinity: without a completion"] if broken else []
    notes += (
        [f"{numbered(empty, 'prompt has', 'prompts have')} an empty completion: without tokens"]
        if empty
        else []
    )
    notes += said_of_reading(encoded)
    truncated = sum(row.truncated for row in encoded)
    return Texts(tuple(spans), PromptCounts(len(spans), len(encoded) - len(spans), truncated), tuple(notes))
