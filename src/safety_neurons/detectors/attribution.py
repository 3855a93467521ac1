"""Attribution: activation × gradient of the refusal score, for every neuron of one model at once."""

from collections.abc import Sequence
from typing import Any, Unpack

from torch import Tensor

from safety_neurons.detectors.finishing import Choice, finish, searched
from safety_neurons.detectors.found import Found, PromptCounts
from safety_neurons.detectors.gradients import SCORED_TOKENS, Scored, attribute, explained, mask_gradients, mean_of, midpoints_of
from safety_neurons.detectors.streaming import Progress, Stream, stream_key
from safety_neurons.errors import InputError, UsageError
from safety_neurons.model import LanguageModel, as_prompts
from safety_neurons.model.language_model import Texts as Asked
from safety_neurons.model.passes import Batch, BatchSize, evaluating
from safety_neurons.neurons import SITES, NeuronSet, Selection
from safety_neurons.results import Checkpoint

REFUSALS = ("I'm sorry, but I can't help with that.", "I cannot help with this request.")
COMPLIANCES = ("Sure, here is what you asked for.", "Of course, here is how to do it.")


def find_attribution(
    model: LanguageModel,
    prompts: Asked,
    *,
    refusal: str | Sequence[str] | None = None,
    compliance: str | Sequence[str] | None = None,
    integrated: int = 0,
    sites: Sequence[str] = SITES,
    layers: range | str | None = None,
    batch_size: BatchSize = "auto",
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
    subtract: NeuronSet | None = None,
    **choice: Unpack[Choice],
) -> Found:
    """Σ over tokens of activation × gradient of mean log p(refusal) − mean log p(compliance), mean over prompts (positive: refusal).

    One forward and one backward pass give every neuron of every site.

    Args:
        model: the model.
        prompts: usually harmful requests.
        refusal: texts of a refusal; several are averaged; built-in English ones by default.
        compliance: texts of a compliance, likewise.
        integrated: steps of the integral over scaling the searched activations from 0 to 1, all together; 0 for the plain gradient.
        sites: any of `q k v o gate up down`.
        layers: a range or "A:B"; None for all.
        batch_size: prompts a batch, or "auto".
        checkpoint: partial state; a killed run continues behind its last finished batch.
        progress: called with (batches done, in all, tokens).
        subtract: neurons taken away after selection.
        **choice: `top`, `count`, `top_per_matrix` or `threshold`, and `agreement`; the largest 1 % by default.

    Raises:
        InputError: a text without tokens, or no prompts.
        NumericalError: NaN or infinity; the message names the site.
        UsageError: a negative number of steps.

    Source: gradient × activation and its path integral (Sundararajan et al. 2017), on the score that this project defines.
    Differs: the integral scales all searched activations together, so that the attributions of all neurons sum to the score's change
    between everything deactivated and nothing.
    """
    if integrated < 0:
        raise UsageError(f"integrated {integrated} is negative: expected a number of steps, or 0 for the plain gradient")
    prompts = as_prompts(prompts)
    selection = Selection.of(**choice, default_top=0.01)
    sides = {"refusal": _listed(refusal, REFUSALS), "compliance": _listed(compliance, COMPLIANCES)}
    config = {**sides, "integrated": integrated} | searched(sites, layers)
    stream = Stream(checkpoint, stream_key("attribution", (model,), prompts, config, selection, batch_size))
    encoded = model.encode(prompts, reserve=SCORED_TOKENS)
    units = [explained(row.ids, *([_ids(model, row.ids, text) for text in texts] for texts in sides.values())) for row in encoded]
    sizes = model.table.select(sites=sites, layers=layers).sizes
    steps = midpoints_of(integrated) if integrated else [1.0]
    notes: list[str] = []

    def gradients(batch: Batch, rows: Sequence[Scored]) -> dict[str, Tensor]:
        return mean_of([mask_gradients(model, batch, rows, sizes, mask=step)[0] for step in steps])

    options: dict[str, Any] = {"stream": stream, "selection": selection, "batch_size": batch_size, "progress": progress}
    with evaluating(model.model):
        values, folded = attribute(model, units, sizes, gradients, notes=notes, **options)
    made: dict[str, Any] = {
        "table": model.table,
        "models": (model.name,),
        "prompts": prompts,
        "selection": selection,
        "votes": folded.votes,
    }
    counts = PromptCounts(len(units), 0, sum(row.truncated for row in encoded)).without(len(folded.failed))
    return finish("attribution", values, config=config, counts=counts, notes=notes, subtract=subtract, **made)


def _listed(texts: str | Sequence[str] | None, default: Sequence[str]) -> list[str]:
    if texts is None:
        return list(default)
    return [texts] if isinstance(texts, str) else list(texts)


def _ids(model: LanguageModel, prompt: Sequence[int], text: str) -> list[int]:
    """Tokens of a text behind a prompt: with a space between where the prompt ends in a visible character."""
    end = model.tokenizer.decode([prompt[-1]], skip_special_tokens=True)
    space = " " if end and not end[-1].isspace() else ""
    ids = model.tokenizer(space + text.strip(), add_special_tokens=False)["input_ids"]
    if not ids:
        raise InputError(f"the text {text!r} has no tokens; expected a sentence to score")
    return [int(token) for token in ids]
