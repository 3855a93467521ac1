"""Re-checks of answers under way: a threshold of their own, measured on answers to safe prompts at the positions where they happen."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from safety_neurons.errors import InputError
from safety_neurons.guard.operating import check_probability
from safety_neurons.results import Rate


@dataclass(frozen=True)
class Recheck:
    """The threshold of re-checks, per answer: an answer is stopped if any of its checks reaches it.

    Attributes:
        every: generated tokens between checks.
        max_new_tokens: longest answer it was measured on.
        threshold: of the same probability as the prompt's, at generated positions.
        fpr_target: share of the answers to safe prompts that may be stopped.
        fpr: share of those measured that are, with its Clopper-Pearson interval.
        tpr: share of the answers to unsafe prompts that are; undefined where none was given.
        supported: whether there were 20 / FPR answers to safe prompts.
        why: why not.
    """

    every: int
    max_new_tokens: int
    threshold: float
    fpr_target: float
    fpr: Rate
    tpr: Rate
    supported: bool
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {**asdict(self), "fpr": self.fpr.to_json(), "tpr": self.tpr.to_json()}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Recheck":
        """What `to_json` wrote.

        Raises:
            InputError: damaged.
        """
        try:
            fpr, tpr = Rate.from_json(found["fpr"]), Rate.from_json(found["tpr"])
            every, longest = (int(found[name]) for name in ("every", "max_new_tokens"))
            threshold, target = check_probability(found["threshold"], "threshold"), check_probability(found["fpr_target"], "target")
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise InputError(f"a damaged re-check ({type(error).__name__}); expected what a guard's file holds") from error
        if every < 1 or longest < 1:
            raise InputError(f"a damaged re-check (every {every} tokens of {longest}); expected numbers of at least 1")
        return cls(every, longest, threshold, target, fpr, tpr, bool(found["supported"]), str(found["why"]))
