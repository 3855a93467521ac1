"""What goes wrong, in the shape of the OpenAI API: `{"error": {"message", "type", "param", "code"}}`."""

import json
from collections.abc import Mapping
from typing import Any

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
