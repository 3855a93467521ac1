"""Perplexity and KL divergence of a treated model on text that has nothing to do with safety; the form of every measurement."""

import contextlib
import dataclasses
import math
import pathlib
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from safety_neurons.declarations import Declaration
from safety_neurons.model import LanguageModel, kl_divergence, token_divergences, token_losses
from safety_neurons.model.batches import BatchSize
from safety_neurons.prompt_lists import Prompts
from safety_neurons.results import Rate, per_token
from safety_neurons.results import perplexity as perplexity_rate

Treatment = Callable[[], AbstractContextManager[Any]]
"""Makes the context manager inside which a model is treated; called once for every pass."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One task, measured on one model.

    Attributes:
        task: its name, as it was asked for.
        metric: what the value is, such as `accuracy` or `perplexity`.
        rate: the value with its interval and how many items it rests on.
        higher_is_better: whether more of it is good.
        ids: one name for every item.
        outcomes: one number for every item: 0 or 1, or a sum over tokens; None is unscored.
        counts: tokens of every item, where outcomes are sums over tokens; otherwise empty.
        details: further numbers, such as the accuracy of every subject.
        notes: what had to be said.
    """

    task: str
    metric: str
    rate: Rate
    higher_is_better: bool = True
    ids: tuple[str, ...] = ()
    outcomes: tuple[float | None, ...] = ()
    counts: tuple[int, ...] = ()
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """The measurement as JSON values, without single items."""
        about = {"task": self.task, "metric": self.metric, "higher_is_better": self.higher_is_better}
        return {**about, **self.rate.to_json(), "details": dict(self.details)}

    def items(self) -> dict[str, Any]:
        """Single items, from which a later run can be compared item by item."""
        return {"ids": list(self.ids), "outcomes": list(self.outcomes), "counts": list(self.counts)}


@dataclasses.dataclass(frozen=True)
class TaskSettings(Declaration):
    """How tasks are measured; the same for every arm."""

    limit: int | None = None
    """Items of each task, the first so many."""
    shots: int | None = None
    """Examples shown; what is usual for the task where None."""
    max_new_tokens: int = 256
    """Length of an answer where a task generates."""
    batch_size: BatchSize = "auto"
    """Rows a pass."""
    seed: int = 0
    """Seed under which answers are kept."""
    folder: pathlib.Path | None = None
    """An organism's own prompts."""
    tasks_folder: pathlib.Path | None = None
    """Task files (YAML) beside those of lm-evaluation-harness."""
    offline: bool = False
    """Fetch nothing."""


_HEADING = re.compile(r"\s*= [^=].*[^=] =\s*")


def perplexity(
    model: LanguageModel, text: Prompts, treatment: Treatment = contextlib.nullcontext, *, batch_size: BatchSize = "auto"
) -> float | None:
    """exp(mean negative log-likelihood per token) of the text, each record fed as it stands, without a template.

    None where no record has a token to predict.
    """
    with treatment():
        losses = token_losses(model, text.texts, batch_size=batch_size)
    return math.exp(losses.total / losses.n_tokens) if losses.n_tokens else None


def divergence(model: LanguageModel, prompts: Prompts, treatment: Treatment, *, batch_size: BatchSize = "auto") -> float | None:
    """Mean KL(untreated ‖ treated) per prompt token, in nats, over templated prompts. None where there is no token."""
    return kl_divergence(model, [encoded.ids for encoded in model.encode(prompts)], treatment, batch_size=batch_size)


def measure_perplexity(
    model: LanguageModel,
    text: Prompts,
    treatment: Treatment = contextlib.nullcontext,
    *,
    task: str = "perplexity",
    batch_size: BatchSize = "auto",
) -> Measurement:
    """`perplexity` with an interval over records, and the loss of every record."""
    notes: list[str] = []
    with treatment():
        losses = token_losses(model, text.texts, batch_size=batch_size, notes=notes)
    found = perplexity_rate(losses.totals, losses.counts)
    ids = tuple(prompt.id for prompt in text)
    said = tuple(f"{task}: {note}" for note in notes)
    return Measurement(task, "perplexity", found, False, ids, losses.totals, losses.counts, {"tokens": losses.n_tokens}, said)


def measure_divergence(
    reference: LanguageModel,
    prompts: Prompts,
    treated: Treatment | LanguageModel,
    *,
    task: str = "kl",
    batch_size: BatchSize = "auto",
) -> Measurement:
    """Mean KL(reference ‖ treated) per token of templated prompts, in nats, with an interval over prompts.

    Args:
        reference: the untreated model; its tokenizer and template count.
        prompts: benign requests.
        treated: another model with the same vocabulary, or what makes the context in which the reference is treated.
        task: name in the result.
        batch_size: prompts a pass.
    """
    notes: list[str] = []
    fed = [encoded.ids for encoded in reference.encode(prompts)]
    rows = token_divergences(reference, fed, treated, batch_size=batch_size, notes=notes)
    totals, counts = tuple(float(row.sum()) for row in rows), tuple(len(row) for row in rows)
    ids = tuple(prompt.id for prompt in prompts)
    said = tuple(f"{task}: {note}" for note in notes)
    return Measurement(task, "KL per token", per_token(totals, counts), False, ids, totals, counts, {"tokens": sum(counts)}, said)


def documents(text: str) -> list[str]:
    """The articles of a file in WikiText's format, which begin at a heading of the first rank; the whole text where there is none."""
    parts: list[list[str]] = [[]]
    for line in text.splitlines(keepends=True):
        if _HEADING.fullmatch(line):
            parts.append([])
        parts[-1].append(line)
    return [joined for part in parts if (joined := "".join(part)).strip()]


def measure_running_text(
    model: LanguageModel,
    texts: list[str],
    treatment: Treatment = contextlib.nullcontext,
    *,
    task: str = "wikitext",
    batch_size: BatchSize = "auto",
) -> Measurement:
    """Perplexity per word of whole documents, fed in windows of the context's length; per token and bits per byte beside it.

    Every token is predicted once. A document's first token is predicted from BOS (or an end token), and the first of each later window
    from the last token of the window before.

    Source: lm-evaluation-harness, rolling log-likelihood of the task `wikitext`.
    Differs: the text is taken as the file has it; the harness's detokenizer, which undoes WikiText's own spacing, is not applied.
    """
    start = model.bos_id if model.bos_id is not None else model.pad_id
    width = model.max_length or 2048
    windows: list[list[int]] = []
    owners: list[int] = []
    for number, text in enumerate(texts):
        ids = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for first in range(0, len(ids), width - 1):
            windows.append([start if first == 0 else ids[first - 1], *ids[first : first + width - 1]])
            owners.append(number)
    notes: list[str] = []
    with treatment():
        losses = token_losses(model, windows, batch_size=batch_size, notes=notes)
    totals, tokens = [0.0] * len(texts), [0] * len(texts)
    for owner, window, total, count in zip(owners, windows, losses.totals, losses.counts, strict=True):
        totals[owner] += total if count or len(window) < 2 else math.nan  # a text is whole or left out
        tokens[owner] += count
    kept = [number for number, total in enumerate(totals) if not math.isnan(total)]
    loss, n_tokens = sum(totals[number] for number in kept), sum(tokens[number] for number in kept)
    words = tuple(len(re.split(r"\s+", text)) for text in texts)
    n_bytes = sum(len(texts[number].encode()) for number in kept)
    details = {
        "token_perplexity": math.exp(loss / n_tokens) if n_tokens else None,
        "bits_per_byte": loss / n_bytes / math.log(2) if n_bytes else None,
        "tokens": n_tokens,
    }
    said = tuple(f"{task}: {note}" for note in notes)
    outcomes = tuple(None if math.isnan(total) else total for total in totals)
    ids_of = tuple(str(number) for number in range(len(texts)))
    return Measurement(task, "word perplexity", perplexity_rate(outcomes, words), False, ids_of, outcomes, words, details, said)
