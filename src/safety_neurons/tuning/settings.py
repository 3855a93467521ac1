"""Options of tuning: how neurons are trained, and what the model is measured on before and after.

Torch-free.
"""

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

from safety_neurons.declarations import Between, Declaration, NotNegative, Panel, Positive, Reads
from safety_neurons.errors import UsageError

LARGEST = 2e37
"""Adam's first step is ten times the rate, which no longer fits into float32 above 3e37: the optimizer itself
fails there.
"""


def checked_rate(learning_rate: float | str, option: str = "--learning-rate") -> float:
    """A learning rate as a number above zero.

    Raises:
        UsageError: it is none.
    """
    try:
        number = float(learning_rate)
    except (TypeError, ValueError):
        number = -1.0
    if not number > 0:
        raise UsageError(
            f"{option} {learning_rate}: expected auto or a number above 0; at 0 no step would change anything"
        )
    if not number < LARGEST:
        raise UsageError(
            f"{option} {learning_rate}: expected auto or a number above 0, below {LARGEST:g}; weights "
            "would overflow"
        )
    return number


@dataclasses.dataclass(frozen=True)
class Training(Declaration):
    """How neurons are trained."""

    PANEL: ClassVar[str | None] = "Training"

    mix: Annotated[NotNegative, Panel("Data")] = 2.0
    """Harmless examples for each harmful one."""
    anchor: NotNegative = 4.0
    """Weight of the divergence from the untouched model on harmless examples and general text; 0 learns the
    harmless answers instead.
    """
    learning_rate: str | float = "auto"
    """auto (relative to the size of the weights, adapted to what the checks find) or a number."""
    epochs: Positive = 4
    """Passes over the examples."""
    max_steps: Positive | None = None
    """End after so many steps."""
    accumulate: Positive = 1
    """Batches of a step."""
    warmup: Annotated[float, Between(0, 1)] = 0.1
    """Share of the steps over which the rate rises."""
    clip: Annotated[float, Between(0, above=True)] = 1.0
    """Largest norm of the trained entries' gradient."""
    weight_decay: NotNegative = 0.0
    """Pull towards the base."""
    max_length: Annotated[int, Between(8)] = 512
    """Tokens of an example."""

    def check(self) -> None:
        """Also the learning rate."""
        super().check()
        if self.learning_rate != "auto":
            checked_rate(self.learning_rate)


@dataclasses.dataclass(frozen=True)
class Anchored(Declaration):
    """What the model is held to itself on, besides harmless requests."""

    PANEL: ClassVar[str | None] = "Data"

    general: Annotated[str | Any, Reads("prompts", words=("none",))] = "builtin:general"
    """General text on which the model is held to itself: a file, builtin:NAME[/LANG] or none."""


@dataclasses.dataclass(frozen=True)
class TuningSettings(Training):
    """How `tune` trains, with what every verb of the command line has."""

    batch_size: int | Literal["auto"] = "auto"
    """Examples of a pass; auto is 8; halved where memory runs out, without changing the step."""
    seed: int = 0
    """Of the order of the examples and the draw of the harmless ones."""

    def check(self) -> None:
        """Also the batch size."""
        super().check()
        if self.batch_size != "auto" and self.batch_size < 1:
            raise UsageError(f"--batch-size {self.batch_size}: expected auto or a number of at least 1")


@dataclasses.dataclass(frozen=True)
class BeforeAndAfter(Declaration):
    """What the model is measured on before and after."""

    PANEL: ClassVar[str | None] = "Measured before and after"

    test_harmful: Annotated[str | Any, Reads("prompts")] = "builtin:harmful-test"
    """Harmful requests to measure on."""
    test_harmless: Annotated[str | Any, Reads("prompts")] = "builtin:harmless-test"
    """Harmless requests to measure on."""
    text: Annotated[str | Any, Reads("prompts", words=("none",))] = "builtin:general-test"
    """General text for perplexity, or none."""
    max_new_tokens: Positive | None = None
    """Length of an answer, in tokens. [default: 256, on organisms 64]"""
