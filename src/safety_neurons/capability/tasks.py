"""Capability by name: `perplexity[:FILE]`, `kl[:PROMPTS]`, `wikitext:FILE`, `gsm8k:FILE`, `mmlu:FOLDER`,
`[lm-eval:]TASK`.

Tasks of lm-evaluation-harness run on the model in memory, so that interventions act on them; the library is
the optional extra `evaluate`.
"""

import contextlib
import importlib.util
import pathlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safety_neurons.capability.measures import (
    Measurement,
    TaskSettings,
    Treatment,
    documents,
    measure_divergence,
    measure_gsm8k,
    measure_mmlu,
    measure_perplexity,
    measure_running_text,
    read_mmlu,
    read_sums,
)
from safety_neurons.errors import InputError, UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.model.batches import BatchSize
from safety_neurons.prompt_lists import prompts
from safety_neurons.prompt_lists.readers import read_text
from safety_neurons.prompt_lists.tables import has_header, is_json
from safety_neurons.results import Rate, rate
from safety_neurons.results.estimates import from_error

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


def task(name: str) -> Task:
    """The task of a name.

    Raises:
        UsageError: it needs a file, or the harness, which is not installed.
    """
    kind, _, source = name.partition(":")
    if kind in OWN and (source or kind in _DEFAULT):
        return Task(name, kind, source or _DEFAULT[kind])
    if kind not in OWN and kind != HARNESS and source:
        raise UsageError(
            f"capability {name!r} is unknown; expected {', '.join(OWN)} with a file, or {HARNESS}:TASK"
        )
    if not available():
        hint = (
            f"{kind}:FILE for the project's own, or "
            if kind in _NEEDS_FILE
            else f"one of {', '.join(OWN)}, or "
        )
        raise UsageError(
            f"capability {name!r} would be a task of lm-evaluation-harness, which is not installed; "
            f"expected {hint}{INSTALL}"
        )
    if not (source or kind) or (kind == HARNESS and not source):
        raise UsageError(f"capability {name!r} names no task; expected {HARNESS}:TASK")
    return Task(name, HARNESS, source or kind)


def checked(names: Iterable[str], settings: TaskSettings) -> list[Task]:
    """Tasks by name, whose files are read before anything is measured.

    Raises:
        UsageError: as for `task`. InputError: a file that is missing, or of another shape.
    """
    tasks = [task(name) for name in names]
    for one in tasks:
        _check(one, settings)
    return tasks


def _check(wanted: Task, settings: TaskSettings) -> None:
    """Reads a task's files."""
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
    settings: TaskSettings | None = None,
    *,
    reference: LanguageModel | None = None,
    done: Mapping[int, str] | None = None,
    answered: Callable[[int, str], None] | None = None,
) -> Measurement:
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
    how, name = settings or TaskSettings(), wanted.name
    if wanted.kind == "perplexity":
        text = prompts(wanted.source, limit=how.limit, folder=how.folder)
        return measure_perplexity(model, text, treatment, task=name, batch_size=how.batch_size)
    if wanted.kind == "kl":
        requests = prompts(wanted.source, limit=how.limit, folder=how.folder)
        if reference is None:
            return measure_divergence(model, requests, treatment, task=name, batch_size=how.batch_size)
        with treatment():
            return measure_divergence(reference, requests, model, task=name, batch_size=how.batch_size)
    if wanted.kind == "wikitext":
        texts = _document_texts(wanted.source)[: how.limit]
        return measure_running_text(model, texts, treatment, task=name, batch_size=how.batch_size)
    if wanted.kind == "mmlu":
        return measure_mmlu(model, wanted.source, treatment, task=name, settings=how)
    if wanted.kind == "gsm8k":
        return measure_gsm8k(
            model, wanted.source, treatment, task=name, settings=how, done=done, answered=answered
        )
    return measure_harness(model, [wanted.source], treatment, settings=how)[0]


_RECORDS = (".json", ".jsonl", ".csv", ".tsv", ".parquet")


def _document_texts(source: str) -> list[str]:
    path = pathlib.Path(source).expanduser()
    named = any(suffix.lower() in _RECORDS for suffix in path.suffixes)
    text = "" if named else read_text(path)[0]
    if named or is_json(text) or has_header(text):
        raise InputError(
            f"{source}: a file of records; expected running text: name a .txt file, or perplexity:{source} "
            "for a text a record"
        )
    return documents(text)


INSTALL = "pip install 'safety-neurons[evaluate]'"
_OFFLINE = (
    ("huggingface_hub.constants", "HF_HUB_OFFLINE"),
    ("datasets.config", "HF_HUB_OFFLINE"),
    ("datasets.config", "HF_DATASETS_OFFLINE"),
    ("evaluate.config", "HF_EVALUATE_OFFLINE"),
)
_FIRST = ("exact_match", "acc", "word_perplexity", "f1", "bleu")


def available() -> bool:
    """Whether lm-evaluation-harness is installed."""
    return importlib.util.find_spec("lm_eval") is not None


@contextlib.contextmanager
def without_hub() -> Iterator[None]:
    """The hub's libraries, as far as they are loaded, open no connection for a block."""
    with contextlib.ExitStack() as stack:
        for module_name, name in _OFFLINE:
            module = sys.modules.get(module_name)
            if module is not None and hasattr(module, name):
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, True)
        yield


def harness_model(model: LanguageModel, *, batch_size: BatchSize = "auto") -> Any:
    """The model in memory as the harness wants it (`lm_eval.models.huggingface.HFLM`).

    Hooks on the model act.

    Raises:
        UsageError: the harness is not installed.
    """
    if not available():
        raise UsageError(
            f"tasks of lm-evaluation-harness need the package lm_eval, which is not installed; {INSTALL}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.models.huggingface import HFLM

        return HFLM(
            pretrained=model.model,
            tokenizer=model.tokenizer,
            batch_size=8 if batch_size == "auto" else batch_size,
        )


def measure_harness(
    model: LanguageModel,
    tasks: Sequence[str],
    treatment: Treatment = contextlib.nullcontext,
    settings: TaskSettings | None = None,
    **options: Any,
) -> list[Measurement]:
    """Standard tasks by their names in the harness, on the model as it is in memory under the treatment.

    Args:
        model: the model.
        tasks: names such as `arc_challenge`, or of a group such as `mmlu`.
        treatment: what the model is under.
        settings: how to measure; offline, data have to be local or in the hub's cache.
        **options: fields of `TaskSettings` to change.

    Raises:
        UsageError: the harness is not installed.
        InputError: it does not know a task, or cannot get its data.
    """
    how = TaskSettings.of(settings, **options)
    runner = harness_model(model, batch_size=how.batch_size)
    importlib.import_module("datasets.config")  # Loaded before it is told to stay offline.
    try:
        with (
            warnings.catch_warnings(),
            without_hub() if how.offline else contextlib.nullcontext(),
            model.running(),
            treatment(),
        ):
            warnings.simplefilter("ignore")
            from lm_eval import simple_evaluate
            from lm_eval.tasks import TaskManager

            manager = TaskManager(include_path=None if how.tasks_folder is None else str(how.tasks_folder))
            results = simple_evaluate(
                model=runner,
                tasks=list(tasks),
                num_fewshot=how.shots,
                limit=how.limit,
                task_manager=manager,
                log_samples=True,
                bootstrap_iters=0,
            )
    except (KeyError, ValueError, OSError, ConnectionError) as error:
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise InputError(
            f"lm-evaluation-harness cannot run {', '.join(tasks)} ({detail}); expected names it knows "
            "and data it can reach"
        ) from error
    wanted = [name for name in results["results"] if name in tasks] or list(results["results"])
    return [_measured(name, results) for name in wanted]


def _measured(name: str, results: Mapping[str, Any]) -> Measurement:
    """The first metric of a task with its interval; the others under `details`."""
    numbers = {
        key: value for key, value in results["results"][name].items() if "," in key and "_stderr" not in key
    }
    numbers = {key: float(value) for key, value in numbers.items() if isinstance(value, int | float)}
    if not numbers:
        raise InputError(f"lm-evaluation-harness gives no number for {name!r}; expected a task with a metric")
    first = min(
        numbers,
        key=lambda key: next(
            (place for place, part in enumerate(_FIRST) if key.startswith(part)), len(_FIRST)
        ),
    )
    metric, _, selected = first.partition(",")
    better = bool(((results.get("higher_is_better") or {}).get(name) or {}).get(metric, True))
    leaves = (
        [name] if name in results.get("samples", {}) else (results.get("group_subtasks") or {}).get(name, [])
    )
    samples = [
        (f"{leaf} {sample['doc_id']}", sample[metric])
        for leaf in leaves
        for sample in results.get("samples", {}).get(leaf, [])
        if sample.get("filter", "none") in (selected, "none")
        and isinstance(sample.get(metric), int | float | bool)
    ]
    outcomes = tuple(float(value) for _, value in samples)
    exact = rate(outcomes)
    agrees = exact.value is not None and abs(exact.value - numbers[first]) < 1e-9
    shown = (
        exact
        if agrees
        else _by_error(
            numbers[first], results["results"][name].get(f"{metric}_stderr,{selected}"), results, name
        )
    )
    ids = tuple(identifier for identifier, _ in samples) if agrees else ()
    label = metric if selected == "none" else f"{metric} ({selected})"
    details = {
        "engine": "lm-evaluation-harness",
        "version": str(results.get("lm_eval_version", "")),
        **numbers,
    }
    return Measurement(f"lm-eval:{name}", label, shown, better, ids, outcomes if agrees else (), (), details)


def _by_error(value: float, error: Any, results: Mapping[str, Any], name: str) -> Rate:
    """An interval from the harness's own standard error, where single items do not give the value."""
    counts = (results.get("n-samples") or {}).get(name) or {}
    n = int(counts.get("effective", 0))
    return (
        from_error(value, float(error), n) if isinstance(error, int | float) else Rate(value, None, None, n)
    )
