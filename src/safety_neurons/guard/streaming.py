"""Streams of a guarded model: the answer in a thread of its own, its pieces through a queue, its end whenever the reader leaves."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from safety_neurons.guard.verdicts import Verdict
from safety_neurons.guard.watching import Watch
from safety_neurons.model import LanguageModel

if TYPE_CHECKING:
    from safety_neurons.guard.generating import GuardedAnswer

_REPLACEMENT = "�"
_END = object()


class GuardedStream:
    """Pieces of one answer, in order. Iterate; or use it as a context manager, which ends the generation on the way out.

    Args:
        answer: generates with a streamer and an event that cancels.
        model: decodes.
        every: tokens between re-checks, before which they are held back; 0 for none.
        ends: ids that end an answer.
    """

    def __init__(
        self, answer: Callable[[Any, threading.Event], "GuardedAnswer"], model: LanguageModel, every: int = 0, ends: Sequence[int] = ()
    ) -> None:
        self._channel = _Channel(model, every, ends)
        self._thread = threading.Thread(target=_run, args=(answer, self._channel), name="guarded-stream", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        item = self._channel.pieces.get() if not self._channel.over else _END
        if isinstance(item, str):
            return item
        self._channel.over = True
        self._thread.join()
        if isinstance(item, BaseException):
            raise item
        raise StopIteration

    def __enter__(self) -> "GuardedStream":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        channel = getattr(self, "_channel", None)
        if channel is not None:
            channel.cancelled.set()

    def close(self) -> None:
        """End the generation at its next token and wait for that; may be called at any time, and again."""
        self._channel.cancelled.set()
        self._channel.over = True
        self._thread.join()

    @property
    def verdict(self) -> Verdict | None:
        """On the prompt; None until it is read."""
        watch = self._channel.watch
        return watch.verdicts[0] if watch is not None and watch.verdicts else None

    @property
    def answer(self) -> "GuardedAnswer | None":
        """The whole answer; None until the stream has ended, and after a failure."""
        return self._channel.answer

    @property
    def finish_reason(self) -> str | None:
        """`stop`, `length` or `guard`; None until the stream has ended, and where it was closed before."""
        return None if self.answer is None or self._channel.cancelled.is_set() else self.answer.finish_reason


class _Channel:
    """What the thread that generates and the one that reads share; the streamer of `generate`."""

    def __init__(self, model: LanguageModel, every: int, ends: Sequence[int]) -> None:
        self.every, self.ends = every, frozenset(ends)
        self.pieces: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.cancelled = threading.Event()
        self.watch: Watch | None = None
        self.answer: Any = None
        self.over = False
        self._text = Detokenizer(model.decode)
        self._tokens: list[int] = []
        self._released = 0
        self._started = False

    def put(self, value: Any) -> None:
        """The prompt first, then one token after another."""
        if not self._started:
            self._started = True
            return
        self._tokens.append(int(value.reshape(-1)[0]))
        if self.watch is not None:
            self.watch.advance(len(self._tokens))
        passed = len(self._tokens) - 1
        self._release(passed - passed % self.every if self.every else passed + 1)

    def end(self) -> None:
        """The last token was put."""

    def _release(self, count: int) -> None:
        """Give out the text of the first tokens, unless the row was stopped."""
        if self.watch is None or bool(self.watch.stopped.any()):
            return
        fresh = self._tokens[self._released : count]
        self._released = max(self._released, count)
        for token in fresh:
            if token not in self.ends and (piece := self._text.add(token)):
                self.pieces.put(piece)

    def finish(self, answer: "GuardedAnswer") -> None:
        """Give out the rest: of the answer, or what takes its place."""
        self.answer = answer
        if answer.stopped:
            if answer.stopped_at == 0 and answer.text:
                self.pieces.put(answer.text)
            return
        for token in answer.token_ids[self._text.count :]:
            if piece := self._text.add(token):
                self.pieces.put(piece)
        if piece := self._text.rest():
            self.pieces.put(piece)


def _run(answer: Callable[[Any, threading.Event], "GuardedAnswer"], channel: _Channel) -> None:
    try:
        channel.finish(answer(channel, channel.cancelled))
    except BaseException as error:
        channel.pieces.put(error)
    finally:
        channel.pieces.put(_END)


class Detokenizer:
    """Text of tokens one after another; a character of several tokens comes out whole.

    Each piece is what the text of a few tokens gains by the next one, so that tokenizers which look at their neighbours (spaces at the
    start of a word, joined bytes) give what they give for the whole.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._start = self._read = 0

    @property
    def count(self) -> int:
        """Tokens so far."""
        return len(self._ids)

    def add(self, token: int) -> str:
        """What the text gains by a token; empty while a character is not whole."""
        self._ids.append(token)
        return self._gained(final=False)

    def rest(self) -> str:
        """What is left of a character that stays incomplete."""
        return self._gained(final=True)

    def _gained(self, *, final: bool) -> str:
        before = self._decode(self._ids[self._start : self._read])
        after = self._decode(self._ids[self._start :])
        if len(after) <= len(before) or (after.endswith(_REPLACEMENT) and not final):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return after[len(before) :]
