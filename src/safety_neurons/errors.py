"""The error tree. Every message says in one line what arrived, what was expected and what to do.

SafetyNeuronsError               exit code 1
├── InputError                   a file, prompt list or value that cannot be used
│   └── UsageError               arguments that contradict one another (exit code 2)
├── NeuronError                  a neuron set or score file that is empty, damaged or out of range
│   └── ForeignModelError        found on another architecture
├── ModelError                   a model that cannot be loaded or driven
│   ├── UnsupportedModelError    a layer or site whose anatomy cannot be found or proved
│   ├── MismatchError            two models (or a model and its tokenizer) that do not belong together
│   └── NumericalError           NaN or infinity where a number was needed
├── DecodeError                  a decoding mode an intervention cannot follow
├── RunError                     a run folder that is unwritable, damaged or of another configuration
│   └── EndedError               another process of the same command has ended
└── GateError                    a stated threshold was not met (exit code 3)
"""

import contextlib
import re
from collections.abc import Iterator

_OPTION = re.compile(r"`[^`]*`|(?<!\w)'[^']*'|\"[^\"]*\"|(?<![^\s(,])--([a-z][a-z-]*[a-z])(?![\w-])")
"""An option of the command line.

What stands in quotes is a user's text or a whole command, and is no option.
"""
_BREAKS = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")
"""What ends a line, in a name or in the words of another library."""
_on_command_line = False


@contextlib.contextmanager
def command_line() -> Iterator[None]:
    """Messages of errors name options as the command line has them.

    Outside of this context as Python's arguments.
    """
    global _on_command_line
    before, _on_command_line = _on_command_line, True
    try:
        yield
    finally:
        _on_command_line = before


class SafetyNeuronsError(Exception):
    """Root of everything this package raises on purpose.

    Its message names an option as `--top-per-matrix`. Every verb is a Python call with the same words, so
    that outside of the command line the same message names the argument, `top_per_matrix`: advice is never in
    words that are not there. It is one line, whatever names and other libraries' words it holds.
    """

    exit_code = 1

    def __str__(self) -> str:
        text = _BREAKS.sub(" ", super().__str__()).strip()
        if _on_command_line:
            return text
        return _OPTION.sub(lambda found: found[1].replace("-", "_") if found[1] else found[0], text)


class InputError(SafetyNeuronsError):
    """A file, prompt list or value that cannot be used."""


class UsageError(InputError):
    """Arguments that contradict one another or are outside their range."""

    exit_code = 2


class NeuronError(SafetyNeuronsError):
    """A neuron set or score file that is empty, damaged or out of range."""


class ForeignModelError(NeuronError):
    """A neuron set or score file found on another architecture."""


class ModelError(SafetyNeuronsError):
    """A model that cannot be loaded or driven."""


class UnsupportedModelError(ModelError):
    """A layer or site whose anatomy cannot be found or proved; the message names it."""


class MismatchError(ModelError):
    """Two models, or a model and its tokenizer, that do not belong together."""


class NumericalError(ModelError):
    """NaN or infinity where a number was needed."""


class DecodeError(SafetyNeuronsError):
    """A decoding mode that an intervention cannot follow."""


class RunError(SafetyNeuronsError):
    """A run folder that is unwritable, damaged or belongs to another configuration."""


class EndedError(RunError):
    """Another process that does the same command has ended."""


class GateError(SafetyNeuronsError):
    """A stated threshold was not met."""

    exit_code = 3


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, short enough for one line of our own."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
