"""analyze vocabulary, progressive, tax: what single neurons do, what a set does bit by bit, and what shared neurons cost."""

import dataclasses
import pathlib
from typing import Annotated, Any, ClassVar

from safety_neurons.cli.analyze import MEASURE, MaybePair, models, with_figure
from safety_neurons.cli.options import (
    EvaluationPrompts,
    ModelName,
    NeuronFile,
    OneModel,
    PromptFile,
    Requested,
    ScoreFile,
    Some,
    listed,
)
from safety_neurons.cli.session import Session, resolve
from safety_neurons.cli.verb import verb
from safety_neurons.declarations import Count, Declaration, Panel, Positive, Reads, Share
from safety_neurons.detectors.methods import CardOptions, Positions, Searched
from safety_neurons.errors import UsageError

SCORES_FILE = "scores.safetensors"
SAFETY, HELPFUL = "safety", "helpful"


@dataclasses.dataclass(frozen=True)
class Ordered(Declaration):
    """Neurons, and the scores that give their order."""

    neurons: NeuronFile | None = None
    """Neuron file, or the folder of a find run (its scores give the order)."""
    scores: ScoreFile | None = None
    """Score file, where it is not beside the neurons."""

    def ranks(self, session: Session, model: Any) -> Any:
        """The scores of `--scores`, or those beside the neurons; None where there are none."""
        if self.scores is not None:
            return session.scores(self.scores, model)
        path = pathlib.Path(resolve(self.neurons)) if self.neurons else pathlib.Path()
        folder = path if path.is_dir() else path.parent
        return session.scores(str(folder), model) if self.neurons and (folder / SCORES_FILE).is_file() else None


@dataclasses.dataclass(frozen=True)
class Carded(Declaration):
    """Which neurons get a card."""

    at: str | None = None
    """KEY:INDEX,… instead of a file: layers.3.down:17"""
    cards: Positive = 8
    """How many neurons of the file, largest scores first."""

    @property
    def named(self) -> list[tuple[str, int]]:
        """The neurons of `--at`, as keys and indices."""
        return [read_neuron(part) for part in listed(self.at) or ()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewRequests(Some, Requested):
    """Requests that a model is measured on, a few where no number is said."""

    limit: Positive | None = 32
    """Use the first N prompts."""


@verb("analyze vocabulary")
def vocabulary(
    session: Session, given: MaybePair, ordered: Ordered, carded: Carded, requested: FewRequests, shown: CardOptions
) -> dict[str, Any]:
    """Neuron cards: what a neuron writes, where it is active, and what it alone does to the refusal's log-odds."""
    if (ordered.neurons is None) == (carded.at is None):
        which = "neither" if carded.at is None else "both"
        raise UsageError(f"{which} of --neurons and --at given, expected one of them")
    chosen = carded.named

    def work() -> dict[str, Any]:
        from safety_neurons import studies

        base, model = models(session, given.base, given.model)
        ranks, neurons = ordered.ranks(session, model), chosen
        if ordered.neurons:
            members, notes = studies.with_cards(model, session.neurons(ordered.neurons, model))
            neurons = studies.strongest(members, ranks, carded.cards, session.common.seed)
            drawn = [] if ranks is not None else ["no scores beside the neurons: the cards are of members drawn at random"]
            session.notes.extend([*notes, *drawn])
        harmful, harmless = (session.read(name, model, requested.limit) for name in ("harmful", "harmless"))
        with session.status("analyze vocabulary") as tell:
            cards = studies.vocabulary(
                model, neurons, harmful, harmless, base=base, scores=ranks, progress=tell, **shown.values(), **session.running
            )
        session.notes.extend(cards.notes)
        return with_figure(session, dict(cards.record()))

    return session.run(work)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curves(Some, EvaluationPrompts):
    """What curves are measured on, and how finely they are drawn."""

    PANEL: ClassVar[str | None] = MEASURE

    random: Count = 3
    """Random orders and random sets."""
    points: Positive = 8
    """Most steps of a curve."""
    max_new_tokens: Annotated[Positive, Panel("Prompts")] = 64
    """Length of a completion, in tokens."""


@verb("analyze progressive")
def progressive(session: Session, given: OneModel, ordered: Ordered, curves: Curves) -> dict[str, Any]:
    """Switch a set off layer by layer and neuron by neuron: curves of safety and capability, with bands of random orders."""
    if ordered.neurons is None:
        raise UsageError("--neurons is missing; expected a neuron file or the folder of a find run")
    path = ordered.neurons

    def work() -> dict[str, Any]:
        from safety_neurons import studies

        model = session.model(given.model)
        neurons, ranks = session.neurons(path, model), ordered.ranks(session, model)
        harmful, harmless, text = (session.read(name, model, curves.limit) for name in ("harmful", "harmless", "text"))
        completions = session.folder.path("completions.jsonl")
        drawn = {name: getattr(curves, name) for name in ("random", "points", "max_new_tokens")}
        options = {**drawn, **session.running, "scores": ranks, "text": text, "completions_file": completions}
        with session.status("analyze progressive") as tell:
            found = studies.progressive(model, neurons, harmful, harmless, progress=tell, **options)
        session.notes.extend(found.notes)
        return with_figure(session, dict(found.record()))

    return session.run(work)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedModels(Declaration):
    """A base model, and models that were trained from it."""

    PANEL: ClassVar[str | None] = "Models"

    base: ModelName
    """The less safe model: ID[@REVISION][+ADAPTER…] or organism:NAME/base."""
    safety: ModelName
    """The base model after a safety preference training."""
    helpful: ModelName
    """The base model after a helpfulness preference training."""
    control: Annotated[list[str] | None, Reads("model")] = None
    """NAME=MODEL after some other training, to hold the two against; may be repeated."""

    @property
    def specs(self) -> dict[str, str]:
        """The trainings by name, the controls behind the two."""
        specs = {SAFETY: self.safety, HELPFUL: self.helpful}
        for text in self.control or ():
            name, sign, model = text.partition("=")
            if not (name and sign and model) or name in specs:
                raise UsageError(f"--control {text!r}: expected NAME=MODEL with a name that no other training has")
            specs[name] = model
        return specs

    def check(self) -> None:
        """Also the names."""
        super().check()
        _ = self.specs


@dataclasses.dataclass(frozen=True)
class ScoredOn(Declaration):
    """What the trainings are scored on: one list, or two."""

    PANEL: ClassVar[str | None] = "Prompts"

    prompts: PromptFile = "builtin:harmful"
    """A file or builtin:NAME[/LANG]."""
    also: Annotated[str, Reads("prompts", column=True, words=("none",))] = "builtin:harmless"
    """Further requests to score on, or none."""
    find_limit: Positive | None = None
    """Use the first N of each list to score on."""


@dataclasses.dataclass(frozen=True)
class Helpfulness(Declaration):
    """What counts as helpful."""

    helpfulness: str = "auto"
    """answered, taught, ending:TEXT, or auto: taught for organisms, else answered."""


@dataclasses.dataclass(frozen=True)
class SharedNeurons(Declaration):
    """Which neurons count as shared, and how they are measured."""

    PANEL: ClassVar[str | None] = "Prompts"

    positions: Positions = "completion"
    """completion, completion-predicting, prompt or prompt-last."""
    top: Annotated[Share, Panel("Options")] = 0.05
    """Share of the neurons in a top set."""
    random: Annotated[Count, Panel("Options")] = 5
    """Random sets of the size of the shared one."""
    max_new_tokens: Positive = 64
    """Length of a completion, in tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaxStudy(SharedNeurons, Searched, Some, Helpfulness, Requested, ScoredOn, TrainedModels):
    """Everything that decides the analysis; the last base has the first options."""


@verb("analyze tax")
def tax(session: Session, study: TaxStudy) -> dict[str, Any]:
    """The alignment tax: overlap of safety and helpfulness neurons, and what patching the shared ones costs and brings on both sides."""

    def work() -> dict[str, Any]:
        from safety_neurons import studies
        from safety_neurons.analysis.overlap import relations
        from safety_neurons.prompt_lists import Prompts

        before, *loaded = session.several([study.base, *study.specs.values()])
        trained = dict(zip(study.specs, loaded, strict=True))
        measure = study.helpfulness
        if measure == "auto":
            measure = "answered" if before.prompt_folder is None else "taught"
        lists = [session.read(name, before, study.find_limit) for name in ("prompts", "also")]
        scored = Prompts([prompt for prompts in lists if prompts is not None for prompt in prompts])
        asked = [session.read(name, before, study.limit) for name in ("harmful", "harmless")]
        searched: dict[str, Any] = {"sites": listed(study.sites) or ("down",), "layers": study.layers, "positions": study.positions}
        writing: dict[str, Any] = {"max_new_tokens": study.max_new_tokens, "batch_size": session.batch_size()}
        with session.status("tax") as tell:
            read = studies.read_trainings(before, trained, scored, progress=tell, **searched, **writing)
            shared = read.shared(SAFETY, HELPFUL, study.top)
            completions = session.folder.path("completions.jsonl")
            crossed = studies.cross_patch(
                {name: trained[name] for name in (SAFETY, HELPFUL)},
                shared,
                *asked,
                measure=studies.helpfulness(measure),
                random=study.random,
                seed=session.common.seed,
                completions_file=completions,
                progress=tell,
                **writing,
            )
            if tell is not None:
                tell("analyse")
            pairs = relations(read.changes, top=study.top, seed=session.common.seed)
        session.notes.extend([*read.notes, *crossed.bench.notes])
        record: dict[str, Any] = {
            "top": study.top,
            "prompts": read.prompts,
            "helpfulness": measure,
            "relations": [each.record() for each in pairs],
        }
        record |= {**crossed.record(), "completions": str(completions)}
        files = keep(session, read, shared)
        return with_figure(session, {**record, "files": files})

    return session.run(work)


def read_neuron(text: str) -> tuple[str, int]:
    """`layers.3.down:17` as a key and an index."""
    from safety_neurons.neurons import parse_key

    key, sign, index = text.rpartition(":")
    if not sign or not index.isascii() or not index.isdigit():
        raise UsageError(f"--at {text!r}: expected KEY:INDEX, such as layers.3.down:17")
    parse_key(key)
    return key, int(index)


def keep(session: Session, read: Any, shared: Any) -> dict[str, str]:
    """Write the scores of every training and the shared neurons; where they are."""
    files = {f"scores_{name}": session.folder.path(f"scores-{name}.safetensors") for name in read.scores}
    for name, scores in read.scores.items():
        scores.save(files[f"scores_{name}"])
    files["shared"] = session.folder.path("shared.safetensors")
    shared.save(files["shared"])
    return {name: str(path) for name, path in files.items()}
