"""Conversations in their public shapes: `messages`, ShareGPT `conversations`, and transcripts of “Human: …” paragraphs."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from safety_neurons.errors import InputError
from safety_neurons.prompts.records import Message

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")
_HUMAN_FIRST = re.compile(r"\s*Human:")


def is_transcript(value: object) -> bool:
    """Whether a cell is a conversation as one string, in paragraphs that begin with “Human:” and “Assistant:”."""
    return isinstance(value, str) and _HUMAN_FIRST.match(value) is not None and "\n\nAssistant:" in value


def is_conversation(value: object) -> bool:
    """Whether a cell is a list of turns."""
    return isinstance(value, Sequence) and not isinstance(value, str) and bool(value) and all(isinstance(turn, Mapping) for turn in value)


def read_transcript(text: str, found: Counter[str]) -> list[Message]:
    """Turns of a transcript string; irregular ones are repaired and counted in `found`."""
    parts = _TURN.split("\n\n" + text.strip("\n") if not text.startswith("\n\n") else text)
    roles, contents = parts[1::2], parts[2::2]
    turns = [Message("user" if role == "Human" else "assistant", content.strip()) for role, content in zip(roles, contents, strict=True)]
    return merge_turns(turns, found)


def merge_turns(turns: list[Message], found: Counter[str]) -> list[Message]:
    """Joins turns of one role that follow one another; a chat template would refuse them."""
    merged: list[Message] = []
    for turn in turns:
        if merged and merged[-1].role == turn.role and turn.role in ("user", "assistant"):
            merged[-1] = Message(turn.role, "\n\n".join(part for part in (merged[-1].content, turn.content) if part))
            found["joined"] += 1
        else:
            merged.append(turn)
    return merged


def read_turns(turns: Any, where: str) -> list[Message]:
    """Turns of a list of `{role, content}` or `{from, value}` records.

    Raises:
        InputError: A turn without role or text, or with a role nobody knows.
    """
    if not is_conversation(turns):
        raise InputError(
            f"{where}: the conversation is a {type(turns).__name__}; expected a list of {{role, content}} turns; repair the record"
        )
    return [read_turn(turn, where, number) for number, turn in enumerate(turns, 1)]


def read_turn(turn: Mapping[str, Any], where: str, number: int = 1) -> Message:
    """One turn of either shape; content may be a list of text parts."""
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        content = "".join(part for part in parts if isinstance(part, str)) if all(isinstance(part, str) for part in parts) else None
    known = _ROLES.get(role.casefold()) if isinstance(role, str) else None
    if known is None or not isinstance(content, str):
        what = f"role {role!r}" if known is None else f"content of type {type(turn.get('content', turn.get('value'))).__name__}"
        raise InputError(
            f"{where}: turn {number} has {what}; expected role system, user or assistant and text as content; repair the record"
        )
    return Message(known, content)
