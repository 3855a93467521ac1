"""From rows to prompts: choose the columns once, read every row, count what was dropped or looks wrong."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from safety_neurons.errors import InputError
from safety_neurons.prompts import columns as names
from safety_neurons.prompts.conversations import is_conversation, is_transcript, merge_turns, read_transcript, read_turn, read_turns
from safety_neurons.prompts.records import Message, Prompt

Row = Mapping[str, Any]
_COMPLIES = re.compile(r"\s*(sure|of course|certainly|absolutely)\b[^.\n]{0,20}\bhere\b", re.IGNORECASE)
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Plan:
    """The columns of a file that were chosen."""

    prompt: str
    answer: str | None
    input: str | None
    context: str | None
    id: str | None
    category: str | None
    language: str | None

    @cached_property
    def used(self) -> frozenset[str | None]:
        """The chosen columns; all others are kept as `meta`."""
        return frozenset((self.prompt, self.answer, self.input, self.context, self.id, self.category, self.language))


def prompts_of(rows: Sequence[Row], source: str, column: str | None, answer_column: str | None, notes: list[str]) -> list[Prompt]:
    """Prompts of rows; what is dropped, repaired or suspicious goes into `notes` with its count.

    Raises:
        InputError: No rows, no column for the prompt, or no row with a text.
    """
    if not rows:
        raise InputError(f"{source}: no rows below the header or in the list; expected at least one prompt; check the file")
    plan = _plan(rows, source, column, answer_column)
    found: Counter[str] = Counter()
    read = [_prompt(row, plan, f"{source}: row {number}", str(number), found) for number, row in enumerate(rows)]
    kept = [prompt for prompt in read if prompt is not None]
    if not kept:
        raise InputError(
            f"{source}: the column {plan.prompt!r} is empty in all {len(rows)} rows; expected text; name another with --column"
        )
    notes += _notes(kept, plan, len(read) - len(kept), found)
    return _with_unique_ids(kept, notes)


def _plan(rows: Sequence[Row], source: str, column: str | None, answer_column: str | None) -> Plan:
    present = list(dict.fromkeys(key for row in rows for key in row))
    named = names.named_column(present, column, source, "--column") if column is not None else _prompt_column(rows, present, source)
    answer = (
        names.named_column(present, answer_column, source, "--answer-column")
        if answer_column is not None
        else names.find_column([key for key in present if key != named], names.ANSWER_COLUMNS)
    )
    with_input = named.strip().casefold() in ("instruction", "prompt") and names.INPUT_COLUMN in present and answer != names.INPUT_COLUMN
    return Plan(
        prompt=named,
        answer=answer,
        input=names.INPUT_COLUMN if with_input else None,
        context=names.find_column(present, names.CONTEXT_COLUMNS) if named.casefold() == "behavior" else None,
        id=names.find_column(present, names.ID_COLUMNS),
        category=names.find_column(present, names.CATEGORY_COLUMNS),
        language=names.find_column(present, names.LANGUAGE_COLUMNS),
    )


def _prompt_column(rows: Sequence[Row], present: list[str], source: str) -> str:
    conversation = names.find_column(present, names.CONVERSATION_COLUMNS)
    if conversation is not None and any(is_conversation(row.get(conversation)) for row in rows):
        return conversation
    found = names.find_column(present, names.PROMPT_COLUMNS)
    if found is not None:
        return found
    for name in ("chosen", "rejected"):
        if any(is_transcript(row.get(name)) or is_conversation(row.get(name)) for row in rows):
            return name
    looks_like_data = any(len(name) > 40 or " " in name.strip() for name in present)
    hint = (
        " (that looks like a row of data: for a file without a header give the number of the column, --column 1)" if looks_like_data else ""
    )
    raise InputError(
        f"{source}: no column for the prompt; it has {names.listed(present)}{hint}; "
        f"expected one of {', '.join(names.PROMPT_COLUMNS)} or messages; name one with --column"
    )


def _prompt(row: Row, plan: Plan, where: str, number: str, found: Counter[str]) -> Prompt | None:
    messages, answer = _asked(row, plan, where, found)
    text = next((turn.content for turn in messages if turn.role == "user"), "")
    if not text.strip():
        return None
    plain = len(messages) == 1
    category = row.get(plan.category) if plan.category else None
    return Prompt(
        id=_identity(row, plan) or number,
        text=text,
        messages=() if plain else tuple(messages),
        answer=answer,
        category=", ".join(map(str, category)) if isinstance(category, list) else _text_or_none(category),
        language=_text_or_none(row.get(plan.language)) if plan.language else None,
        meta={key: value for key, value in row.items() if key not in plan.used and isinstance(value, str | int | float | bool)},
    )


def _identity(row: Row, plan: Plan) -> str | None:
    value = row.get(plan.id) if plan.id else None
    return str(value) if isinstance(value, str | int) and str(value).strip() else None


def _asked(row: Row, plan: Plan, where: str, found: Counter[str]) -> tuple[list[Message], str | None]:
    """The turns to be answered and the wanted answer of one row."""
    value = row.get(plan.prompt)
    answer = _answer(row.get(plan.answer), where, found) if plan.answer else None
    if isinstance(value, str) and is_transcript(value):
        turns = read_transcript(_clean(value, found), found)
        other = row.get("rejected")
        if plan.prompt == "chosen" and isinstance(other, str) and is_transcript(other) and _before_last(other) != _before_last(value):
            found["diverged"] += 1
        return _split_answer(turns, answer, found)
    if is_conversation(value):
        turns = merge_turns([Message(turn.role, _clean(turn.content, found)) for turn in read_turns(value, where)], found)
        system = row.get("system")
        if isinstance(system, str) and system.strip() and turns[0].role != "system":
            turns = [Message("system", system), *turns]
        return _split_answer(turns, answer, found)
    return [Message("user", _joined(_text(value, plan.prompt, where, found), row, plan, found))], answer


def _before_last(transcript: str) -> str:
    return transcript.rpartition("\n\nAssistant:")[0].strip()


def _split_answer(turns: list[Message], answer: str | None, found: Counter[str]) -> tuple[list[Message], str | None]:
    if not turns or turns[-1].role != "assistant":
        return turns, answer
    if not turns[-1].content.strip():
        found["answerless"] += 1
        return turns[:-1], answer
    return turns[:-1], turns[-1].content if answer is None else answer


def _answer(value: Any, where: str, found: Counter[str]) -> str | None:
    """The answer of a cell: text, one turn, or a conversation that ends with it."""
    if isinstance(value, Mapping):
        return _clean(read_turn(value, where).content, found) or None
    if is_conversation(value):
        turns = read_turns(value, where)
        return _clean(turns[-1].content, found) if turns[-1].role == "assistant" else None
    if is_transcript(value):
        turns = read_transcript(_clean(value, found), Counter())
        return turns[-1].content or None if turns[-1].role == "assistant" else None
    return _clean(value, found) if isinstance(value, str) and value.strip() else None


def _joined(text: str, row: Row, plan: Plan, found: Counter[str]) -> str:
    """The text with its Alpaca input after it or its HarmBench context before it."""
    extra = row.get(plan.input) if plan.input else None
    context = row.get(plan.context) if plan.context else None
    if isinstance(extra, str) and extra.strip() and text.strip():
        text = f"{text}\n\n{_clean(extra, found)}"
    if isinstance(context, str) and context.strip() and text.strip():
        text = f"{_clean(context, found)}\n\n---\n\n{text}"
    return text


def _text(value: Any, column: str, where: str, found: Counter[str]) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, str):
        raise InputError(f"{where}: the column {column!r} holds a {type(value).__name__}; expected text; name another column with --column")
    return _clean(value, found)


def _clean(text: str, found: Counter[str]) -> str:
    """The text without outer white space, with line feeds as line ends and without halves of surrogate pairs."""
    if _SURROGATE.search(text):
        found["surrogates"] += 1
        text = _SURROGATE.sub("\ufffd", text)
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def _text_or_none(value: Any) -> str | None:
    return str(value) if isinstance(value, str | int) and str(value).strip() else None


def _notes(kept: list[Prompt], plan: Plan, dropped: int, found: Counter[str]) -> list[str]:
    copies = len(kept) - len({(prompt.sha256, prompt.language) for prompt in kept})
    complying = sum(_COMPLIES.match(prompt.text) is not None for prompt in kept)
    targets = sum(prompt.answer is not None and _COMPLIES.match(prompt.answer) is not None for prompt in kept)
    lines = [
        (dropped, f"dropped {dropped} empty prompts"),
        (copies, f"{copies} duplicate prompts, kept"),
        (found["joined"], f"joined {found['joined']} turns to the turn of the same role before them"),
        (found["answerless"], f"{found['answerless']} conversations end with an empty answer, taken as no answer"),
        (found["diverged"], f"{found['diverged']} pairs differ before their last turn; the chosen side is read"),
        (found["surrogates"], f"replaced broken characters (half surrogate pairs) in {found['surrogates']} texts"),
        (
            complying > len(kept) / 4,
            f"{complying} of {len(kept)} prompts begin like an answer (“Sure, here is …”): "
            f"the column {plan.prompt!r} seems to hold targets, not prompts",
        ),
        (
            targets > len(kept) / 4,
            f"{targets} of {len(kept)} answers begin like compliance (“Sure, here is …”): "
            f"do not tune for safety on the column {plan.answer!r}",
        ),
    ]
    return [line for count, line in lines if count]


def _with_unique_ids(kept: list[Prompt], notes: list[str]) -> list[Prompt]:
    seen: Counter[str] = Counter()
    result = []
    for prompt in kept:
        seen[prompt.id] += 1
        again = seen[prompt.id]
        result.append(prompt if again == 1 else _renamed(prompt, f"{prompt.id}#{again}"))
    doubled = len(kept) - len(seen)
    if doubled:
        notes.append(f"{doubled} ids occur more than once; numbered with #2, #3, …")
    return result


def _renamed(prompt: Prompt, name: str) -> Prompt:
    return Prompt(name, prompt.text, prompt.messages, prompt.answer, prompt.category, prompt.language, prompt.meta)
