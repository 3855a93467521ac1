"""Attribution patching: what overwriting each neuron with the aligned model's activation would do to the score, to first order."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

from torch import Tensor

from safety_neurons.detectors.finishing import Choice, finish, searched
from safety_neurons.detectors.found import Found, PromptCounts
from safety_neurons.detectors.gradients import SCORED_TOKENS, Scored, attribute, explained, mask_gradients, mean_of, midpoints_of
from safety_neurons.detectors.pairs import comparing, donated
from safety_neurons.detectors.streaming import Progress, Stream, stream_key
from safety_neurons.detectors.text import generate
from safety_neurons.errors import InputError, NumericalError, UsageError
from safety_neurons.model import LanguageModel, as_prompts, check_pair
from safety_neurons.model.language_model import Texts as Asked
from safety_neurons.model.passes import Batch, BatchSize
from safety_neurons.neurons import NeuronSet, Selection
from safety_neurons.prompts import Prompts
from safety_neurons.results import Checkpoint


def find_attribution_patching(
    base: LanguageModel,
    aligned: LanguageModel,
    prompts: Asked,
    *,
    at: str = "path",
    midpoints: int = 8,
    sites: Sequence[str] = ("down",),
    layers: range | str | None = None,
    batch_size: BatchSize = "auto",
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
    subtract: NeuronSet | None = None,
    **choice: Unpack[Choice],
) -> Found:
    """Gradient of the explained score with respect to a soft mask m in `base + m·(aligned − base)`, mean over prompts.

    The score is mean log p(refusal) − mean log p(compliance) over the first 16 tokens, teacher-forced in the base model; refusal is the
    aligned model's own greedy completion of the prompt, compliance the base model's. Positive pushes towards refusal.

    Args:
        base: the less safe model, which is patched.
        aligned: the safer one, which gives the activations.
        prompts: usually harmful requests.
        at: `path` averages the gradient over midpoints of m from 0 to 1, all neurons together; `base` takes it at m = 0.
        midpoints: how many, for `path`.
        sites: any of `q k v o gate up down`.
        layers: a range or "A:B"; None for all.
        batch_size: prompts a batch, or "auto".
        checkpoint: partial state; a killed run continues behind its last finished batch.
        progress: called with (done, in all, tokens).
        subtract: neurons taken away after selection.
        **choice: `top`, `count`, `top_per_matrix` or `threshold`, and `agreement`; the largest 5 % by default.

    Raises:
        InputError: both models complete every prompt with the same text, or with none.
        MismatchError: the models have other shapes or tokenizers.
        NumericalError: NaN or infinity; the message names the site.
        UsageError: unknown `at`, or fewer than one midpoint.

    Source: attribution patching (Nanda 2023; Syed et al. 2023) with the path average of integrated gradients (Sundararajan et al. 2017).
    Differs: the activation that is moved is the running one, as in patching during generation: earlier neurons' moves reach it.
    """
    if at not in ("path", "base") or midpoints < 1:
        raise UsageError(f"at {at!r} with {midpoints} midpoints: expected at 'path' (with at least 1 midpoint) or 'base'")
    prompts = as_prompts(prompts)
    selection = Selection.of(**choice, default_top=0.05)
    check_pair(base, aligned)
    sizes = base.table.select(sites=sites, layers=layers).sizes
    config = {"at": at, "midpoints": midpoints if at == "path" else 0} | searched(sites, layers)
    stream = Stream(checkpoint, stream_key("attribution-patching", (base, aligned), prompts, config, selection, batch_size))
    options: dict[str, Any] = {"stream": stream, "batch_size": batch_size, "progress": progress}
    with comparing(base, aligned):
        units, counts, notes = own_completions(base, aligned, prompts, **options)
        gradients = patching_gradients(base, aligned, sizes, steps(at, midpoints))
        values, folded = attribute(base, units, sizes, gradients, selection=selection, notes=notes, **options)
    made: dict[str, Any] = {
        "table": base.table,
        "models": (base.name, aligned.name),
        "prompts": prompts,
        "selection": selection,
        "votes": folded.votes,
    }
    return finish(
        "attribution-patching", values, config=config, counts=counts.without(len(folded.failed)), notes=notes, subtract=subtract, **made
    )


def steps(at: str, number: int) -> list[float]:
    """Values of the mask at which the gradient is taken."""
    return [0.0] if at == "base" else midpoints_of(number)


def patching_gradients(
    base: LanguageModel, aligned: LanguageModel, sizes: Mapping[str, int], masks: Sequence[float]
) -> Callable[[Batch, Sequence[Scored]], dict[str, Tensor]]:
    """The function that gives each row's gradients, averaged over the mask values."""

    def gradients(batch: Batch, rows: Sequence[Scored]) -> dict[str, Tensor]:
        donors = donated(aligned, batch, sizes)
        return mean_of([mask_gradients(base, batch, rows, sizes, mask=mask, donors=donors)[0] for mask in masks])

    return gradients


def own_completions(
    base: LanguageModel,
    aligned: LanguageModel,
    prompts: Prompts,
    *,
    stream: Stream,
    batch_size: BatchSize = "auto",
    progress: Progress | None = None,
) -> tuple[list[list[Scored]], PromptCounts, list[str]]:
    """The scored rows of each prompt, from both models' own greedy completions; prompts without a difference are counted as failed."""
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
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
    notes = [f"{empty} prompts have an empty completion and were left out"] if empty else []
    notes += [f"{broken} prompts gave NaN or infinity and were left out"] if broken else []
    notes += [f"{same} prompts are completed with the same first {SCORED_TOKENS} tokens by both models and add nothing"] if same else []
    return units, PromptCounts(len(units), empty + broken, sum(row.truncated for row in encoded)), notes
