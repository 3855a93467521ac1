"""Requests and answers in the shapes of the OpenAI API, errors included, and what of a request the guard has
to read.
"""

import json
import re
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from safety_neurons import strict_json
from safety_neurons.errors import InputError
from safety_neurons.guard.features import RequestReading, readings
from safety_neurons.guard.server.mistakes import arrived, first_mistake
from safety_neurons.prompt_lists import Message, Prompt, request_of
from safety_neurons.prompt_lists.records import as_text, opened

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
"""Kinds of errors as clients of the OpenAI API know them.

Other 4xx are invalid requests and 5xx server errors.
"""


class Problem(Exception):
    """A request that is answered with an error.

    Attributes:
        status: HTTP status.
        message: One line: what arrived, what was expected, what to do. Never what a prompt says.
        code: A word for programs.
        param: The field of the request that is meant.
        headers: Further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
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
    return Problem(
        503,
        "the server is shutting down",
        "shutting_down",
        headers={"Retry-After": "5", "Connection": "close"},
    )


def unforeseen(name: str) -> Problem:
    """Something failed that nobody thought of; the answer names the request, not what failed."""
    return Problem(500, f"something failed on the server; its log says more about {name}", "internal_error")


def unfinished(status: str) -> Problem:
    """A conversation that the guard could not judge, which is why it is not answered."""
    if status == "timeout":
        return Problem(
            503,
            "the guard did not finish in time, so the request was not answered",
            "guard_timeout",
            headers={"Retry-After": "5"},
        )
    return Problem(
        503,
        "the guard could not judge the request, so it was not answered",
        "guard_error",
        headers={"Retry-After": "5"},
    )


def too_many_characters(found: int, limit: int) -> Problem:
    """A prompt that is refused before anybody counts its tokens."""
    message = f"the prompt has {found} characters; expected at most {limit}"
    return Problem(400, message, "context_length_exceeded", param="messages")


def too_long(tokens: int | None, limit: int) -> Problem:
    """A prompt with more tokens than are taken; how many it has may not be known."""
    found = f"{tokens} tokens" if tokens is not None else "more tokens than fit the guard's model"
    return Problem(
        400, f"the prompt has {found}; expected at most {limit}", "context_length_exceeded", param="messages"
    )


Record = TypeVar("Record", bound=BaseModel)
Name = Annotated[str, Field(max_length=256)]
Word = Annotated[str, Field(pattern=r"^[^\s<|\\/>{}]{1,128}$")]
"""A name without spaces, slashes and brackets: some templates show it to the model, so it must not hold a
prompt.
"""
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
    """A conversation that is to be answered.

    Further fields go to the upstream where they are known not to hold a prompt.
    """

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
    """Something to judge: a text, a list of texts, the parts of one message, or the turns of one
    conversation.
    """

    input: (
        str
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | Annotated[list[Part], Field(min_length=1, fail_fast=True)]
        | Annotated[list[Turn], Field(min_length=1, fail_fast=True)]
    )
    model: Name | None = None


class ClassifyRequest(Shape):
    """A text, a list of texts, or the turns of one conversation, to judge."""

    input: (
        str
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | Annotated[list[Turn], Field(min_length=1, fail_fast=True)]
    )
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

    `status` is `ok`, or why the guard could not judge (`truncated`, `error`, `timeout`), which is flagged
    unless the server fails open; `would_flag` differs from `flagged` where the server only watches (shadow).
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
    """Whether the server is there.

    Of a guard also what its threshold is worth: the share of unsafe requests caught, and of safe ones.
    """

    status: str
    guard: dict[str, Any] | None = None


def parse(body: bytes, depth: int) -> Any:
    """The JSON value of a body.

    Refused are what Python's reader would let pass and another one understands otherwise or not at all: names
    that come twice, NaN and infinities (a number such as 1e999 included), lone surrogates, deep nesting,
    numbers of many digits.

    Args:
        body: As it arrived.
        depth: Lists and objects within one another at most.

    Raises:
        Problem: 400.
    """
    try:
        return strict_json.loads(body.decode("utf-8"), depth=depth)
    except UnicodeDecodeError:
        raise Problem(
            400, "the body is not UTF-8; expected a JSON object in UTF-8", "invalid_encoding"
        ) from None
    except json.JSONDecodeError as error:
        what = f"line {error.lineno}, column {error.colno}"
        raise Problem(400, f"the body is not JSON ({what}); expected a JSON object", "invalid_json") from None
    except strict_json.RefusedJSON as error:
        code = {"number": "invalid_json", "surrogate": "invalid_encoding"}.get(error.code, error.code)
        raise Problem(
            400, f"the body holds {error}; expected a JSON object that every reader understands alike", code
        ) from None


def validated(value: Any, shape: type[Record]) -> Record:
    """A value as one of the shapes.

    Raises:
        Problem: 400, with the path of the first field that is wrong and without what it holds.
    """
    if not isinstance(value, dict):
        raise Problem(400, f"the body is {arrived(value)}; expected an object", "invalid_type")
    try:
        return shape.model_validate(value)
    except pydantic.ValidationError as error:
        place, said = first_mistake(error)
        raise Problem(400, said, "invalid_value", param=place or None) from None


class Streamed(Response):
    """An answer that is sent as it comes. The door watches the client, so nothing here does.

    What writes the answer is closed at its end.

    Args:
        pieces: Parts of the body.
        status: Of HTTP.
        headers: Further headers.
        kind: Media type.
    """

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        *,
        kind: str,
    ) -> None:
        super().__init__(None, status, headers, kind)
        self._pieces = pieces
        del self.headers["content-length"]

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - of every ASGI application
        """Sends it."""
        try:
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            async for piece in self._pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._pieces.aclose()


ROLES = {"developer": "system", "tool": "user", "function": "user"}
"""Roles that templates do not know, and which one they are read as: what a tool says is untrusted text like a
user's.
"""
SETTINGS = frozenset(
    [
        "max_tokens",
        "max_completion_tokens",
        "min_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "n",
        "seed",
        "stream",
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
        "logit_bias",
        "logprobs",
        "top_logprobs",
        "store",
        "service_tier",
        "reasoning_effort",
        "verbosity",
        "parallel_tool_calls",
        "ignore_eos",
        "modalities",
        "chat_template_kwargs",
    ]
)
"""Fields of a chat request or a completion that may hold a number or a word, and nothing that a model could
follow.
"""
_OF_THE_TEMPLATE = frozenset(
    [
        "messages",
        "conversation",
        "tools",
        "documents",
        "chat_template",
        "tokenize",
        "add_generation_prompt",
        "continue_final_message",
    ]
)
"""Arguments of a template that would put other text than the guard read, or end it elsewhere."""
READ = (
    "tools",
    "functions",
    "tool_choice",
    "function_call",
    "response_format",
    "prediction",
    "web_search_options",
    "stop",
    "user",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
    "model",
)
"""Fields that may hold text which a model reads: each is judged by itself."""


@dataclass(frozen=True)
class Fields:
    """Fields that the bodies of a route may have.

    Attributes:
        own: What the conversation or text is made of, and what the server itself follows.
        settings: May hold a number or a word, and nothing that a model could follow.
        read: May hold text which a model reads: each is judged by itself.
        elsewhere: Name text that lies at an upstream, which the guard has not read.
    """

    own: frozenset[str]
    settings: frozenset[str] = SETTINGS
    read: tuple[str, ...] = READ
    elsewhere: frozenset[str] = frozenset()

    @property
    def known(self) -> frozenset[str]:
        """All that are passed on."""
        return self.own | self.settings | {*self.read}


CHAT_FIELDS = Fields(frozenset({"messages", "stream_options"}))
COMPLETION_FIELDS = Fields(
    frozenset({"prompt", "stream_options"}),
    SETTINGS | {"echo", "best_of"},
    ("suffix", "stop", "user", "model"),
)
RESPONSES_FIELDS = Fields(
    frozenset({"input", "instructions", "stream_options"}),
    frozenset(
        [
            "max_output_tokens",
            "max_tool_calls",
            "temperature",
            "top_p",
            "top_logprobs",
            "stream",
            "store",
            "background",
            "parallel_tool_calls",
            "service_tier",
            "truncation",
            "reasoning",
        ]
    ),
    (
        "tools",
        "tool_choice",
        "text",
        "include",
        "user",
        "metadata",
        "safety_identifier",
        "prompt_cache_key",
        "model",
    ),
    frozenset({"previous_response_id", "conversation", "prompt"}),
)
_LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")
_SAY_NOTHING: tuple[Any, ...] = (
    None,
    "auto",
    "none",
    "required",
    [],
    {},
    {"type": "text"},
    {"type": "json_object"},
    {"format": {"type": "text"}},
)
_MOST_TEXTS = 1024
_PART_FIELDS = {"type", "text", "refusal", "annotations", "cache_control", "prompt_cache_breakpoint"}
_SAID = ("refusal", "tool_calls", "function_call", "annotations")
_THOUGHT = ("reasoning_content", "reasoning", "reasoning_details", "thinking", "thinking_blocks")
"""What an assistant thought: some templates show it to the model, others leave it out."""
_TURN_FIELDS = {"role", "content", "name", "tool_call_id", "audio", "cache_control", *_SAID, *_THOUGHT}
_WORD = re.compile(r"[A-Za-z0-9.]{0,16}|on_demand|standard_only")
_CACHED = ("cache_control", "prompt_cache_breakpoint")
_HASH = re.compile(r"[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}|[0-9a-fA-F]{32,64}")
_OPAQUE = re.compile(r"(?!.*[a-z]{8})(?:(?=.*[0-9]).{1,8}|(?=.*[0-9].*[0-9]).{9,64})")
_OF_IDENTIFIERS = frozenset(
    {
        "call",
        "chatcmpl",
        "tool",
        "toolu",
        "fc",
        "user",
        "session",
        "thread",
        "msg",
        "req",
        "org",
        "id",
        "key",
        "cache",
    }
)
_JOINTS = re.compile(r"[_\-.,:;/+*~|=&\u00ad\u200b-\u200d\u2060\ufeff]+|(?<=[a-z])(?=[A-Z])")
"""What holds words together where there is no white space."""
_SPECIAL_TOKEN = re.compile(r"</?\|?[A-Za-z_]{1,16}\|?>|\[/?[A-Z_]{1,16}\]")


def conversation(
    turns: Sequence[Turn], limit: int, places: Sequence[str] | None = None
) -> list[RequestReading]:
    """How the guard reads a conversation: as a whole, turn by turn, and what a message holds beside its
    content by itself.

    In the whole, parts of a message are joined by line breaks, and calls of tools and what the assistant
    refused count as said; thoughts are left out, as templates leave them out of earlier answers.

    Args:
        turns: At least one.
        limit: Turns that are taken.
        places: What the turns are called in the request; `messages[0]`, … where that is not given.

    Raises:
        Problem: More turns than are taken, or something that is no text.
    """
    if len(turns) > limit:
        raise Problem(
            400,
            f"the conversation has {len(turns)} messages; expected at most {limit}",
            "too_many_messages",
            param="messages",
        )
    called = places or [f"messages[{place}]" for place in range(len(turns))]
    messages = tuple(
        Message(ROLES.get(turn.role, turn.role), said(turn, place))
        for turn, place in zip(turns, called, strict=True)
    )
    whole = Prompt(id="0", text=request_of(messages) or messages[-1].content, messages=messages)
    try:
        found = readings(whole)
    except InputError as error:
        raise Problem(400, str(error), "too_many_messages", param="messages") from None
    return [
        *found,
        *_alone(
            [
                (place, text)
                for turn, place in zip(turns, called, strict=True)
                for text in _beside_content(turn, place)
            ]
        ),
    ]


def said(turn: Turn, place: str) -> str:
    """The text of a message as part of a conversation."""
    extra = turn.model_extra or {}
    strange = sorted(name for name, value in extra.items() if name not in _TURN_FIELDS and value is not None)
    strange += [] if extra.get("audio") is None else ["audio"]
    strange += [] if _is_mark(extra.get("cache_control")) else ["cache_control"]
    if strange:
        message = f"{place}: the guard cannot read its field {strange[0][:64]!r}; expected text"
        raise Problem(400, message, "unreadable_content", param=place)
    return "\n".join([*_content(turn, place), *(as_text(extra[name]) for name in _SAID if extra.get(name))])


def _content(turn: Turn, place: str) -> list[str]:
    return (
        [turn.content]
        if isinstance(turn.content, str)
        else [text_of(part, place) for part in turn.content or ()]
    )


def _beside_content(turn: Turn, place: str) -> Iterator[str]:
    """The parts and the fields of a message, each by itself: which of them a model is shown is up to its
    template.
    """
    extra = turn.model_extra or {}
    parts = _content(turn, place)
    if len(parts) > 1:
        yield from parts
        # Many templates put nothing between parts, so that half a word in each of two is a word to the model.
        yield "".join(parts)
    if any(extra.get(name) for name in _SAID):
        yield "\n".join(parts)
    for name in (*_SAID, *_THOUGHT):
        if extra.get(name):
            yield from texts_in(extra[name])
    if turn.name:
        yield _spaced(turn.name)
    if turn.tool_call_id and not is_identifier(turn.tool_call_id):
        yield _spaced(turn.tool_call_id)


def text_of(part: Part, place: str) -> str:
    """The text of a part of a message.

    Raises:
        Problem: An image, a sound or a file: the guard cannot read it.
    """
    extra = part.model_extra or {}
    strange = [name for name, value in extra.items() if name not in _PART_FIELDS and value is not None]
    texts = [text for text in (part.text, extra.get("refusal")) if text is not None]
    texts += [as_text(extra["annotations"])] if extra.get("annotations") else []
    strange += [name for name in _CACHED if not _is_mark(extra.get(name))]
    what = None
    if part.type not in SPEECH:
        what = f"a part of type {part.type!r}"
    elif strange:
        what = f"the field {strange[0][:64]!r} of a part"
    elif not texts or not all(isinstance(text, str) for text in texts):
        what = "a part without a text"
    if what is not None:
        message = f"{place}: the guard cannot read {what}; expected text"
        raise Problem(400, message, "unreadable_content", param=place)
    return "\n".join(texts)


def beside(
    request: Mapping[str, Any], passed: Iterable[str] = (), fields: Fields = CHAT_FIELDS
) -> list[RequestReading]:
    """Further texts of a request that a model may read, each by itself.

    Args:
        request: The body.
        passed: Fields that the operator lets through unread.
        fields: Those of the route.

    Raises:
        Problem: A field that is not known. A chat template in a request, say, would be a prompt that the
        guard never saw.
    """
    unread = set(passed)
    strange = sorted(
        name for name, value in request.items() if name not in fields.known | unread and value is not None
    )
    strange += strange_options(request)
    if strange:
        name = strange[0][:64]
        why = "is not known, so the guard cannot tell whether it holds a prompt"
        if name in fields.elsewhere:
            why = "names text that this request does not hold, so the guard cannot read it"
        raise Problem(
            400,
            f"field {name!r} {why}; leave it out",
            "unknown_parameter",
            param=name,
        )
    wordy = next(
        (name for name in sorted(fields.settings - unread) if not _is_setting(name, request.get(name))), None
    )
    if wordy is not None:
        raise Problem(
            400,
            f"{wordy}: expected a number or a word; some templates show it to the model",
            "invalid_value",
            param=wordy,
        )
    read = [name for name in fields.read if name not in unread and not _says_nothing(name, request.get(name))]
    return _alone([(name, text) for name in read for text in texts_in(request[name])])


def strange_options(request: Mapping[str, Any]) -> list[str]:
    """Members of `stream_options` that are not known, as paths."""
    options, known = request.get("stream_options") or {}, StreamOptions.model_fields
    return sorted(
        f"stream_options.{name}" for name, value in options.items() if name not in known and value is not None
    )


def texts_in(value: Any) -> Iterator[str]:
    """A value as text, and by itself every text of three words or more in it: among much else one of them
    says little.
    """
    yield _spaced(value) if isinstance(value, str) else as_text(value)
    for text in () if isinstance(value, str) else _leaves(opened(value)):
        if len(re.findall(r"\w+", spaced := _spaced(text))) > 2 or len(text) > 64:
            yield spaced


def is_identifier(text: str) -> bool:
    """Whether a text is what machines number things with: too little of it is words to ask anything of a
    model.
    """
    if len(text) > 64 or not re.fullmatch(r"[A-Za-z0-9_-]*", text):
        return False
    pieces = [
        piece
        for piece in re.split(r"[_-]+", _HASH.sub("", text, count=1))
        if piece and piece.lower() not in _OF_IDENTIFIERS
    ]
    words = [piece for piece in pieces if piece.isalpha()]
    numbered = [piece for piece in pieces if not piece.isalpha()]
    return (
        len(words) < 2
        and all(len(word) <= 12 for word in words)
        and len(numbered) < 3
        and all(map(_OPAQUE.fullmatch, numbered))
    )


def _says_nothing(name: str, value: Any) -> bool:
    """Whether a field needs no reading: it is empty, asks for what happens anyway, or cannot hold a
    prompt.
    """
    if value in _SAY_NOTHING:
        return True
    if name == "model":
        return re.fullmatch(r"\S{0,128}", str(value)) is not None
    if name == "stop":
        text = _SPECIAL_TOKEN.sub("", value if isinstance(value, str) else " ".join(value))
        return text.isascii() and len(text) <= 64 and len(re.findall(r"[A-Za-z]+", text)) < 3
    return name in _LABELS and is_identifier("-".join(_leaves(value)))


def _leaves(value: Any) -> Iterator[str]:
    """Every text and number within a value, names of fields included."""
    if isinstance(value, dict):
        for name, one in value.items():
            yield name
            yield from _leaves(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _leaves(one)
    elif value is not None:
        yield str(value)


def _spaced(text: str) -> str:
    """A text whose words hang together otherwise than by white space (`how_to-do.it`, `howToDoIt`) as words.

    Every other one as it is.
    """
    return text if re.search(r"\s", text.strip()) else _JOINTS.sub(" ", text)


def _alone(texts: Sequence[tuple[str, str]]) -> list[RequestReading]:
    if len(texts) > _MOST_TEXTS:
        raise Problem(
            400,
            f"{len(texts)} texts beside the turns; expected at most {_MOST_TEXTS}",
            "too_many_texts",
            param=texts[0][0],
        )
    once = {text: name for name, text in reversed(texts) if text.strip()}
    return [RequestReading(name, Prompt(id=name, text=text)) for text, name in once.items()]


def _is_setting(name: str, value: Any) -> bool:
    """Whether a value is a number, or one word too short to hold a prompt."""
    if name == "logit_bias" and isinstance(value, dict):
        return all(
            re.fullmatch(r"[0-9]{1,9}", token) and isinstance(bias, int | float)
            for token, bias in value.items()
        )
    if name == "chat_template_kwargs" and isinstance(value, dict):
        return all(
            re.fullmatch(r"[a-z][a-z0-9_]{0,63}", argument)
            and argument not in _OF_THE_TEMPLATE
            and _is_setting("", one)
            for argument, one in value.items()
        )
    if name == "reasoning" and isinstance(value, dict):
        return all(re.fullmatch(r"[a-z_]{1,32}", one) and _is_setting("", how) for one, how in value.items())
    if name == "modalities" and isinstance(value, list):
        return all(one in ("text", "audio") for one in value) and len(value) <= 2
    return (
        value is None
        or isinstance(value, int | float)
        or (isinstance(value, str) and _WORD.fullmatch(value) is not None)
    )


def _is_mark(value: Any) -> bool:
    """Whether a value marks what is to be cached: `{"type": "ephemeral", "ttl": "5m"}`."""
    if isinstance(value, dict):
        return value.keys() <= {"type", "ttl"} and all(_is_setting("", one) for one in value.values())
    return _is_setting("", value)
