"""What can be scored: a text, a prompt, or turns of a conversation."""

from collections.abc import Sequence

from safety_neurons.errors import InputError
from safety_neurons.prompts import Prompt, as_prompt, as_prompts
from safety_neurons.prompts.readers import Source

Request = Source

__all__ = ["Request", "as_prompt", "as_request_prompts"]


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
