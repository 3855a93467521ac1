"""Exact importance of the neurons of routed experts: change of the block's output, router weight included, routing held fixed."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from safety_neurons.detectors.importance_mlp import expert_changes
from safety_neurons.model.experts import ExpertRows, ExpertsAnatomy


class ExpertsReader:
    """Scores of all wanted experts of one layer, from the rows of the gate step."""

    def __init__(
        self,
        experts: ExpertsAnatomy,
        keys: Iterable[str],
        lengths: Callable[[], list[int]],
        give: Callable[[int, str, Tensor], None],
    ) -> None:
        self.experts, self.keys, self.lengths, self.give = experts, set(keys), lengths, give
        self.sites = tuple(site for site in ("gate", "up", "down") if any(key.endswith(f".{site}") for key in self.keys))
        self.seen: dict[str, ExpertRows] = {}
        self.sums: dict[str, Tensor] = {}
        self._norms: Tensor | None = None

    def readers(self) -> dict[str, Callable[[Any], None]]:
        """Readers of the rows of all experts."""
        name = f"layers.{self.experts.layer}.experts.*"
        return {f"{name}.gate": partial(self._note, "gate"), f"{name}.up": partial(self._note, "up"), f"{name}.down": self._score}

    def start(self) -> None:
        """Forget what an unfinished pass left."""
        self.seen.clear()
        self.sums.clear()

    def finish(self) -> None:
        """Hand over the scores of the pass that just ended; an expert that no token was sent to scores 0."""
        batch = len(self.lengths())
        for site, squares in self.sums.items():
            norms = squares.unflatten(0, (batch, -1)).sqrt() * self._column_norms(squares)
            for row in range(batch):
                for expert in range(self.experts.n_experts):
                    if (key := self.experts.key(expert, site)) in self.keys:
                        self.give(row, key, norms[row, expert])
        self.start()

    def _note(self, site: str, rows: ExpertRows) -> None:
        self.seen[site] = rows

    def _score(self, rows: ExpertRows) -> None:
        lengths = torch.tensor(self.lengths(), device=rows.values.device)
        width = int(lengths.max())
        row, position = rows.token_index // width, rows.token_index % width
        real = position < lengths[row]
        place = (row * self.experts.n_experts + rows.expert_index)[real]
        changes = expert_changes(self.experts, self.seen["gate"], self.seen["up"], rows.values, self.sites)
        for site, change in changes.items():
            squares = change[real].to(torch.float64).square()
            if site not in self.sums:
                self.sums[site] = squares.new_zeros(len(lengths) * self.experts.n_experts, squares.shape[1])
            self.sums[site].index_add_(0, place, squares)

    def _column_norms(self, like: Tensor) -> Tensor:
        if self._norms is None:
            weights = (self.experts.weight(expert, "down").detach() for expert in range(self.experts.n_experts))
            self._norms = torch.stack([torch.linalg.vector_norm(weight, dim=0, dtype=like.dtype) for weight in weights])
        return self._norms
