"""One question to a chat model behind an OpenAI-compatible server: retries, time limits, a key that follows no redirect."""

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safety_neurons import strict_json
from safety_neurons.errors import ModelError, UsageError

LARGEST = 1 << 24
"""Bytes of a reply that are read."""
LONGEST_WAIT = 60.0
"""Seconds waited before a retry at most, whatever the server asks for."""
GIVE_UP = 5
"""Requests in a row that could not reach the server after which later ones are tried once only."""


class ServerError(ModelError):
    """A request that failed for good; the message says why."""


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
        key_variable: Environment variable with the key, read at each request and never kept; no key is sent where it is not set.
        timeout: Seconds to wait for the server, for each try.
        retries: Further tries after too many requests, a server error, a lost connection or a time-out.
        backoff: Seconds before the first of them, doubled each time; a `Retry-After` of the server counts instead.
        offline: Talk to this machine only.
        sleep: How to wait.

    Raises:
        UsageError: No http or https address, or one of another machine with `offline`.
    """

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
            raise UsageError(f"server at {parts.hostname}: expected no user or password in the address; put the key into {key_variable}")
        if offline and not is_local(parts.hostname):
            raise UsageError(f"server at {parts.hostname} with --offline: expected one on this machine (localhost)")
        self.url = url.rstrip("/")
        self.model = model
        self._key_variable, self._timeout, self._retries, self._backoff, self._sleep = key_variable, timeout, retries, backoff, sleep
        handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
        if is_local(parts.hostname):
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)
        self._unreachable = 0

    def chat(self, messages: Sequence[Mapping[str, str]], **settings: Any) -> Reply:
        """The server's answer to a conversation.

        Args:
            messages: Turns with `role` and `content`.
            **settings: Further fields of the request, such as `temperature`, `max_tokens` or `seed`.

        Raises:
            ServerError: It did not answer after all tries, refused the request, or answered something else.
        """
        record = self._sent(json.dumps({"model": self.model, "messages": [dict(turn) for turn in messages], **settings}).encode())
        try:
            choice = record["choices"][0]
            message = choice["message"]
            text, refusal = message.get("content"), message.get("refusal")
            return Reply(str(text or ""), str(choice.get("finish_reason") or "stop"), str(refusal or ""))
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ServerError(f"{self.url} answered without choices[0].message; expected OpenAI's chat completions") from error

    def _sent(self, body: bytes) -> Any:
        tries = 1 + (self._retries if self._unreachable < GIVE_UP else 0)
        why = ""
        for attempt in range(tries):
            wait = min(LONGEST_WAIT, self._backoff * 2**attempt)
            try:
                record = self._once(body)
            except urllib.error.HTTPError as error:
                self._unreachable = 0
                with contextlib.closing(error):
                    why = f"{self.url} answered {error.code} {self._without_key(_said(error))}"
                    if error.code not in (408, 409, 425, 429) and error.code < 500:
                        raise ServerError(why) from None
                    wait = _retry_after(error.headers.get("Retry-After"), wait)
            except (OSError, http.client.HTTPException) as error:  # lost, refused or late connections
                self._unreachable += 1
                reason = getattr(error, "reason", error)
                late = isinstance(reason, TimeoutError)
                why = f"{self.url} did not answer within {self._timeout:g} s" if late else f"{self.url} cannot be reached ({reason})"
            except ValueError:
                self._unreachable = 0
                why = f"{self.url} answered something that is not JSON"
            else:
                self._unreachable = 0
                return record
            if attempt + 1 < tries:
                self._sleep(wait)
        raise ServerError(f"{why}; {tries} tries")

    def _key(self) -> str:
        return os.environ.get(self._key_variable, "").strip()

    def _without_key(self, said: str) -> str:
        """What a server says, which may hold the key that it was sent; errors are kept beside completions."""
        key = self._key()
        return said.replace(key, f"[{self._key_variable}]") if key else said

    def _once(self, body: bytes) -> Any:
        request = urllib.request.Request(f"{self.url}/chat/completions", body, {"Content-Type": "application/json"}, method="POST")
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


def _said(error: urllib.error.HTTPError) -> str:
    """What the server says of an error, in one line."""
    try:
        text = error.read(2000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return str(error.reason)
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        record = strict_json.loads(text, lenient=True)
        text = str(record["error"]["message"] if isinstance(record.get("error"), dict) else record.get("error") or record["message"])
    return " ".join(text.split())[:200] or str(error.reason)


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
