"""Answers in the shapes of the OpenAI API, whole or as events: chat completions, completions, responses."""

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safety_neurons.guard.server.shapes import Problem

DONE = b"data: [DONE]\n\n"


@dataclass
class Answered:
    """One choice of an answer, as far as it is known.

    Attributes:
        text: What was written.
        reason: `stop`, `length` or `content_filter`.
        prompt_tokens: Of what was asked; 0 where the model was not.
        tokens: Written.
        flagged: Whether a check flagged it while it was written.
    """

    text: str = ""
    reason: str = "stop"
    prompt_tokens: int = 0
    tokens: int = 0
    flagged: bool = False


@dataclass(frozen=True)
class Spent:
    """Tokens of a request, each prompt counted once, and of all that was answered."""

    prompt: int = 0
    completion: int = 0

    @property
    def record(self) -> dict[str, int]:
        """As completions count them."""
        total = self.prompt + self.completion
        return {"prompt_tokens": self.prompt, "completion_tokens": self.completion, "total_tokens": total}


class Envelope:
    """Chat completions.

    Args:
        model: As the client named it.
        choices: How many there are.
        counted: Whether a stream ends with counts of tokens.
    """

    kind, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, model: str, choices: int = 1, *, counted: bool = False) -> None:
        self.id, self.created = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time())
        self.model, self.choices, self.counted = model, choices, counted

    def whole(self, answers: Sequence[Answered], spent: Spent) -> dict[str, Any]:
        """A complete answer."""
        choices = [
            {"index": index, **self._said(one.text), "logprobs": None, "finish_reason": one.reason}
            for index, one in enumerate(answers)
        ]
        return {**self._head(self.kind), "choices": choices, "usage": spent.record}

    def opening(self) -> bytes:
        """What stands before the text of all choices."""
        start = {"role": "assistant", "content": "", "refusal": None}
        return b"".join(self._piece(index, {"delta": start}) for index in range(self.choices))

    def piece(self, index: int, text: str) -> bytes:
        """More text of a choice."""
        return self._piece(index, {"delta": {"content": text}})

    def closing(self, index: int, answer: Answered) -> bytes:
        """The end of a choice."""
        return self._piece(index, {"delta": {}}, answer.reason)

    def ending(self, spent: Spent) -> bytes:
        """What stands behind all choices."""
        counts = {**self._head(self.chunk), "choices": [], "usage": spent.record}
        return (event(counts) if self.counted else b"") + DONE

    def broken(self, problem: Problem) -> bytes:
        """The end of a stream that is no whole answer."""
        return b"data: " + problem.body + b"\n\n"

    def _said(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _piece(self, index: int, said: Mapping[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": index, **said, "logprobs": None, "finish_reason": reason}
        record = {**self._head(self.chunk), "choices": [choice]}
        return event({**record, "usage": None} if self.counted else record)


class CompletionEnvelope(Envelope):
    """Text completions: the same around texts without a role."""

    kind, chunk, prefix = "text_completion", "text_completion", "cmpl"

    def opening(self) -> bytes:
        """Nothing."""
        return b""

    def piece(self, index: int, text: str) -> bytes:
        """More text of a choice."""
        return self._piece(index, {"text": text})

    def closing(self, index: int, answer: Answered) -> bytes:
        """The end of a choice."""
        return self._piece(index, {"text": ""}, answer.reason)

    def _said(self, text: str) -> dict[str, Any]:
        return {"text": text}


_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}


class ResponsesEnvelope(Envelope):
    """Responses: one message of one text, every event with its number.

    Args:
        model: As the client named it.
        shown: Fields of the request that its answer repeats.
    """

    kind, prefix = "response", "resp"

    def __init__(self, model: str, shown: Mapping[str, Any]) -> None:
        super().__init__(model)
        self.id = f"resp_{secrets.token_hex(24)}"
        self._shown, self._item = dict(shown), f"msg_{secrets.token_hex(24)}"
        self._number, self._text, self._closed = 0, "", Answered()

    def whole(self, answers: Sequence[Answered], spent: Spent) -> dict[str, Any]:
        """A complete answer."""
        (answer,) = answers
        counts = {
            "input_tokens": spent.prompt,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": spent.completion,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": spent.prompt + spent.completion,
        }
        return self._response(answer, self._message(answer), counts)

    def opening(self) -> bytes:
        """What stands before the text."""
        started = self._response(None, None, None)
        place = {"item_id": self._item, "output_index": 0, "content_index": 0}
        return b"".join(
            [
                self._event("response.created", response=started),
                self._event("response.in_progress", response=started),
                self._event("response.output_item.added", output_index=0, item=self._message(None)),
                self._event("response.content_part.added", **place, part=self._part("")),
            ]
        )

    def piece(self, index: int, text: str) -> bytes:
        """More text."""
        self._text += text
        return self._event("response.output_text.delta", **self._place(index), delta=text, logprobs=[])

    def closing(self, index: int, answer: Answered) -> bytes:
        """The end of the text."""
        self._closed = Answered(self._text, answer.reason)
        place, message = self._place(index), self._message(self._closed)
        return b"".join(
            [
                self._event("response.output_text.done", **place, text=self._text, logprobs=[]),
                self._event("response.content_part.done", **place, part=self._part(self._text)),
                self._event("response.output_item.done", output_index=index, item=message),
            ]
        )

    def ending(self, spent: Spent) -> bytes:
        """The whole answer once more."""
        whole = self.whole([self._closed], spent)
        return self._event(f"response.{whole['status']}", response=whole)

    def broken(self, problem: Problem) -> bytes:
        """The end of a stream that is no whole answer; clients that know no event `error` read its member."""
        error = problem.record["error"]
        said = {"code": error["code"], "message": error["message"], "param": error["param"], "error": error}
        return self._event("error", **said)

    def _event(self, kind: str, **record: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return f"event: {kind}\n".encode() + event({"type": kind, "sequence_number": number, **record})

    def _place(self, index: int) -> dict[str, Any]:
        return {"item_id": self._item, "output_index": index, "content_index": 0}

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _message(self, answer: Answered | None) -> dict[str, Any]:
        status = "in_progress" if answer is None else self._status(answer)
        content = [] if answer is None else [self._part(answer.text)]
        head = {"id": self._item, "type": "message", "status": status}
        return {**head, "role": "assistant", "content": content}

    def _status(self, answer: Answered) -> str:
        return "incomplete" if answer.reason in _INCOMPLETE else "completed"

    def _response(
        self,
        answer: Answered | None,
        message: Mapping[str, Any] | None,
        counts: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        reason = None if answer is None else _INCOMPLETE.get(answer.reason)
        return {
            "id": self.id,
            "object": self.kind,
            "created_at": self.created,
            "status": "in_progress" if answer is None else self._status(answer),
            "background": False,
            "error": None,
            "incomplete_details": None if reason is None else {"reason": reason},
            "model": self.model,
            "output": [] if message is None else [dict(message)],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "tool_choice": "auto",
            "tools": [],
            "text": {"format": {"type": "text"}},
            "truncation": "disabled",
            **self._shown,
            "usage": counts,
        }


def event(record: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(record, ensure_ascii=False).encode() + b"\n\n"
