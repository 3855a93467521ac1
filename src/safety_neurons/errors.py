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
└── GateError                    a stated threshold was not met (exit code 3)
"""


class SafetyNeuronsError(Exception):
    """Root of everything this package raises on purpose."""

    exit_code = 1


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


class GateError(SafetyNeuronsError):
    """A stated threshold was not met."""

    exit_code = 3
