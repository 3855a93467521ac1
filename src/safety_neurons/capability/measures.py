"""Measure a treated model: perplexity, KL divergence, and accuracy on GSM8K and MMLU from local files."""

import contextlib
import dataclasses
import math
import pathlib
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch

from safety_neurons import strict_json
from safety_neurons.counting import numbered
from safety_neurons.declarations import Declaration
from safety_neurons.errors import InputError
from safety_neurons.model import (
    Batch,
    LanguageModel,
    encode_text,
    kl_divergence,
    run_batches,
    token_divergences,
    token_losses,
)
from safety_neurons.model.batches import BatchSize
from safety_neurons.model.decoding import Answer, Decoding
from safety_neurons.model.language_model import generate, stops
from safety_neurons.model.likelihood import widened
from safety_neurons.prompt_lists import Prompts
from safety_neurons.prompt_lists.readers import LARGEST
from safety_neurons.prompt_lists.tables import Cells
from safety_neurons.results import Rate, per_token, rate
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
        groups: what items share; empty where they share nothing.
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
    groups: tuple[str | None, ...] = ()

    def record(self) -> dict[str, Any]:
        """The measurement as JSON values, without single items."""
        about = {"task": self.task, "metric": self.metric, "higher_is_better": self.higher_is_better}
        return {**about, **self.rate.to_json(), "details": dict(self.details)}

    def items(self) -> dict[str, Any]:
        """Single items, from which a later run can be compared item by item."""
        items = {"ids": list(self.ids), "outcomes": list(self.outcomes), "counts": list(self.counts)}
        return {**items, "groups": list(self.groups)} if self.groups else items


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
    model: LanguageModel,
    text: Prompts,
    treatment: Treatment = contextlib.nullcontext,
    *,
    batch_size: BatchSize = "auto",
    notes: list[str] | None = None,
) -> float | None:
    """exp(mean negative log-likelihood per token) of the text, each record fed as it stands, without a
    template.

    None where no record has a token to predict; `notes` gets what was left out.
    """
    with treatment():
        losses = token_losses(model, text.texts, batch_size=batch_size, notes=notes)
    return math.exp(losses.total / losses.n_tokens) if losses.n_tokens else None


def divergence(
    model: LanguageModel,
    prompts: Prompts,
    treatment: Treatment,
    *,
    batch_size: BatchSize = "auto",
    notes: list[str] | None = None,
) -> float | None:
    """Mean KL(untreated ‖ treated) per prompt token, in nats, over templated prompts.

    None where there is no token. `notes` gets a line about prompts that are left out.
    """
    fed = [encoded.ids for encoded in model.encode(prompts)]
    return kl_divergence(model, fed, treatment, batch_size=batch_size, notes=notes)


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
    estimate = perplexity_rate(losses.totals, losses.counts, text.groups)
    ids = tuple(prompt.id for prompt in text)
    named_notes = tuple(f"{task}: {note}" for note in notes)
    return Measurement(
        task,
        "perplexity",
        estimate,
        False,
        ids,
        losses.totals,
        losses.counts,
        {"tokens": losses.n_tokens},
        named_notes,
        tuple(text.groups),
    )


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
        treated: another model with the same vocabulary, or what makes the context in which the reference is
            treated.
        task: name in the result.
        batch_size: prompts a pass.
    """
    notes: list[str] = []
    fed = [encoded.ids for encoded in reference.encode(prompts)]
    rows = token_divergences(reference, fed, treated, batch_size=batch_size, notes=notes)
    totals, counts = tuple(float(row.sum()) for row in rows), tuple(len(row) for row in rows)
    ids = tuple(prompt.id for prompt in prompts)
    named_notes = tuple(f"{task}: {note}" for note in notes)
    return Measurement(
        task,
        "KL per token",
        per_token(totals, counts, prompts.groups),
        False,
        ids,
        totals,
        counts,
        {"tokens": sum(counts)},
        named_notes,
        tuple(prompts.groups),
    )


def documents(text: str) -> list[str]:
    """The articles of a file in WikiText's format, which begin at a heading of the first rank.

    The whole text where there is none.
    """
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
    """Perplexity per word of whole documents, fed in windows of the context's length.

    Per token and bits per byte beside it.

    Every token is predicted once. A document's first token is predicted from BOS (or an end token), and the
    first of each later window from the last token of the window before.

    Source: lm-evaluation-harness, rolling log-likelihood of the task `wikitext`. Differs: the text is taken
    as the file has it; the harness's detokenizer, which undoes WikiText's own spacing, is not applied.
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
    finite = [number for number, total in enumerate(totals) if not math.isnan(total)]
    loss, n_tokens = sum(totals[number] for number in finite), sum(tokens[number] for number in finite)
    words = tuple(len(re.split(r"\s+", text)) for text in texts)
    n_bytes = sum(len(texts[number].encode()) for number in finite)
    details = {
        "token_perplexity": math.exp(loss / n_tokens) if n_tokens else None,
        "bits_per_byte": loss / n_bytes / math.log(2) if n_bytes else None,
        "tokens": n_tokens,
    }
    named_notes = tuple(f"{task}: {note}" for note in notes)
    outcomes = tuple(None if math.isnan(total) else total for total in totals)
    ids_of = tuple(str(number) for number in range(len(texts)))
    return Measurement(
        task,
        "word perplexity",
        perplexity_rate(outcomes, words),
        False,
        ids_of,
        outcomes,
        words,
        details,
        named_notes,
    )


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
    numbers = _STRICT.findall(answer)
    return str(numbers[0]).strip() if numbers else INVALID


def flexible(answer: str) -> str:
    """The last thing that looks like a number, or `[invalid]`."""
    numbers = _FLEXIBLE.findall(answer)
    return next((part for part in numbers[-1] if part), "").strip() if numbers else INVALID


def matches(extracted: str, reference: str) -> bool:
    """Whether a number and a worked answer say the same: dollar signs, commas, a last full stop and what
    stands before `####` aside.
    """
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
        lines = source.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read {str(source)!r} ({error}); expected GSM8K as JSON Lines with question and answer"
        ) from error
    sums = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = strict_json.loads(line, lenient=True)
            question, answer = record["question"], record["answer"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"line {number} of {str(source)!r} is no record of GSM8K; expected question and answer"
            ) from error
        sums.append(Sum(str(question), str(answer)))
        number_of = _compared(sums[-1].answer)
        if not isinstance(question, str) or not matches(strict(f"#### {number_of}"), sums[-1].answer):
            raise InputError(
                f"line {number} of {str(source)!r} asks {str(question)[:40]!r} and answers "
                f"{number_of[-40:]!r}, which no answer could match; expected a question and an "
                "answer that ends in #### NUMBER"
            )
    if not sums:
        raise InputError(f"{str(source)!r} is empty; expected GSM8K as JSON Lines with question and answer")
    return sums


def asked_and_shown(
    path: str | pathlib.Path, shots: int = SHOTS, limit: int | None = None
) -> tuple[list[Sum], list[Sum], list[str]]:
    """The sums to ask, the worked examples shown before each, and what has to be said.

    Examples are the first of `train.jsonl` beside the file; where there is none, the file's own last ones,
    which are then not asked.
    """
    sums = read_sums(path)
    source = pathlib.Path(path).expanduser()
    training = (source if source.is_dir() else source.parent) / "train.jsonl"
    if not shots:
        return sums[:limit], [], []
    if training.is_file() and training != source:
        return sums[:limit], read_sums(training)[:shots], []
    if len(sums) <= shots:
        raise InputError(
            f"{str(path)!r} has {len(sums)} records; expected more than the {shots} that are shown as "
            "examples"
        )
    note = (
        f"gsm8k: no train.jsonl beside the file; its last {shots} records are shown as examples and not asked"
    )
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


def score_sums(
    task: str, answers: Sequence[str | None], sums: Sequence[Sum], *, notes: Sequence[str] = ()
) -> Measurement:
    """Strict exact match, with flexible extraction beside it; an answer of None is unscored."""
    pairs = list(zip(answers, sums, strict=True))
    hard = tuple(
        None if answer is None else float(matches(strict(answer), one.answer)) for answer, one in pairs
    )
    soft = tuple(
        None if answer is None else float(matches(flexible(answer), one.answer)) for answer, one in pairs
    )
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
    """Exact match on a local file, greedy, without a chat template.

    A context too long for the model loses its beginning.

    Args:
        model: the model.
        path: a file of GSM8K, or its folder.
        treatment: what the model is under.
        task: name in the result.
        settings: how it is asked; 5 worked examples where no number is said.
        done: answers of an earlier, interrupted call, by number; they are not asked again.
        answered: told every answer as soon as it is there.
        **options: fields of `TaskSettings` to change.

    Source: lm-evaluation-harness 0.4, task `gsm8k` (prompt, stops, both extractions, what is ignored when
    numbers are compared). Differs: examples are the first of the training file instead of random ones.
    """
    how = TaskSettings.of(settings, **options)
    sums, examples, notes = asked_and_shown(path, SHOTS if how.shots is None else how.shots, how.limit)
    max_new_tokens = how.max_new_tokens
    room = (model.max_length or 10**9) - max_new_tokens
    if room < 2:
        max_new_tokens = max(1, (model.max_length or 2) // 2)
        room = (model.max_length or 10**9) - max_new_tokens
        notes.append(
            f"{task}: the context holds {model.max_length} tokens, so answers are cut at {max_new_tokens}"
        )
    sequences = [encode_text(model.tokenizer, sum_context(one, examples), templated=True) for one in sums]
    lost = sum(len(ids) > room for ids in sequences)
    if lost:
        notes.append(
            f"{task}: {lost} of {len(sums)} questions with their examples were longer than the context "
            "and lost their beginning"
        )
    answers: dict[int, str] = dict(done or {})

    def keep(index: int, answer: Answer) -> None:
        if answer.finish_reason == "failed":
            return
        answers[index] = cut(model.decode(answer.token_ids))
        if answered is not None:
            answered(index, answers[index])

    decoding = Decoding(max_new_tokens, others=stops(model, STOPS))
    fed = [ids[-room:] for ids in sequences]
    with treatment():
        generate(
            model, fed, decoding, batch_size=how.batch_size, skip=sorted(answers), answered=keep, notes=notes
        )
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
    """The CSV files `test/SUBJECT_test.csv`, `val/…`, `dev/…` of a folder or zip: no header.

    Question, four choices, letter.

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
            subject, subjects = subject.replace("_", " "), splits.setdefault(kind, {})
            if subject in subjects:
                raise InputError(
                    f"{str(source)!r} holds {stem}.csv twice ({name} is one); expected each once: name the "
                    "folder of one"
                )
            subjects[subject] = _questions(subject, text, name)
    wanted = split or next((kind for kind in ("test", "val") if kind in splits), "test")
    if not splits.get(wanted):
        raise InputError(
            f"{str(source)!r} holds no file such as {wanted}/anatomy_{wanted}.csv; expected MMLU as "
            "folder or zip of CSV files"
        )
    return Mmlu(
        [question for questions in splits[wanted].values() for question in questions], splits.get("dev", {})
    )


def _files(source: pathlib.Path) -> dict[str, str]:
    try:
        if source.is_dir():
            paths = [path for path in source.rglob("*.csv") if not path.name.startswith("._")]
            return {str(path.relative_to(source)): path.read_text(encoding="utf-8-sig") for path in paths}
        with zipfile.ZipFile(source) as archive:
            tables = [
                item for item in archive.infolist() if re.search(r"(?:^|/)(?!\._)[^/]+\.csv$", item.filename)
            ]
            if any(
                item.file_size > LARGEST for item in tables
            ):  # zipfile reads no more than the size that is named
                raise InputError(
                    f"{str(source)!r} unpacks to more than {LARGEST >> 20} MiB a table; expected MMLU: "
                    "look at it first"
                )
            return {item.filename: archive.read(item).decode("utf-8-sig") for item in tables}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise InputError(
            f"{str(source)!r} is a damaged or locked zip archive ({error}); expected a whole one: get it "
            "again"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read {str(source)!r} ({error}); expected MMLU as a folder or zip of CSV files"
        ) from error


def _questions(subject: str, text: str, name: str) -> list[Question]:
    questions = []
    cells = Cells(text, ",", name)
    cells.rename([""] * 6)
    for row in cells:
        if not row:
            continue
        if len(row) != 6 or row[5].strip() not in LETTERS or not row[0].strip() or not any(row[1:5]):
            raise InputError(
                f"row {cells.row} of {name} has {len(row)} cells, the last {row[-1][:40]!r}; expected "
                "question, four choices and a letter from A to D, and no header"
            )
        questions.append(Question(subject, row[0], tuple(row[1:5]), LETTERS.index(row[5].strip())))
    if cells.swallowed:
        raise InputError(
            f"a cell from line {cells.swallowed} of {name} on holds lines that look like rows; expected a "
            "row a question; look whether a quotation mark is missing"
        )
    if not questions:
        raise InputError(f"{name} is empty; expected questions: get the file again")
    return questions


def block(question: Question, *, answered: bool = False) -> str:
    """A question as it is put, with its letter where it is an example."""
    choices = "".join(
        f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, question.choices, strict=True)
    )
    return f"{question.text.strip()}\n{choices}Answer:" + (
        f" {LETTERS[question.answer]}\n\n" if answered else ""
    )


def question_context(question: Question, examples: Sequence[Question]) -> str:
    """What a model reads before the letter."""
    head = f"The following are multiple choice questions (with answers) about {question.subject}.\n\n"
    return head + "".join(block(example, answered=True) for example in examples) + block(question)


def split_ids(
    model: LanguageModel, context: str, continuation: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids to feed and ids to predict at their end. Where both do not fit the context, the beginning is lost.

    The last id is only predicted, so the context may be filled to its end by what stands before it.
    """
    whole = encode_text(model.tokenizer, context + continuation, templated=True)
    targets = whole[len(encode_text(model.tokenizer, context, templated=True)) :]
    if not targets:
        raise InputError(
            f"the tokenizer joins {continuation!r} with what stands before it; expected at least one "
            "token of its own"
        )
    kept = whole if model.max_length is None else whole[-(model.max_length + 1) :]
    return tuple(kept[:-1]), tuple(targets)


def log_likelihoods(
    model: LanguageModel,
    pairs: Sequence[tuple[str, str]],
    treatment: Treatment = contextlib.nullcontext,
    *,
    batch_size: BatchSize = "auto",
) -> list[float]:
    """Summed log-likelihood of every continuation after its context, in nats, without a template.

    Equal texts are fed once.
    """
    split = [split_ids(model, context, continuation) for context, continuation in pairs]
    fed: dict[tuple[int, ...], list[int]] = {}
    for number, (ids, _) in enumerate(split):
        fed.setdefault(ids, []).append(number)
    readers = list(fed.values())
    likelihoods = [0.0] * len(pairs)

    def per_batch(batch: Batch) -> dict[int, float]:
        found = {}
        assert batch.output is not None
        for row, (index, length) in enumerate(zip(batch.indices, batch.lengths, strict=True)):
            for number in readers[index]:
                targets = split[number][1]
                scores = widened(batch.output[row, length - len(targets) : length]).log_softmax(-1)
                found[number] = float(
                    scores.gather(1, torch.tensor(targets, device=scores.device)[:, None]).sum()
                )
        return found

    with treatment():
        for part in run_batches(model, [list(ids) for ids in fed], per_batch, batch_size, True):
            for number, likelihood in part.items():
                likelihoods[number] = likelihood
    return likelihoods


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
    """Accuracy over all questions, without a chat template.

    A context too long for the model loses its beginning.

    Args:
        model: the model.
        path: a folder or zip of MMLU's CSV files.
        treatment: what the model is under.
        task: name in the result.
        split: what is asked; `test` where it is there, otherwise `val`.
        settings: how it is asked; 5 examples of the same subject where no number is said. A limit is spread
            evenly over all subjects.
        **options: fields of `TaskSettings` to change.

    Source: Hendrycks et al., ICLR 2021; prompt and scoring of lm-evaluation-harness 0.4, task `mmlu`.
    Differs: nothing in the scores; a limit is spread over the subjects instead of taking the first of each.
    """
    how, data = TaskSettings.of(settings, **options), read_mmlu(path, split)
    questions, shots = data.asked, SHOTS if how.shots is None else how.shots
    if how.limit is not None and how.limit < len(questions):
        questions = [
            questions[number] for number in np.linspace(0, len(questions) - 1, how.limit).round().astype(int)
        ]
    pairs = [
        (question_context(one, data.shown.get(one.subject, [])[:shots]), f" {letter}")
        for one in questions
        for letter in LETTERS
    ]
    answers = chosen(log_likelihoods(model, pairs, treatment, batch_size=how.batch_size)) if questions else []
    right = tuple(
        None if answer is None else float(answer == one.answer)
        for answer, one in zip(answers, questions, strict=True)
    )
    ids = tuple(f"{one.subject} {number}" for number, one in enumerate(questions))
    notes = [] if data.shown or not shots else [f"{task}: no dev files, so no examples are shown"]
    short = {one.subject for one in questions if len(data.shown.get(one.subject, [])) < shots}
    if data.shown and short:
        count = sum(one.subject in short for one in questions)
        notes.append(
            f"{task}: {count} of {len(questions)} questions are asked behind fewer than "
            f"{numbered(shots, 'example')}: the dev files have no more ({', '.join(sorted(short))[:80]})"
        )
    failed = right.count(None)
    notes += (
        [f"{task}: {failed} of {len(right)} questions gave NaN or infinity and are unscored"]
        if failed
        else []
    )
    return Measurement(
        task,
        "accuracy",
        rate(right),
        True,
        ids,
        right,
        (),
        {"subjects": _by_subject(questions, right)},
        tuple(notes),
    )


def _by_subject(
    questions: Sequence[Question], right: Sequence[float | None]
) -> Mapping[str, Mapping[str, float | int]]:
    grouped: dict[str, list[float]] = {}
    for one, value in zip(questions, right, strict=True):
        if value is not None:
            grouped.setdefault(one.subject, []).append(value)
    return {
        subject: {"value": sum(values) / len(values), "n": len(values)} for subject, values in grouped.items()
    }
