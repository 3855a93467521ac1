"""Replications: numbers that were published, each beside the number of the same quantity that runs measured.

A recipe lists what was published under `published`: what it is, where it stands, and where in the result of
one of its steps the measured number is found. A number that no step can give has none, and says why.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from safety_neurons.errors import InputError
from safety_neurons.results.records import Estimate, EstimateRecord

PERCENT = "%"
"""The unit of shares, which results hold as numbers from 0 to 1."""
NOT_RUN = "not run here"
NOT_GIVEN = "no verb gives it"
NOT_FOUND, NOT_OF_IT, OURS = "not found", "not published", "not in the paper"
"""A number that the sources at hand do not give, that of a model nothing was published of, one of our own."""
Form = Mapping[str, Any]
"""Where a measured number is, or what it is made of: see `number_of`."""
_FORMS = ("step", "mean", "one minus", "restored")
_KEYS = frozenset({"what", "unit", "source", "note", "values", "measured"})


class PublishedRecord(TypedDict):
    """A published number and the measured one, both in the unit that was published in."""

    what: str
    of: str
    """The model, or whatever tells the rows of one quantity apart."""
    unit: str
    source: str
    note: str
    published: float | None
    """None where no number is known."""
    measured: EstimateRecord | None
    """None where nothing was measured."""
    unpublished: NotRequired[str]
    """Why no number is known: not found, not of this model, or not in the paper at all."""
    difference: float | None
    """Measured minus published."""
    why: NotRequired[str]
    """What keeps the measured number from being there."""


class StepOutcomeRecord(TypedDict):
    """One step of a recipe."""

    name: str
    verb: str
    why: str | None
    """What kept it from being run; None of one that was."""


class ReplicationRecord(TypedDict):
    """run, of a recipe that lists what was published."""

    about: str
    of: str | None
    """What was run, among what tells rows apart."""
    trial: bool
    """Whether numbers are of a trial, on next to no prompts."""
    steps: list[StepOutcomeRecord]
    published: list[PublishedRecord]


class _Missing(Exception):
    """A number that is not there, and why."""


@dataclasses.dataclass(frozen=True)
class Ran:
    """What was run of a recipe.

    Attributes:
        results: by step its result, of those that were run.
        verbs: by step its verb, of all of them.
        left_out: by step that was not run what kept it.
        of: the model, or whatever tells the rows of one quantity apart; None where that was not said.
        trial: whether it was a trial.
    """

    results: Mapping[str, Mapping[str, Any]]
    verbs: Mapping[str, str]
    left_out: Mapping[str, str]
    of: str | None = None
    trial: bool = False


@dataclasses.dataclass(frozen=True)
class Quantity:
    """One published quantity.

    Attributes:
        what: in words.
        unit: `%`, or a word; empty for none.
        source: paper, table, row.
        values: by model (or whatever tells rows apart) the published number; None where it is not known.
        measured: where the measured number is; None where no step gives it.
        note: what differs between the two, or why one is missing.
    """

    what: str
    unit: str
    source: str
    values: Mapping[str, float | None]
    measured: Form | None
    note: str = ""

    def rows(self, ran: Ran) -> Iterator[PublishedRecord]:
        """A row for every published number, the measured one beside that of what was run.

        What was run and nothing was published of has a row of its own.
        """
        names = dict.fromkeys(self.values)
        if ran.of is not None:
            names.setdefault(ran.of)
        for name in names or [""]:
            published = self.values.get(name)
            row: PublishedRecord = {
                "what": self.what,
                "of": name,
                "unit": self.unit,
                "source": self.source,
                "note": self.note,
                "published": published,
                "measured": None,
                "difference": None,
            }
            if published is None:
                of_others = (
                    any(value is not None for value in self.values.values()) and name not in self.values
                )
                row["unpublished"] = OURS if self.source == OURS else NOT_OF_IT if of_others else NOT_FOUND
            try:
                if ran.of is not None and name != ran.of:
                    raise _Missing(NOT_RUN)
                found = self._scaled(self._measured(ran))
                row["measured"] = found.to_json()
                if None not in (found.value, published) and not ran.trial:
                    row["difference"] = found.value - published  # type: ignore[operator]
            except _Missing as missing:
                row["why"] = str(missing)
            yield row

    def _measured(self, ran: Ran) -> Estimate:
        if self.measured is None:
            raise _Missing(NOT_GIVEN)
        return number_of(self.measured, ran)

    def _scaled(self, found: Estimate) -> Estimate:
        return _each(found, lambda value: 100 * value) if self.unit == PERCENT else found


def replication(about: str, quantities: Sequence[Quantity], ran: Ran) -> ReplicationRecord:
    """Every published number beside the measured one."""
    steps: list[StepOutcomeRecord] = [
        {
            "name": name,
            "verb": verb,
            "why": None if name in ran.results else ran.left_out.get(name, NOT_RUN),
        }
        for name, verb in ran.verbs.items()
    ]
    rows = [row for quantity in quantities for row in quantity.rows(ran)]
    return {"about": about, "of": ran.of, "trial": ran.trial, "steps": steps, "published": rows}


def number_of(form: Form, ran: Ran) -> Estimate:
    """A measured number.

    Args:
        form: `{"step": NAME, "at": KEYS}` for one in the result of a step; `{"mean": FORMS}`; `{"one minus":
            FORM}`; `{"restored": [FROM, WITH, TO]}` for (with − from) ÷ (to − from). The last two of several
            have no interval, since what is paired between runs is not known here.
        ran: what was run.
    """
    if "step" in form:
        return _in_step(form["step"], form["at"], ran)
    if "one minus" in form:
        return _each(number_of(form["one minus"], ran), lambda value: 1 - value)
    parts = [number_of(part, ran) for part in form.get("mean") or form["restored"]]
    values = [part.value for part in parts if part.value is not None]
    n, unscored = min(part.n for part in parts), sum(part.unscored for part in parts)
    if len(values) < len(parts):
        return Estimate(None, None, None, n, unscored, "a number that it is made of is undefined")
    if "mean" in form:
        value = sum(values) / len(values)
    else:
        before, treated, after = values
        if before == after:
            return Estimate(None, None, None, n, unscored, "both models score the same")
        value = (treated - before) / (after - before)
    return Estimate(value, None, None, n, unscored, f"made of {len(values)} numbers: no interval")


def _in_step(step: str, at: Sequence[Any], ran: Ran) -> Estimate:
    if step not in ran.results:
        why = ran.left_out.get(step)
        raise _Missing(f"{NOT_RUN}: {step} {why}" if why else NOT_RUN)
    found: Any = ran.results[step]
    for key in at:
        found = _inside(found, key)
        if found is None:
            raise _Missing(f"the result of step {step} has no {' / '.join(map(_word, at))}")
    if isinstance(found, Mapping):
        numbers = [found.get(name) for name in ("value", "low", "high")]
        if "value" in found and all(number is None or _is_number(number) for number in numbers):
            value, low, high = numbers
            n, unscored = (int(found.get(name) or 0) for name in ("n", "unscored"))
            return Estimate(value, low, high, n, unscored, found.get("why"))
    elif _is_number(found):
        return Estimate(float(found), None, None, 0)
    raise _Missing(f"{' / '.join(map(_word, at))} of step {step} is no number")


def _inside(value: Any, key: Any) -> Any:
    """The entry of a key, a place, or the first that has the fields of an object; None where there is
    none.
    """
    if isinstance(key, Mapping):
        entries = list(value.values()) if isinstance(value, Mapping) else value
        fits = (
            entry
            for entry in (entries if isinstance(entries, list) else ())
            if isinstance(entry, Mapping) and all(entry.get(name) == wanted for name, wanted in key.items())
        )
        return next(fits, None)
    if isinstance(value, list):
        return value[key] if isinstance(key, int) and -len(value) <= key < len(value) else None
    return value.get(key) if isinstance(value, Mapping) else None


def _word(key: Any) -> str:
    if isinstance(key, Mapping):
        return ", ".join(f"{name}={wanted}" for name, wanted in key.items())
    return str(key)


def _each(found: Estimate, change: Callable[[float], float]) -> Estimate:
    """A number and its ends changed by the same line, the lower end first."""
    ends = [change(end) if end is not None else None for end in (found.low, found.high)]
    if None not in ends and ends[0] > ends[1]:  # type: ignore[operator]
        ends.reverse()
    value = None if found.value is None else change(found.value)
    return dataclasses.replace(found, value=value, low=ends[0], high=ends[1])


def quantities_of(record: Any, where: str, steps: Sequence[str]) -> list[Quantity]:
    """The list `published` of a recipe.

    Args:
        record: JSON values.
        where: the recipe, for messages.
        steps: names of its steps.

    Raises:
        InputError: an entry of another shape, or one that names a step which does not exist.
    """
    if not isinstance(record, list):
        raise InputError(
            f"{where} is not a recipe: `published` is a {type(record).__name__}, expected a list of objects "
            "with `what`, `source`, `values` and `measured`"
        )
    return [
        _quantity(entry, f"{where} is not a recipe: published {n}", steps)
        for n, entry in enumerate(record, 1)
    ]


def _quantity(entry: Any, where: str, steps: Sequence[str]) -> Quantity:
    if not isinstance(entry, dict) or not {"what", "source", "values", "measured"} <= entry.keys() <= _KEYS:
        raise InputError(
            f"{where} has other keys than what, source, values, measured, unit and note: correct it"
        )
    words = {name: entry.get(name, "") for name in ("what", "source", "unit", "note")}
    values, measured = entry["values"], entry["measured"]
    if not all(isinstance(word, str) for word in words.values()) or not isinstance(values, dict):
        raise InputError(f"{where}: expected texts, and `values` by name: correct it")
    if not all(value is None or _is_number(value) for value in values.values()):
        raise InputError(f"{where}: expected every value to be a number, or null where none is known")
    if measured is None and not words["note"]:
        raise InputError(
            f"{where} says nothing of how it is measured, expected `measured`, or a `note` on why not"
        )
    if measured is not None:
        _check(measured, where, steps)
    numbers = {name: None if value is None else float(value) for name, value in values.items()}
    return Quantity(words["what"], words["unit"], words["source"], numbers, measured, words["note"])


def _check(form: Any, where: str, steps: Sequence[str]) -> None:
    """Refuses a form that `number_of` does not know."""
    kind = next((name for name in _FORMS if isinstance(form, dict) and name in form), None)
    parts = form[kind] if kind else None
    if kind == "one minus" and len(form) == 1:
        return _check(parts, where, steps)
    if isinstance(parts, list) and len(form) == 1 and (len(parts) == 3 if kind == "restored" else parts):
        for part in parts:
            _check(part, where, steps)
        return None
    at = form.get("at") if kind == "step" and form.keys() == {"step", "at"} else None
    if not isinstance(at, list) or not at or not all(isinstance(key, str | int | dict) for key in at):
        raise InputError(
            f"{where}: `measured` is {str(form)[:60]!r}, expected step and at, mean, one minus, or restored "
            "of three"
        )
    if parts not in steps:
        raise InputError(f"{where} names step {str(parts)[:40]!r}, expected one of {', '.join(steps)}")
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
