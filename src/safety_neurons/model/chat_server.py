"""Completions from an OpenAI-compatible server (vLLM, SGLang, …): requests with retries, time limits and a
key that follows no redirect.
"""

import concurrent.futures
import contextlib
import email.utils
import http.client
import ipaddress
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safety_neurons import strict_json
from safety_neurons.arguments import well_typed
from safety_neurons.counting import numbered
from safety_neurons.errors import ModelError, UsageError
from safety_neurons.model import ranks
from safety_neurons.model.batches import BatchSize, Progress
from safety_neurons.model.decoding import Decoding
from safety_neurons.model.language_model import PendingCompletions, Texts
from safety_neurons.prompt_lists import Prompt
from safety_neurons.results import Completion, Completions

LARGEST = 1 << 24
"""Bytes of a reply that are read."""

LONGEST_WAIT = 60.0
"""Seconds waited before a retry at most, whatever the server asks for."""

GIVE_UP = 5
"""Requests in a row that could not reach the server after which later ones are tried once only."""

FILTERED = "content_filter"
"""Why a reply ends that the server's filter held back, or whose request it refused."""

_FILTERS = frozenset(
    {
        "content_filter",
        "content_policy_violation",
        "responsibleaipolicyviolation",
        "safety",
        "content_blocked",
    }
)

_UNSUPPORTED = frozenset({"unsupported_parameter", "unsupported_value", "unknown_parameter"})

_INSTEAD: Mapping[str, str | None] = {
    "max_tokens": "max_completion_tokens",
    "temperature": None,
    "top_p": None,
    "seed": None,
}
"""What a request is sent with in the place of a field that the server does not take; None leaves it out."""

_PASSING = frozenset(
    {
        "rate_limit_exceeded",
        "server_error",
        "overloaded",
        "overloaded_error",
        "timeout",
        "internal_server_error",
    }
)


class ServerError(ModelError):
    """A request that failed for good; the message says why."""


class OddReplyError(ServerError):
    """A reply without an answer in it that could be read."""


class RefusedRequestError(ServerError):
    """A request that the server refuses for what is in it, such as a conversation that is too long.

    Others it may answer.
    """


class _RecordError(Exception):
    """An error record of the server: its status, what it says, and how it names the reason."""

    def __init__(self, status: int, said: str, record: Any) -> None:
        super().__init__(said)
        error = record.get("error") if isinstance(record, dict) else None
        error = error if isinstance(error, dict) else {}
        within = error.get("innererror")
        inner = within if isinstance(within, dict) else {}
        self.status, self.field = status, str(error.get("param") or "")
        self.reasons = {
            str(value).casefold()
            for value in (error.get("code"), error.get("type"), inner.get("code"))
            if value
        }

    @property
    def passes(self) -> bool:
        """Whether to try again: too many requests, or something at the server's side."""
        return self.status in (408, 409, 425, 429) or self.status >= 500

    @property
    def of_request(self) -> bool:
        """Whether it is about this request, and not about the key, the bill, the address or the server."""
        return (
            400 <= self.status < 500 and not self.passes and self.status not in (401, 402, 404, 405, 407, 410)
        )


@dataclass(frozen=True)
class Reply:
    """What the server answered.

    Attributes:
        text: The answer.
        finish_reason: `stop`, `length`, `content_filter`, …, as the server says.
        refusal: Where the server marks a refusal of its own, the text of it.
    """

    text: str
    finish_reason: str = "stop"
    refusal: str = ""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: the key must not follow it to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


class ChatServer:
    """A model on a server that speaks OpenAI's chat completions. May be used from several threads.

    Args:
        url: Up to and with `/v1`.
        model: What the server calls the model.
        key_variable: Environment variable with the key, read at each request and never kept; no key is sent
            where it is not set.
        timeout: Seconds to wait for the server, for each try.
        retries: Further tries after too many requests, a server error, a lost connection or a time-out.
        backoff: Seconds before the first of them, doubled each time; a `Retry-After` of the server counts
            instead.
        offline: Talk to this machine only.
        sleep: How to wait.

    Attributes:
        changed: Fields of requests that the server does not take, and under which name they are sent instead;
            None where they are left out.

    Raises:
        UsageError: No http or https address, or one of another machine with `offline`.
    """

    @well_typed
    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_variable: str = "OPENAI_API_KEY",
        timeout: float = 60.0,
        retries: int = 4,
        backoff: float = 1.0,
        offline: bool = False,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"server {url!r}: expected an address such as http://localhost:8000/v1")
        if parts.username or parts.password:
            raise UsageError(
                f"server at {parts.hostname}: expected no user or password in the address; put the key "
                f"into {key_variable}"
            )
        if offline and not is_local(parts.hostname):
            raise UsageError(
                f"server at {parts.hostname} with --offline: expected one on this machine (localhost)"
            )
        self.url = url.rstrip("/")
        self.model = model
        self._key_variable, self._timeout, self._retries, self._backoff, self._sleep = (
            key_variable,
            timeout,
            retries,
            backoff,
            sleep,
        )
        handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
        if is_local(parts.hostname):
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)
        self._unreachable = 0
        self.changed: dict[str, str | None] = {}

    def chat(self, messages: Sequence[Mapping[str, str]], **settings: Any) -> Reply:
        """The server's answer to a conversation.

        Args:
            messages: Turns with `role` and `content`.
            **settings: Further fields of the request, such as `temperature`, `max_tokens` or `seed`; None
                leaves one out. One that the server names as unsupported is renamed or left out from then on
                (`changed`).

        Raises:
            ServerError: It did not answer after all tries, or refused the request: RefusedRequestError where
            that is for what is in it. OddReplyError: It answered something else.
        """
        for _ in range(1 + len(_INSTEAD)):
            fields = {
                self.changed.get(name, name): value for name, value in settings.items() if value is not None
            }
            fields.pop(None, None)
            try:
                record = self._sent(
                    json.dumps(
                        {"model": self.model, "messages": [dict(turn) for turn in messages], **fields}
                    ).encode()
                )
            except _RecordError as error:
                if error.reasons & _FILTERS:
                    return Reply("", FILTERED)
                if error.field in _INSTEAD and error.field in fields and error.reasons & _UNSUPPORTED:
                    self.changed[error.field] = _INSTEAD[
                        error.field
                    ]  # another thread may have done so since this request was sent
                    continue
                raise (RefusedRequestError if error.of_request else ServerError)(str(error)) from None
            return self._reply(record)
        raise ServerError(f"{self.url} refuses every form of the request")

    def _reply(self, record: Any) -> Reply:
        """What a record of the server answers."""
        try:
            choice = record["choices"][0]
            message = choice["message"]
            content, refusal, reason = (
                message.get("content"),
                message.get("refusal"),
                choice.get("finish_reason"),
            )
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise OddReplyError(
                f"{self.url} answered without choices[0].message; expected OpenAI's chat completions"
            ) from error
        text, refused = _text_of(content)
        if text is None:
            raise OddReplyError(
                f"{self.url} answered with a content of type {type(content).__name__}; expected text or "
                "text parts"
            )
        if not text and message.get("tool_calls") and reason in (None, "stop"):
            reason = "tool_calls"
        return Reply(text, str(reason or "stop"), refusal if isinstance(refusal, str) else refused)

    def _sent(self, body: bytes) -> Any:
        tries = 1 + (self._retries if self._unreachable < GIVE_UP else 0)
        why = ""
        for attempt in range(tries):
            wait = min(LONGEST_WAIT, self._backoff * 2**attempt)
            try:
                record = self._once(body)
                if (error := self._error_within(record)) is not None:
                    raise error
            except urllib.error.HTTPError as error:
                self._unreachable = 0
                with contextlib.closing(error):
                    text, record = _said(error)
                    refused = _RecordError(
                        error.code, f"{self.url} answered {error.code} {self._without_key(text)}", record
                    )
                if not refused.passes or refused.reasons & _FILTERS:
                    raise refused from None
                why, wait = str(refused), _retry_after(error.headers.get("Retry-After"), wait)
            except _RecordError as error:
                self._unreachable = 0
                if not error.passes or error.reasons & _FILTERS:
                    raise
                why = str(error)
            except (OSError, http.client.HTTPException) as error:  # lost, refused or late connections
                self._unreachable += 1
                reason = getattr(error, "reason", error)
                late = isinstance(reason, TimeoutError)
                why = (
                    f"{self.url} did not answer within {self._timeout:g} s"
                    if late
                    else f"{self.url} cannot be reached ({reason})"
                )
            except ValueError:
                self._unreachable = 0
                why = f"{self.url} answered something that is not JSON"
            else:
                self._unreachable = 0
                return record
            if attempt + 1 < tries:
                self._sleep(wait)
        raise ServerError(f"{why}; {tries} tries")

    def _error_within(self, record: Any) -> _RecordError | None:
        """The error that a reply of status 200 is, with the status that it names itself.

        One that names none may pass.
        """
        if not isinstance(record, dict) or not record.get("error") or record.get("choices"):
            return None
        error = record["error"] if isinstance(record["error"], dict) else {}
        named = [str(error.get(name)) for name in ("status", "code", "status_code")]
        status = next(
            (
                int(value)
                for value in named
                if value.isascii() and value.isdigit() and 400 <= int(value) < 600
            ),
            0,
        )
        reasons = {str(error.get(name)).casefold() for name in ("code", "type") if error.get(name)}
        status = status or (503 if not reasons or reasons & _PASSING else 400)
        text = self._without_key(_message_of(record, "an error"))
        return _RecordError(status, f"{self.url} answered 200 with an error: {text}", record)

    def _key(self) -> str:
        return os.environ.get(self._key_variable, "").strip()

    def _without_key(self, text: str) -> str:
        """What a server says, which may hold the key that it was sent; errors are kept beside completions."""
        key = self._key()
        return text.replace(key, f"[{self._key_variable}]") if key else text

    def _once(self, body: bytes) -> Any:
        request = urllib.request.Request(
            f"{self.url}/chat/completions", body, {"Content-Type": "application/json"}, method="POST"
        )
        if key := self._key():
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        with self._opener.open(request, timeout=self._timeout) as answer:
            return strict_json.loads(answer.read(LARGEST).decode("utf-8"), lenient=True)


def is_local(host: str) -> bool:
    """Whether a host name means this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _text_of(content: Any) -> tuple[str | None, str]:
    """The text of a reply's content, which may be a list of parts, and what its parts refuse.

    None where it is neither.
    """
    if content is None or isinstance(content, str):
        return content or "", ""
    if not isinstance(content, list):
        return None, ""
    texts, refusals = [], []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif (
            isinstance(part, dict) and part.get("type") == "refusal" and isinstance(part.get("refusal"), str)
        ):
            refusals.append(part["refusal"])
        elif isinstance(part, dict) and part.get("type", "text") in ("text", "output_text"):
            inner = part.get("text")
            inner = inner.get("value") if isinstance(inner, dict) else inner
            if not isinstance(inner, str):
                return None, ""
            texts.append(inner)
    return "".join(texts), "".join(
        refusals
    )  # parts of other kinds are thoughts, tools and images, which are no text


def _said(error: urllib.error.HTTPError) -> tuple[str, Any]:
    """What the server says of an error, in one line, and its record where it is JSON."""
    try:
        text = error.read(1 << 16).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return str(error.reason), None
    try:
        record = strict_json.loads(text, lenient=True)
    except ValueError:
        return " ".join(text.split())[:200] or str(error.reason), None
    return _message_of(record, text) or str(error.reason), record


def _message_of(record: Any, otherwise: str) -> str:
    """The message of an error record, in one line."""
    text = otherwise
    with contextlib.suppress(KeyError, TypeError, AttributeError):
        text = str(
            record["error"]["message"]
            if isinstance(record.get("error"), dict)
            else record.get("error") or record["message"]
        )
    return " ".join(text.split())[:200]


def _retry_after(value: str | None, otherwise: float) -> float:
    if not value:
        return otherwise
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return otherwise
    return max(0.0, min(LONGEST_WAIT, seconds))


CONCURRENT = 8

_GOES_ON = {"add_generation_prompt": False, "continue_final_message": True}
"""Of vLLM and SGLang: an answer that is begun is gone on with.

Other servers refuse the request rather than begin another answer.
"""

_ENDED = frozenset({"stop", "eos", "eos_token", "end_turn", "stop_sequence", "stop_string"})

_CUT = frozenset({"length", "max_tokens", "model_length"})

_UNREADABLE, _REFUSED = "unreadable", "refused_request"

_MEANING = {
    FILTERED: "were held back by the server's content filter",
    "tool_calls": "call a tool in the place of an answer",
    _UNREADABLE: "could not be read",
    _REFUSED: "failed, since the server refused the request",
}


class Endpoint:
    """A model behind a URL. It is asked chat turns and gives completions.

    Activations and log-likelihoods it has none.

    Args:
        url: Up to and with the version, then the model's name on the server:
            `http://localhost:8000/v1#MODEL`.
        model: Name of the model, where it does not stand behind the address.
        system: System prompt for prompts that bring none.
        request: Entries of every request that go before those of a call; None leaves one out, such as
            `{"max_tokens": None, "temperature": None, "max_completion_tokens": 512}`.
        think_end: Text that ends the model's thinking, where it is none of the marks that are known.
        **connection: As `ChatServer` takes them: key_variable, timeout, retries, backoff, offline.

    Raises:
        UsageError: No such address, or no name of a model.
    """

    @well_typed
    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        system: str | None = None,
        request: Mapping[str, Any] | None = None,
        think_end: str | None = None,
        **connection: Any,
    ) -> None:
        address, _, named = url.partition("#")
        self.model = model or named
        if not self.model:
            raise UsageError(
                f"endpoint {url!r} names no model; expected it behind the address, such as "
                "http://localhost:8000/v1#MODEL"
            )
        self.system = system
        self.request = dict(request or {})
        self.think_end = think_end or None
        self._server = ChatServer(address, self.model, **{"timeout": 120.0, **connection})

    def __repr__(self) -> str:
        return f"Endpoint({self.name!r})"

    @property
    def name(self) -> str:
        """Address and model."""
        return f"{self._server.url}#{self.model}"

    def complete(
        self,
        prompts: Texts,
        *,
        done: Completions | None = None,
        answered: Callable[[Completion], None] | None = None,
        notes: list[str] | None = None,
        **asking: Any,
    ) -> Completions:
        """Answers prompts as `LanguageModel.complete` does, greedy unless `sample` is set.

        Several requests are under way at a time; of several processes one asks, and all get the answers.

        Arguments are those of `LanguageModel.complete`, but for these: `seed` is of sampling where the server
        knows seeds, `batch_size` are requests at a time (8 where `auto`), `progress` gets 0 for the tokens,
        which are not known, and what of `decoding` is no field of `Decoding` is a further entry of the
        request, such as `stop`. A prompt's own turns are sent as they are.

        Returns:
            One completion a prompt, in the order of the prompts; `token_ids` are not known. A prompt or
            answer that the server's filter holds back, a call of a tool, a reply that cannot be read and a
            request that is refused for what is in it (too long, say) are completions without text: `meta` has
            the server's `finish_reason`, or what it said under `error`, judges leave them unscored, and the
            notes say how many there are. What was refused is asked again by a later call.

        Raises:
            ServerError: The server cannot be reached, takes no key or address, refuses every request, or
            gives no answer that can be read.
        """
        said: list[str] = []

        def ask() -> tuple[Completions, list[str]]:
            return self._asked(prompts, done=done, answered=answered, notes=said, **asking), said

        completions, said = ranks.once(ask)
        if ranks.rank() and answered is not None:
            kept = {(one.prompt_id, one.completion) for one in done or ()}
            for one in completions:
                if (one.prompt_id, one.completion) not in kept:
                    answered(one)
        if notes is not None:
            notes += said
        return completions

    def _asked(
        self,
        prompts: Texts,
        *,
        arm: str = "untreated",
        batch_size: BatchSize = "auto",
        progress: Progress | None = None,
        done: Completions | None = None,
        answered: Callable[[Completion], None] | None = None,
        notes: list[str],
        **decoding: Any,
    ) -> Completions:
        how = Decoding.of(decoding)
        body: dict[str, Any] = {"max_tokens": how.max_new_tokens, "temperature": 0.0, "seed": how.seed}
        if how.sample:
            body |= {"temperature": how.temperature, "top_p": how.top_p}
        body |= {**self.request, **(how.others or {})}
        pending = PendingCompletions(prompts, arm, how.seed, done, answered, failed_again=True)
        asked, results = pending.prompts, pending.results
        odd: Counter[str] = Counter()
        errors: Counter[str] = Counter()
        with concurrent.futures.ThreadPoolExecutor(
            CONCURRENT if batch_size == "auto" else batch_size
        ) as pool:
            waiting = {
                pool.submit(self._answer, prompt, body): index
                for index, prompt in enumerate(asked)
                if index not in results
            }
            try:
                for future in concurrent.futures.as_completed(waiting):
                    text, reason, error = future.result()
                    about = {"finish_reason": reason} if reason not in _ENDED | _CUT else {}
                    odd.update(about.values())
                    if error:
                        errors[error] += 1
                    self._go_on(odd, errors, len(asked))
                    meta = (
                        ({"think_end": self.think_end} if self.think_end else {})
                        | about
                        | ({"error": error} if error else {})
                    )
                    pending.add(
                        waiting[future],
                        text,
                        "failed" if error else "length" if reason in _CUT else "stop",
                        meta=meta,
                    )
                    if progress is not None:
                        progress(len(results), len(asked), 0)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        notes += [
            f"{count} of {len(asked)} answers {_MEANING.get(reason, f'ended in {reason!r}')}"
            for reason, count in odd.items()
        ]
        notes += [
            f"the server takes no {name!r}: {f'{new!r} was sent instead' if new else 'it was left out'}"
            for name, new in self._server.changed.items()
        ]
        notes += [f"{numbered(count, 'request')} refused: {error}" for error, count in errors.most_common(3)]
        return pending.completions

    def _go_on(self, odd: Counter[str], errors: Counter[str], n: int) -> None:
        """Ends a call in which no request at all gives an answer.

        Raises:
            ServerError: That is so.
        """
        if odd[_UNREADABLE] == n:
            raise OddReplyError(
                f"{self._server.url} gave no answer that can be read; expected OpenAI's chat completions"
            )
        if odd[_REFUSED] and odd[_REFUSED] + odd[_UNREADABLE] == n:
            raise ServerError(
                f"{errors.most_common(1)[0][0]}; all of {n} requests failed, expected answers: "
                "rename or leave out the fields that it names with --request"
            )

    def _turns(self, prompt: Prompt) -> list[dict[str, str]]:
        turns = [{"role": turn.role, "content": turn.content} for turn in prompt.messages] or [
            {"role": "user", "content": prompt.text}
        ]
        if self.system is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.system})
        return turns

    def _answer(self, prompt: Prompt, body: Mapping[str, Any]) -> tuple[str, str, str]:
        """Text, why it ends, and what the server says where it refuses the request.

        A refusal it marks as one is the text.

        Raises:
            ServerError: Any other failure.
        """
        turns = self._turns(prompt)
        begun = _GOES_ON if turns[-1]["role"] == "assistant" else {}
        try:
            reply = self._server.chat(turns, **{**begun, **body})
        except OddReplyError:
            return "", _UNREADABLE, ""
        except RefusedRequestError as error:
            return "", _REFUSED, str(error)
        return (
            reply.text or reply.refusal,
            FILTERED if reply.finish_reason == "safety" else reply.finish_reason,
            "",
        )
