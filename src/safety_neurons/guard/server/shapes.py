"""The requests that are understood and the answers that are given, as the OpenAPI document shows them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

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
