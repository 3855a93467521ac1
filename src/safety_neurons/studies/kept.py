"""Kept: what answers in a folder were written by, so that a study never goes on with another model's answers."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from safety_neurons.capability import Settings, Task
from safety_neurons.errors import RunError
from safety_neurons.guard import Guard
from safety_neurons.model import LanguageModel
from safety_neurons.model.chat_server import Endpoint
from safety_neurons.model.identity import identity, json_sha256
from safety_neurons.neurons import NeuronSet, Scores
from safety_neurons.prompts import Prompts
from safety_neurons.results import plain, read_json, write_json
from safety_neurons.results.run import ANSWERED_BY
from safety_neurons.studies.answering import Writing

_ASIDE = ("batch_size", "file", "progress", "seeds", "arms")
"""Fields that do not change what is written, or by which it is kept apart."""


def facts_of(
    model: LanguageModel | Endpoint,
    treatment: Mapping[str, Any],
    how: Writing,
    tasks: Sequence[Task],
    settings: Settings,
) -> dict[str, Any]:
    """What answers depend on beside the prompts, as JSON values.

    Args:
        model: what answers; of one in memory the weights count too.
        treatment: by name the neurons, the donor, or words.
        how: how completions are written.
        tasks: of capability.
        settings: how they are measured.
    """
    treated = {name: _of(value) for name, value in treatment.items() if value is not None}
    writing = {name: value for name, value in dataclasses.asdict(how).items() if name not in ("batch_size", "samples", "seed")}
    measuring = {name: value for name, value in dataclasses.asdict(settings).items() if name not in ("batch_size", "folder", "offline")}
    facts = {"model": _of(model), "treatment": treated, "writing": writing}
    return dict(plain({**facts, **{f"capability {task.name}": measuring for task in tasks}}))


def hold(folder: pathlib.Path | None, facts: Mapping[str, Any]) -> None:
    """Writes down what the folder's answers depend on; nothing where no folder is given.

    Raises:
        RunError: the folder holds answers that depend on something else.
    """
    if folder is None:
        return
    file = folder / ANSWERED_BY
    before = read_json(file) if file.is_file() else {}
    known: dict[str, Any] = dict(before) if isinstance(before, Mapping) else {}
    other = next((name for name, value in facts.items() if value != known.get(name, value)), None)
    if other is not None:
        told = f"{str(folder)!r} holds answers made with different {other}"
        raise RunError(f"{told}: expected the same, or another folder; choose one with out")
    write_json(file, {**known, **facts})


def hold_answers(file: pathlib.Path | None, **facts: Any) -> None:
    """`hold` for a file of answers, or of results by seed: models, sets, scores and prompts count by their content, others as they are.

    Raises:
        RunError: what is kept in the file's folder depends on something else.
    """
    if file is not None:
        hold(file.parent, {f"{name} of {file.name}": plain(_of(value)) for name, value in facts.items()})


def _of(value: Any) -> Any:
    if isinstance(value, LanguageModel):
        return identity(value)
    if isinstance(value, Endpoint):
        return {"name": value.name, "system": value.system}
    if isinstance(value, NeuronSet):
        return json_sha256([[key, value[key].tolist()] for key in value.keys()])  # noqa: SIM118 - not a mapping
    if isinstance(value, Scores):
        return json_sha256([[key, vector.tobytes().hex()] for key, vector in value.items()])
    if isinstance(value, Guard | Prompts):
        return value.sha256
    if isinstance(value, Mapping):
        return {str(name): _of(item) for name, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
        return {name: _of(item) for name, item in fields.items() if name not in _ASIDE}
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_of(item) for item in value]
    return "given" if callable(value) else str(value)
