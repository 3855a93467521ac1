"""What of a request the guard has to read: the turns as one conversation, and by itself whatever else holds text."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from safety_neurons.guard.server.problems import Problem
from safety_neurons.guard.server.shapes import SPEECH, Part, Turn
from safety_neurons.prompts import Message, Prompt, request_of
from safety_neurons.prompts.conversations import as_text

ROLES = {"developer": "system", "tool": "user", "function": "user"}
"""Roles that templates do not know, and which one they are read as: what a tool says is untrusted text like a user's."""
INERT = frozenset(
    [
        "model",
        "messages",
        "stream",
        "stream_options",
        "max_tokens",
        "max_completion_tokens",
        "min_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "n",
        "seed",
        "stop",
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
        "logit_bias",
        "logprobs",
        "top_logprobs",
        "user",
        "metadata",
        "store",
        "service_tier",
        "reasoning_effort",
        "verbosity",
        "parallel_tool_calls",
        "safety_identifier",
        "prompt_cache_key",
        "ignore_eos",
        "modalities",
    ]
)
"""Fields of a chat request that hold no text which a model reads."""
READ = ("tools", "functions", "tool_choice", "function_call", "response_format", "prediction", "web_search_options")
"""Fields that hold text which a model may read: each is judged by itself."""
_PLAIN = re.compile(r"[A-Za-z0-9_.:-]{0,32}")
_OF_NOBODY = frozenset({"model", "messages", "stream_options", "stop", "user", "metadata", "safety_identifier", "prompt_cache_key"})
"""Fields that are checked elsewhere, or that no template shows to a model."""
_PART_FIELDS = {"type", "text", "refusal", "annotations", "cache_control", "prompt_cache_breakpoint"}
_TURN_FIELDS = {"role", "content", "name", "tool_calls", "tool_call_id", "function_call", "refusal", "annotations", "audio"}


def prompt_of(turns: Sequence[Turn], limit: int, number: int = 0) -> Prompt:
    """The conversation as the guard's model is asked it.

    Parts of a message are joined by line breaks; calls of tools and what the assistant refused count as said.

    Raises:
        Problem: More turns than are taken, or something that is no text.
    """
    if len(turns) > limit:
        raise Problem(400, f"the conversation has {len(turns)} messages; expected at most {limit}", "too_many_messages", param="messages")
    messages = tuple(Message(ROLES.get(turn.role, turn.role), said(turn, f"messages[{place}]")) for place, turn in enumerate(turns))
    return Prompt(id=str(number), text=request_of(messages) or messages[-1].content, messages=messages)


def said(turn: Turn, place: str) -> str:
    """All text of a message."""
    extra = turn.model_extra or {}
    strange = sorted(name for name, value in extra.items() if name not in _TURN_FIELDS and value is not None)
    if strange or extra.get("audio") is not None:
        name = strange[0][:64] if strange else "audio"
        raise Problem(400, f"{place}: the guard cannot read its field {name!r}; expected text", "unreadable_content", param=place)
    found = [turn.content] if isinstance(turn.content, str) else [text_of(part, place) for part in turn.content or ()]
    for name in ("refusal", "tool_calls", "function_call", "annotations"):
        if extra.get(name):
            found.append(as_text(extra[name]))
    return "\n".join(found)


def text_of(part: Part, place: str) -> str:
    """The text of a part of a message.

    Raises:
        Problem: An image, a sound or a file: the guard cannot read it.
    """
    extra = part.model_extra or {}
    strange = [name for name, value in extra.items() if name not in _PART_FIELDS and value is not None]
    texts = [text for text in (part.text, extra.get("refusal")) if text is not None]
    texts += [as_text(extra["annotations"])] if extra.get("annotations") else []
    strange += [name for name in ("cache_control", "prompt_cache_breakpoint") if not _is_plain(extra.get(name))]
    if part.type not in SPEECH or strange or not texts or not all(isinstance(text, str) for text in texts):
        raise Problem(400, f"{place}: the guard cannot read a part of type {part.type!r}; expected text", "unreadable_content", param=place)
    return "\n".join(texts)


def beside(request: Mapping[str, Any], passed: Iterable[str] = ()) -> list[Prompt]:
    """Further texts of a chat request that a model may read, each as a prompt of its own.

    Args:
        request: The body.
        passed: Fields that the operator lets through unread.

    Raises:
        Problem: A field that is not known. A chat template in a request, say, would be a prompt that the guard never saw.
    """
    known = {*INERT, *READ, *passed}
    strange = sorted(name for name, value in request.items() if name not in known and value is not None)
    if strange:
        name = strange[0][:64]
        raise Problem(
            400,
            f"field {name!r} is not known, so the guard cannot tell whether it holds a prompt; leave it out",
            "unknown_parameter",
            param=name,
        )
    checked = sorted(INERT - _OF_NOBODY)
    wordy = next((name for name in checked if not _is_plain(request.get(name), numbers=name == "logit_bias")), None)
    if wordy is not None:
        raise Problem(400, f"{wordy}: expected a number or a word; some templates show it to the model", "invalid_value", param=wordy)
    names = sorted({turn["name"] for turn in request["messages"] if turn.get("name")})
    texts = [("name", " ".join(names))] if names else []
    texts += [(name, as_text(request[name])) for name in READ if request.get(name) not in (None, "auto", "none", "required", [], {})]
    return [Prompt(id=name, text=text) for name, text in texts]


def _is_plain(value: Any, *, numbers: bool = False) -> bool:
    """Whether a value is numbers and words too short to hold a prompt."""
    if isinstance(value, dict) and numbers:
        return all(isinstance(one, int | float) and _PLAIN.fullmatch(name) for name, one in value.items())
    parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [value]
    if len(parts) > 8:
        return False
    return all(part is None or isinstance(part, int | float) or (isinstance(part, str) and bool(_PLAIN.fullmatch(part))) for part in parts)
