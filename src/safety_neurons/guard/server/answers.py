"""Answers in the shape of OpenAI's chat completions, whole and as a stream of server-sent events."""

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Envelope:
    """What all pieces of one answer share.

    Attributes:
        model: As the client named it.
        id: Of the answer.
        created: Seconds since 1970.
    """

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def whole(self, text: str, reason: str, usage: Mapping[str, int]) -> dict[str, Any]:
        """A complete answer."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": dict(usage)}

    def piece(self, delta: Mapping[str, Any], reason: str | None = None, *, with_usage: bool = False) -> bytes:
        """One event of a stream."""
        choice = {"index": 0, "delta": dict(delta), "logprobs": None, "finish_reason": reason}
        record = {**self._head("chat.completion.chunk"), "choices": [choice]}
        return event({**record, "usage": None} if with_usage else record)

    def usage(self, usage: Mapping[str, int]) -> bytes:
        """The event that counts tokens, after the last choice."""
        return event({**self._head("chat.completion.chunk"), "choices": [], "usage": dict(usage)})

    def refused(self, text: str, usage: Mapping[str, int] | None) -> Sequence[bytes]:
        """A refusal as a stream."""
        with_usage = usage is not None
        events = [
            self.piece({"role": "assistant", "content": "", "refusal": None}, with_usage=with_usage),
            self.piece({"content": text}, with_usage=with_usage),
            self.piece({}, "content_filter", with_usage=with_usage),
        ]
        return [*events, *([self.usage(usage)] if usage is not None else []), DONE]


def event(record: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(record, ensure_ascii=False).encode() + b"\n\n"


def usage(prompt: int = 0, completion: int = 0) -> dict[str, int]:
    """Counts of tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
