"""What a measurement of capability gives: one number with its interval, and the outcome of every item for paired comparisons."""

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from safety_neurons.results import Rate

Treatment = Callable[[], AbstractContextManager[Any]]
"""Makes the context manager inside which a model is treated; called once for every pass."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """One task, measured on one model.

    Attributes:
        task: its name, as it was asked for.
        metric: what the value is, such as `accuracy` or `perplexity`.
        rate: the value with its interval and how many items it rests on.
        higher_is_better: whether more of it is good.
        ids: one name for every item.
        outcomes: one number for every item: 0 or 1, or a sum over tokens; None is unscored.
        counts: tokens of every item, where outcomes are sums over tokens; otherwise empty.
        details: further numbers, such as the accuracy of every subject.
        notes: what had to be said.
    """

    task: str
    metric: str
    rate: Rate
    higher_is_better: bool = True
    ids: tuple[str, ...] = ()
    outcomes: tuple[float | None, ...] = ()
    counts: tuple[int, ...] = ()
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """The measurement as JSON values, without single items."""
        about = {"task": self.task, "metric": self.metric, "higher_is_better": self.higher_is_better}
        return {**about, **self.rate.to_json(), "details": dict(self.details)}

    def items(self) -> dict[str, Any]:
        """Single items, from which a later run can be compared item by item."""
        return {"ids": list(self.ids), "outcomes": list(self.outcomes), "counts": list(self.counts)}
