"""What can be scored: a text, a prompt, or turns of a conversation; and the readings that a verdict on it is the largest of."""

import dataclasses
from collections.abc import Sequence

from safety_neurons.errors import InputError
from safety_neurons.prompts import Message, Prompt, as_prompt, as_prompts
from safety_neurons.prompts.readers import Source

Request = Source
WHOLE, ASKED = "conversation", "conversation without the last answer"
MOST_TURNS = 1024
"""Turns of a conversation that are read; each costs a reading."""

__all__ = ["Reading", "Request", "as_prompt", "as_request_prompts", "readings"]


@dataclasses.dataclass(frozen=True)
class Reading:
    """One way to read a request.

    Attributes:
        name: `conversation`, `conversation without the last answer`, or `turn N`, counted from 1.
        prompt: what the model is fed.
    """

    name: str
    prompt: Prompt


def as_request_prompts(requests: Sequence[Request] | Source) -> list[Prompt]:
    """Prompts of whatever names some; plain texts and turns are numbered.

    Raises:
        InputError: an empty text, or turns that cannot be read.
    """
    asked = list(as_prompts(requests))
    empty = next((prompt.id for prompt in asked if not any(turn.content.strip() for turn in prompt.turns)), None)
    if empty is not None:
        raise InputError(f"request {empty!r}: an empty text arrived; expected a request to score")
    return asked


def readings(prompt: Prompt) -> list[Reading]:
    """How a request is read: as a whole, without the answer it ends in, and every turn by itself, as if a user had asked that alone.

    An answer that is put into the model's mouth, or harmless turns behind a harmful one, can make the whole look safe; they cannot change
    what a turn says alone. What is the same for the model (one user turn, say) is read once; turns without text are not read alone.

    Raises:
        InputError: more turns than are read.

    Source: none of the papers, which judge single requests.
    """
    turns = tuple(prompt.messages) or (Message("user", prompt.text),)
    if len(turns) > MOST_TURNS:
        raise InputError(f"a conversation of {len(turns):,} turns; the guard reads at most {MOST_TURNS:,}: give it the last ones")
    found, seen = [Reading(WHOLE, prompt)], {turns}
    end = next((number for number in range(len(turns), 0, -1) if turns[number - 1].role != "assistant"), 0)
    asked = end < len(turns) and any(turn.role == "user" for turn in turns[:end])
    parts: list[tuple[str, tuple[Message, ...]]] = [(ASKED, turns[:end])] if asked else []
    parts += [(f"turn {number}", (Message("user", turn.content),)) for number, turn in enumerate(turns, 1) if turn.content.strip()]
    for name, part in parts:
        if part not in seen:
            seen.add(part)
            text = next((turn.content for turn in reversed(part) if turn.role == "user"), part[-1].content)
            found.append(Reading(name, Prompt(prompt.id, text, part)))
    return found
