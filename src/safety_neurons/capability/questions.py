"""Accuracy on benchmark questions from local files: GSM8K by exact match of a number, MMLU by log-likelihood of a letter.

GSM8K's number is read in two ways, as lm-evaluation-harness does: `strict` wants it behind `####`, `flexible` takes the last number.
"""

import contextlib
import csv
import io
import pathlib
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from safety_neurons import strict_json
from safety_neurons.capability.language import Measurement, TaskSettings, Treatment
from safety_neurons.errors import InputError
from safety_neurons.model import Batch, LanguageModel, encode_text, run_batches
from safety_neurons.model.batches import BatchSize
from safety_neurons.model.language_model import Answer, Decoding, generate, stops
from safety_neurons.model.likelihood import widened
from safety_neurons.prompt_lists.readers import LARGEST
from safety_neurons.results import rate

SHOTS = 5
STOPS = ("Question:", "</s>", "<|im_end|>")
INVALID = "[invalid]"
_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = (re.compile(","), re.compile(r"\$"), re.compile(r"(?s).*#### "), re.compile(r"\.$"))


class Sum(NamedTuple):
    """One question with its worked answer, which ends in `#### NUMBER`."""

    question: str
    answer: str


def strict(answer: str) -> str:
    """The first number behind `####`, or `[invalid]`."""
    found = _STRICT.findall(answer)
    return str(found[0]).strip() if found else INVALID


def flexible(answer: str) -> str:
    """The last thing that looks like a number, or `[invalid]`."""
    found = _FLEXIBLE.findall(answer)
    return next((part for part in found[-1] if part), "").strip() if found else INVALID


def matches(extracted: str, reference: str) -> bool:
    """Whether a number and a worked answer say the same: dollar signs, commas, a last full stop and what stands before `####` aside."""
    return _compared(extracted) == _compared(reference)


def _compared(text: str) -> str:
    for pattern in _IGNORED:
        text = pattern.sub("", text)
    return text.lower()


def read_sums(path: str | pathlib.Path) -> list[Sum]:
    """The records of a GSM8K file: JSON Lines with `question` and `answer`; for a folder its `test.jsonl`.

    Raises:
        InputError: missing, or a line that is no such record.
    """
    source = pathlib.Path(path).expanduser()
    source = source / "test.jsonl" if source.is_dir() else source
    try:
        lines = source.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {str(source)!r} ({error}); expected GSM8K as JSON Lines with question and answer") from error
    sums = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = strict_json.loads(line, lenient=True)
            sums.append(Sum(str(record["question"]), str(record["answer"])))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"line {number} of {str(source)!r} is no record of GSM8K; expected question and answer") from error
    if not sums:
        raise InputError(f"{str(source)!r} is empty; expected GSM8K as JSON Lines with question and answer")
    return sums


def asked_and_shown(path: str | pathlib.Path, shots: int = SHOTS, limit: int | None = None) -> tuple[list[Sum], list[Sum], list[str]]:
    """The sums to ask, the worked examples shown before each, and what has to be said.

    Examples are the first of `train.jsonl` beside the file; where there is none, the file's own last ones, which are then not asked.
    """
    sums = read_sums(path)
    source = pathlib.Path(path).expanduser()
    training = (source if source.is_dir() else source.parent) / "train.jsonl"
    if not shots:
        return sums[:limit], [], []
    if training.is_file() and training != source:
        return sums[:limit], read_sums(training)[:shots], []
    if len(sums) <= shots:
        raise InputError(f"{str(path)!r} has {len(sums)} records; expected more than the {shots} that are shown as examples")
    note = f"gsm8k: no train.jsonl beside the file; its last {shots} records are shown as examples and not asked"
    return sums[:-shots][:limit], sums[-shots:], [note]


def sum_context(sum_: Sum, examples: Sequence[Sum]) -> str:
    """What a model is asked: the examples, then the question."""
    shown = "".join(f"Question: {example.question}\nAnswer: {example.answer}\n\n" for example in examples)
    return f"{shown}Question: {sum_.question}\nAnswer:"


def cut(text: str) -> str:
    """The answer up to the first mark that ends it."""
    for stop in STOPS:
        text = text.split(stop)[0]
    return text


def score_sums(task: str, answers: Sequence[str | None], sums: Sequence[Sum], *, notes: Sequence[str] = ()) -> Measurement:
    """Strict exact match, with flexible extraction beside it; an answer of None is unscored."""
    pairs = list(zip(answers, sums, strict=True))
    hard = tuple(None if answer is None else float(matches(strict(answer), one.answer)) for answer, one in pairs)
    soft = tuple(None if answer is None else float(matches(flexible(answer), one.answer)) for answer, one in pairs)
    ids = tuple(str(number) for number in range(len(sums)))
    details = {"flexible": rate(soft).to_json()}
    return Measurement(task, "exact match (strict)", rate(hard), True, ids, hard, (), details, tuple(notes))


def measure_gsm8k(
    model: LanguageModel,
    path: str | pathlib.Path,
    treatment: Treatment = contextlib.nullcontext,
    *,
    task: str = "gsm8k",
    settings: TaskSettings | None = None,
    done: Mapping[int, str] | None = None,
    answered: Callable[[int, str], None] | None = None,
    **options: Any,
) -> Measurement:
    """Exact match on a local file, greedy, without a chat template; a context too long for the model loses its beginning.

    Args:
        model: the model.
        path: a file of GSM8K, or its folder.
        treatment: what the model is under.
        task: name in the result.
        settings: how it is asked; 5 worked examples where no number is said.
        done: answers of an earlier, interrupted call, by number; they are not asked again.
        answered: told every answer as soon as it is there.
        **options: fields of `TaskSettings` to change.

    Source: lm-evaluation-harness 0.4, task `gsm8k` (prompt, stops, both extractions, what is ignored when numbers are compared).
    Differs: examples are the first of the training file instead of random ones.
    """
    how = TaskSettings.of(settings, **options)
    sums, examples, notes = asked_and_shown(path, SHOTS if how.shots is None else how.shots, how.limit)
    max_new_tokens = how.max_new_tokens
    room = (model.max_length or 10**9) - max_new_tokens
    if room < 2:
        max_new_tokens = max(1, (model.max_length or 2) // 2)
        room = (model.max_length or 10**9) - max_new_tokens
        notes.append(f"{task}: the context holds {model.max_length} tokens, so answers are cut at {max_new_tokens}")
    sequences = [encode_text(model.tokenizer, sum_context(one, examples), templated=True) for one in sums]
    lost = sum(len(ids) > room for ids in sequences)
    if lost:
        notes.append(f"{task}: {lost} of {len(sums)} questions with their examples were longer than the context and lost their beginning")
    answers: dict[int, str] = dict(done or {})

    def keep(index: int, answer: Answer) -> None:
        if answer.finish_reason == "failed":
            return
        answers[index] = cut(model.decode(answer.token_ids))
        if answered is not None:
            answered(index, answers[index])

    decoding = Decoding(max_new_tokens, others=stops(model, STOPS))
    kept = [ids[-room:] for ids in sequences]
    with treatment():
        generate(model, kept, decoding, batch_size=how.batch_size, skip=sorted(answers), answered=keep, notes=notes)
    return score_sums(task, [answers.get(number) for number in range(len(sums))], sums, notes=notes)


LETTERS = ("A", "B", "C", "D")


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
        with zipfile.ZipFile(source) as archive:
            tables = [item for item in archive.infolist() if re.search(r"(?:^|/)(?!\._)[^/]+\.csv$", item.filename)]
            if any(item.file_size > LARGEST for item in tables):  # zipfile reads no more than the size that is named
                raise InputError(f"{str(source)!r} unpacks to more than {LARGEST >> 20} MiB a table; expected MMLU: look at it first")
            return {item.filename: archive.read(item).decode("utf-8-sig") for item in tables}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise InputError(f"{str(source)!r} is a damaged or locked zip archive ({error}); expected a whole one: get it again") from error
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


def question_context(question: Question, examples: Sequence[Question]) -> str:
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
        run_batches(model, [list(ids) for ids in fed], per_batch, batch_size, True)
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
    split: str | None = None,
    settings: TaskSettings | None = None,
    **options: Any,
) -> Measurement:
    """Accuracy over all questions, without a chat template; a context too long for the model loses its beginning.

    Args:
        model: the model.
        path: a folder or zip of MMLU's CSV files.
        treatment: what the model is under.
        task: name in the result.
        split: what is asked; `test` where it is there, otherwise `val`.
        settings: how it is asked; 5 examples of the same subject where no number is said. A limit is spread evenly over all subjects.
        **options: fields of `TaskSettings` to change.

    Source: Hendrycks et al., ICLR 2021; prompt and scoring of lm-evaluation-harness 0.4, task `mmlu`.
    Differs: nothing in the scores; a limit is spread over the subjects instead of taking the first of each.
    """
    how, data = TaskSettings.of(settings, **options), read_mmlu(path, split)
    asked, shots = data.asked, SHOTS if how.shots is None else how.shots
    if how.limit is not None and how.limit < len(asked):
        asked = [asked[number] for number in np.linspace(0, len(asked) - 1, how.limit).round().astype(int)]
    pairs = [(question_context(one, data.shown.get(one.subject, [])[:shots]), f" {letter}") for one in asked for letter in LETTERS]
    answers = chosen(log_likelihoods(model, pairs, treatment, batch_size=how.batch_size)) if asked else []
    right = tuple(None if answer is None else float(answer == one.answer) for answer, one in zip(answers, asked, strict=True))
    ids = tuple(f"{one.subject} {number}" for number, one in enumerate(asked))
    notes = [] if data.shown or not shots else [f"{task}: no dev files, so no examples are shown"]
    failed = right.count(None)
    notes += [f"{task}: {failed} of {len(right)} questions gave NaN or infinity and are unscored"] if failed else []
    return Measurement(task, "accuracy", rate(right), True, ids, right, (), {"subjects": _by_subject(asked, right)}, tuple(notes))


def _by_subject(asked: Sequence[Question], right: Sequence[float | None]) -> Mapping[str, Mapping[str, float | int]]:
    grouped: dict[str, list[float]] = {}
    for one, value in zip(asked, right, strict=True):
        if value is not None:
            grouped.setdefault(one.subject, []).append(value)
    return {subject: {"value": sum(values) / len(values), "n": len(values)} for subject, values in grouped.items()}
