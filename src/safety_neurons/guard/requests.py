"""What can be scored: a text, turns of a conversation, or a prompt."""

from collections.abc import Mapping, Sequence
from typing import Any

from safety_neurons.errors import InputError
from safety_neurons.prompts import Message, Prompt
from safety_neurons.prompts.conversations import read_turn

Request = str | Prompt | Sequence[Message | Mapping[str, Any]]


def as_prompt(request: Request, name: str = "0") -> Prompt:
    """A request as a prompt, with an id where it brings none.

    Raises:
        InputError: no turns, a turn without role or text, or no text at all.
    """
    if isinstance(request, Prompt):
        return request
    if isinstance(request, str):
        if not request.strip():
            raise InputError("an empty text arrived; expected a request to score")
        return Prompt(name, request)
    if not isinstance(request, Sequence) or not request:
        raise InputError(f"a {type(request).__name__} arrived; expected a text, a Prompt or a list of at least one turn")
    turns = tuple(_turn(turn, number) for number, turn in enumerate(request, 1))
    asked = next((turn.content for turn in turns if turn.role == "user"), turns[-1].content)
    return Prompt(name, asked, turns)


def _turn(turn: Any, number: int) -> Message:
    if isinstance(turn, Message):
        return turn
    if not isinstance(turn, Mapping):
        raise InputError(f"turn {number} is a {type(turn).__name__}; expected a Message or {{role, content}}")
    return read_turn(turn, "the request", number)
