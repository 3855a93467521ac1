"""GSM8K: grade-school sums, answered in words; right where the number that is read from the answer is the one expected.

The number is read in two ways, as lm-evaluation-harness does: `strict` wants it behind `####`, `flexible` takes the last number.
"""

import contextlib
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from safety_neurons import strict_json
from safety_neurons.capability.measured import Measured, Treatment
from safety_neurons.errors import InputError
from safety_neurons.model import LanguageModel, encode_text
from safety_neurons.model.completing import Answer, Decoding, generate
from safety_neurons.model.measures import BatchSize
from safety_neurons.model.stopping import stops
from safety_neurons.results import rate

SHOTS, MAX_NEW_TOKENS = 5, 256
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


def context_of(sum_: Sum, examples: Sequence[Sum]) -> str:
    """What a model is asked: the examples, then the question."""
    shown = "".join(f"Question: {example.question}\nAnswer: {example.answer}\n\n" for example in examples)
    return f"{shown}Question: {sum_.question}\nAnswer:"


def cut(text: str) -> str:
    """The answer up to the first mark that ends it."""
    for stop in STOPS:
        text = text.split(stop)[0]
    return text


def scored(task: str, answers: Sequence[str | None], sums: Sequence[Sum], *, notes: Sequence[str] = ()) -> Measured:
    """Strict exact match, with flexible extraction beside it; an answer of None is unscored."""
    pairs = list(zip(answers, sums, strict=True))
    hard = tuple(None if answer is None else float(matches(strict(answer), one.answer)) for answer, one in pairs)
    soft = tuple(None if answer is None else float(matches(flexible(answer), one.answer)) for answer, one in pairs)
    ids = tuple(str(number) for number in range(len(sums)))
    details = {"flexible": rate(soft).to_json()}
    return Measured(task, "exact match (strict)", rate(hard), True, ids, hard, (), details, tuple(notes))


def measure_gsm8k(
    model: LanguageModel,
    path: str | pathlib.Path,
    treatment: Treatment = contextlib.nullcontext,
    *,
    task: str = "gsm8k",
    shots: int = SHOTS,
    limit: int | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: BatchSize = "auto",
    done: Mapping[int, str] | None = None,
    answered: Callable[[int, str], None] | None = None,
) -> Measured:
    """Exact match on a local file, greedy, without a chat template; a context too long for the model loses its beginning.

    Args:
        model: the model.
        path: a file of GSM8K, or its folder.
        treatment: what the model is under.
        task: name in the result.
        shots: worked examples shown before each question.
        limit: ask the first so many.
        max_new_tokens: length of an answer.
        batch_size: questions a pass.
        done: answers of an earlier, interrupted call, by number; they are not asked again.
        answered: told every answer as soon as it is there.

    Source: lm-evaluation-harness 0.4, task `gsm8k` (prompt, stops, both extractions, what is ignored when numbers are compared).
    Differs: examples are the first of the training file instead of random ones.
    """
    sums, examples, notes = asked_and_shown(path, shots, limit)
    room = (model.max_length or 10**9) - max_new_tokens
    if room < 2:
        max_new_tokens = max(1, (model.max_length or 2) // 2)
        room = (model.max_length or 10**9) - max_new_tokens
        notes.append(f"{task}: the context holds {model.max_length} tokens, so answers are cut at {max_new_tokens}")
    sequences = [encode_text(model.tokenizer, context_of(one, examples), templated=True) for one in sums]
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
        generate(model, kept, decoding, batch_size=batch_size, skip=sorted(answers), answered=keep, notes=notes)
    return scored(task, [answers.get(number) for number in range(len(sums))], sums, notes=notes)
