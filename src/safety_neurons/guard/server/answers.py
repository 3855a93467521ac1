"""Answers in the shape of OpenAI's chat completions, whole and as a stream of server-sent events."""

import json
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

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


class Streamed(Response):
    """An answer that is sent as it comes. The door watches the client, so nothing here does; what writes the answer is closed at its end.

    Args:
        pieces: Parts of the body.
        status: Of HTTP.
        headers: Further headers.
        kind: Media type.
    """

    def __init__(
        self, pieces: AsyncGenerator[bytes, None], status: int = 200, headers: Mapping[str, str] | None = None, *, kind: str
    ) -> None:
        super().__init__(None, status, headers, kind)
        self._pieces = pieces
        del self.headers["content-length"]

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - of every ASGI application
        """Sends it."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for piece in self._pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._pieces.aclose()
