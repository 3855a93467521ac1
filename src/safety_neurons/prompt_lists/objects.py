"""From JSON documents and objects in memory to rows: lists, columns, lists by category, what servers and the
hub write around them, and rows that are turns of a conversation.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from safety_neurons import strict_json
from safety_neurons.counting import numbered
from safety_neurons.errors import InputError
from safety_neurons.prompt_lists.classes import is_viewed, viewed_rows
from safety_neurons.prompt_lists.columns import (
    ABOUT,
    ANSWER_COLUMNS,
    GROUP_COLUMNS,
    LISTS,
    METADATA,
    SPLIT,
    SYSTEM_COLUMNS,
    columns_of,
    folded,
    is_conversation_column,
    is_known_column,
)
from safety_neurons.prompt_lists.records import ROLES, Message, role_of


class Unread(NamedTuple):
    """A row that is there and cannot be read, and why."""

    why: str


Row = dict[str, Any] | Unread


def role_by_itself(turn: Any) -> str | None:
    """Which of the roles a turn by itself has; None for what is no turn."""
    if isinstance(turn, Message):
        return turn.role
    names = (("role", "content"), ("from", "value"))
    said = next((turn.get(role) for role, text in names if isinstance(turn, Mapping) and text in turn), None)
    return ROLES.get(str(said).casefold())


def is_one_conversation(items: list[Any]) -> bool:
    """Whether a list is the turns of one conversation.

    Turns of the user alone are requests of their own, and turns of several groups several conversations.
    """
    roles = set(map(role_by_itself, items))
    groups = {
        str(turn[name])
        for turn in items
        if isinstance(turn, Mapping)
        for name in columns_of(turn, GROUP_COLUMNS)[:1]
    }
    return bool(roles) and None not in roles and (len(items) == 1 or roles != {"user"}) and len(groups) < 2


def with_conversations(rows: Iterable[Any], notes: list[str]) -> Iterator[Any]:
    """The rows, those of one group that are turns of a conversation and follow one another as one row."""
    held: list[dict[str, Any]] = []
    turns = conversations = 0
    for row in itertools.chain(rows, [None]):
        group = _group_of_turn(row)
        if held and group != _group_of_turn(held[0]):
            if any(role_of(turn) == "assistant" for turn in held):
                held = in_order(held)
                turns, conversations = turns + len(held), conversations + 1
                beside = {key: value for key, value in held[0].items() if key not in _OF_TURN}
                held = [{**beside, "messages": held}]
            yield from held
            held = []
        if group is not None:
            held.append(dict(row))
        elif row is not None:
            yield row
    if turns:
        notes.append(
            f"{numbered(turns, 'row')} with a role each {'is a turn' if turns == 1 else 'are turns'} of "
            f"{numbered(conversations, 'conversation')}, told apart by their group; read as such"
        )


_PLACES = ("turn", "turn_id", "turn_index", "turn_number", "message_index", "sequence", "position")
_OF_TURN = ("role", "from", "content", "value", "text", "id", "message_id", *_PLACES)
"""What a row that is a turn says of the turn and not of its conversation."""


def in_order(turns: list[Any]) -> list[Any]:
    """The turns by their numbers, where each has one of its own; else as they come."""
    for name in _PLACES:
        numbers = [str(turn.get(name, "")) if isinstance(turn, Mapping) else "" for turn in turns]
        if all(map(str.isdecimal, numbers)) and len(set(numbers)) == len(numbers):
            return sorted(turns, key=lambda turn: int(turn[name]))
    return turns


def _group_of_turn(row: Any) -> str | None:
    """The group of a row that is one turn of it."""
    if not isinstance(row, Mapping) or not {"role", "from"} & row.keys() or role_of(row) is None:
        return None
    name = next(iter(columns_of(row, GROUP_COLUMNS)), None)
    said = None if name is None else row[name]
    texts = row.keys() & {"content", "value", "text"}
    return (
        str(said) if said not in (None, "") and texts and not any(map(is_conversation_column, row)) else None
    )


def rows_of(whole: Any, name: str, column: str | None, notes: list[str] | None = None) -> Iterator[Row]:
    """Rows of a parsed JSON document or of an object in memory, whatever its shape."""
    if isinstance(whole, list):
        return iter([{"messages": in_order(whole)}]) if is_one_conversation(whole) else as_rows(whole)
    if not isinstance(whole, Mapping):
        raise InputError(
            f"{name}: the JSON document is a {type(whole).__name__}; expected a list of records; put the "
            "prompts in a list"
        )
    return iter(_of_object(whole, name, column, notes if notes is not None else []))


def _of_object(whole: Mapping[str, Any], name: str, column: str | None, notes: list[str]) -> Iterable[Row]:
    header, data = whole.get("columns"), whole.get("data")
    if isinstance(header, list) and isinstance(data, list) and all(isinstance(row, list) for row in data):
        return _split(distinct(list(map(str, header)), name, column, notes), data)
    if role_by_itself(whole):
        return [{"messages": [whole]}]
    if is_viewed(whole):
        return (Unread(row) if isinstance(row, str) else row for row in viewed_rows(whole, notes))
    named = [key for key in whole if key == column or is_known_column(key)]
    if any(not isinstance(whole[key], list | dict) for key in named):
        _refuse_list_beside(whole, name, column, named)
        return [dict(whole)]
    turns = [
        value[0]
        for key, value in whole.items()
        if is_conversation_column(key) and isinstance(value, list) and value
    ]
    if any(isinstance(turn, dict) and not turn.keys().isdisjoint(("role", "from")) for turn in turns):
        return [dict(whole)]
    if named and all(
        isinstance(whole[key], list) or set(map(type, whole[key].values())) <= {str, type(None)}
        for key in named
    ):
        return _by_column(whole, named, name, notes)
    _refuse_parts(whole, name)
    rows = _of_named_list(whole, name, notes)
    return _by_category(whole, name, notes) if rows is None else rows


def _of_named_list(whole: Mapping[str, Any], name: str, notes: list[str]) -> Iterable[Row] | None:
    """Rows of the one list of an object whose name or records say that it is the prompts, or None."""
    lists = [key for key, value in whole.items() if isinstance(value, list) and value]
    known = [key for wanted in LISTS for key in lists if folded(key) == wanted]
    inner = next(iter(known), None)
    shared = {key: whole[key] for key in columns_of(whole, SYSTEM_COLUMNS) if isinstance(whole[key], str)}
    beside = [
        key
        for key, value in whole.items()
        if key not in (inner, *shared)
        and folded(key) not in METADATA
        and isinstance(value, list | dict | str)
    ]
    if inner is not None and all(isinstance(value, str) for value in whole[inner]):
        length = len(whole[inner])
        same = [key for key in beside if isinstance(whole[key], list) and len(whole[key]) == length]
        answers = [key for key in beside if folded(key) in ANSWER_COLUMNS]
        if same or answers:
            left = [key for key in beside if key not in same + answers]
            unsaid = [key for key in same if folded(key) not in ABOUT.union(ANSWER_COLUMNS)]
            if unsaid:
                notes.append(f"lists of one length are read as columns: {_shown([inner, *unsaid])}")
            notes += [f"left out what stands beside the prompts: {_shown(left)}"] if left else []
            columns = {key: value for key, value in whole.items() if key not in left}
            columns |= {key: [value] * length for key, value in shared.items()}
            renamed = {"prompt" if key == inner else key: value for key, value in columns.items()}
            return _by_column(renamed, ["prompt"], name, notes)
    records = [key for key in lists if isinstance(whole[key][0], dict)]
    if inner is None and len(records) == 1 and not any(map(_holds_prompts, _but(whole, records[0]))):
        inner = records[0]
        beside = [key for key in beside if key != inner]
    several = len(known) > 1 and any(not isinstance(whole[key], str) for key in beside)
    if inner is None or (several and folded(inner) not in _GENERAL):
        return None
    notes += [f"left out what stands beside the prompts: {_shown(beside)}"] if beside else []
    notes += _miscounted(whole, len(whole[inner]))
    rows = as_rows(whole[inner])
    return (row if isinstance(row, Unread) else {**shared, **row} for row in rows) if shared else rows


_COUNT = re.compile(
    r"n|num|total|count|size|length|(?:total|n|num)_(?:count|examples|items|prompts|records|rows|samples)\w*"
    r"|(?:example|item|prompt|record|row|sample|total)_count"
)


def _miscounted(whole: Mapping[str, Any], length: int) -> list[str]:
    """What an object says of the length of its list where that is another, as of a first page."""
    about = [(whole, ""), *((one, f"{key}.") for key, one in whole.items() if folded(key) in METADATA)]
    lines = [
        f"the file says {above}{key} {value:,} and holds {numbered(length, 'record')}; is it whole?"
        for one, above in about
        if isinstance(one, Mapping)
        for key, value in one.items()
        if type(value) is int and value != length and _COUNT.fullmatch(folded(key))
    ]
    more = [key for key in whole if folded(key) in _MORE and whole[key]]
    return lines + [
        f"the file is a page of several ({key!r} names more); the others are not read" for key in more
    ]


_MORE = ("next", "next_page", "next_cursor", "has_more", "has_next")
"""What servers of lists say where there is more."""


_GENERAL = ("prompts", "examples", "rows", "data", "samples")
"""Names of lists that no category has."""


def _but(whole: Mapping[str, Any], key: str) -> list[Any]:
    return [value for name, value in whole.items() if name != key and folded(name) not in METADATA]


def _holds_prompts(value: Any) -> bool:
    """Whether a value may hold prompts: a list of texts, or an object with a list or a column of them."""
    if isinstance(value, list):
        return bool(value) and all(map(_is_row, value))
    return isinstance(value, Mapping) and any(
        is_known_column(key) or isinstance(one, list | dict) for key, one in value.items()
    )


def _refuse_list_beside(
    whole: Mapping[str, Any], name: str, column: str | None, named: Sequence[str]
) -> None:
    """A text under the name of a prompt may be said about a list of prompts beside it, or be the prompt."""
    beside = [
        key
        for key, value in whole.items()
        if folded(key) in LISTS and isinstance(value, list) and value and all(map(_is_row, value))
    ]
    if beside and column is None:
        raise InputError(
            f"{name}: a text under {named[0]!r} and a list under {beside[0]!r}; expected the prompts in "
            "one of them; keep that one, or name the column of the text with --column"
        )


def _is_row(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, Mapping) and any(map(is_known_column, value)))


def _refuse_parts(whole: Mapping[str, Any], name: str) -> None:
    """The splits of a data set are not one list of prompts."""
    parts = [
        key for key, value in whole.items() if isinstance(value, list | dict) and folded(key) not in METADATA
    ]
    if len(parts) > 1 and all(SPLIT.fullmatch(folded(part)) for part in parts):
        raise parts_of(name, parts)


def parts_of(name: str, parts: Sequence[str]) -> InputError:
    """What is said of a data set of several splits."""
    return InputError(
        f"{name}: a data set of {len(parts)} parts ({', '.join(map(repr, parts[:5]))}); expected one; choose "
        "one by its name"
    )


def as_rows(items: Iterable[Any], start: int = 1) -> Iterator[Row]:
    """Rows of the elements of a list: records, texts, conversations, pages of records."""
    for number, item in enumerate(items, start):
        if isinstance(item, Mapping):
            yield dict(item)
        elif isinstance(item, str) or item is None:
            yield {"text": item}
        elif isinstance(item, list) and item and all(isinstance(turn, Mapping) for turn in item):
            if any(map(role_of, item)) or not all(any(map(is_known_column, one)) for one in item):
                yield {"messages": item}
            else:  # pages of records
                yield from as_rows(item, start)
        elif isinstance(item, strict_json.RefusedJSON):
            yield Unread(f"record {number} is JSON that cannot be read ({item})")
        else:
            yield Unread(f"record {number} is a {type(item).__name__}; expected an object or a string")


def _split(header: list[str], data: list[list[Any]]) -> Iterator[Row]:
    """Rows of pandas' orient="split"."""
    for number, row in enumerate(data, 1):
        if len(row) == len(header):
            yield dict(zip(header, row, strict=True))
        else:
            yield Unread(f"record {number} has {len(row)} values but there are {len(header)} columns")


def _by_column(whole: Mapping[str, Any], named: list[str], name: str, notes: list[str]) -> Iterable[Row]:
    """Rows of `{"goal": [...], "target": [...]}` or of `{"goal": {"0": ..., "1": ...}}`."""
    index = whole[named[0]]
    index = list(index) if isinstance(index, dict) else list(map(str, range(len(index))))
    columns = {
        key: [value[row] for row in index] if isinstance(value, dict) and value.keys() == {*index} else value
        for key, value in whole.items()
    }
    columns = {key: value for key, value in columns.items() if isinstance(value, list | dict)}
    lengths = {key: len(value) for key, value in columns.items()}
    other = [key for key, value in columns.items() if isinstance(value, dict) or len(value) != len(index)]
    if any(folded(key) not in METADATA for key in other):
        listed = ", ".join(f"{key} {length}" for key, length in lengths.items())
        raise InputError(
            f"{name}: columns of different rows ({listed}); expected one value a row in each; repair the file"
        )
    left = [key for key in whole if key not in columns or key in other]
    notes += [f"left out what stands beside the columns: {_shown(left)}"] if left else []
    columns = {key: value for key, value in columns.items() if key not in other}
    return (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


_FAULT = {"error", "errors", "detail", "documentation_url", "statuscode", "status_code"}
_OF_FAULT = {"message", "code", "status", "type", "title", "path"}
"""What servers call an error, and what they say beside it."""


def _by_category(
    whole: Mapping[str, Any],
    name: str,
    notes: list[str],
    above: str = "",
    named: list[str] | None = None,
) -> list[Row]:
    """Rows of `{"fraud": ["…"], "weapons": {"guns": ["…"]}}`; the path of keys is the category.

    Texts are prompts where the object holds nothing but texts; beside lists they say something about the
    lists.
    """
    rows: list[Row] = []
    left: list[str] = []
    named = [] if named is None else named
    lists = any(isinstance(value, list | dict) for value in whole.values())
    if not lists and set(map(folded, whole)) & _FAULT and set(map(folded, whole)) <= _FAULT | _OF_FAULT:
        raise InputError(
            f"{name}: what a server says of an error ({_shown([str(one) for one in whole.values()])}); "
            "expected a list of records; get the file again"
        )
    for key, value in whole.items():
        category = f"{above}/{key}" if above else str(key)
        if folded(key) in METADATA or (lists and not isinstance(value, list | dict)):
            left.append(str(key))
        elif isinstance(value, list):
            named.append(category)
            told = {} if folded(key) in LISTS or is_conversation_column(key) else {"category": category}
            rows += [row if isinstance(row, Unread) else {**told, **row} for row in as_rows(value)]
        elif isinstance(value, dict) and any(
            is_known_column(inner) or is_conversation_column(inner) for inner in value
        ):
            rows.append({"id": category, **value})
        elif isinstance(value, dict):
            rows += _by_category(value, name, notes, category, named)
        elif isinstance(value, str):
            rows.append({"id": category, "text": value})
        else:
            raise InputError(
                f"{name}: the key {category!r} holds a {type(value).__name__}; expected lists of prompts "
                "by category; repair the file"
            )
    if not rows and not above:
        raise InputError(
            f"{name}: a JSON object without a list of prompts; it has {_shown(list(map(str, whole)))}; "
            "expected a list of records; put the prompts in a list"
        )
    notes += [f"left out what stands beside the prompts: {_shown(left)}"] if left else []
    if len(named) > 1 and not above:
        notes.append(
            f"{numbered(len(named), 'list')} of prompts are read one after the other, and their names as "
            f"categories: {_shown(named)}"
        )
    if keys := [str(key) for key, value in whole.items() if isinstance(value, str) and str(key) not in left]:
        said = numbered(len(keys), "text is read as a prompt", "texts are read as prompts")
        notes.append(f"{said}, by the keys {_shown(keys)}, which are taken for ids")
    return rows


def _shown(keys: list[str]) -> str:
    return ", ".join(key[:40] for key in keys[:6]) + (f" and {len(keys) - 6} more" if len(keys) > 6 else "")


def distinct(header: list[str], name: str, column: str | None, notes: list[str]) -> list[str]:
    """Names of columns, those without a use that come twice numbered; one with a use is refused."""
    counts = Counter(header)
    doubled = sorted(cell for cell, count in counts.items() if count > 1)
    bad = [
        cell for cell in doubled if is_known_column(cell) or is_conversation_column(cell) or cell == column
    ]
    if bad:
        raise InputError(
            f"{name}: the header names {', '.join(bad)} more than once; expected different columns; "
            "rename one"
        )
    if not doubled:
        return header
    if any(doubled):
        named = _shown(list(filter(None, doubled)))
        notes.append(f"the header names {named} more than once; the later ones are numbered")
    seen: Counter[str] = Counter()
    distinct = []
    for cell in header:
        seen[cell] += 1
        distinct.append(cell if seen[cell] == 1 else f"{cell} ({seen[cell]})")
    return distinct
