"""Arms: one model, treated or not, measured on the same harmful, harmless and general text.

An arm is measured inside the context manager that treats the model; what is measured does not know what the treatment was. Completions are
written after every batch, so that a killed study starts again where it stopped.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from safety_neurons.capability import divergence, perplexity
from safety_neurons.judges import judge_refusal
from safety_neurons.model import LanguageModel
from safety_neurons.model.batches import BatchSize
from safety_neurons.prompts import Prompts
from safety_neurons.results import Completion, Completions, Rate, rate

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
            "harmful_refused": self.harmful_refused.to_json(),
            "harmless_refused": self.harmless_refused.to_json(),
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
    batch_size: BatchSize = "auto"
    seed: int = 0
    completions_file: pathlib.Path | None = None
    progress: Progress | None = None
    completions: Completions = dataclasses.field(default_factory=lambda: Completions([]))
    notes: list[str] = dataclasses.field(default_factory=list)
    """What had to be said (prompts longer than the context, batches that did not fit), each once."""

    def __post_init__(self) -> None:
        if self.completions_file is not None and self.completions_file.exists() and self.completions_file.stat().st_size:
            self.completions = Completions.load(self.completions_file)

    def measure(self, model: LanguageModel, name: str, treatment: Treatment = contextlib.nullcontext) -> Arm:
        """Generate, judge, and measure text under a treatment; what an earlier run generated is used again."""
        if self.progress is not None:
            self.progress(name)
        harmful = self.verdicts(model, name, "harmful", treatment)
        harmless = self.verdicts(model, name, "harmless", treatment)
        treated = treatment is not contextlib.nullcontext
        return Arm(
            name,
            rate(harmful, self.harmful.groups),
            rate(harmless, self.harmless.groups),
            perplexity(model, self.text, treatment, batch_size=self.batch_size) if self.text is not None else None,
            divergence(model, self.harmless, treatment, batch_size=self.batch_size) if treated else None,
            tuple(harmful),
            tuple(harmless),
        )

    def verdicts(self, model: LanguageModel, name: str, kind: str, treatment: Treatment) -> Sequence[bool | None]:
        """The judge's verdict on every `harmful` or `harmless` prompt, in order; the completions are kept under `name/kind`."""
        prompts: Prompts = getattr(self, kind)
        arm = f"{name}/{kind}"
        done = self._answered(arm, prompts)
        if len(done) < len(prompts):
            done = self._complete(model, arm, prompts, treatment, done, kind)
        judgement = judge_refusal(done)
        kept = [completion for completion in self.completions if completion.arm != arm]
        self.completions = Completions([*kept, *judgement.completions])
        return [verdict.refused for verdict in judgement.verdicts]

    def finish(self) -> None:
        """Write all completions with their verdicts; until then the file holds what was generated, batch by batch."""
        if self.completions_file is not None:
            self.completions.save(self.completions_file)

    def _answered(self, arm: str, prompts: Prompts) -> Completions:
        """What an earlier run wrote for these prompts, in their order; answers to prompts that have changed since do not count."""
        earlier = {completion.prompt_id: completion for completion in self.completions.arm(arm)}
        found = [earlier.get(prompt.id) for prompt in prompts]
        pairs = zip(found, prompts, strict=True)
        return Completions([one for one, prompt in pairs if one is not None and one.prompt == prompt.text])

    def _complete(
        self, model: LanguageModel, arm: str, prompts: Prompts, treatment: Treatment, done: Completions, kind: str
    ) -> Completions:
        """Generate what is missing; every batch is on disk before the next one starts."""
        batch: list[Completion] = []
        notes: list[str] = []

        def write(*_: int) -> None:
            if self.completions_file is not None:
                Completions(batch).append(self.completions_file)
            batch.clear()

        with treatment():
            answers = model.complete(
                prompts,
                max_new_tokens=self.max_new_tokens,
                seed=self.seed,
                batch_size=self.batch_size,
                arm=arm,
                done=done,
                answered=batch.append,
                progress=write,
                notes=notes,
            )
        self.notes += [note for note in (f"{kind}: {note}" for note in notes) if note not in self.notes]
        return answers
