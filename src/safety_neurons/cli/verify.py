"""verify: does a set of neurons carry the behaviour? Necessity by deactivation, sufficiency by patching, beside controls."""

import dataclasses
import functools
from typing import Any

from safety_neurons.cli.options import EvaluationPrompts, NeuronFile, OneModel, Repeats, ScoreFile, Some, TwoModels, parse_sizes
from safety_neurons.cli.session import Session
from safety_neurons.cli.verb import verb
from safety_neurons.declarations import Declaration
from safety_neurons.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verified(Declaration):
    """The set, or the scores whose largest are taken."""

    neurons: NeuronFile | None = None
    """Neuron file (or the folder of a find run)."""
    scores: ScoreFile | None = None
    """Score file (or the folder of a find run), with --sizes."""
    sizes: str | None = None
    """Comma-separated shares of the scored neurons: 0.005,0.01,0.05"""

    def check(self) -> None:
        """Also that there is a set, or scores with sizes."""
        super().check()
        if (self.neurons is None) == (self.scores is None):
            which = "neither" if self.neurons is None else "both"
            raise UsageError(f"{which} of --neurons and --scores given, expected one of them")
        if self.neurons is not None and self.sizes is not None:
            raise UsageError("--sizes needs --scores: a neuron file has one size")
        parse_sizes(self.sizes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifiedOn(Repeats, Some, EvaluationPrompts):
    """What it is measured on, and beside how many random sets; the last base has the first options."""


@verb("verify deactivate")
def deactivate(session: Session, models: OneModel, verified: Verified, beside: VerifiedOn) -> dict[str, Any]:
    """Necessity: what the model loses while these neurons are off."""

    def work() -> dict[str, Any]:
        from safety_neurons.studies import verify_deactivate

        model = session.model(models.model)
        return measured(session, verified, beside, model, functools.partial(verify_deactivate, model))

    return session.run(work)


@verb("verify patch")
def patch(session: Session, models: TwoModels, verified: Verified, beside: VerifiedOn) -> dict[str, Any]:
    """Sufficiency: how much safety these neurons' activations alone carry from the aligned model into the base model."""

    def work() -> dict[str, Any]:
        from safety_neurons.studies import verify_patch

        pair = session.pair(models.base, models.aligned)
        study = functools.partial(verify_patch, pair.base, pair.aligned)
        return measured(session, verified, beside, pair.base, study)

    return session.run(work)


def measured(session: Session, verified: Verified, beside: VerifiedOn, model: Any, study: Any) -> dict[str, Any]:
    """Load what both kinds need, measure, and keep the completions."""
    if verified.neurons is not None:
        chosen, sizes = session.neurons(verified.neurons, model), []
    else:
        chosen, sizes = session.scores(str(verified.scores), model), parse_sizes(verified.sizes)
    harmful, harmless, text = (session.read(name, model, beside.limit) for name in ("harmful", "harmless", "text"))
    completions = session.folder.path("completions.jsonl")
    with session.status("verify") as progress:
        verification = study(
            chosen,
            harmful,
            harmless,
            text=text,
            sizes=sizes,
            random=beside.random,
            max_new_tokens=beside.max_new_tokens,
            completions_file=completions,
            progress=progress,
            **session.running,
        )
    session.notes.extend(verification.notes)
    for name, shared in verification.overlap.items():
        if shared:
            session.notes.append(f"{shared} of the {name} prompts are among those the set was found on")
    return {**verification.record(), "completions": str(completions)}
