"""Languages: deactivate the neurons found in one language and measure refusals in all of them."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from safety_neurons.interventions import deactivated
from safety_neurons.model import LanguageModel
from safety_neurons.model.batches import BatchSize
from safety_neurons.neurons import NeuronSet
from safety_neurons.prompts import Prompts
from safety_neurons.results import rate
from safety_neurons.results.estimates import GroupLabels
from safety_neurons.studies.arms import Bench, Progress
from safety_neurons.studies.groups import Cell, Groups, Matrix, Verdicts, held_together
from safety_neurons.studies.kept import hold_answers


@dataclasses.dataclass(frozen=True)
class LanguageMatrix:
    """Refusals in every language while a set is off."""

    languages: tuple[str, ...]
    untreated: Mapping[str, Verdicts]
    cells: tuple[Cell, ...]
    """One for every set and language, set by set."""
    skipped: tuple[str, ...]
    """Sets without members."""
    shared: Mapping[str, GroupLabels]
    """What the prompts of every language share."""
    notes: tuple[str, ...]

    def cell(self, name: str, language: str) -> Cell:
        """The cell of a set and a language."""
        return next(cell for cell in self.cells if (cell.set, cell.group) == (name, language))

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "untreated": {name: rate(outcomes, self.shared[name]).to_json() for name, outcomes in self.untreated.items()},
            "matrix": [cell.record() for cell in self.cells],
            "skipped": list(self.skipped),
        }


def deactivation_matrix(
    model: LanguageModel,
    sets: Mapping[str, NeuronSet],
    harmful: Mapping[str, Prompts],
    *,
    random: int = 5,
    seed: int = 0,
    max_new_tokens: int = 64,
    batch_size: BatchSize = "auto",
    completions_file: pathlib.Path | None = None,
    progress: Progress | None = None,
) -> LanguageMatrix:
    """Refusals of harmful requests in every language while each of the sets is off, beside random sets of the same distribution.

    Args:
        model: the model that refuses.
        sets: by name; empty ones are skipped, and named.
        harmful: requests by language, best parallel and apart from those the sets were found on.
        random: random sets for each set, with as many neurons in every matrix.
        seed: of random sets.
        max_new_tokens: length of a completion, in tokens.
        batch_size: prompts per pass.
        completions_file: where completions are kept; a killed study goes on from it.
        progress: told every arm.

    Source: Zhao et al., ICLR 2025, section 2.3 (safety neurons are specific to a language).
    Differs: refusals in every language are measured for every set, with paired intervals and random sets, not in its own language only.
    """
    groups = Groups(harmful)
    hold_answers(completions_file, model=model, sets=sets, seed=seed, max_new_tokens=max_new_tokens)
    bench = Bench(groups.pooled, Prompts([]), None, max_new_tokens, batch_size, seed, completions_file, progress)
    matrix = Matrix(bench, groups, model, lambda neurons: lambda: deactivated(model, neurons), random)
    cells = [cell for name, neurons in sets.items() if len(neurons) for cell in matrix.row(name, neurons)]
    bench.finish()
    skipped = tuple(name for name, neurons in sets.items() if not len(neurons))
    return LanguageMatrix(
        tuple(groups.names), matrix.untreated, held_together(cells), skipped, groups.shared, (*matrix.notes, *bench.notes)
    )
