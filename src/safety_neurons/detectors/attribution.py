"""Attribution: activation × gradient of the refusal score, for every neuron of one model at once."""

from collections.abc import Sequence

from torch import Tensor

from safety_neurons.detectors.gradients import SCORED_TOKENS, ScoredRow, attribute, explained, mask_gradients, mean_of, midpoints_of
from safety_neurons.detectors.methods import Attribution
from safety_neurons.detectors.runner import PromptCounts, Run, Scored
from safety_neurons.errors import InputError
from safety_neurons.model import LanguageModel
from safety_neurons.model.passes import Batch


def score(method: Attribution, run: Run) -> Scored:
    """Activation times gradient of every neuron, at the model itself or averaged along the scaling of all activations."""
    model = run.aligned
    encoded = model.encode(run.prompts, reserve=SCORED_TOKENS)
    sides = [method.texts["refusal"], method.texts["compliance"]]
    units = [explained(row.ids, *([_ids(model, row.ids, text) for text in texts] for texts in sides)) for row in encoded]
    steps = midpoints_of(method.integrated) if method.integrated else [1.0]

    def gradients(batch: Batch, rows: Sequence[ScoredRow]) -> dict[str, Tensor]:
        return mean_of([mask_gradients(model, batch, rows, run.sizes, mask=step)[0] for step in steps])

    values, folded = attribute(run, model, units, gradients)
    counts = PromptCounts(len(units), 0, sum(row.truncated for row in encoded)).without(len(folded.failed))
    return Scored(values, counts, folded.votes)


def _ids(model: LanguageModel, prompt: Sequence[int], text: str) -> list[int]:
    """Tokens of a text behind a prompt: with a space between where the prompt ends in a visible character."""
    end = model.tokenizer.decode([prompt[-1]], skip_special_tokens=True)
    space = " " if end and not end[-1].isspace() else ""
    ids = model.tokenizer(space + text.strip(), add_special_tokens=False)["input_ids"]
    if not ids:
        raise InputError(f"the text {text!r} has no tokens; expected a sentence to score")
    return [int(token) for token in ids]
