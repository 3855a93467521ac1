"""Attribution patching: what overwriting each neuron with the aligned model's activation would do to the score, to first order."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from safety_neurons.detectors.gradients import SCORED_TOKENS, ScoredRow, attribute, explained, mask_gradients, mean_of, midpoints_of
from safety_neurons.detectors.methods import AttributionPatching
from safety_neurons.detectors.pairs import donated
from safety_neurons.detectors.runner import PromptCounts, Run, Scored
from safety_neurons.detectors.text import generate
from safety_neurons.errors import InputError, NumericalError
from safety_neurons.model import LanguageModel
from safety_neurons.model.passes import Batch


def score(method: AttributionPatching, run: Run) -> Scored:
    """What patching each neuron would do to the score, to first order."""
    units, counts = own_completions(run)
    gradients = patching_gradients(run.base, run.aligned, run.sizes, steps(method.at, method.midpoints))
    values, folded = attribute(run, run.base, units, gradients)
    return Scored(values, counts.without(len(folded.failed)), folded.votes)


def steps(at: str, number: int) -> list[float]:
    """Values of the mask at which the gradient is taken."""
    return [0.0] if at == "base" else midpoints_of(number)


def patching_gradients(
    base: LanguageModel, aligned: LanguageModel, sizes: Mapping[str, int], masks: Sequence[float]
) -> Callable[[Batch, Sequence[ScoredRow]], dict[str, Tensor]]:
    """The function that gives each row's gradients, averaged over the mask values."""

    def gradients(batch: Batch, rows: Sequence[ScoredRow]) -> dict[str, Tensor]:
        donors = donated(aligned, batch, sizes)
        return mean_of([mask_gradients(base, batch, rows, sizes, mask=mask, donors=donors)[0] for mask in masks])

    return gradients


def own_completions(run: Run) -> tuple[list[list[ScoredRow]], PromptCounts]:
    """The scored rows of each prompt, from both models' own greedy completions; prompts without a difference are counted as failed."""
    base, aligned, prompts, stream = run.base, run.aligned, run.prompts, run.stream
    options: dict[str, Any] = {"batch_size": run.batch_size, "progress": run.progress}
    refusals = generate(aligned, prompts, "aligned", SCORED_TOKENS, stream, **options)
    compliances = generate(base, prompts, "base", SCORED_TOKENS, stream, **options)
    encoded = base.encode(prompts, reserve=SCORED_TOKENS)
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
        raise NumericalError(f"all {broken} prompts gave NaN or infinity: check the models' weights, or use --dtype float32")
    if not units or same == len(units):
        what = "the same text from both models" if units else "an empty completion"
        raise InputError(
            f"all {len(encoded)} prompts gave {what}: there is nothing to explain; use prompts that only the aligned model refuses"
        )
    run.notes += [f"{empty} prompts have an empty completion and were left out"] if empty else []
    run.notes += [f"{broken} prompts gave NaN or infinity and were left out"] if broken else []
    alike = f"{same} prompts are completed with the same first {SCORED_TOKENS} tokens by both models and add nothing"
    run.notes += [alike] if same else []
    return units, PromptCounts(len(units), empty + broken, sum(row.truncated for row in encoded))
