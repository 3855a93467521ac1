"""Requests: suites by name as lists of harmful and of harmless prompts, attacks put around the harmful ones."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from safety_neurons.errors import UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.model.chat_server import Endpoint
from safety_neurons.prompts import Prompt, Prompts, as_prompts, prompts
from safety_neurons.results.files import PathLike
from safety_neurons.studies.answering import UNTREATED, unique
from safety_neurons.suites import ADAPTIVE, STATIC, Suite, attack, suite

HARMLESS = "builtin:harmless-test"
_BUILTIN = "builtin:"


@dataclasses.dataclass(frozen=True)
class Requests:
    """Prompts of one kind of one suite.

    Attributes:
        suite: name of the suite.
        kind: `harmful` or `harmless`.
        prompts: what is asked.
    """

    suite: str
    kind: str
    prompts: Prompts


@dataclasses.dataclass(frozen=True)
class Asked:
    """All requests of an evaluation, and what had to be said of them."""

    requests: tuple[Requests, ...]
    notes: tuple[str, ...]


def requests_of(
    sources: Any,
    harmless: Any = HARMLESS,
    attacks: Sequence[str] = ("direct",),
    *,
    data: PathLike | None = None,
    column: str | None = None,
    offline: bool = False,
    limit: int | None = None,
    model: LanguageModel | Endpoint | None = None,
) -> Asked:
    """The requests of suites.

    Args:
        sources: names, files, suites, or harmful prompts in whatever form `as_prompts` takes; a list of records is one suite.
        harmless: what over-refusal is measured on where no suite has harmless requests; None for nothing.
        attacks: put around harmful requests; `direct` is none.
        data: folder of the suites' files.
        column: column of the prompts in a file of the user's own.
        offline: open no socket.
        limit: requests of each suite.
        model: what is asked. Of one in memory `builtin:` names mean its organism's own prompts first, and `gcg` is made on it as it is;
            other attacks are adaptive only where they were made on it.

    Raises:
        UsageError: no suite, or one that is named twice.
        InputError: a suite that cannot be read.
    """
    sources = _one_by_one(sources)
    if not sources:
        raise UsageError("no suite was named; expected at least one, such as builtin:harmful-test")
    in_memory, name = (model if isinstance(model, LanguageModel) else None), (None if model is None else model.name)
    own = None if in_memory is None else in_memory.prompt_folder
    suites = [_suite(source, None, own, data, column, offline, limit) for source in sources]
    notes = []
    if harmless is not None and not any(len(one.harmless) for one in suites):
        suites.append(_suite(harmless, "harmless", own, data, column, offline, limit))
        notes.append(f"no suite has harmless requests, so over-refusal is measured on {suites[-1].name}")
    names = [one.name for one in suites]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise UsageError(f"suite {double!r} is named twice; expected every suite once")
    found = []
    for one in suites:
        notes += [f"{one.name}: {note}" for note in one.notes]
        if len(one.harmful):
            found.append(Requests(one.name, "harmful", unique(_labelled(_attacked(one.harmful, attacks, in_memory), name))))
        if len(one.harmless):
            found.append(Requests(one.name, "harmless", unique(one.harmless)))
    return Asked(tuple(found), tuple(notes))


def _one_by_one(sources: Any) -> Sequence[Any]:
    """The suites in a list; rows of one list, a table or a single name are one suite."""
    rows = isinstance(sources, list | tuple) and sources and all(isinstance(one, Mapping | Prompt) for one in sources)
    return sources if isinstance(sources, list | tuple) and not rows else [sources]


def _suite(
    source: Any,
    kind: str | None,
    own: pathlib.Path | None,
    data: PathLike | None,
    column: str | None,
    offline: bool,
    limit: int | None,
) -> Suite:
    if isinstance(source, Suite):
        return source
    if isinstance(source, str) and source.startswith(_BUILTIN):
        about = "harmless" if source.removeprefix(_BUILTIN).startswith(("harmless", "general")) else "harmful"
        return _stamped(prompts(source, folder=own, limit=limit), source, kind or about)
    if not isinstance(source, str | os.PathLike):
        found, kind = as_prompts(source), kind or "harmful"
        name = found.name if isinstance(source, Prompts) else f"{kind} {found.name}"
        return _stamped(found[:limit] if limit else found, name, kind)
    folder = None if data is None else str(data)
    return suite(source, folder=folder, offline=offline, limit=limit, column=column, kind=kind)


def _stamped(found: Prompts, name: str, kind: str) -> Suite:
    """Prompts as a suite, with the entries that attacks, judges and tables read."""

    def about(prompt: Any) -> dict[str, Any]:
        return {"goal": prompt.text, "behavior_id": prompt.id, "method": "direct", **prompt.meta, "suite": name, "kind": kind}

    return Suite(name, Prompts([dataclasses.replace(one, meta=about(one)) for one in found], name, found.notes), kind, name)


def _attacked(harmful: Prompts, attacks: Sequence[str], model: LanguageModel | None) -> Prompts:
    """Every request under every attack, which tells the ids apart; `gcg` is made on the model in hand."""
    if tuple(attacks) == ("direct",):
        return harmful
    if "gcg" in attacks and model is None:
        raise UsageError("attack gcg is made on a model: expected one in memory (--model); an endpoint gives no gradients")
    kept: list[Prompt] = []
    for method in dict.fromkeys(attacks):
        made = attack(harmful, method, model=model if method == "gcg" else None)
        kept += [dataclasses.replace(one, meta={**one.meta, "made_on": UNTREATED}) for one in made] if method == "gcg" else made
    return Prompts(kept, harmful.name, harmful.notes)


def _labelled(found: Prompts, model: str | None) -> Prompts:
    """Attack prompts with how their results are to be read: what was optimised on another model is transferred to this one."""
    kept = []
    for one in found:
        optimised = one.meta.get("adaptive") is True or one.meta.get("label") == ADAPTIVE
        label = ADAPTIVE if optimised and one.meta.get("source_model") == model else STATIC
        says = isinstance(one.meta.get("adaptive"), bool) or one.meta.get("label") in (ADAPTIVE, STATIC)
        kept.append(dataclasses.replace(one, meta={**one.meta, "label": label}) if says else one)
    return Prompts(kept, found.name, found.notes)
