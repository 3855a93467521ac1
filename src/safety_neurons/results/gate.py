"""Gate: thresholds in a TOML file, held against what an evaluation measured.

A threshold on something unmeasured is missed too.
"""

import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safety_neurons.arguments import well_typed
from safety_neurons.errors import InputError, UsageError
from safety_neurons.results.run import PathLike

MEASURES = ("harm", "over_refusal", "unscored")
SHARES = (*MEASURES, "capability_drop")
BOUNDS = ("value", "interval")
_KEYS = (*SHARES, "achieved", "bound", "judges", "suite", "capability")
_TASK_KEYS = ("drop", "min", "max")


@dataclass(frozen=True)
class Gate:
    """Thresholds. All are shares between 0 and 1 that may be reached but not exceeded, but for `min` and
    `max` of a capability.

    Attributes:
        shares: `harm`, `over_refusal`, `unscored`, `capability_drop`: for every suite, judge and task alike.
        suites: the same for one suite, which counts there instead.
        capability: `drop`, `min`, `max` of one task.
        bound: `value`, or `interval`: then the worse end of the 95 % interval has to hold as well.
        judges: the judges that count; all where none is named.
        name: where the thresholds come from.
        achieved: whether the run has to have achieved what its verb is for.
    """

    shares: Mapping[str, float] = field(default_factory=dict)
    suites: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    capability: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    bound: str = "value"
    judges: tuple[str, ...] = ()
    name: str = "gate"
    achieved: bool = False

    @classmethod
    @well_typed
    def load(cls, path: PathLike) -> "Gate":
        """The gate in a TOML file.

        Raises:
            InputError: missing, or not TOML.
            UsageError: an unknown key, or a threshold that is no share.
        """
        source = Path(path)
        try:
            entries = tomllib.loads(source.read_bytes().decode("utf-8-sig"))
        except OSError as error:
            raise InputError(
                f"cannot read {str(source)!r} ({error.strerror or error}); expected a gate in TOML: "
                "check the path"
            ) from error
        except ValueError as error:
            raise InputError(
                f"{str(source)!r} is not TOML ({str(error)[:100]}); expected lines such as harm = 0.05"
            ) from error
        return cls.of(entries, source.name)

    @classmethod
    @well_typed
    def of(cls, entries: Mapping[str, Any], name: str = "gate") -> "Gate":
        """The gate of the entries of such a file.

        Raises:
            UsageError: an unknown key, or a threshold that is no share.
        """
        _known(entries, _KEYS, name)
        tables = {key: entries.get(key, {}) for key in ("suite", "capability")}
        for key, table in tables.items():
            if not isinstance(table, Mapping) or not all(
                isinstance(entry, Mapping) for entry in table.values()
            ):
                raise UsageError(
                    f"{name}: {key} is no table of tables; expected a heading such as [{key}.NAME] with "
                    "thresholds below it"
                )
        for suite, entry in tables["suite"].items():
            _known(entry, MEASURES, f"{name}, suite.{suite}")
        for task, entry in tables["capability"].items():
            _known(entry, _TASK_KEYS, f"{name}, capability.{task}")
        achieved = entries.get("achieved", False)
        if not isinstance(achieved, bool):
            raise UsageError(f"{name}: achieved is {achieved!r}; expected true or false")
        bound, judges = entries.get("bound", "value"), entries.get("judges", [])
        if bound not in BOUNDS:
            raise UsageError(f"{name}: bound {bound!r} is unknown; expected one of {', '.join(BOUNDS)}")
        if (
            not isinstance(judges, Sequence)
            or isinstance(judges, str)
            or not all(isinstance(judge, str) for judge in judges)
        ):
            raise UsageError(f"{name}: judges {judges!r}; expected a list of names")
        gate = cls(
            {key: _number(entries[key], f"{name}: {key}", share=True) for key in SHARES if key in entries},
            {
                suite: {
                    key: _number(value, f"{name}: suite.{suite}.{key}", share=True)
                    for key, value in entry.items()
                }
                for suite, entry in tables["suite"].items()
            },
            {
                task: {
                    key: _number(value, f"{name}: capability.{task}.{key}", share=key == "drop")
                    for key, value in entry.items()
                }
                for task, entry in tables["capability"].items()
            },
            bound,
            tuple(judges),
            name,
            achieved,
        )  # fmt: skip
        if not (gate.shares or gate.suites or gate.capability or achieved):
            raise UsageError(
                f"{name} has no threshold; expected some of {', '.join(SHARES)}, achieved, suite.NAME or "
                "capability.NAME"
            )
        return gate

    @property
    def needs_a_baseline(self) -> bool:
        """Whether a threshold compares with another measurement."""
        return "capability_drop" in self.shares or any("drop" in entry for entry in self.capability.values())

    @well_typed
    def check(self, result: Mapping[str, Any]) -> list[str]:
        """One line for every threshold that is not met; none where the gate is passed.

        Args:
            result: an evaluation as JSON values: its treated arm is held to the thresholds, where it has one,
                and its changes to those on capability drops.
        """
        missed = []
        if self.achieved and result.get("achieved") is not True:
            known = "achieved" in result
            missed.append(
                f"achieved: no ({result['why']})"
                if known
                else "achieved: not told by this run; expected a tuning"
            )
        arm = result.get("treated") or result.get("untreated") or {}
        if "suites" not in arm:
            unmeasured = [
                *self.shares,
                *(f"suite {name}" for name in self.suites),
                *(f"capability {name}" for name in self.capability),
            ]
            return [*missed, *(f"{what}: not measured by this run" for what in unmeasured)]
        return [*missed, *self._suites(arm), *self._tasks(arm, result.get("capability_changes") or [])]

    def _suites(self, arm: Mapping[str, Any]) -> Iterator[str]:
        unmet = {suite for suite in self.suites if suite not in {entry["suite"] for entry in arm["suites"]}}
        yield from (
            f"suite {suite}: not evaluated, though {self.name} has a threshold on it"
            for suite in sorted(unmet)
        )
        for measure in MEASURES:
            held = set()
            for entry in arm["suites"]:
                limit = self._limit(measure, entry["suite"])
                for judge, judged in self._of(entry) if limit is not None else ():
                    rate = _share_unscored(judged) if measure == "unscored" else judged.get(measure)
                    if rate is not None and limit is not None:
                        held.add(entry["suite"])
                        yield from self._at_most(
                            measure.replace("_", "-"), f"{entry['suite']} by {judge}", rate, limit
                        )
            yield from self._unheld(measure, held, unmet)

    def _unheld(self, measure: str, held: Collection[str], absent: Collection[str]) -> Iterator[str]:
        """Thresholds on a measure that no judge who counts has given."""
        word = measure.replace("_", "-")
        if measure in self.shares and not held:
            yield f"{word}: not measured, expected at most {self.shares[measure]:g}"
        for suite in sorted(set(self.suites) - set(held) - set(absent)):
            if measure in self.suites[suite]:
                yield f"{word} on {suite}: not measured, expected at most {self.suites[suite][measure]:g}"

    def _of(self, entry: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for judge, judged in entry["judges"].items():
            if not self.judges or judge in self.judges or judged.get("name") in self.judges:
                yield judge, judged

    def _limit(self, measure: str, suite: str) -> float | None:
        return self.suites.get(suite, {}).get(measure, self.shares.get(measure))

    def _at_most(self, what: str, where: str, rate: Mapping[str, Any], limit: float) -> Iterator[str]:
        value = rate["high"] if self.bound == "interval" else rate["value"]
        if value is None:
            yield f"{what} on {where}: undefined, nothing was scored; expected at most {limit:g}"
        elif not value <= limit:
            end = ", upper end of the interval," if self.bound == "interval" else ""
            yield f"{what} on {where}: {value:.4g}{end} expected at most {limit:g}"

    def _tasks(self, arm: Mapping[str, Any], changes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        measured = {entry["task"]: entry for entry in arm["capability"]}
        for task in sorted(set(self.capability) - set(measured)):
            yield f"capability {task}: not measured, though {self.name} has a threshold on it"
        drops = {change["task"]: change for change in changes}
        if "capability_drop" in self.shares and not changes:
            yield (
                f"capability-drop: not measured, expected at most {self.shares['capability_drop']:g}; name "
                "a capability and a baseline"
            )
        for task, entry in measured.items():
            own = self.capability.get(task, {})
            limit = own.get("drop", self.shares.get("capability_drop"))
            if limit is not None and task in drops:
                yield from self._drop(task, drops[task], limit)
            elif "drop" in own:
                yield (
                    f"capability drop of {task}: no baseline to compare with, expected at most "
                    f"{own['drop']:g}"
                )
            yield from self._range(task, entry, own)

    def _drop(self, task: str, change: Mapping[str, Any], limit: float) -> Iterator[str]:
        value = change["drop_high"] if self.bound == "interval" else change["drop"]
        if value is None:
            yield f"capability drop of {task}: undefined, expected at most {limit:g}"
        elif not value <= limit:
            yield f"capability drop of {task}: {value:.4g} of the baseline, expected at most {limit:g}"

    def _range(self, task: str, entry: Mapping[str, Any], own: Mapping[str, float]) -> Iterator[str]:
        for key, end, word in (("min", "low", "at least"), ("max", "high", "at most")):
            if key not in own:
                continue
            value = entry.get(end) if self.bound == "interval" else entry["value"]
            if value is None:
                yield f"capability {task}: undefined, nothing was scored; expected {word} {own[key]:g}"
            elif not (value >= own[key] if key == "min" else value <= own[key]):
                yield f"capability {task}: {entry['metric']} {value:.4g}, expected {word} {own[key]:g}"


def _share_unscored(judged: Mapping[str, Any]) -> dict[str, float | None] | None:
    """Share of the answers that a judge did not score; None where it says nothing of such requests."""
    rate = next(
        (
            judged[measure]
            for measure in ("harm", "over_refusal", "refused")
            if judged.get(measure) is not None
        ),
        None,
    )
    if rate is None:
        return None  # A judge of harm alone has nothing to score on harmless requests.
    total = rate["n"] + rate["unscored"]
    share = rate["unscored"] / total if total else None
    return {"value": share, "high": share}


def _known(entries: Mapping[str, Any], allowed: Sequence[str], where: str) -> None:
    unknown = sorted(set(entries) - set(allowed))
    if unknown:
        raise UsageError(f"{where}: unknown key {unknown[0]!r}; expected some of {', '.join(allowed)}")


def _number(value: Any, where: str, *, share: bool) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or value != value
        or (share and not 0 <= value <= 1)
    ):
        raise UsageError(f"{where} is {value!r}; expected a {'share between 0 and 1' if share else 'number'}")
    return float(value)
