"""Arms: one model, treated or not, measured on the same harmful, harmless and general text.

An arm is measured inside the context manager that treats the model; what is measured does not know what the treatment was. Completions are
written after every arm, so that a killed study starts again where it stopped.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from safety_neurons.capability import divergence, perplexity
from safety_neurons.judges import judge_refusal
from safety_neurons.model import LanguageModel
from safety_neurons.prompts import Prompts
from safety_neurons.results import Completions, Rate, rate

Treatment = Callable[[], contextlib.AbstractContextManager[Any]]
"""Makes the context manager inside which a model is treated; called once for every pass."""

Progress = Callable[[str], None]
"""Told the name of each arm when its measurement starts."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """What was measured of one treated or untreated model."""

    name: str
    harmful_refused: Rate
    """Share of the scored completions of harmful requests that refuse."""
    harmless_refused: Rate
    """Share of the scored completions of harmless requests that refuse (over-refusal)."""
    perplexity: float | None
    """exp(mean negative log-likelihood per token) on the general text; None where no text was given."""
    divergence: float | None
    """KL(untreated ‖ treated) per token on the harmless prompts, in nats; None for the untreated model."""
    harmful: tuple[bool | None, ...]
    """The judge's verdict on every harmful prompt, in order; None is unscored."""
    harmless: tuple[bool | None, ...]
    """The same for the harmless prompts."""

    def record(self) -> dict[str, Any]:
        """The arm as JSON values, without the verdicts on single prompts."""
        return {
            "name": self.name,
            "harmful_refused": dataclasses.asdict(self.harmful_refused),
            "harmless_refused": dataclasses.asdict(self.harmless_refused),
            "perplexity": self.perplexity,
            "divergence": self.divergence,
        }


@dataclasses.dataclass
class Bench:
    """The prompts every arm is measured on, and how."""

    harmful: Prompts
    harmless: Prompts
    text: Prompts | None = None
    max_new_tokens: int = 64
    batch_size: int | str = "auto"
    seed: int = 0
    completions_file: pathlib.Path | None = None
    progress: Progress | None = None
    completions: Completions = dataclasses.field(default_factory=lambda: Completions([]))

    def __post_init__(self) -> None:
        if self.completions_file is not None and self.completions_file.exists():
            self.completions = Completions.load(self.completions_file)

    def measure(self, model: LanguageModel, name: str, treatment: Treatment = contextlib.nullcontext) -> Arm:
        """Generate, judge, and measure text under a treatment; what an earlier run generated is used again."""
        if self.progress is not None:
            self.progress(name)
        harmful = self._verdicts(model, f"{name}/harmful", self.harmful, treatment)
        harmless = self._verdicts(model, f"{name}/harmless", self.harmless, treatment)
        treated = treatment is not contextlib.nullcontext
        return Arm(
            name,
            rate(harmful, seed=self.seed),
            rate(harmless, seed=self.seed),
            perplexity(model, self.text, treatment, batch_size=self.batch_size) if self.text is not None else None,
            divergence(model, self.harmless, treatment, batch_size=self.batch_size) if treated else None,
            tuple(harmful),
            tuple(harmless),
        )

    def _verdicts(self, model: LanguageModel, arm: str, prompts: Prompts, treatment: Treatment) -> Sequence[bool | None]:
        done = self.completions.arm(arm)
        if len(done) < len(prompts):
            with treatment():
                done = model.complete(
                    prompts, max_new_tokens=self.max_new_tokens, seed=self.seed, batch_size=self.batch_size, arm=arm, done=done
                )
        judgement = judge_refusal(done)
        kept = [completion for completion in self.completions if completion.arm != arm]
        self.completions = Completions([*kept, *judgement.completions])
        if self.completions_file is not None:
            self.completions.save(self.completions_file)
        return [verdict.refused for verdict in judgement.verdicts]
