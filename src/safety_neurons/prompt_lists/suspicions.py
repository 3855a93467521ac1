"""What looks wrong in the texts of a list of prompts and of their answers; nothing of it is changed."""

import re
from collections import Counter
from collections.abc import Callable, Sequence

from safety_neurons.counting import numbered
from safety_neurons.prompt_lists.columns import SPLIT, folded
from safety_neurons.prompt_lists.labels import is_bad_answer
from safety_neurons.prompt_lists.records import Prompt

COMPLIES = re.compile(r"\s*(sure|of course|certainly|absolutely)\b[^.\n]{0,20}\bhere\b", re.IGNORECASE)
NOTHING = frozenset(
    {"nan", "none", "null", "nil", "<na>", "undefined", "n/a", "#n/a", "#ref!", "#value!", "\\n"}
)
"""What programs write in the place of a missing value."""
_WITHHELD = frozenset({"redacted", "[redacted]", "[removed]", "[deleted]", "<redacted>", "[withheld]"})
_LETTER = re.compile(r"\s*\(?[A-J]\)?\s*")
_NUMBER = re.compile(r"\s*[-+]?\d[\d.,]*\s*")
_WRONG = re.compile(
    r"[\ufffd\ufeff\x00-\x08\x0e-\x1a\x1c-\x1f]"
    r"|[\u00c2-\u00c3][\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u2018-\u203a\u20ac\u2122]"
    r"|\u00e2\u20ac[\u0080-\u00bf\u0152\u0153\u0161\u2018-\u201d\u2122\u02dc]"
)
"""Marks of a wrong decoding: its replacement character, and UTF-8 read as a Western code page."""
_ESCAPED = re.compile(
    r"&(?:#\d{2,6}|#x[0-9a-fA-F]{2,6}|amp|lt|gt|quot|apos|nbsp);|\\u[0-9a-fA-F]{4}|\\[nt](?![a-z])"
)
_MARKS = re.compile(
    r"<\|(?:im_start|im_end|start_header_id|eot_id|begin_of_text|endoftext|user|assistant|system|Human)\|>"
    r"|\[/?INST\]|<</?SYS>>|\A<s>|</s>\s*\Z|<(?:start|end)_of_turn>|\[\|(?:Human|AI)\|\]"
    r"|### ?(?:Instruction|Response):|\bUSER: .*\bASSISTANT:",
    re.DOTALL,
)
_BOTH_SIDES = re.compile(
    r"\s*(?:#+ *|<)?(?:Human|User|Question|Q)>?:"
    r".*(?:\n|#+)\s*<?(?:Assistant|AI|Bot|GPT|Model|Answer|A)>?: *\S",
    re.IGNORECASE | re.DOTALL,
)
_WRITTEN = re.compile(
    r"\s*(?:\{\s*[\"'][\w -]{1,40}[\"']\s*:.*\}|\[\s*(?:\{.*\}|\"[^\"]*\".*|'[^']*'.*)\s*\])\s*", re.DOTALL
)
_ITEM = re.compile(r"\s*(?:[-*\u2022]|\(?\d{1,6}[.):\]])\s+\S")
_QUOTED = re.compile(r"\s*(?:\".*\"|'.*'|\u201c.*\u201d)\s*,?\s*", re.DOTALL)
_NAMED = re.compile(r"\s*(?:- )?[\"']?([A-Za-z_]{1,20})[\"']?\s*: ")


def suspicions(read: Sequence[Prompt], column: str, answer_column: str, replaced: int) -> list[str]:
    """A line for each thing that looks wrong.

    Args:
        read: the prompts.
        column: where they are from.
        answer_column: where their answers are from; empty where that is a turn.
        replaced: texts with broken characters that were said already.
    """
    texts = [prompt.text for prompt in read]
    answers = [prompt.answer for prompt in read if prompt.answer is not None]
    copies = len(read) - len({hash((prompt.messages or prompt.text, prompt.language)) for prompt in read})
    numbers, escaped = _count(texts, _NUMBER.fullmatch), _count(texts, _ESCAPED.search)
    letters = _count(answers, _LETTER.fullmatch)
    bad = sum(prompt.answer is not None and is_bad_answer(prompt, answer_column) for prompt in read)
    missing = " what programs write for a missing value ('nan', 'None'); kept"
    written = " a record or a list as text, as a file holds them; kept"
    counts = (
        (copies, "duplicate prompt", "duplicate prompts", ", kept"),
        (_missing(texts, NOTHING), "prompt says", "prompts say", missing),
        (_missing(answers, NOTHING), "answer says", "answers say", missing),
        (_missing(texts, _WITHHELD), "prompt says", "prompts say", " that a text was withheld; kept"),
        (numbers if numbers > len(texts) / 4 else 0, "prompt is a number", "prompts are numbers", "; kept"),
        (
            _count([*texts, *answers], _WRONG.search) - replaced,
            "text holds",
            "texts hold",
            " what a wrong decoding leaves (\ufffd, Ã¤, â€™); kept",
        ),
        (
            escaped if escaped > len(texts) / 20 else 0,  # of code a few belong there
            "prompt holds",
            "prompts hold",
            " escaped signs (&amp;, \\n); kept",
        ),
        (_count(texts, _WRITTEN.fullmatch), "prompt is", "prompts are", written),
        (
            _count(texts, _BOTH_SIDES.match),
            "prompt holds",
            "prompts hold",
            " both sides of a conversation as one text; kept",
        ),
        (
            sum(not any(map(str.isalnum, text)) for text in texts),
            "prompt holds",
            "prompts hold",
            " no letter and no digit; kept",
        ),
        (
            letters if letters > len(texts) / 4 else 0,
            "answer is",
            "answers are",
            " one letter, as of choices that the prompt does not hold; kept",
        ),
        (bad, "answer is", "answers are", " marked false or not safe by the row; kept"),
    )
    lines = [f"{numbered(count, one, more)}{what}" for count, one, more, what in counts if count > 0]
    lines += _of_parts(read) + _of_all(texts) + _marked(texts, answers)
    return lines + _complying(texts, answers, column, answer_column)


def _of_parts(read: Sequence[Prompt]) -> list[str]:
    """The parts of a data set that rows say they are of."""
    parts = Counter(
        str(value)
        for prompt in read
        for name, value in prompt.meta.items()
        if folded(name) in ("split", "datasplit", "partition") and SPLIT.fullmatch(folded(value))
    )
    shown = ", ".join(f"{part} {count}" for part, count in parts.items())
    return [f"rows of {len(parts)} parts of a data set are read together ({shown})"] if len(parts) > 1 else []


def _count(texts: Sequence[str], test: Callable[[str], object]) -> int:
    return sum(bool(test(text)) for text in texts)


def _missing(texts: Sequence[str], words: frozenset[str]) -> int:
    return sum(len(text) < 20 and text.strip().casefold() in words for text in texts)


def _of_all(texts: Sequence[str]) -> list[str]:
    """What all of several texts begin with, and models would be fed."""
    if len(texts) < 2:
        return []
    lines = [
        f"every prompt {what}, which belongs to it as it is read"
        for test, what in (
            (_ITEM.match, "begins with the number or the sign of a list"),
            (_QUOTED.fullmatch, "stands in quotation marks"),
        )
        if all(map(test, texts))
    ]
    names = Counter(found[1] for text in texts if (found := _NAMED.match(text)))
    known = {name: count for name, count in names.items() if count > 1}
    if sum(known.values()) > len(texts) / 2 and len(known) < 6:
        shown = ", ".join(f"{name}:" for name in known)
        begin = f"{sum(known.values())} of {len(texts)} prompts begin with a name ({shown})"
        lines.append(f"{begin}, which belongs to them")
    return lines


def _marked(texts: Sequence[str], answers: Sequence[str]) -> list[str]:
    """What prompts and answers hold of a chat template, inside which they are put again."""
    lines = []
    for found, one, more in (
        (texts, "prompt holds", "prompts hold"),
        (answers, "answer holds", "answers hold"),
    ):
        marks = [match[0] for text in found if (match := _MARKS.search(text))]
        if marks:
            lines.append(
                f"{numbered(len(marks), one, more)} marks of a chat template ({marks[0][:20]!r}), inside "
                "which it is put again; use --template none, or take them out"
            )
    return lines


def _complying(texts: Sequence[str], answers: Sequence[str], column: str, answer_column: str) -> list[str]:
    lines = []
    complying, targets = _count(texts, COMPLIES.match), _count(answers, COMPLIES.match)
    if complying > len(texts) / 4:
        lines.append(
            f"{complying} of {len(texts)} prompts begin like an answer (“Sure, here is …”): "
            f"the column {column!r} seems to hold targets, not prompts"
        )
    if targets > len(texts) / 4:
        named = f"the column {answer_column!r}" if answer_column else "them"
        lines.append(
            f"{targets} of {len(texts)} answers begin like compliance (“Sure, here is …”): do not tune for "
            f"safety on {named}"
        )
    return lines
