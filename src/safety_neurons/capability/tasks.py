"""Capability by name: `perplexity[:FILE]`, `kl[:PROMPTS]`, `wikitext:FILE`, `gsm8k:FILE`, `mmlu:FOLDER`, `[lm-eval:]TASK`."""

import contextlib
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from safety_neurons.capability.gsm8k import measure_gsm8k, read_sums
from safety_neurons.capability.harness import INSTALL, available, measure_harness
from safety_neurons.capability.language import documents, measure_divergence, measure_perplexity, measure_running_text
from safety_neurons.capability.measured import Measured, Treatment
from safety_neurons.capability.mmlu import measure_mmlu, read_mmlu
from safety_neurons.errors import InputError, UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.model.measures import BatchSize
from safety_neurons.prompts import prompts

OWN = ("perplexity", "kl", "wikitext", "gsm8k", "mmlu")
_NEEDS_FILE = ("wikitext", "gsm8k", "mmlu")
_DEFAULT = {"perplexity": "builtin:general-test", "kl": "builtin:harmless-test"}
HARNESS = "lm-eval"


@dataclass(frozen=True)
class Task:
    """What is measured, and on what.

    Attributes:
        name: as it was asked for.
        kind: one of `OWN`, or `lm-eval`.
        source: a file, a builtin name, or the task's name in the harness.
    """

    name: str
    kind: str
    source: str

    @property
    def compares(self) -> bool:
        """Whether it is a comparison with an untreated model rather than a measurement of one."""
        return self.kind == "kl"


@dataclass(frozen=True)
class Settings:
    """How tasks are measured; the same for every arm.

    Attributes:
        limit: items of each task, the first so many.
        shots: examples shown; what is usual for the task where None.
        max_new_tokens: length of an answer where a task generates.
        batch_size: rows a pass.
        seed: under which answers are kept.
        folder: an organism's own prompts.
        tasks_folder: task files of lm-evaluation-harness.
        offline: fetch nothing.
    """

    limit: int | None = None
    shots: int | None = None
    max_new_tokens: int = 256
    batch_size: BatchSize = "auto"
    seed: int = 0
    folder: pathlib.Path | None = None
    tasks_folder: pathlib.Path | None = None
    offline: bool = False


def task(name: str) -> Task:
    """The task of a name.

    Raises:
        UsageError: it needs a file, or the harness, which is not installed.
    """
    kind, _, source = name.partition(":")
    if kind in OWN and (source or kind in _DEFAULT):
        return Task(name, kind, source or _DEFAULT[kind])
    if kind not in OWN and kind != HARNESS and source:
        raise UsageError(f"capability {name!r} is unknown; expected {', '.join(OWN)} with a file, or {HARNESS}:TASK")
    if not available():
        hint = f"{kind}:FILE for the project's own, or " if kind in _NEEDS_FILE else f"one of {', '.join(OWN)}, or "
        raise UsageError(f"capability {name!r} would be a task of lm-evaluation-harness, which is not installed; expected {hint}{INSTALL}")
    if not (source or kind) or (kind == HARNESS and not source):
        raise UsageError(f"capability {name!r} names no task; expected {HARNESS}:TASK")
    return Task(name, HARNESS, source or kind)


def check(wanted: Task, settings: Settings) -> None:
    """Reads a task's files before anything is loaded.

    Raises:
        InputError: missing, or of another shape.
    """
    if wanted.kind == "gsm8k":
        read_sums(wanted.source)
    elif wanted.kind == "mmlu":
        read_mmlu(wanted.source)
    elif wanted.kind == "wikitext":
        _document_texts(wanted.source)
    elif wanted.kind in _DEFAULT:
        prompts(wanted.source, limit=settings.limit, folder=settings.folder)


def measure(
    wanted: Task,
    model: LanguageModel,
    treatment: Treatment = contextlib.nullcontext,
    settings: Settings | None = None,
    *,
    reference: LanguageModel | None = None,
    done: Mapping[int, str] | None = None,
    answered: Callable[[int, str], None] | None = None,
) -> Measured:
    """One task, measured on the model under a treatment.

    Args:
        wanted: the task.
        model: the model.
        treatment: what it is under.
        settings: how to measure.
        reference: for `kl` the model to compare with; the model itself, untreated, where None.
        done: answers of an interrupted call, for tasks that generate.
        answered: told every new answer, for tasks that generate.
    """
    how = settings or Settings()
    common = {"task": wanted.name, "batch_size": how.batch_size}
    if wanted.kind == "perplexity":
        return measure_perplexity(model, prompts(wanted.source, limit=how.limit, folder=how.folder), treatment, **common)  # type: ignore[arg-type]
    if wanted.kind == "kl":
        asked = prompts(wanted.source, limit=how.limit, folder=how.folder)
        if reference is None:
            return measure_divergence(model, asked, treatment, **common)  # type: ignore[arg-type]
        with treatment():
            return measure_divergence(reference, asked, model, **common)  # type: ignore[arg-type]
    if wanted.kind == "wikitext":
        return measure_running_text(model, _document_texts(wanted.source)[: how.limit], treatment, **common)  # type: ignore[arg-type]
    shots = {} if how.shots is None else {"shots": how.shots}
    if wanted.kind == "mmlu":
        return measure_mmlu(model, wanted.source, treatment, limit=how.limit, **shots, **common)  # type: ignore[arg-type]
    if wanted.kind == "gsm8k":
        kept = {"done": done, "answered": answered, "max_new_tokens": how.max_new_tokens}
        return measure_gsm8k(model, wanted.source, treatment, limit=how.limit, **shots, **kept, **common)  # type: ignore[arg-type]
    options = {"limit": how.limit, "shots": how.shots, "batch_size": how.batch_size, "tasks_folder": how.tasks_folder}
    return measure_harness(model, [wanted.source], treatment, offline=how.offline, **options)[0]  # type: ignore[arg-type]


def _document_texts(source: str) -> list[str]:
    path = pathlib.Path(source).expanduser()
    try:
        found = documents(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {source!r} ({error}); expected running text in UTF-8") from error
    if not found:
        raise InputError(f"{source!r} is empty; expected running text")
    return found
