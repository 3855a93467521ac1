"""What of a request the guard has to read: the turns as one conversation and one by one, and by itself whatever else holds text."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from safety_neurons.errors import InputError
from safety_neurons.guard.features import RequestReading, readings
from safety_neurons.guard.server.shapes import SPEECH, Part, Problem, StreamOptions, Turn
from safety_neurons.prompt_lists import Message, Prompt, request_of
from safety_neurons.prompt_lists.records import as_text, opened

ROLES = {"developer": "system", "tool": "user", "function": "user"}
"""Roles that templates do not know, and which one they are read as: what a tool says is untrusted text like a user's."""
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
"""Fields of a chat request that may hold a number or a word, and nothing that a model could follow."""
_OF_THE_TEMPLATE = frozenset(
    ["messages", "conversation", "tools", "documents", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message"]
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
KNOWN = SETTINGS | {*READ, "messages", "stream_options"}
_LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")
_SAY_NOTHING: tuple[Any, ...] = (None, "auto", "none", "required", [], {}, {"type": "text"}, {"type": "json_object"})
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
    {"call", "chatcmpl", "tool", "toolu", "fc", "user", "session", "thread", "msg", "req", "org", "id", "key", "cache"}
)
_JOINTS = re.compile(r"[_\-.,:;/+*~|=&\u00ad\u200b-\u200d\u2060\ufeff]+|(?<=[a-z])(?=[A-Z])")
"""What holds words together where there is no white space."""
_SPECIAL_TOKEN = re.compile(r"</?\|?[A-Za-z_]{1,16}\|?>|\[/?[A-Z_]{1,16}\]")


def conversation(turns: Sequence[Turn], limit: int) -> list[RequestReading]:
    """How the guard reads a conversation: as a whole, turn by turn, and what a message holds beside its content by itself.

    In the whole, parts of a message are joined by line breaks, and calls of tools and what the assistant refused count as said; thoughts
    are left out, as templates leave them out of earlier answers.

    Args:
        turns: At least one.
        limit: Turns that are taken.

    Raises:
        Problem: More turns than are taken, or something that is no text.
    """
    if len(turns) > limit:
        raise Problem(400, f"the conversation has {len(turns)} messages; expected at most {limit}", "too_many_messages", param="messages")
    messages = tuple(Message(ROLES.get(turn.role, turn.role), said(turn, f"messages[{place}]")) for place, turn in enumerate(turns))
    whole = Prompt(id="0", text=request_of(messages) or messages[-1].content, messages=messages)
    try:
        found = readings(whole)
    except InputError as error:
        raise Problem(400, str(error), "too_many_messages", param="messages") from None
    return [*found, *_alone([(f"messages[{place}]", text) for place, turn in enumerate(turns) for text in _beside_content(turn, place)])]


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
    return [turn.content] if isinstance(turn.content, str) else [text_of(part, place) for part in turn.content or ()]


def _beside_content(turn: Turn, place: int) -> Iterator[str]:
    """The parts and the fields of a message, each by itself: which of them a model is shown is up to its template."""
    extra = turn.model_extra or {}
    parts = _content(turn, f"messages[{place}]")
    if len(parts) > 1:
        yield from parts
        yield "".join(parts)  # many templates put nothing between parts, so that half a word in each of two is a word to the model
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
    if part.type not in SPEECH or strange or not texts or not all(isinstance(text, str) for text in texts):
        raise Problem(400, f"{place}: the guard cannot read a part of type {part.type!r}; expected text", "unreadable_content", param=place)
    return "\n".join(texts)


def beside(request: Mapping[str, Any], passed: Iterable[str] = ()) -> list[RequestReading]:
    """Further texts of a chat request that a model may read, each by itself.

    Args:
        request: The body.
        passed: Fields that the operator lets through unread.

    Raises:
        Problem: A field that is not known. A chat template in a request, say, would be a prompt that the guard never saw.
    """
    unread = set(passed)
    strange = sorted(name for name, value in request.items() if name not in KNOWN | unread and value is not None)
    strange += strange_options(request)
    if strange:
        name = strange[0][:64]
        raise Problem(
            400,
            f"field {name!r} is not known, so the guard cannot tell whether it holds a prompt; leave it out",
            "unknown_parameter",
            param=name,
        )
    wordy = next((name for name in sorted(SETTINGS - unread) if not _is_setting(name, request.get(name))), None)
    if wordy is not None:
        raise Problem(400, f"{wordy}: expected a number or a word; some templates show it to the model", "invalid_value", param=wordy)
    fields = [name for name in READ if name not in unread and not _says_nothing(name, request.get(name))]
    return _alone([(name, text) for name in fields for text in texts_in(request[name])])


def strange_options(request: Mapping[str, Any]) -> list[str]:
    """Members of `stream_options` that are not known, as paths."""
    options, known = request.get("stream_options") or {}, StreamOptions.model_fields
    return sorted(f"stream_options.{name}" for name, value in options.items() if name not in known and value is not None)


def texts_in(value: Any) -> Iterator[str]:
    """A value as text, and by itself every text of three words or more in it: among much else one of them says little."""
    yield _spaced(value) if isinstance(value, str) else as_text(value)
    for text in () if isinstance(value, str) else _leaves(opened(value)):
        if len(re.findall(r"\w+", spaced := _spaced(text))) > 2 or len(text) > 64:
            yield spaced


def is_identifier(text: str) -> bool:
    """Whether a text is what machines number things with: too little of it is words to ask anything of a model."""
    if len(text) > 64 or not re.fullmatch(r"[A-Za-z0-9_-]*", text):
        return False
    pieces = [piece for piece in re.split(r"[_-]+", _HASH.sub("", text, count=1)) if piece and piece.lower() not in _OF_IDENTIFIERS]
    words = [piece for piece in pieces if piece.isalpha()]
    numbered = [piece for piece in pieces if not piece.isalpha()]
    return len(words) < 2 and all(len(word) <= 12 for word in words) and len(numbered) < 3 and all(map(_OPAQUE.fullmatch, numbered))


def _says_nothing(name: str, value: Any) -> bool:
    """Whether a field needs no reading: it is empty, asks for what happens anyway, or cannot hold a prompt."""
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
    """A text whose words hang together otherwise than by white space (`how_to-do.it`, `howToDoIt`) as words; every other one as it is."""
    return text if re.search(r"\s", text.strip()) else _JOINTS.sub(" ", text)


def _alone(texts: Sequence[tuple[str, str]]) -> list[RequestReading]:
    if len(texts) > _MOST_TEXTS:
        raise Problem(400, f"{len(texts)} texts beside the turns; expected at most {_MOST_TEXTS}", "too_many_texts", param=texts[0][0])
    once = {text: name for name, text in reversed(texts) if text.strip()}
    return [RequestReading(name, Prompt(id=name, text=text)) for text, name in once.items()]


def _is_setting(name: str, value: Any) -> bool:
    """Whether a value is a number, or one word too short to hold a prompt."""
    if name == "logit_bias" and isinstance(value, dict):
        return all(re.fullmatch(r"[0-9]{1,9}", token) and isinstance(bias, int | float) for token, bias in value.items())
    if name == "chat_template_kwargs" and isinstance(value, dict):
        return all(
            re.fullmatch(r"[a-z][a-z0-9_]{0,63}", argument) and argument not in _OF_THE_TEMPLATE and _is_setting("", one)
            for argument, one in value.items()
        )
    if name == "modalities" and isinstance(value, list):
        return all(one in ("text", "audio") for one in value) and len(value) <= 2
    return value is None or isinstance(value, int | float) or (isinstance(value, str) and _WORD.fullmatch(value) is not None)


def _is_mark(value: Any) -> bool:
    """Whether a value marks what is to be cached: `{"type": "ephemeral", "ttl": "5m"}`."""
    if isinstance(value, dict):
        return value.keys() <= {"type", "ttl"} and all(_is_setting("", one) for one in value.values())
    return _is_setting("", value)
