"""From summed values to `Found`: provenance, selection or votes, subtraction."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from safety_neurons.detectors.found import Found, PromptCounts
from safety_neurons.errors import NumericalError
from safety_neurons.neurons import NeuronSet, Provenance, Scores, Selection, SiteTable, Votes
from safety_neurons.neurons.selection import said_of_zeros
from safety_neurons.prompts import Prompts


class Choice(TypedDict, total=False):
    """How neurons are selected; at most one of the first four, and each detector has a default."""

    top: float | None
    count: int | None
    top_per_matrix: int | None
    threshold: float | None
    agreement: float | None


def searched(sites: Sequence[str], layers: range | str | None) -> dict[str, Any]:
    """What was searched, as it is written to the provenance."""
    return {"sites": list(sites), "layers": list(layers) if isinstance(layers, range) else layers}


def checked_scores(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The values as float32.

    Raises:
        NumericalError: a site holds NaN or infinity.
    """
    for key, scores in values.items():
        if not np.isfinite(scores).all():
            raise NumericalError(f"site {key} gave NaN or infinity: check the model's weights, or use --dtype float32")
    return {key: np.asarray(scores, dtype=np.float32) for key, scores in values.items()}


def finish(
    method: str,
    values: Mapping[str, np.ndarray],
    *,
    table: SiteTable,
    models: Iterable[str],
    selection: Selection,
    votes: Votes | None = None,
    prompts: Prompts | None = None,
    config: Mapping[str, Any] | None = None,
    counts: PromptCounts,
    notes: Iterable[str] = (),
    subtract: NeuronSet | None = None,
) -> Found:
    """Scores and the chosen set, both with provenance.

    Args:
        method: name of the detector.
        values: one number per neuron of every searched site.
        table: the model's whole site table (shares are counted against it).
        models: names of the models.
        selection: acts on the scores, or, with an agreement, on the votes.
        votes: of the prompts; only with an agreement.
        prompts: those it was found on; their hashes are kept, so that verify can count overlap.
        config: the detector's options.
        counts: prompts used, failed, truncated.
        notes: warnings so far.
        subtract: taken away after selection.

    Raises:
        NumericalError: a score is not a number.
    """
    said = list(notes)
    origin: dict[str, Any] = {
        "method": method,
        "models": tuple(models),
        "model_fingerprint": table.fingerprint,
        "prompts_sha256": prompts.sha256 if prompts is not None else "",
        "config": {**(config or {}), "selection": selection.config(), "prompt_digests": prompts.digests if prompts is not None else []},
    }
    scores = Scores(checked_scores(values), table, Provenance(kind="scores", **origin))
    if votes is None:
        chosen: Mapping[str, np.ndarray] = {key: np.flatnonzero(mask) for key, mask in selection.choose(dict(scores.items())).items()}
    else:
        chosen = votes.members(float(selection.agreement or 1.0))
        if not chosen:
            said.append(f"no neuron was chosen in that share of the prompts; an agreement of {votes.agreement_for_one():.4g} gives one")
        said += votes.said_of(chosen.keys())
    said += said_of_zeros(dict(scores.items()), chosen)
    neurons = NeuronSet(chosen, table, Provenance(kind="neurons", **origin))
    if subtract is not None:
        before = len(neurons)
        neurons = NeuronSet(dict((neurons - subtract).items()), table, Provenance(kind="neurons", **origin))
        said.append(f"{before - len(neurons)} of {before} chosen neurons were subtracted")
    return Found(scores, neurons, counts, tuple(said))
