"""Found: what every detector returns."""

from dataclasses import dataclass, replace

from safety_neurons.neurons import NeuronSet, Scores
from safety_neurons.results import html_table


@dataclass(frozen=True)
class PromptCounts:
    """What became of the prompts."""

    used: int
    """Prompts that are in the scores."""
    failed: int = 0
    """Prompts that could not be used; the notes say why."""
    truncated: int = 0
    """Prompts that were cut to the context length."""

    def without(self, n: int) -> "PromptCounts":
        """The same with so many of the used prompts failed after all."""
        return replace(self, used=self.used - n, failed=self.failed + n)


@dataclass(frozen=True)
class Found:
    """The result of a detector: a score for every neuron searched, and the set chosen from them."""

    scores: Scores
    """One number per neuron of every searched site: mean over prompts, signed where the method is."""
    neurons: NeuronSet
    """The chosen set; may be empty with an agreement, and the notes then say which agreement gives one neuron."""
    prompts: PromptCounts
    """Prompts used, failed and truncated."""
    notes: tuple[str, ...] = ()
    """Counted warnings, one sentence each."""

    def _repr_html_(self) -> str:
        counts = f"{self.prompts.used:,} used, {self.prompts.failed:,} failed, {self.prompts.truncated:,} truncated"
        rows = [["prompts", counts], ["scored", f"{len(self.scores):,} neurons"], *(["note", note] for note in self.notes)]
        return self.neurons._repr_html_() + html_table("Found", ["what", "how many"], rows)
