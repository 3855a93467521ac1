"""Answering: who writes completions, and the file they are kept in, from which a killed study goes on."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from safety_neurons.model import LanguageModel
from safety_neurons.model.batches import BatchSize
from safety_neurons.model.chat_server import Endpoint
from safety_neurons.prompts import Prompt, Prompts
from safety_neurons.results import Completion, Completions
from safety_neurons.suites import ADAPTIVE, STATIC

Treatment = Callable[[], contextlib.AbstractContextManager[Any]]
Progress = Callable[[str], None]
UNTREATED = "untreated"
Key = tuple[str, str, str, int]
_KEPT = ("goal", "behavior_id", "method", "label", "target", "opening", "context", "kind", "source_model")
"""What of a prompt's own notes goes with its completion: judges and tables read it."""


@dataclasses.dataclass(frozen=True)
class Writing:
    """How completions are written.

    Attributes:
        max_new_tokens: length of a completion.
        samples: completions of every prompt, each with a seed of its own.
        temperature: of sampling; 0 is greedy.
        top_p: of sampling.
        seed: the first seed.
        batch_size: prompts a pass, or requests at a time.
    """

    max_new_tokens: int = 128
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: BatchSize = "auto"

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of every sample."""
        return tuple(range(self.seed, self.seed + self.samples))


class Answers:
    """Completions of a study, on disk batch by batch; what an interrupted run wrote is not written again."""

    def __init__(self, file: pathlib.Path | None = None, progress: Progress | None = None) -> None:
        """Takes up what the file holds.

        Args:
            file: where completions are kept; nowhere where None.
            progress: told what is being written.
        """
        self.file, self.progress = file, progress
        self.notes: list[str] = []
        self.new = 0
        """Completions written by this run."""
        self._known: dict[Key, dict[str, Completion]] = {}
        if file is not None and file.exists() and file.stat().st_size:
            for one in Completions.load(file):
                self._known.setdefault(key_of(one), {})[one.prompt_id] = one

    def write(
        self,
        model: LanguageModel | Endpoint,
        suite: str,
        prompts: Prompts,
        how: Writing,
        arm: str,
        treatment: Treatment = contextlib.nullcontext,
    ) -> list[Completions]:
        """One list of completions for every seed, in the order of the prompts."""
        return [self._seed(model, suite, prompts, how, seed, arm, treatment) for seed in how.seeds]

    def keep(self, *completions: Completion) -> None:
        """Add completions to the file at once."""
        for one in completions:
            self._known.setdefault(key_of(one), {})[one.prompt_id] = one
        self.new += len(completions)
        if self.file is not None and completions:
            Completions(completions).append(self.file)

    def known(self, arm: str, suite: str, seed: int, kind: str = "") -> dict[str, Completion]:
        """By prompt what is written already."""
        return dict(self._known.get((arm, suite, kind, seed), {}))

    def judged(self, completions: Completions) -> None:
        """Put completions with their verdicts in the place of those without; others of the same suite and seed go."""
        for key in dict.fromkeys(map(key_of, completions)):
            self._known[key] = {one.prompt_id: one for one in completions if key_of(one) == key}

    def finish(self) -> Completions:
        """Write everything once more, in order and with its verdicts."""
        everything = Completions(one for part in self._known.values() for one in part.values())
        if self.file is not None:
            everything.save(self.file)
        return everything

    def _seed(
        self, model: LanguageModel | Endpoint, suite: str, prompts: Prompts, how: Writing, seed: int, arm: str, treatment: Treatment
    ) -> Completions:
        if self.progress is not None:
            self.progress(f"{arm}, {suite}" + (f", seed {seed}" if how.samples > 1 else ""))
        by_id = {prompt.id: prompt for prompt in prompts}
        kind = str(prompts[0].meta.get("kind", "")) if len(prompts) else ""
        earlier = self.known(arm, suite, seed, kind)
        done = Completions(one for one in earlier.values() if one.prompt_id in by_id and one.prompt == by_id[one.prompt_id].text)
        notes: list[str] = []
        batch: list[Completion] = []

        def answered(completion: Completion) -> None:
            batch.append(marked(completion, suite, by_id[completion.prompt_id]))

        def write(*_: int) -> None:
            self.keep(*batch)
            batch.clear()

        with treatment():
            model.complete(
                prompts,
                max_new_tokens=how.max_new_tokens,
                sample=how.temperature > 0,
                temperature=how.temperature or 1.0,
                top_p=how.top_p,
                seed=seed,
                batch_size=how.batch_size,
                arm=arm,
                done=done,
                answered=answered,
                progress=write,
                notes=notes,
            )
        write()
        self.notes += [note for note in (f"{suite}: {note}" for note in notes) if note not in self.notes]
        written = self.known(arm, suite, seed, kind)
        return Completions(written[prompt.id] for prompt in prompts)


def key_of(completion: Completion) -> Key:
    """Where a completion belongs: arm, suite, kind of request, seed."""
    about = completion.meta
    return completion.arm, str(about.get("suite", "")), str(about.get("kind", "")), completion.seed


def marked(completion: Completion, suite: str, prompt: Prompt) -> Completion:
    """The completion with what judges and tables have to know of its prompt."""
    about: dict[str, Any] = {key: prompt.meta[key] for key in _KEPT if prompt.meta.get(key) is not None}
    if about.get("label") == ADAPTIVE and prompt.meta.get("made_on", completion.arm) != completion.arm:
        about["label"] = STATIC  # Optimised on the model without the treatment: on the treated one it is transferred.
    about |= {
        key: value
        for key, value in (("category", prompt.category), ("language", prompt.language), ("group", prompt.group))
        if value is not None
    }
    return dataclasses.replace(completion, meta={**about, **completion.meta, "suite": suite})


def unique(prompts: Prompts) -> Prompts:
    """The prompts, with a number behind an id that occurred before: an id stands for one prompt."""
    seen: dict[str, int] = {}
    kept = []
    for prompt in prompts:
        seen[prompt.id] = seen.get(prompt.id, 0) + 1
        new = prompt.id if seen[prompt.id] == 1 else f"{prompt.id}/{seen[prompt.id]}"
        kept.append(prompt if new == prompt.id else dataclasses.replace(prompt, id=new))
    return Prompts(kept, prompts.name, prompts.notes)


def told(meta: Mapping[str, Any]) -> dict[str, str]:
    """Category, language and attack of a completion, where it has them."""
    attack = meta.get("method")
    if attack and meta.get("label") in (ADAPTIVE, STATIC):
        attack = f"{attack}, {meta['label']}"
    found = {"category": meta.get("category"), "language": meta.get("language"), "attack": attack}
    return {name: str(value) for name, value in found.items() if value not in (None, "")}
