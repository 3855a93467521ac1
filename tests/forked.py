"""A part of a test in a process of its own, which is forked: it has imported everything already, and what
this process has changed for a test holds there too.
"""

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn


def forked(work: Callable[[], object]) -> str:
    """What the work gives in another process, as text; an error in place of it as its type and text."""

    def said() -> None:
        try:
            sys.stdout.write(str(work()))
        except BaseException as error:
            sys.stdout.write(f"{type(error).__name__}: {error}")

    return Forked(said).ended()[0]


class Forked:
    """A process with pipes for its standard output and error; what a signal is to do there is as usual.

    Attributes:
        code: with which it has ended; a signal's number is negative.
    """

    def __init__(self, work: Callable[[], object]) -> None:
        self.code: int | None = None
        pipes = [os.pipe() for _ in range(2)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # No lock is held by a test's other threads.
            self.pid = os.fork()
        if not self.pid:
            _work(work, [write for _, write in pipes])
        for _, write in pipes:
            os.close(write)
        self.out, self.err = (os.fdopen(read, encoding="utf-8") for read, _ in pipes)

    def send(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.code is None:
            os.kill(self.pid, number)

    def ended(self) -> tuple[str, str]:
        """What it still says on both streams before it ends."""
        said = self.out.read(), self.err.read()
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return said


def _work(work: Callable[[], object], streams: list[int]) -> NoReturn:
    code = 1
    try:
        for name, number, descriptor in zip(("stdout", "stderr"), (1, 2), streams, strict=True):
            os.dup2(descriptor, number)
            stream = open(number, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        # A shell starts what it puts in the background with SIGINT ignored, and children inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        work()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
