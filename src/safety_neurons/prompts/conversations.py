"""Conversations in their public shapes: lists of turns, lists of texts, turns written as text, transcripts of “Human: …” paragraphs.

What a turn says is read here for files and for the guard's server alike.
"""

import ast
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from safety_neurons import strict_json
from safety_neurons.errors import InputError
from safety_neurons.prompts.records import Message

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "function": "tool",
    "function_response": "tool",
    "ipython": "tool",
    "observation": "tool",
    "environment": "tool",
}
"""What turns are called, and which of the four roles each is."""
_ROLE_KEYS = ("role", "from", "author", "speaker", "sender", "type")
_TEXT_KEYS = ("content", "value", "text", "message", "parts")
_CALLS = ("tool_calls", "function_call")
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")
_HUMAN_FIRST = re.compile(r"\s*Human:")
_WRITTEN = re.compile(r"\s*\[\s*\{")
_WRITTEN_TEXTS = re.compile(r"\s*\[\s*[{'\"]")
_BETWEEN_RECORDS = re.compile(r"\}\s*\n\s*\{")
_DEEPEST_CALL = 400
"""Lists and objects within one another in the arguments of a call."""
_LONGEST_LITERAL = 1 << 18
"""Characters of a Python literal that are parsed: its syntax tree takes a hundred times as much memory."""


class UnreadableTurnError(InputError):
    """A turn without a role or a text that anybody knows."""


def read_turn(turn: Mapping[str, Any], unread: list[str] | None = None, joint: str = "") -> Message:
    """One turn of any public shape.

    Text parts are joined, calls of tools and what the assistant refused count as said; a turn without any text is empty.

    Args:
        turn: `{role, content}`, `{from, value}` and their kin; the content is text, a part, a list of either, or null.
        unread: Receives what in it is no text (`a part of type 'image_url'`).
        joint: What stands between two parts: nothing, as chat templates write them, unless the reader joins them otherwise.

    Raises:
        UnreadableTurnError: A role that nobody knows, or no field for the text.
    """
    name = _role_name(turn)
    role = ROLES.get(name.strip().casefold()) if isinstance(name, str) else None
    if role is None:
        raise UnreadableTurnError(f"role {str(name)[:40]!r}; expected system, user, assistant or tool")
    fields = [key for key in _TEXT_KEYS if key in turn]
    if not fields and not any(turn.get(key) for key in (*_CALLS, "refusal")):
        raise UnreadableTurnError(f"no text; it has {', '.join(map(str, list(turn)[:6]))}; expected content")
    left: list[str] = [] if unread is None else unread
    content = next((turn[key] for key in fields if turn[key] is not None), None)
    said = list(texts_of(content, left))
    said += [turn["refusal"]] if isinstance(turn.get("refusal"), str) else []
    said += [as_text(turn[key]) for key in _CALLS if turn.get(key)]
    return Message(role, joint.join(said))


def _role_name(turn: Mapping[str, Any]) -> Any:
    value = next((turn[key] for key in _ROLE_KEYS if turn.get(key) is not None), None)
    return value.get("role", value.get("name")) if isinstance(value, Mapping) else value


def texts_of(content: Any, unread: list[str]) -> Iterator[str]:
    """The texts of a turn's content, in order; what is no text goes into `unread`."""
    if content is None:
        return
    if isinstance(content, str):
        yield content
    elif isinstance(content, Mapping):
        yield from _texts_of_part(content, unread)
    elif isinstance(content, Sequence) and not isinstance(content, bytes | bytearray):
        for part in content:
            yield from texts_of(part, unread)
    else:
        unread.append(f"content of type {type(content).__name__}")


def _texts_of_part(part: Mapping[str, Any], unread: list[str]) -> Iterator[str]:
    kind = part.get("type", part.get("content_type"))
    if kind == "tool_use":
        yield as_text({key: part.get(key) for key in ("name", "input")})
        return
    for name in ("text", "refusal", "content", "parts"):
        if part.get(name) is not None and (name == "text" or kind in (None, "text", "refusal", "tool_result", "multimodal_text")):
            yield from texts_of(part[name], unread)
            return
    if kind != "text":
        unread.append(f"a part of type {str(kind)[:40]!r}" if kind is not None else "a part without text")


def as_text(value: Any) -> str:
    """A value as a model would see it: text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(opened(value), ensure_ascii=False, default=str)


def opened(value: Any, name: str = "") -> Any:
    """The value with the arguments of calls, JSON within a string, in the open: templates read them, and so escapes in them."""
    if isinstance(value, Mapping):
        return {key: opened(one, key) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [opened(one) for one in value]
    if name == "arguments" and isinstance(value, str):
        try:
            return strict_json.loads(value, depth=_DEEPEST_CALL, lenient=True, doubled=True)
        except ValueError:
            return value
    return value


def is_transcript(value: object) -> bool:
    """Whether a cell is a conversation as one string, in paragraphs that begin with “Human:” and “Assistant:”."""
    return isinstance(value, str) and _HUMAN_FIRST.match(value) is not None and "\n\nAssistant:" in value


def is_conversation(value: object) -> bool:
    """Whether a cell is a list of turns."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and bool(value)
        and all(isinstance(turn, Mapping | Message) for turn in value)
    )


def written_list(value: object, *, texts: bool) -> list[Any] | None:
    """The turns of a list that was written as text, as JSON or as Python prints it; None for every other value.

    Args:
        value: A cell.
        texts: Whether a list of texts counts too.
    """
    if not isinstance(value, str) or (_WRITTEN_TEXTS if texts else _WRITTEN).match(value) is None or not value.rstrip().endswith("]"):
        return None
    try:
        found = strict_json.loads(value, lenient=True)
    except ValueError:
        found = _literal(value)
    if not isinstance(found, list) or not found:
        return None
    if all(isinstance(turn, Mapping) and _role_name(turn) is not None for turn in found):
        return found if all(any(key in turn for key in (*_TEXT_KEYS, *_CALLS)) for turn in found) else None
    return found if texts and all(isinstance(one, str) for one in found) else None


def _literal(text: str) -> Any:
    if len(text) > _LONGEST_LITERAL:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of escapes in the text that it does not know.
        for candidate in (text, _BETWEEN_RECORDS.sub("},\n{", text)):  # numpy prints records without commas between them
            try:
                return ast.literal_eval(candidate.strip())
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                continue
    return None


def read_transcript(text: str, found: Counter[str]) -> list[Message]:
    """Turns of a transcript string; irregular ones are repaired and counted in `found`."""
    parts = _TURN.split("\n\n" + text.lstrip() if not text.startswith("\n\n") else text)
    roles, contents = parts[1::2], parts[2::2]
    turns = [Message("user" if role == "Human" else "assistant", content) for role, content in zip(roles, contents, strict=True)]
    return merge_turns(turns, found)


def merge_turns(turns: list[Message], found: Counter[str]) -> list[Message]:
    """Joins turns of one role that follow one another; a chat template would refuse them."""
    merged: list[Message] = []
    for turn in turns:
        if merged and merged[-1].role == turn.role and turn.role in ("system", "user", "assistant"):
            merged[-1] = Message(turn.role, "\n\n".join(part for part in (merged[-1].content, turn.content) if part))
            found["joined"] += 1
        else:
            merged.append(turn)
    return merged


def read_turns(turns: Sequence[Mapping[str, Any] | Message], unread: list[str] | None = None) -> list[Message]:
    """The turns of a list of records or of `Message`.

    Raises:
        UnreadableTurnError: A turn that cannot be read, with its number.
    """
    read = []
    for number, turn in enumerate(turns, 1):
        try:
            read.append(turn if isinstance(turn, Message) else read_turn(turn, unread))
        except UnreadableTurnError as error:
            raise UnreadableTurnError(f"turn {number} has {error}") from None
    return read
