"""Attribution and attribution patching: gradients of an explained score with respect to a soft mask on
activations.

Every neuron k gets a mask entry m_k: its activation a becomes `donor + m·(a − donor)` towards itself or `a +
m·(donor − a)` towards a donor, and the derivative of the score with respect to m_k, summed over all tokens,
is the first-order effect of that neuron.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from safety_neurons.counting import numbered
from safety_neurons.detectors.methods import Attribution, AttributionPatching, ExplainedTexts
from safety_neurons.detectors.reading import donated
from safety_neurons.detectors.runner import BatchSums, Folded, PromptCounts, Run, Scored, to_numpy
from safety_neurons.detectors.text import generate
from safety_neurons.errors import InputError, NumericalError
from safety_neurons.model import LanguageModel, hooks
from safety_neurons.model.batches import Batch, collate, forward, frozen
from safety_neurons.model.language_model import said_of_reading
from safety_neurons.model.sites import ExpertRows
from safety_neurons.neurons.scores import number_of

SCORED_TOKENS = 16
"""Tokens of a refusal or compliance text that are scored."""
TOKEN_BUDGET = 1024
"""Padded tokens of an "auto" batch whose activations are kept for the backward pass."""

Mean = Callable[[Callable[[float], Mapping[str, Tensor]]], dict[str, Tensor]]
"""Averages along a path what a function of its point gives, per site key."""
Editing = Callable[[Mapping[str, hooks.Editor]], AbstractContextManager[Any]]
"""Puts editors of activations on for a block."""


@dataclass(frozen=True)
class ScoredRow:
    """One teacher-forced sequence and its share of the explained score.

    Attributes:
        ids: prompt and scored text.
        start: position of the first scored token.
        weight: what the mean log-probability of the scored tokens is multiplied by.
        rival: a token whose log-probability at the same positions is taken away; None for none.
        instead: tokens any of which may stand in place of a scored one; empty for the scored one alone.
    """

    ids: tuple[int, ...]
    start: int
    weight: float
    rival: int | None = None
    instead: tuple[int, ...] = ()


def explained(
    prompt: Sequence[int], refusals: Sequence[Sequence[int]], compliances: Sequence[Sequence[int]]
) -> list[ScoredRow]:
    """The sequences whose weighted sum is mean log p(refusal) − mean log p(compliance) of one prompt, first
    16 tokens of each text.
    """
    sides = ((refusals, 1.0), (compliances, -1.0))
    return [
        ScoredRow((*prompt, *text[:SCORED_TOKENS]), len(prompt), sign / len(texts))
        for texts, sign in sides
        for text in texts
    ]


def score_rows(
    logits: Float[Tensor, "batch token vocab"], batch: Batch, rows: Sequence[ScoredRow]
) -> Float[Tensor, " batch"]:
    """Each row's weight times the mean log-probability of its scored tokens, in float32 or wider."""
    scores = []
    for number, row in enumerate(rows):
        targets = batch.input_ids[number, row.start : len(row.ids)].to(logits.device)
        predicting = logits[number, row.start - 1 : len(row.ids) - 1]
        predicting = predicting if predicting.dtype == torch.float64 else predicting.float()
        chances = predicting.log_softmax(-1)
        log_probabilities = (
            chances[:, list(row.instead)].logsumexp(1) if row.instead else chances.gather(1, targets[:, None])
        )
        scores.append(
            row.weight
            * (log_probabilities.mean() - (0.0 if row.rival is None else chances[:, row.rival].mean()))
        )
    return torch.stack(scores)


def mask_gradients(
    lm: LanguageModel,
    batch: Batch,
    rows: Sequence[ScoredRow],
    sizes: Mapping[str, int],
    *,
    mask: float | Mapping[str, Tensor],
    donors: Mapping[str, Any] | None = None,
    editing: Editing | None = None,
) -> tuple[dict[str, Float[Tensor, "batch neuron"]], Float[Tensor, " batch"]]:
    """One forward and one backward pass: derivative of each row's score with respect to that row's mask, at
    `mask`.

    Without donors an activation is `m·a` (1 leaves the model as it is, 0 deactivates); with donors it is `a +
    m·(donor − a)`. The activation is the one of the running pass, so what earlier sites' masks change reaches
    later sites.

    Args:
        lm: model to differentiate; parameters are frozen meanwhile.
        batch: the rows, padded.
        rows: what is scored.
        sizes: neurons of every site key.
        mask: value of all mask entries, or of each neuron's (site key to `[neuron]`), the same in every row.
        donors: activations to move towards, on the same tokens, as `hooks.reading` gives them (a row per
            routed token for an expert).
        editing: puts the masks on for a block, in place of `hooks.editing` alone: with other rules of what a
            gradient is.

    Returns:
        Gradients per row, and the rows' scores.
    """
    widest = torch.float64 if lm.dtype == torch.float64 else torch.float32
    masks = {
        key: spread(mask, key, (len(rows), size)).to(batch.input_ids.device, widest)
        for key, size in sizes.items()
    }

    def edit(key: str) -> Callable[[Any], Tensor]:
        def editor(activation: Any) -> Tensor:
            values = activation if isinstance(activation, Tensor) else activation.values
            masks[key] = masks[key].to(values.device).requires_grad_()
            routed = not isinstance(activation, Tensor)
            share = masks[key][activation.token_index // batch.width] if routed else masks[key][:, None, :]
            wide = values.to(widest)
            if donors is None:
                return (wide * share).to(values.dtype)
            donor = matched(donors[key], activation, wide) if routed else donors[key].to(wide)
            return (wide + share * (donor - wide)).to(values.dtype)

        return editor

    with (
        frozen(lm.model),
        lm.running(),
        torch.enable_grad(),
        (editing or partial(hooks.editing, lm.anatomy))({key: edit(key) for key in sizes}),
    ):
        logits = forward(lm.model, batch, with_logits=True)
        assert logits is not None
        scores = score_rows(logits, batch, rows)
        # An expert that no token was sent to is not in the graph.
        gradients = torch.autograd.grad(scores.sum(), [masks[key] for key in sizes], allow_unused=True)
    found = {
        key: masks[key].new_zeros(masks[key].shape) if slope is None else slope
        for key, slope in zip(sizes, gradients, strict=True)
    }
    return found, scores.detach()


def spread(
    mask: float | Mapping[str, Tensor], key: str, shape: tuple[int, int]
) -> Float[Tensor, "batch neuron"]:
    """The mask of one site in every row of a batch, in memory of its own."""
    if isinstance(mask, Mapping):
        return mask[key].detach().expand(shape).clone()
    return torch.full(shape, mask, dtype=torch.float64)


def matched(
    donor: ExpertRows, rows: ExpertRows, wide: Float[Tensor, "row neuron"]
) -> Float[Tensor, "row neuron"]:
    """The donor's activations of one expert in the order of `rows`.

    A token that the donor sent elsewhere keeps its own (`wide`).
    """
    if len(donor) == 0 or len(rows) == 0:
        return wide
    tokens, order = donor.token_index.to(wide.device).sort()
    index = torch.searchsorted(tokens, rows.token_index).clamp(max=len(tokens) - 1)
    return torch.where(
        (tokens[index] == rows.token_index)[:, None], donor.values.to(wide)[order[index]], wide
    )


def attribute(
    run: Run,
    lm: LanguageModel,
    units: Sequence[Sequence[ScoredRow]],
    gradients: Callable[[Batch, Sequence[ScoredRow]], dict[str, Tensor]],
    path: "PathMean | None" = None,
) -> tuple[dict[str, np.ndarray], Folded]:
    """Mean over prompts of the summed gradients of each prompt's rows; with an agreement, every prompt votes.

    Args:
        run: the searched sites and the resumable state.
        lm: model to differentiate.
        units: the scored rows of each prompt.
        gradients: rows in a batch to one gradient per row and neuron.
        path: along which they are means; says afterwards how many of its points were taken.

    Returns:
        One signed number per neuron, and what became of the prompts (with their votes, where they vote).
    """

    def reduce(batch: Batch) -> BatchSums:
        rows = [row for index in batch.indices for row in units[index]]
        owner = torch.tensor([number for number, index in enumerate(batch.indices) for _ in units[index]])
        slopes = gradients(
            collate([row.ids for row in rows], range(len(rows)), pad_id=lm.pad_id).to(lm.device), rows
        )
        added = BatchSums(scores=[{} for _ in batch.indices])
        if path is not None and path.settle:
            added.sums[TAKEN] = np.array([path.taken, 1.0])
        for key, values in slopes.items():
            summed = torch.zeros(
                len(batch.indices), values.shape[1], dtype=torch.float64, device=values.device
            )
            each = to_numpy(summed.index_add_(0, owner.to(values.device), values.double()))
            added.sums[f"gradient/{key}"] = each.sum(0)
            for scores, prompt in zip(added.scores, each, strict=True):
                scores[key] = prompt
        return added

    longest = [max(unit, key=lambda row: len(row.ids)).ids for unit in units]
    budget = max(TOKEN_BUDGET // max(len(unit) for unit in units), 1)
    folded = run.fold(longest, reduce, lm, budget)
    used = len(units) - len(folded.failed)
    if path is not None:
        run.notes += path.said(folded.sums.pop(TAKEN, None))
    return {name.split("/", 1)[1]: values / used for name, values in folded.sums.items()}, folded


def mean_of(gradients: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Mean over steps, per site key."""
    return {key: torch.stack([step[key] for step in gradients]).mean(0) for key in gradients[0]}


TAKEN = "taken"
"""Among the sums: points of the path that batches took, and batches."""
GAUSS = (1 - 3**-0.5) / 2
"""Where the first of the two points lies that integrate a cubic from 0 to 1 exactly."""


def pairs_of(number: int) -> list[list[int]]:
    """The points of a path in the order in which they are taken: pairs on both sides of the middle, the one
    nearest to the two points of Gauss first, then always the one farthest from those taken.
    """
    left = list(range((number + 1) // 2))
    taken = [left.pop(min(range(len(left)), key=lambda place: abs((left[place] + 0.5) / number - GAUSS)))]
    while left:
        taken.append(
            left.pop(max(range(len(left)), key=lambda at: min(abs(left[at] - one) for one in taken)))
        )
    return [sorted({one, number - 1 - one}) for one in taken]


@dataclass
class PathMean:
    """The mean along a path of what a batch gives at its points, which ends early where that is allowed.

    Points are added in pairs. With `settle` above 0, the rest are left out once a pair has changed no more
    than that share of the set which the batch alone would choose: what only the rest would show is not seen.
    0 takes all points.

    Attributes:
        points: values of the mask.
        settle: share of the set.
        n_top: neurons of the set.
        taken: how many points the last batch took.
    """

    points: Sequence[float]
    settle: float = 0.0
    n_top: int = 0
    taken: int = 0

    @staticmethod
    def of(run: Run, points: Sequence[float]) -> "PathMean":
        """By the options of a run; where prompts vote, each by a set of its own, no point is left out."""
        n_neurons, chosen = sum(run.sizes.values()), run.selection
        n_top = number_of(chosen.top, n_neurons) if chosen.top is not None else int(chosen.count or 0)
        settle = 0.0 if run.votes else float(getattr(run.method, "settle", 0.0))
        return PathMean(points, settle if n_top else 0.0, n_top)

    def mean(self, at: Callable[[float], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Mean of what `at` gives at the points, per site key."""
        if not self.settle:
            return mean_of([at(point) for point in self.points])
        seen: list[Mapping[str, Tensor]] = []
        before: set[int] | None = None
        for pair in pairs_of(len(self.points)):
            seen += [at(self.points[number]) for number in pair]
            now = self._top(mean_of(seen))
            if before is not None and len(now - before) <= self.settle * self.n_top:
                break
            before = now
        self.taken = len(seen)
        return mean_of(seen)

    def _top(self, slopes: Mapping[str, Tensor]) -> set[int]:
        whole = torch.cat([values.sum(0).double().cpu() for values in slopes.values()])
        return set(whole.topk(min(self.n_top, len(whole))).indices.tolist())

    def said(self, sums: Float[np.ndarray, " 2"] | None) -> list[str]:
        """That points were left out, and by which rule, from the points that all batches took."""
        if sums is None or sums[0] == sums[1] * len(self.points):
            return []
        taken, batches = sums.tolist()
        return [
            f"{taken / batches:.1f} of {len(self.points)} points of the path were taken "
            f"(mean over {batches:.0f} batches): the last pair changed at most {self.settle:.2g} of a "
            f"batch's {self.n_top:,} neurons (settle)"
        ]


def midpoints_of(number: int) -> list[float]:
    """Midpoints of `number` equal steps from 0 to 1."""
    return [(step + 0.5) / number for step in range(number)]


def score_attribution(method: Attribution, run: Run) -> Scored:
    """Activation times gradient of every neuron, at the model itself or averaged along the scaling of all
    activations.
    """
    model = run.aligned
    steps = midpoints_of(method.integrated) if method.integrated else [1.0]

    def gradients(batch: Batch, rows: Sequence[ScoredRow]) -> dict[str, Tensor]:
        return mean_of([mask_gradients(model, batch, rows, run.sizes, mask=step)[0] for step in steps])

    return of_texts(method, run, gradients)


def of_texts(
    method: ExplainedTexts, run: Run, gradients: Callable[[Batch, Sequence[ScoredRow]], dict[str, Tensor]]
) -> Scored:
    """`attribute` for one model and the given texts of refusals and compliances."""
    model = run.aligned
    encoded = model.encode(run.prompts, reserve=SCORED_TOKENS)
    run.notes += said_of_reading(encoded)
    sides = [method.texts["refusal"], method.texts["compliance"]]
    units = [
        explained(row.ids, *([tokens_behind(model, row.ids, text) for text in texts] for texts in sides))
        for row in encoded
    ]
    values, folded = attribute(run, model, units, gradients)
    counts = PromptCounts(len(units), 0, sum(row.truncated for row in encoded)).without(len(folded.failed))
    return Scored(values, counts, folded.votes)


def tokens_behind(model: LanguageModel, prompt: Sequence[int], text: str) -> list[int]:
    """Tokens of a text behind a prompt: with a space between where the prompt ends in a visible character."""
    end = model.tokenizer.decode([prompt[-1]], skip_special_tokens=True)
    space = " " if end and not end[-1].isspace() else ""
    ids = model.tokenizer(space + text.strip(), add_special_tokens=False)["input_ids"]
    if not ids:
        raise InputError(f"the text {text!r} has no tokens; expected a sentence to score")
    return [int(token) for token in ids]


def score_patching(method: AttributionPatching, run: Run) -> Scored:
    """What patching each neuron would do to the score, to first order."""
    units, counts = own_completions(run)
    path = PathMean.of(run, steps(method.at, method.midpoints))
    gradients = patching_gradients(run.base, run.aligned, run.sizes, path.mean)
    values, folded = attribute(run, run.base, units, gradients, path)
    return Scored(values, counts.without(len(folded.failed)), folded.votes)


def steps(at: str, number: int) -> list[float]:
    """Values of the mask at which the gradient is taken."""
    return [0.0] if at == "base" else midpoints_of(number)


def patching_gradients(
    base: LanguageModel,
    aligned: LanguageModel,
    sizes: Mapping[str, int],
    mean: Mean,
) -> Callable[[Batch, Sequence[ScoredRow]], dict[str, Tensor]]:
    """The function that gives each row's gradients, averaged by `mean` over values of the mask."""

    def gradients(batch: Batch, rows: Sequence[ScoredRow]) -> dict[str, Tensor]:
        donors = donated(aligned, batch, sizes)
        return mean(lambda mask: mask_gradients(base, batch, rows, sizes, mask=mask, donors=donors)[0])

    return gradients


def own_completions(run: Run) -> tuple[list[list[ScoredRow]], PromptCounts]:
    """The scored rows of each prompt, from both models' own greedy completions.

    Prompts without a difference are counted as failed.
    """
    base, aligned, prompts, stream = run.base, run.aligned, run.prompts, run.stream
    options: dict[str, Any] = {"batch_size": run.batch_size, "progress": run.progress}
    refusals = generate(aligned, prompts, "aligned", SCORED_TOKENS, stream, **options)
    compliances = generate(base, prompts, "base", SCORED_TOKENS, stream, **options)
    encoded = base.encode(prompts, reserve=SCORED_TOKENS)
    run.notes += said_of_reading(encoded)
    units, empty, broken, same = [], 0, 0, 0
    for row, refusal, compliance in zip(encoded, refusals, compliances, strict=True):
        if refusal is None or compliance is None:
            broken += 1
            continue
        if not refusal or not compliance:
            empty += 1
            continue
        same += refusal == compliance
        units.append(explained(row.ids, [refusal], [compliance]))
    if broken == len(encoded):
        raise NumericalError(
            f"all {broken} prompts gave NaN or infinity: check the models' weights, or use --dtype float32"
        )
    if not units or same == len(units):
        what = "the same text from both models" if units else "an empty completion"
        raise InputError(
            f"all {len(encoded)} prompts gave {what}: there is nothing to explain; use prompts that only "
            "the aligned model refuses"
        )
    run.notes += (
        [f"{numbered(empty, 'prompt has', 'prompts have')} an empty completion: left out"] if empty else []
    )
    run.notes += [f"{numbered(broken, 'prompt')} gave NaN or infinity: left out"] if broken else []
    alike = (
        f"{numbered(same, 'prompt is', 'prompts are')} completed with the same first {SCORED_TOKENS} tokens "
        "by both models: nothing is added"
    )
    run.notes += [alike] if same else []
    return units, PromptCounts(len(units), empty + broken, sum(row.truncated for row in encoded))
