"""From rows to prompts: every row by itself, and what was left out, joined or looks wrong is counted with the
first row it happened in.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from safety_neurons.counting import numbered
from safety_neurons.errors import InputError
from safety_neurons.prompt_lists.columns import (
    METADATA,
    PROMPT_COLUMNS,
    REQUESTS_ONLY,
    ColumnPlan,
    find_column,
    folded,
    listed,
    plan_for,
)
from safety_neurons.prompt_lists.objects import (
    Unread,
    with_conversations,
)
from safety_neurons.prompt_lists.records import (
    ROLES,
    Message,
    Prompt,
    UnreadableTurnError,
    is_conversation,
    is_pair,
    is_transcript,
    merge_turns,
    read_transcript,
    read_turns,
    request_of,
    role_of,
    texts_of,
    with_unique_ids,
    written_list,
)
from safety_neurons.prompt_lists.suspicions import NOTHING, suspicions
from safety_neurons.prompt_lists.tables import (
    MOST_ROWS,
    looks_like_data,
    too_many,
)

Row = Mapping[str, Any] | Unread | Prompt
_SURROGATE = re.compile("[\ud800-\udfff]")
_BARE = frozenset({"goal", "behavior", "behaviour"})
"""Columns that hold the bare request beside the prompt that is put, as files of attacks have them."""
_ARGUMENTS = {"doc", "arguments"}
"""What a sample of lm-evaluation-harness has: the document, and the texts that were put to the model."""


def prompts_of(
    rows: Iterable[Row],
    source: str,
    column: str | None,
    answer_column: str | None,
    notes: list[str],
    *,
    limit: int | None = None,
    whole: bool = False,
) -> list[Prompt]:
    """Prompts of rows; what is left out, repaired or suspicious goes into `notes` with its count and its
    first row.

    Args:
        rows: Records, rows that could not be read, or prompts; read one by one.
        source: What errors call them.
        column: The prompt's column; by default of each row the first known one that is not empty.
        answer_column: The answer's.
        notes: Receives a line for each thing that was left out, repaired or looks wrong.
        limit: Stop after so many prompts.
        whole: Refuse a row that cannot be read or is empty instead of leaving it out.

    Raises:
        InputError: No rows, no column for the prompt, no row with a text, or more rows than are read.
    """
    reader = _RowReader(source, column, answer_column)
    read: list[Prompt] = []
    rows = with_conversations(rows, notes) if column is None and not whole else rows
    for number, row in enumerate(rows):
        if number >= MOST_ROWS and limit is None:
            raise too_many(source)
        prompt = reader.prompt(row, number)
        if prompt is not None:
            read.append(prompt)
        elif whole:
            raise reader.refusal(number + 1, of_last=True)
        if limit is not None and len(read) >= limit:
            break
    reader.check_names()
    if not read:
        raise reader.refusal(reader.rows)
    notes += reader.notes(read)
    doubled = len(read) - len({prompt.id for prompt in read})
    if doubled:
        notes.append(f"{doubled} ids occur more than once; numbered with #2, #3, …")
    return with_unique_ids(read)


class _Tally:
    """Counts by kind, and where each kind came first."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._first: dict[str, int] = {}

    def add(self, kind: str, row: int, count: int = 1) -> None:
        if count:
            self.counts[kind] += count
            self._first.setdefault(kind, row)

    def first(self, kind: str) -> str:
        return f"(first: row {self._first[kind]})"

    def row(self, kind: str) -> int:
        return self._first[kind]


class _Unusable(Exception):
    """Why a value is no prompt."""


class _RowReader:
    """Reads rows and remembers what happened to them."""

    def __init__(self, source: str, column: str | None, answer_column: str | None) -> None:
        self._source, self._column, self._answer_column = source, column, answer_column
        self._plans: dict[tuple[str, ...], ColumnPlan] = {}
        self._present: dict[str, None] = {}
        self._tally, self._left, self._used, self._joined, self._systems, self._aside, self._unread = (
            _Tally() for _ in range(7)
        )
        self._reasons: dict[str, str] = {}
        self._answers_used: Counter[str] = Counter()
        self._number = self.rows = 0

    # One row

    def prompt(self, row: Row, number: int) -> Prompt | None:
        """The prompt of a row; None where it has none, which is counted."""
        self.rows = number + 1
        if isinstance(row, Prompt):
            return row
        if isinstance(row, Unread):
            self._leave(row.why, number)
            return None
        row, plan = self._opened(row)
        if not (plan.prompt or plan.conversation or plan.pair):
            self._leave("no known column for the prompt", number)
            return None
        self._number = number
        role = (
            ROLES.get(str(row.get("role")).casefold())
            if self._column is None and not plan.conversation
            else None
        )
        if role not in (None, "user"):
            self._leave(f"a turn of role {role} by itself, which is no request", number)
            return None
        try:
            column, turns = self._asked(row, plan)
        except (_Unusable, UnreadableTurnError) as error:
            self._leave(str(error), number)
            return None
        asked = not turns or any(turn.role == "user" for turn in turns)
        turns, answer, answered_by = self._with_answer(row, plan, column, turns)
        text = request_of(turns)
        if not text.strip():
            self._tally.add("empty" if asked else "no request", number)
            return None
        joined = {column, answered_by}
        if len(turns) == 1 and turns[0].role == "user":
            text, beside = self._with_input(row, plan, column, text)
            earlier, name = self._earlier(row, plan)
            turns, joined = [*earlier, Message("user", text)], joined | beside | {name}
        turns, system = self._with_system(row, plan, turns)
        self._count_aside(row, plan, joined | {system}, [turn.content for turn in turns])
        self._used.add(column, number)
        self._answers_used[answered_by or ""] += answer is not None
        return self._record(row, plan, turns, answer, joined | {system})

    def _leave(self, why: str, number: int) -> None:
        kind = re.sub(r"\d+", "#", why)
        self._reasons.setdefault(kind, why)
        self._left.add(kind, number)

    def _opened(self, row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ColumnPlan]:
        """The row that holds the prompt: itself, or a record within it; and its plan."""
        plan = self._plan(row)
        if plan.prompt or plan.conversation or plan.pair:
            return row, plan
        if row.keys() >= _ARGUMENTS and self._column is None:
            asked = _first_text(row["arguments"])
            beside = {key: value for key, value in row.items() if key not in _ARGUMENTS}
            row = {**beside, "prompt": asked, "id": row.get("doc_id")} if asked is not None else row
            return row, self._plan(row)
        inner = [
            (key, value)
            for key, value in row.items()
            if isinstance(value, Mapping) and folded(key) not in METADATA
        ]
        inner = [
            (key, value)
            for key, value in inner
            if (found := self._plan(value, note=False)).prompt or found.conversation
        ]
        if len(inner) == 1:
            key, value = inner[0]
            row = {**{name: one for name, one in row.items() if name != key}, **value}
            return row, self._plan(row)
        return row, plan

    def _plan(self, row: Mapping[str, Any], note: bool = True) -> ColumnPlan:
        present = tuple(row)
        plan = self._plans.get(present)
        if plan is None:
            plan = plan_for(present, self._column, self._answer_column)
            if len(self._plans) < 1000:
                self._plans[present] = plan
            if note:
                self._present.update(dict.fromkeys(present))
        return plan

    # What is asked

    def _asked(self, row: Mapping[str, Any], plan: ColumnPlan) -> tuple[str, list[Message]]:
        """The column that holds the request, and its turns."""
        why: Exception | None = None
        empty = ""
        for column in (*plan.conversation, *plan.prompt, *plan.pair):
            value = _plain(row.get(column))
            if _is_blank(value):
                empty = empty or column
                continue
            try:
                turns = self._turns(
                    value,
                    column,
                    column in plan.conversation,
                    column in plan.pair and column not in plan.prompt,
                )
            except (_Unusable, UnreadableTurnError) as error:
                why = why or error
                continue
            if turns and (column not in plan.pair or column in plan.prompt or turns[0].role != "assistant"):
                if why is not None:
                    self._tally.add(f"not read: {why}; {column!r} is read in its place", self._number)
                return column, turns
            why = why or _Unusable(f"the column {column!r} holds an answer without its request")
        if why is not None:
            raise why
        return empty, []

    def _turns(self, value: Any, column: str, conversation: bool, pair: bool) -> list[Message]:
        """The turns of a cell; none where the cell is of another use than its column's name says."""
        value = self._unwritten(value, conversation)
        if isinstance(value, str):
            if is_transcript(value):
                return self._transcript(value)
            if conversation:
                raise _Unusable(f"the column {column!r} holds text that is no list of turns")
            return [] if pair else [Message("user", self._clean(value))]
        if is_conversation(value):
            return self._conversation(value)
        if pair:
            return []
        if isinstance(value, Mapping):
            return self._within(value, column)
        if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
            return self._texts(value, column, conversation)
        raise _Unusable(f"the column {column!r} holds a {type(value).__name__}; expected text or turns")

    def _unwritten(self, value: Any, conversation: bool) -> Any:
        """The list that a text spells out, where it spells out turns."""
        turns = written_list(value, texts=conversation)
        if turns is None:
            return value
        self._tally.add("written", self._number)
        return turns

    def _transcript(self, text: str) -> list[Message]:
        joined: Counter[str] = Counter()
        turns = read_transcript(self._clean(text), joined)
        self._tally.add("joined", self._number, joined["joined"])
        return turns

    def _conversation(self, value: Sequence[Any]) -> list[Message]:
        unread: list[str] = []
        joined: Counter[str] = Counter()
        turns = [Message(turn.role, self._clean(turn.content)) for turn in read_turns(value, unread)]
        if unread:
            self._tally.add("no text: " + unread[0], self._number)
        turns = merge_turns(turns, joined)
        self._tally.add("joined", self._number, joined["joined"])
        unwanted = isinstance(value[-1], Mapping) and value[-1].get("weight") in (0, "0")
        self._tally.add("unwanted", self._number, unwanted and turns[-1].role == "assistant")
        return turns

    def _within(self, value: Mapping[str, Any], column: str) -> list[Message]:
        """Turns of a record in a cell: `{"turns": [...]}`, `{"text": ...}`, `{"role": ..., "content":
        ...}`.
        """
        inner = self._plan(value, note=False)
        if inner.conversation:
            return self._asked(value, inner)[1]
        roles = [ROLES.get(str(key).casefold()) for key in value]
        if None not in roles and "user" in roles and all(isinstance(one, str) for one in value.values()):
            said = zip(roles, value.values(), strict=True)
            return [Message(str(role), self._clean(text)) for role, text in said if text.strip()]
        unread: list[str] = []
        text = "".join(texts_of(value, unread))
        if text or not inner.prompt:
            if not text:
                raise _Unusable(f"the column {column!r} holds an object without text; it has {listed(value)}")
            return [Message("user", self._clean(text))]
        return self._asked(value, inner)[1]

    def _texts(self, value: list[str], column: str, conversation: bool) -> list[Message]:
        """Turns of a list of texts."""
        texts = [self._clean(one) for one in value]
        if len(texts) == 1:
            return [Message("user", texts[0])]
        if folded(column) == REQUESTS_ONLY:
            self._tally.add("further", self._number)
            return [Message("user", texts[0])]
        if conversation:
            return [Message("assistant" if place % 2 else "user", text) for place, text in enumerate(texts)]
        raise _Unusable(
            f"the column {column!r} holds a list of {len(value)} texts; expected one text or turns"
        )

    def _with_input(
        self, row: Mapping[str, Any], plan: ColumnPlan, column: str, text: str
    ) -> tuple[str, set[str | None]]:
        """The text with its input or context behind it, or its HarmBench context before it.

        And the columns that were joined.
        """
        joined: set[str | None] = set()
        for name in plan.input:
            extra = row.get(name)
            if name == column or (
                folded(name) == "input" and folded(column) not in ("instruction", "prompt")
            ):
                continue
            if isinstance(extra, str) and extra.strip():
                text = f"{text}\n\n{self._clean(extra)}"
                joined.add(name)
                self._joined.add(name, self._number)
        context = next(
            (row[name] for name in plan.context if isinstance(row.get(name), str) and row[name].strip()), None
        )
        if context is not None and folded(column) == "behavior":
            text = f"{self._clean(context)}\n\n---\n\n{text}"
            joined.update(plan.context)
        return text, joined

    def _earlier(self, row: Mapping[str, Any], plan: ColumnPlan) -> tuple[list[Message], str | None]:
        """The turns before the request that another column holds: pairs of request and answer, or turns."""
        for name in plan.history:
            value = self._unwritten(_plain(row.get(name)), conversation=True)
            turns: list[Message] = []
            if is_conversation(value) and all(map(role_of, value)):
                turns = self._conversation(value)
            elif isinstance(value, list) and all(map(is_pair, value)):
                turns = [
                    Message(role, self._clean(text))
                    for pair in value
                    for role, text in zip(("user", "assistant"), pair, strict=True)
                ]
            if turns and turns[-1].role == "assistant":
                self._tally.add("earlier", self._number)
                return turns, name
        return [], None

    def _with_system(
        self, row: Mapping[str, Any], plan: ColumnPlan, turns: list[Message]
    ) -> tuple[list[Message], str | None]:
        """The turns with the system prompt of the row before them, unless they bring one."""
        for name in plan.system:
            text = (
                "".join(texts_of(_plain(row.get(name)), []))
                if not isinstance(row.get(name), int | float)
                else ""
            )
            if text.strip() and turns[0].role != "system":
                self._systems.add(name, self._number)
                return [Message("system", self._clean(text)), *turns], name
            self._tally.add("another system", self._number, bool(text.strip()) and text != turns[0].content)
        return turns, None

    # What is answered

    def _with_answer(
        self, row: Mapping[str, Any], plan: ColumnPlan, column: str, turns: list[Message]
    ) -> tuple[list[Message], str | None, str | None]:
        """The turns up to the one that is to be answered, the answer, and the column that it is from."""
        answer, name, a_number = None, None, False
        for name in plan.answer:
            value = _plain(row.get(name))
            if name == column or _is_blank(value):
                continue
            if (answer := self._answer(value)) is not None:
                break
            a_number = a_number or isinstance(value, int | float)
        if folded(column) == "chosen" and (other := row.get("rejected")) is not None:
            self._tally.add("diverged", self._number, _before_last(other) != _before_last(row[column]))
        if turns and turns[-1].role == "assistant":
            text = turns[-1].content
            self._tally.add("answerless", self._number, not text.strip())
            turns = turns[:-1]
            answer = text if answer is None and text.strip() else answer
        if answer is None and a_number:
            self._tally.add("number", self._number)
        return turns, answer, name if answer is not None else None

    def _answer(self, value: Any) -> str | None:
        """The answer of a cell: text, one turn, a conversation that ends with it, or the first of several."""
        value = self._unwritten(value, conversation=False)
        if isinstance(value, str):
            if is_transcript(value):
                turns = read_transcript(self._clean(value), Counter())
                return (
                    turns[-1].content if turns[-1].role == "assistant" and turns[-1].content.strip() else None
                )
            return self._clean(value)
        if is_conversation(value) and any(
            key in turn for turn in value if isinstance(turn, Mapping) for key in ("role", "from")
        ):
            try:
                turns = [turn for turn in read_turns(value) if turn.content.strip()]
            except UnreadableTurnError:
                return None
            return self._clean(turns[-1].content) if turns and turns[-1].role == "assistant" else None
        if isinstance(value, list):
            found = [text for one in value if not _is_blank(one) and (text := self._answer(one)) is not None]
            if len(found) > 1:
                self._tally.add("several answers", self._number)
            return found[0] if found else None
        said = ""
        if isinstance(value, Mapping):
            if isinstance(value.get("text"), list):  # SQuAD's
                return self._answer(value["text"])
            said = (
                str(value["value"]) if isinstance(value.get("value"), str) else "".join(texts_of(value, []))
            )
        return self._clean(said) if said.strip() else None

    def _count_aside(
        self, row: Mapping[str, Any], plan: ColumnPlan, used: set[str | None], said: Sequence[str]
    ) -> None:
        """Counts other columns that may hold the prompt, and lists and objects, which no prompt keeps."""
        asks = set(map(folded, plan.prompt))  # of names that differ in case alone one is planned
        known = {*used, *plan.answer, *plan.pair, *plan.id, *plan.category, *plan.language, *plan.group}
        for name, value in row.items():
            if name in known or folded(name) in METADATA or _is_blank(value):
                continue
            if folded(name) in asks - _BARE and isinstance(value, str):
                self._aside.add(name, self._number, value not in said)
            elif isinstance(value, list | Mapping) and name not in plan.conversation:
                self._unread.add(name, self._number)

    # The record

    def _record(
        self,
        row: Mapping[str, Any],
        plan: ColumnPlan,
        turns: list[Message],
        answer: str | None,
        used: set[str | None],
    ) -> Prompt:
        category = _first(row, plan.category)
        own = {*used, *plan.id[:1], *plan.category[:1], *plan.language[:1], *plan.group[:1]}
        meta = {
            key: value if not isinstance(value, int) or abs(value) < 2**63 else str(value)
            for key, value in row.items()
            if key not in own
            and isinstance(value, str | int | float | bool)
            and value != ""
            and value == value
        }
        return Prompt(
            id=_text_or_none(_first(row, plan.id)) or str(self._number),
            text=request_of(turns),
            messages=tuple(turns) if len(turns) > 1 else (),
            answer=answer,
            category=", ".join(map(str, category)) if isinstance(category, list) else _text_or_none(category),
            language=_shared(_first(row, plan.language)),
            meta=meta,
            group=_shared(_first(row, plan.group)),
        )

    def _clean(self, text: str) -> str:
        """The text as it is, without halves of surrogate pairs, which no tokenizer takes."""
        if not text.isascii() and _SURROGATE.search(text):
            self._tally.add("surrogates", self._number)
            return _SURROGATE.sub("\ufffd", text)
        return text

    # What happened

    def check_names(self) -> None:
        """Refuse a column that the user named and no row has."""
        for name, option in ((self._column, "--column"), (self._answer_column, "--answer-column")):
            if name is not None and self._present and find_column(self._present, [name]) is None:
                shown = listed(self._present)
                raise InputError(
                    f"{self._source}: no column {name!r}; it has {shown}; name one of them with {option}"
                )

    def refusal(self, rows: int, of_last: bool = False) -> InputError:
        """Why there is nothing to read, in all rows or in the last one."""
        if not rows:
            return InputError(
                f"{self._source}: no rows below the header or in the list; expected at least one prompt; "
                "check the file"
            )
        kinds = [kind for kind in self._left.counts if kind != "no known column for the prompt"]
        if kinds:
            kind = min(kinds, key=self._left.row)
            why = self._reasons[kind]
            return InputError(
                f"{self._source}: row {self._left.row(kind)}: "
                f"{why}{'' if 'expected' in why else '; expected text or turns'}; repair the rows or name "
                "another column with --column"
            )
        if of_last:
            return InputError(
                f"{self._source}: row {rows - 1} holds no request; expected text or turns with one of "
                "the user; leave it out"
            )
        if self._tally.counts["empty"] or self._tally.counts["no request"]:
            present = plan_for(tuple(self._present), self._column, None)
            column = next(iter((*present.conversation, *present.prompt, *present.pair)), "")
            return InputError(
                f"{self._source}: the column {column!r} is empty in all {rows} rows; expected text; name "
                "another with --column"
            )
        present_names = list(self._present)
        hint = (
            (
                " (that looks like a row of data: for a file without a header give the number of the column, "
                "--column 1)"
            )
            if looks_like_data(present_names)
            else ""
        )
        return InputError(
            f"{self._source}: no column for the prompt; it has {listed(present_names)}{hint}; "
            f"expected one of {', '.join(PROMPT_COLUMNS)} or messages; name one with --column"
        )

    def notes(self, read: list[Prompt]) -> list[str]:
        """A line for each thing that happened to the rows, or looks wrong in the prompts."""
        tally = self._tally
        lines = []
        for kind, (before, one, more) in _NOTES.items():
            if count := tally.counts[kind]:
                lines.append(f"{before}{numbered(count, one, more)} {tally.first(kind)}")
        for kind, count in self._left.counts.items():
            lines.append(f"left out {numbered(count, 'row')}: {self._reasons[kind]} {self._left.first(kind)}")
        for kind, count in tally.counts.items():
            if kind.startswith("no text: "):
                what = kind.removeprefix("no text: ")
                lines.append(
                    f"{numbered(count, 'row holds', 'rows hold')} what is no text ({what}); only text is "
                    f"read {tally.first(kind)}"
                )
            if kind.startswith("not read: "):
                lines.append(
                    f"{numbered(count, 'row')}: {kind.removeprefix('not read: ')} {tally.first(kind)}"
                )
        if len(self._used.counts) > 1:
            parts = [
                f"{column!r} in {count} {self._used.first(column)}"
                for column, count in self._used.counts.items()
            ]
            lines.append(f"the prompt is in {', '.join(parts)}")
        for column, count in self._joined.counts.items():
            lines.append(
                f"{column!r} is put behind the request, a blank line between them, in "
                f"{numbered(count, 'row')} "
                f"{self._joined.first(column)}"
            )
        for column, count in self._systems.counts.items():
            lines.append(
                f"{column!r} is the system prompt of {numbered(count, 'row')} {self._systems.first(column)}"
            )
        for column, count in self._aside.counts.items():
            lines.append(
                f"{column!r} holds text too and is left aside in {numbered(count, 'row')}; if it is the "
                f"prompt, name it with --column {self._aside.first(column)}"
            )
        if self._unread.counts:
            lines.append(f"lists and objects are left aside: {listed(self._unread.counts)}")
        return lines + suspicions(
            read,
            next(iter(self._used.counts), "prompt"),
            max(self._answers_used, key=lambda name: self._answers_used[name], default=""),
            tally.counts["surrogates"],
        )


_NOTES = {
    "empty": ("dropped ", "empty prompt", ""),
    "no request": (
        "left out ",
        "conversation without a user's turn",
        "conversations without a user's turn",
    ),
    "joined": (
        "joined ",
        "turn to the turn of the same role before it",
        "turns to the turn of the same role before them",
    ),
    "answerless": (
        "",
        "conversation ends with an empty answer, taken as no answer",
        "conversations end with an empty answer, taken as no answer",
    ),
    "unwanted": (
        "",
        "conversation ends with an answer of weight 0, which is not to be learnt; kept",
        "conversations end with an answer of weight 0, which is not to be learnt; kept",
    ),
    "earlier": (
        "",
        "row holds earlier turns beside the request; put before it",
        "rows hold earlier turns beside the request; put before it",
    ),
    "diverged": (
        "",
        "pair differs before its last turn; the chosen side is read",
        "pairs differ before their last turn; the chosen side is read",
    ),
    "surrogates": ("replaced broken characters (half surrogate pairs) in ", "text", ""),
    "written": (
        "",
        "cell holds a list written as text; read as turns",
        "cells hold a list written as text; read as turns",
    ),
    "further": (
        "",
        "row holds further requests behind the first, which need the answers between; the first is read",
        "rows hold further requests behind the first, which need the answers between; the first is read",
    ),
    "number": (
        "",
        "answer is a number or a truth value; expected text, so it is no answer",
        "answers are numbers or truth values; expected text, so they are no answers",
    ),
    "another system": (
        "",
        "conversation brings its own system turn; the row's other system prompt is left out",
        "conversations bring their own system turn; the row's other system prompt is left out",
    ),
    "several answers": (
        "",
        "row holds several answers; the first is read",
        "rows hold several answers; the first is read",
    ),
}
"""What stands before the number, and what is counted: one of it, several."""


def _plain(value: Any) -> Any:
    """A cell without the arrays, tuples and missing values that tables in memory bring."""
    if isinstance(value, str | Mapping | list) or value is None:
        return value
    if isinstance(value, tuple):
        return list(value)
    if hasattr(value, "tolist") and not isinstance(value, type):
        return _plain(value.tolist())
    return None if value is not None and type(value).__name__ in ("NAType", "NaTType") else value


def _is_blank(value: Any) -> bool:
    if isinstance(value, float):
        return math.isnan(value)
    return (
        value is None
        or (isinstance(value, str) and not value.strip())
        or (isinstance(value, Sequence | Mapping) and not value)
    )


def _before_last(conversation: Any) -> Any:
    """What stands before the last turn of a transcript or of a list of turns."""
    if is_transcript(conversation):
        return conversation.rpartition("\n\nAssistant:")[0].strip()
    return list(conversation[:-1]) if is_conversation(conversation) else None


def _first_text(value: Any) -> str | None:
    """The first text in lists and records within one another."""
    here = [value]
    while here:
        one = here.pop(0)
        if isinstance(one, str):
            return one
        here = [*(one.values() if isinstance(one, Mapping) else one if isinstance(one, list) else ()), *here]
    return None


def _first(row: Mapping[str, Any], columns: Sequence[str]) -> Any:
    return next((value for name in columns if not _is_blank(value := _plain(row.get(name)))), None)


def _text_or_none(value: Any) -> str | None:
    """A cell as a name; whole numbers that a table made floats of are whole again."""
    if isinstance(value, float):
        value = int(value) if value.is_integer() else value
    return str(value) if isinstance(value, str | int | float) and str(value).strip() else None


def _shared(value: Any) -> str | None:
    """What prompts share; the word of a program for a missing value is nothing that they do."""
    name = _text_or_none(value)
    return None if name is None or name.strip().casefold() in NOTHING else name
