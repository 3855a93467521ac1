"""Which of a few given answers a model would give: read from the logits of one forward pass, nothing is sampled."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64

from safety_neurons.errors import InputError, MismatchError
from safety_neurons.model.language_model import LanguageModel
from safety_neurons.model.likelihood import logits_budget, widened
from safety_neurons.model.measures import BatchSize, Progress
from safety_neurons.model.passes import Batch, run_batches

Ids = Sequence[int]


@dataclass(frozen=True)
class Choice:
    """How likely each of the given answers is.

    Attributes:
        probabilities: One per answer, summing to 1: at every token where answers part, the model's probabilities of the tokens that go on.
        mass: Probability that the model goes on with one of the answers at all, where they first part. Near 0 the model is not
            answering the question. Both are NaN where the model gives NaN.
    """

    probabilities: Float64[np.ndarray, " answer"]
    mass: float


def answer_probabilities(
    lm: LanguageModel,
    prompts: Sequence[Ids],
    answers: Sequence[Sequence[Ids]],
    *,
    batch_size: BatchSize = "auto",
    progress: Progress | None = None,
    notes: list[str] | None = None,
) -> list[Choice]:
    """How likely a model finds each of the given answers to each prompt.

    Answers are a tree of tokens; the model is read where the tree branches, several places in one row where they lie behind one another,
    so that answers that part at one place cost one row a prompt. An answer that another one begins with is taken to end there (EOS).

    Args:
        lm: The model.
        prompts: Token ids, template included.
        answers: For each prompt the token ids of its possible answers, at least two different ones.
        batch_size: Rows, or `auto`.
        progress: Called as `progress(batches done, batches in all, tokens done)`.
        notes: Gets a line for every batch that was halved.

    Raises:
        InputError: Not one list of answers per prompt, fewer than two answers, or equal ones.
        MismatchError: An answer ends where another goes on, and the model has no EOS.
    """
    if len(prompts) != len(answers):
        raise InputError(f"{len(answers)} lists of answers for {len(prompts)} prompts: expected one each")
    trees = [_Tree(group, lm.eos_ids) for group in answers]
    rows: list[list[int]] = []
    reads: list[list[tuple[int, tuple[int, ...]]]] = []
    for number, (prompt, tree) in enumerate(zip(prompts, trees, strict=True)):
        for longest, read in tree.rows():
            rows.append([*prompt, *longest])
            reads.append([(number, node) for node in read])
    starts = [len(prompt) for prompt in prompts]

    def per_batch(batch: Batch) -> None:
        assert batch.output is not None
        for row, index in enumerate(batch.indices):
            for number, node in reads[index]:
                logits = widened(batch.output[row, starts[number] + len(node) - 1])
                tokens = trees[number].children[node]
                kept = torch.tensor(tokens, device=logits.device)
                trees[number].read[node] = (logits[kept] - logits.logsumexp(0)).double().exp().cpu().numpy()

    run_batches(lm, rows, per_batch, batch_size, True, progress, budget=logits_budget(lm), notes=notes)
    return [tree.choice() for tree in trees]


class _Tree:
    """The tokens of several answers, as a tree: for every beginning that several answers share, the tokens that go on."""

    def __init__(self, answers: Sequence[Ids], eos_ids: Sequence[int]) -> None:
        ended = [tuple(answer) for answer in answers]
        if len(ended) < 2 or len(set(ended)) < len(ended):
            raise InputError(f"{len(ended)} answers, {len(set(ended))} of them different: expected at least two different ones")
        for place, answer in enumerate(ended):
            if any(other != answer and other[: len(answer)] == answer for other in ended):
                if not eos_ids:
                    raise MismatchError("one answer begins another, and the model has no end token to tell them apart")
                ended[place] = (*answer, eos_ids[0])
        self.answers = ended
        following: dict[tuple[int, ...], set[int]] = {}
        for answer in ended:
            for place, token in enumerate(answer):
                following.setdefault(answer[:place], set()).add(token)
        self.children = {node: sorted(tokens) for node, tokens in following.items() if len(tokens) > 1}
        self.read: dict[tuple[int, ...], Float64[np.ndarray, " token"]] = {}

    def rows(self) -> list[tuple[tuple[int, ...], list[tuple[int, ...]]]]:
        """The rows to feed behind the prompt, each with the nodes that are read in it."""
        found: list[tuple[tuple[int, ...], list[tuple[int, ...]]]] = []
        for node in sorted(self.children, key=len, reverse=True):
            home = next((read for longest, read in found if longest[: len(node)] == node), None)
            if home is None:
                found.append((node, [node]))
            else:
                home.append(node)
        return found

    def choice(self) -> Choice:
        """The probabilities, once every node was read."""
        if any(np.isnan(shares).any() for shares in self.read.values()):
            return Choice(np.full(len(self.answers), np.nan), float("nan"))
        values = np.ones(len(self.answers))
        for place, answer in enumerate(self.answers):
            for length in range(len(answer)):
                node = answer[:length]
                if node in self.children:
                    shares = self.read[node]
                    total = shares.sum()
                    values[place] *= shares[self.children[node].index(answer[length])] / total if total > 0 else 1 / len(shares)
        return Choice(values / values.sum(), float(self.read[min(self.children, key=len)].sum()))
