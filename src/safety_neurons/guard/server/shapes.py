"""Requests and answers on the wire: strict JSON read into checked records, errors and answers in the shape of the OpenAI API."""

import json
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from safety_neurons import strict_json

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
"""Kinds of errors as clients of the OpenAI API know them; other 4xx are invalid requests and 5xx server errors."""


class Problem(Exception):
    """A request that is answered with an error.

    Attributes:
        status: HTTP status.
        message: One line: what arrived, what was expected, what to do. Never what a prompt says.
        code: A word for programs.
        param: The field of the request that is meant.
        headers: Further headers of the answer.
    """

    def __init__(self, status: int, message: str, code: str, *, param: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = " ".join(message.split())
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def record(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def body(self) -> bytes:
        """The body, as sent."""
        return json.dumps(self.record).encode()


def busy(seconds: int, *, hang_up: bool = False) -> Problem:
    """Too much waits already; the connection is closed where the rest of the body is not wanted."""
    headers = {"Retry-After": str(seconds), **({"Connection": "close"} if hang_up else {})}
    return Problem(429, f"the guard is busy; try again in {seconds} s", "guard_busy", headers=headers)


def closing() -> Problem:
    """The server finishes what it accepted and takes nothing new."""
    return Problem(503, "the server is shutting down", "shutting_down", headers={"Retry-After": "5", "Connection": "close"})


def unforeseen(name: str) -> Problem:
    """Something failed that nobody thought of; the answer names the request, not what failed."""
    return Problem(500, f"something failed on the server; its log says more about {name}", "internal_error")


def unfinished(status: str) -> Problem:
    """A conversation that the guard could not judge, which is why it is not answered."""
    if status == "timeout":
        return Problem(
            503, "the guard did not finish in time, so the request was not answered", "guard_timeout", headers={"Retry-After": "5"}
        )
    return Problem(503, "the guard could not judge the request, so it was not answered", "guard_error", headers={"Retry-After": "5"})


def too_many_characters(found: int, limit: int) -> Problem:
    """A prompt that is refused before anybody counts its tokens."""
    message = f"the prompt has {found} characters; expected at most {limit}"
    return Problem(400, message, "context_length_exceeded", param="messages")


def too_long(tokens: int | None, limit: int | None) -> Problem:
    """A prompt with more tokens than are taken."""
    found = f"{tokens} tokens" if tokens is not None else "more tokens than fit the guard's model"
    expected = f"at most {limit}" if limit is not None else "a shorter one"
    return Problem(400, f"the prompt has {found}; expected {expected}", "context_length_exceeded", param="messages")


Record = TypeVar("Record", bound=BaseModel)
Name = Annotated[str, Field(max_length=256)]
Word = Annotated[str, Field(pattern=r"^[^\s<|\\/>{}]{1,128}$")]
"""A name without spaces, slashes and brackets: some templates show it to the model, so it must not hold a prompt."""
Role = Literal["system", "developer", "user", "assistant", "tool", "function"]
SPEECH = ("text", "input_text", "output_text", "refusal")
"""Kinds of message parts that are text."""


class Shape(BaseModel):
    """A record of which further fields are kept."""

    model_config = ConfigDict(extra="allow", strict=True)


class Closed(BaseModel):
    """A record without further fields."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Part(Shape):
    """A part of a message; only text can be read."""

    type: Annotated[str, Field(max_length=64, examples=["text"])]
    text: str | None = None


class Turn(Shape):
    """A message of a conversation."""

    role: Role
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: Word | None = None
    tool_call_id: Word | None = None


class StreamOptions(Shape):
    """What a stream ends with."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class ChatRequest(Shape):
    """A conversation that is to be answered. Further fields go to the upstream where they are known not to hold a prompt."""

    model: Name
    messages: Annotated[list[Turn], Field(min_length=1, fail_fast=True)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16, fail_fast=True)] | None = None


class ModerationRequest(Shape):
    """Something to judge: a text, a list of texts, the parts of one message, or the turns of one conversation."""

    input: (
        str
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | Annotated[list[Part], Field(min_length=1, fail_fast=True)]
        | Annotated[list[Turn], Field(min_length=1, fail_fast=True)]
    )
    model: Name | None = None


class ClassifyRequest(Shape):
    """A text, a list of texts, or the turns of one conversation, to judge."""

    input: str | Annotated[list[str], Field(min_length=1, fail_fast=True)] | Annotated[list[Turn], Field(min_length=1, fail_fast=True)]
    model: Name | None = None


class GuardrailRequest(Shape):
    """What LiteLLM asks of a guardrail."""

    texts: Annotated[list[str], Field(fail_fast=True)] | None = None
    structured_messages: Annotated[list[Turn], Field(fail_fast=True)] | None = None
    images: list[Any] | None = None
    tools: list[Any] | None = None
    tool_calls: list[Any] | None = None
    input_type: Literal["request", "response"]


class ErrorDetail(Closed):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Closed):
    """An error in the shape of the OpenAI API."""

    error: ErrorDetail


class Judged(Closed):
    """What the guard found, beside what the API of others has a place for.

    `status` is `ok`, or why the guard could not judge (`truncated`, `error`, `timeout`), which is flagged unless the server fails open;
    `would_flag` differs from `flagged` where the server only watches (shadow).
    """

    status: Literal["ok", "truncated", "error", "timeout"]
    p_unsafe: float | None
    threshold: float | None
    would_flag: bool


class ModerationResult(Closed):
    """The verdict on one input."""

    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[str]]
    guard: Judged


class ModerationAnswer(Closed):
    """Verdicts in the shape of the moderations of OpenAI, with one category: `unsafe`."""

    id: str
    model: str
    results: list[ModerationResult]


class Classification(Closed):
    """The label of one input; `probs` are those of `safe` and `unsafe`, in this order."""

    index: int
    label: Literal["safe", "unsafe"]
    probs: list[float]
    num_classes: int
    guard: Judged


class ClassifyAnswer(Closed):
    """Labels in the shape of a classifier that vLLM serves."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Classification]


class GuardrailAnswer(Closed):
    """What LiteLLM is to do."""

    action: Literal["NONE", "BLOCKED"]
    blocked_reason: str | None = None


class Model(Closed):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(Closed):
    """The models that are served."""

    object: Literal["list"]
    data: list[Model]


class Health(Closed):
    """Whether the server is there; of a guard also what its threshold is worth: the share of unsafe requests caught, and of safe ones."""

    status: str
    guard: dict[str, Any] | None = None


def parse(body: bytes, depth: int) -> Any:
    """The JSON value of a body.

    Refused are what Python's reader would let pass and another one understands otherwise or not at all: names that come twice, NaN and
    infinities (a number such as 1e999 included), lone surrogates, deep nesting, numbers of many digits.

    Args:
        body: As it arrived.
        depth: Lists and objects within one another at most.

    Raises:
        Problem: 400.
    """
    try:
        return strict_json.loads(body.decode("utf-8"), depth=depth)
    except UnicodeDecodeError:
        raise Problem(400, "the body is not UTF-8; expected a JSON object in UTF-8", "invalid_encoding") from None
    except json.JSONDecodeError as error:
        what = f"line {error.lineno}, column {error.colno}"
        raise Problem(400, f"the body is not JSON ({what}); expected a JSON object", "invalid_json") from None
    except strict_json.RefusedJSON as error:
        code = {"number": "invalid_json", "surrogate": "invalid_encoding"}.get(error.code, error.code)
        raise Problem(400, f"the body holds {error}; expected a JSON object that every reader understands alike", code) from None


def validated(value: Any, shape: type[Record]) -> Record:
    """A value as one of the shapes.

    Raises:
        Problem: 400, with the path of the first field that is wrong and without what it holds.
    """
    if not isinstance(value, dict):
        raise Problem(400, f"the body is a JSON {_kind(value)}; expected an object", "invalid_type")
    try:
        return shape.model_validate(value)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = _place(first["loc"])
        raise Problem(400, f"{place or 'the request'}: {first['msg'][:200]}", "invalid_value", param=place or None) from None


def _place(location: tuple[int | str, ...]) -> str:
    """A path such as `messages[0].content`; names of union members are left out, long names cut."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part[0].islower() and part not in ("str", "list", "dict"):
            path += f".{part[:64]}" if path else part[:64]
    return path[:200]


def _kind(value: Any) -> str:
    names = {list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), "value")


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
