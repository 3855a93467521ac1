"""The routes that answer: what a body asks, how the guard reads it, how the local model decodes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, Field

from safety_neurons.guard.features import RequestReading, readings
from safety_neurons.guard.server.door import Settings
from safety_neurons.guard.server.envelopes import CompletionEnvelope, Envelope, ResponsesEnvelope
from safety_neurons.guard.server.local import Decode, RawPrompt
from safety_neurons.guard.server.shapes import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    RESPONSES_FIELDS,
    ChatRequest,
    Fields,
    Name,
    Part,
    Problem,
    Role,
    Shape,
    StreamOptions,
    Turn,
    conversation,
    is_identifier,
    strange_options,
    validated,
)
from safety_neurons.guard.verdict import ASKED, WHOLE
from safety_neurons.prompt_lists import Prompt
from safety_neurons.prompt_lists.records import as_text

_NOTHING_ASKED: Mapping[str, Sequence[Any]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "top_k": (0, -1),
    "min_p": (0,),
    "min_tokens": (0,),
    "repetition_penalty": (1,),
    "ignore_eos": (False,),
}
"""Fields the local model does not know, and the values that ask nothing of it."""
_DECODED = frozenset({"model", "stream", "stream_options", "temperature", "top_p"})
_IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "parallel_tool_calls",
        "safety_identifier",
        "prompt_cache_key",
    }
)


class CompletionRequest(Shape):
    """Texts that are to be gone on with."""

    model: Name
    prompt: str | Annotated[list[str], Field(min_length=1, fail_fast=True)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16, fail_fast=True)] | None = None
    echo: bool | None = None


class InputItem(Shape):
    """A message of a conversation, a call of a tool, what the tool said, or a thought."""

    type: Annotated[str, Field(max_length=64, examples=["message"])] | None = None
    role: Role | None = None
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None


class ResponsesRequest(Shape):
    """A text or a conversation that is to be answered."""

    model: Name
    input: str | Annotated[list[InputItem], Field(min_length=1, fail_fast=True)]
    instructions: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None


@dataclass(frozen=True)
class AnswerRoute:
    """A route that answers; chat completions.

    Attributes:
        path: Of the route.
        name: Of its operation.
        shape: Of its body.
        fields: That its body may have.
        about: The field that holds what is asked.
        local: Fields that the local model follows.
        nothing: Values of further fields that ask nothing of it.
        longest: The field of the longest answer.
        default: Tokens of an answer, where that is not named.
    """

    path: str = "/v1/chat/completions"
    name: str = "chat"
    shape: type[BaseModel] = ChatRequest
    fields: Fields = CHAT_FIELDS
    about: str = "messages"
    local: frozenset[str] = _DECODED | {
        "messages",
        "max_tokens",
        "max_completion_tokens",
        "seed",
        "stop",
        "n",
    }
    nothing: Mapping[str, Sequence[Any]] = field(
        default_factory=lambda: {
            **_NOTHING_ASKED,
            "logprobs": (False,),
            "top_logprobs": (0,),
            "tools": ([],),
            "functions": ([],),
            "tool_choice": ("none", "auto"),
            "function_call": ("none", "auto"),
            "response_format": ({"type": "text"},),
            "modalities": (["text"],),
            "chat_template_kwargs": ({},),
        }
    )
    longest: str = "max_tokens"
    default: int = 256

    @property
    def upstream(self) -> str:
        """The path behind an upstream's address."""
        return self.path.removeprefix("/v1")

    @property
    def ends(self) -> frozenset[bytes]:
        """Events that end a stream, beside `[DONE]`."""
        return frozenset()

    def asked(self, request: Any, limit: int, *, local: bool) -> list[list[RequestReading]]:  # noqa: ARG002 - of other routes
        """The readings of each conversation or text of a request, the one that is answered first.

        Args:
            request: Checked.
            limit: Turns that are taken.
            local: Whether the local model answers.
        """
        return [conversation(request.messages, limit)]

    def choices(self, request: Any) -> int:
        """Answers to each of them."""
        return request.n or 1

    def envelope(self, request: Any, choices: int, *, counted: bool) -> Envelope:
        """What the answers are sent in."""
        return Envelope(request.model, choices, counted=counted)

    def decoding(self, request: Any, body: Mapping[str, Any], settings: Settings) -> Decode:
        """How the local model decodes an answer: greedily unless the request names a temperature above zero.

        Raises:
            Problem: 400 for what the local model cannot do.
        """
        for name, value in body.items():
            if value is None or name in self.local | _IGNORED or value in self.nothing.get(name, ()):
                continue
            known = self.fields.known | self.fields.elsewhere
            why = "is not supported by the local model" if name in known else "is not known"
            raise Problem(
                400, f"field {name[:64]!r} {why}; leave it out", "unsupported_parameter", param=name[:64]
            )
        for name in strange_options(body):
            raise Problem(
                400, f"field {name[:64]!r} is not known; leave it out", "unknown_parameter", param=name[:64]
            )
        most = settings.limits.new_tokens
        wanted = self._wanted(request) or min(self.default, most)
        if wanted > most:
            raise Problem(
                400,
                f"{wanted} new tokens; expected at most {most}",
                "too_many_tokens",
                param=self.longest,
            )
        given = getattr(request, "stop", None)
        stop = [given] if isinstance(given, str) else list(given or ())
        if any(not text or len(text) > 256 for text in stop):
            raise Problem(400, "stop: expected texts of 1 to 256 characters", "invalid_value", param="stop")
        return Decode(
            wanted,
            request.temperature or 0.0,
            request.top_p if request.top_p is not None else 1.0,
            getattr(request, "seed", None),
            tuple(stop),
        )

    def _wanted(self, request: Any) -> int | None:
        return request.max_completion_tokens or request.max_tokens


class CompletionRoute(AnswerRoute):
    """Text completions: each text is fed as it is, and judged as if a user had asked it."""

    def asked(self, request: Any, limit: int, *, local: bool) -> list[list[RequestReading]]:  # noqa: ARG002 - of other routes
        """The readings of each text. What the local model is fed is no place where an answer begins, so the
        text as a user's turn is what decides for a guard that reads ends.
        """
        texts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
        if not local:
            return [readings(Prompt("0", text)) for text in texts]
        return [
            [RequestReading(WHOLE, RawPrompt("0", text)), RequestReading(ASKED, Prompt("0", text))]
            for text in texts
        ]

    def envelope(self, request: Any, choices: int, *, counted: bool) -> Envelope:
        """What the answers are sent in."""
        return CompletionEnvelope(request.model, choices, counted=counted)

    def _wanted(self, request: Any) -> int | None:
        return request.max_tokens


class ResponsesRoute(AnswerRoute):
    """Responses: a text or items, instructions before them."""

    @property
    def ends(self) -> frozenset[bytes]:
        """Events that end a stream, beside `[DONE]`."""
        return frozenset({b"response.completed", b"response.incomplete", b"response.failed", b"error"})

    def asked(self, request: Any, limit: int, *, local: bool) -> list[list[RequestReading]]:  # noqa: ARG002 - of other routes
        """The readings of the conversation."""
        turns, places = [], []
        if request.instructions:
            turns, places = [Turn(role="system", content=request.instructions)], ["instructions"]
        if isinstance(request.input, str):
            found: Iterable[tuple[Turn, str]] = [(Turn(role="user", content=request.input), "input")]
        else:
            found = _turns(request.input)
        for turn, place in found:
            turns.append(turn)
            places.append(place)
        return [conversation(turns, limit, places)]

    def choices(self, request: Any) -> int:  # noqa: ARG002 - of other routes
        """One."""
        return 1

    def envelope(self, request: Any, choices: int, *, counted: bool) -> Envelope:  # noqa: ARG002 - of other routes
        """What the answer is sent in."""
        names = ("instructions", "max_output_tokens", "temperature", "top_p")
        shown = {name: getattr(request, name) for name in names}
        metadata = (request.model_extra or {}).get("metadata")
        shown["metadata"] = metadata if isinstance(metadata, dict) else {}
        return ResponsesEnvelope(request.model, shown)

    def _wanted(self, request: Any) -> int | None:
        return request.max_output_tokens


_STATES = ("in_progress", "completed", "incomplete", "commentary", "final_answer")
_ITEM_FIELDS = {
    "message": {"id", "status", "phase", "role", "content"},
    "function_call": {"id", "status", "call_id", "name", "arguments"},
    "function_call_output": {"id", "status", "call_id", "output"},
    "reasoning": {"id", "status", "summary", "content"},
}


def _turns(items: Sequence[InputItem]) -> Iterable[tuple[Turn, str]]:
    """The turns of a conversation that items are, each with its place; thoughts go with what was said next.

    Raises:
        Problem: An item that is no text: the guard cannot read it.
    """
    thoughts: list[Any] = []
    for number, item in enumerate(items):
        place, kind = f"input[{number}]", item.type or "message"
        extra = {name: value for name, value in (item.model_extra or {}).items() if value not in (None, [])}
        # A role or content where an item of this kind has none would be read by nobody, and may be shown.
        given = extra.keys() | {name for name in ("role", "content") if getattr(item, name)}
        strange = sorted(given - _ITEM_FIELDS.get(kind, set()))
        if kind not in _ITEM_FIELDS or strange:
            what = f"its field {strange[0][:64]!r}" if kind in _ITEM_FIELDS else f"an item of type {kind!r}"
            expected = "messages, calls of functions and their outputs"
            message = f"{place}: the guard cannot read {what}; expected {expected}"
            raise Problem(400, message, "unreadable_content", param=place)
        _check_marks(extra, place)
        if kind == "reasoning":
            said = item.content if isinstance(item.content, list) else [item.content]
            thoughts += [extra.get("summary"), *(as_text(_plain(part)) for part in said if part)]
            continue
        turn: dict[str, Any] = {}
        if kind == "message":
            turn = {"role": item.role, "content": _plain(item.content)}
        elif kind == "function_call":
            called = {"name": extra.get("name"), "arguments": extra.get("arguments")}
            call = {"id": extra.get("call_id"), "type": "function", "function": called}
            turn = {"role": "assistant", "tool_calls": [call]}
        else:
            output = _plain(extra.get("output", ""))
            turn = {"role": "tool", "content": output, "tool_call_id": extra.get("call_id")}
        if thoughts and turn["role"] == "assistant":
            turn["reasoning_details"], thoughts = thoughts, []
        yield _turn(turn, place), place
    if thoughts:
        yield _turn({"role": "assistant", "reasoning_details": thoughts}, "input"), "input"


def _check_marks(item: Mapping[str, Any], place: str) -> None:
    """What machines number items with may not be words, since nobody reads it."""
    for name in ("id", "status", "phase"):
        value = item.get(name)
        known = value in _STATES if name != "id" else isinstance(value, str) and is_identifier(value)
        if value is not None and not known:
            message = (
                f"{place}: the guard cannot read its field {name!r}; expected what machines name items with"
            )
            raise Problem(400, message, "unreadable_content", param=place)


def _plain(content: Any) -> Any:
    """Contents as JSON values, empty fields of parts left out."""
    if isinstance(content, list):
        return [_plain(part) for part in content]
    if isinstance(content, Part):
        content = content.model_dump()
    if isinstance(content, dict):
        return {name: value for name, value in content.items() if value not in (None, [])}
    return content


def _turn(turn: Mapping[str, Any], place: str) -> Turn:
    try:
        return validated(dict(turn), Turn)
    except Problem as problem:
        raise Problem(400, f"{place}: {problem.message}", problem.code, param=place) from None


CHAT = AnswerRoute()
COMPLETIONS = CompletionRoute(
    "/v1/completions",
    "completions",
    CompletionRequest,
    COMPLETION_FIELDS,
    "prompt",
    _DECODED | {"prompt", "max_tokens", "seed", "stop", "n"},
    {**_NOTHING_ASKED, "echo": (False,), "best_of": (1,), "suffix": ("",)},
    default=16,
)
RESPONSES = ResponsesRoute(
    "/v1/responses",
    "responses",
    ResponsesRequest,
    RESPONSES_FIELDS,
    "input",
    _DECODED | {"input", "instructions", "max_output_tokens"},
    {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "text": ({}, {"format": {"type": "text"}}),
        "truncation": ("disabled",),
        "background": (False,),
        "include": ([],),
        "top_logprobs": (0,),
        "reasoning": ({},),
    },
    "max_output_tokens",
)
ANSWERING = (CHAT, COMPLETIONS, RESPONSES)
"""All of them."""
