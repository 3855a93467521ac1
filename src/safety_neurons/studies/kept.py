"""Kept: what answers in a folder were written by, so that a study never goes on with another model's answers."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from safety_neurons.capability import Settings, Task
from safety_neurons.errors import RunError
from safety_neurons.guard import Guard
from safety_neurons.model import LanguageModel
from safety_neurons.model.endpoint import Endpoint
from safety_neurons.neurons import NeuronSet
from safety_neurons.results import plain, read_json, write_json
from safety_neurons.studies.answering import Writing

FILE = "answered_by.json"
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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
    file = folder / FILE
    before = read_json(file) if file.is_file() else {}
    known: dict[str, Any] = dict(before) if isinstance(before, Mapping) else {}
    other = next((name for name, value in facts.items() if value != known.get(name, value)), None)
    if other is not None:
        raise RunError(f"{str(folder)!r} holds answers of another {other}; expected the same one, or another folder: choose one with out")
    write_json(file, {**known, **facts})


def _of(value: Any) -> Any:
    if isinstance(value, LanguageModel):
        return {"name": value.name, "weights": weights_hash(value), "system": value.template.system}
    if isinstance(value, Endpoint):
        return {"name": value.name, "system": value.system}
    if isinstance(value, NeuronSet):
        members = "".join(f"{key}:{','.join(map(str, value[key].tolist()))};" for key in value.keys())  # noqa: SIM118
        return hashlib.sha256(members.encode()).hexdigest()
    if isinstance(value, Guard):
        return value.sha256
    return "given" if callable(value) else str(value)


def weights_hash(model: LanguageModel) -> str:
    """Hash of the sums of every parameter's bits: exact in any order, and another one after tuning."""
    digest = hashlib.sha256()
    for name, parameter in model.model.named_parameters():
        held = parameter.detach()
        bits = 0
        if not held.is_meta and held.numel():
            bits = int(held.view(_INTEGERS[held.element_size()]).sum(dtype=torch.int64))
        digest.update(f"{name}:{tuple(held.shape)}:{bits};".encode())
    return digest.hexdigest()
