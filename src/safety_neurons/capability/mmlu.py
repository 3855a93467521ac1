"""MMLU from local files: the letter with the largest log-likelihood behind the question."""

import contextlib
import csv
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from safety_neurons.capability.measured import Measured, Treatment
from safety_neurons.errors import InputError
from safety_neurons.model import Batch, LanguageModel, encode_text, run_batches
from safety_neurons.model.likelihood import logits_budget, widened
from safety_neurons.model.measures import BatchSize
from safety_neurons.prompts.archives import members, read_member
from safety_neurons.results import rate

LETTERS = ("A", "B", "C", "D")
SHOTS = 5


class Question(NamedTuple):
    """One question with four choices; the answer is the number of a choice."""

    subject: str
    text: str
    choices: tuple[str, ...]
    answer: int


class Mmlu(NamedTuple):
    """Questions to ask, and by subject those that are shown as examples."""

    asked: list[Question]
    shown: dict[str, list[Question]]


def read_mmlu(path: str | pathlib.Path, split: str | None = None) -> Mmlu:
    """The CSV files `test/SUBJECT_test.csv`, `val/…`, `dev/…` of a folder or zip: no header; question, four choices, letter.

    Args:
        path: a folder or a zip file, whatever folders lie around the splits.
        split: what is asked: `test` where it is there, otherwise `val`.

    Raises:
        InputError: missing, without such files, or a row of another shape.
    """
    source = pathlib.Path(path).expanduser()
    splits: dict[str, dict[str, list[Question]]] = {}
    for name, text in sorted(_files(source).items()):
        stem = pathlib.PurePosixPath(name).stem
        subject, _, kind = stem.rpartition("_")
        if kind in ("dev", "val", "test") and subject:
            splits.setdefault(kind, {})[subject.replace("_", " ")] = _questions(subject.replace("_", " "), text, name)
    wanted = split or next((kind for kind in ("test", "val") if kind in splits), "test")
    if not splits.get(wanted):
        raise InputError(
            f"{str(source)!r} holds no file such as {wanted}/anatomy_{wanted}.csv; expected MMLU as folder or zip of CSV files"
        )
    return Mmlu([question for questions in splits[wanted].values() for question in questions], splits.get("dev", {}))


def _files(source: pathlib.Path) -> dict[str, str]:
    try:
        if source.is_dir():
            found = [path for path in source.rglob("*.csv") if not path.name.startswith("._")]
            return {str(path.relative_to(source)): path.read_text(encoding="utf-8-sig") for path in found}
        names = [name for name in members(source) if name.endswith(".csv") and not pathlib.PurePath(name).name.startswith("._")]
        return {name: read_member(source, name).decode("utf-8-sig") for name in names}
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {str(source)!r} ({error}); expected MMLU as a folder or zip of CSV files") from error


def _questions(subject: str, text: str, name: str) -> list[Question]:
    questions = []
    for number, row in enumerate(csv.reader(io.StringIO(text, newline="")), start=1):
        if len(row) != 6 or row[5].strip() not in LETTERS:
            raise InputError(f"row {number} of {name} has {len(row)} cells; expected question, four choices and a letter from A to D")
        questions.append(Question(subject, row[0], tuple(row[1:5]), LETTERS.index(row[5].strip())))
    return questions


def block(question: Question, *, answered: bool = False) -> str:
    """A question as it is put, with its letter where it is an example."""
    choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, question.choices, strict=True))
    return f"{question.text.strip()}\n{choices}Answer:" + (f" {LETTERS[question.answer]}\n\n" if answered else "")


def context_of(question: Question, examples: Sequence[Question]) -> str:
    """What a model reads before the letter."""
    head = f"The following are multiple choice questions (with answers) about {question.subject}.\n\n"
    return head + "".join(block(example, answered=True) for example in examples) + block(question)


def split_ids(model: LanguageModel, context: str, continuation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids to feed and ids to predict at their end. Where both do not fit the context, the beginning is lost.

    The last id is only predicted, so the context may be filled to its end by what stands before it.
    """
    whole = encode_text(model.tokenizer, context + continuation, templated=True)
    targets = whole[len(encode_text(model.tokenizer, context, templated=True)) :]
    if not targets:
        raise InputError(f"the tokenizer joins {continuation!r} with what stands before it; expected at least one token of its own")
    kept = whole if model.max_length is None else whole[-(model.max_length + 1) :]
    return tuple(kept[:-1]), tuple(targets)


def log_likelihoods(
    model: LanguageModel, pairs: Sequence[tuple[str, str]], treatment: Treatment = contextlib.nullcontext, *, batch_size: BatchSize = "auto"
) -> list[float]:
    """Summed log-likelihood of every continuation after its context, in nats, without a template; equal texts are fed once."""
    split = [split_ids(model, context, continuation) for context, continuation in pairs]
    fed: dict[tuple[int, ...], list[int]] = {}
    for number, (ids, _) in enumerate(split):
        fed.setdefault(ids, []).append(number)
    readers = list(fed.values())
    found = [0.0] * len(pairs)

    def per_batch(batch: Batch) -> None:
        assert batch.output is not None
        for row, (index, length) in enumerate(zip(batch.indices, batch.lengths, strict=True)):
            for number in readers[index]:
                targets = split[number][1]
                scores = widened(batch.output[row, length - len(targets) : length]).log_softmax(-1)
                found[number] = float(scores.gather(1, torch.tensor(targets, device=scores.device)[:, None]).sum())

    with treatment():
        run_batches(model, [list(ids) for ids in fed], per_batch, batch_size, True, budget=logits_budget(model))
    return found


def chosen(likelihoods: Sequence[float]) -> list[int | None]:
    """The likeliest of every four; the first of equals; None where one is NaN."""
    rows = np.asarray(likelihoods, dtype=np.float64).reshape(-1, len(LETTERS))
    return [None if np.isnan(row).any() else int(row.argmax()) for row in rows]


def measure_mmlu(
    model: LanguageModel,
    path: str | pathlib.Path,
    treatment: Treatment = contextlib.nullcontext,
    *,
    task: str = "mmlu",
    shots: int = SHOTS,
    limit: int | None = None,
    split: str | None = None,
    batch_size: BatchSize = "auto",
) -> Measured:
    """Accuracy over all questions, without a chat template; a context too long for the model loses its beginning.

    Args:
        model: the model.
        path: a folder or zip of MMLU's CSV files.
        treatment: what the model is under.
        task: name in the result.
        shots: examples of the same subject shown before each question.
        limit: ask so many questions, spread evenly over all subjects.
        split: what is asked; `test` where it is there, otherwise `val`.
        batch_size: sequences a pass.

    Source: Hendrycks et al., ICLR 2021; prompt and scoring of lm-evaluation-harness 0.4, task `mmlu`.
    Differs: nothing in the scores; a limit is spread over the subjects instead of taking the first of each.
    """
    data = read_mmlu(path, split)
    asked = data.asked
    if limit is not None and limit < len(asked):
        asked = [asked[place] for place in np.linspace(0, len(asked) - 1, limit).round().astype(int)]
    pairs = [(context_of(one, data.shown.get(one.subject, [])[:shots]), f" {letter}") for one in asked for letter in LETTERS]
    answers = chosen(log_likelihoods(model, pairs, treatment, batch_size=batch_size)) if asked else []
    right = tuple(None if answer is None else float(answer == one.answer) for answer, one in zip(answers, asked, strict=True))
    ids = tuple(f"{one.subject} {number}" for number, one in enumerate(asked))
    notes = [] if data.shown or not shots else [f"{task}: no dev files, so no examples are shown"]
    failed = right.count(None)
    notes += [f"{task}: {failed} of {len(right)} questions gave NaN or infinity and are unscored"] if failed else []
    return Measured(task, "accuracy", rate(right), True, ids, right, (), {"subjects": _by_subject(asked, right)}, tuple(notes))


def _by_subject(asked: Sequence[Question], right: Sequence[float | None]) -> Mapping[str, Mapping[str, float | int]]:
    grouped: dict[str, list[float]] = {}
    for one, value in zip(asked, right, strict=True):
        if value is not None:
            grouped.setdefault(one.subject, []).append(value)
    return {subject: {"value": sum(values) / len(values), "n": len(values)} for subject, values in grouped.items()}
