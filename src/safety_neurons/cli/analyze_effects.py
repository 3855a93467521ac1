"""analyze vocabulary, progressive, tax: what single neurons do, what a set does bit by bit, and what shared neurons cost."""

import dataclasses
import pathlib
from typing import Annotated, Any, ClassVar

from safety_neurons.cli import console
from safety_neurons.cli.analyze import MEASURE, MaybePair, figure, models
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
        result = cards.record()
        return {**result, **figure(session, "cards_figure", result)}

    return session.run(work, show_cards)


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
        result = found.record()
        return {**result, **figure(session, "progressive_figure", result)}

    return session.run(work, show_progressive)


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
        from safety_neurons.analysis.figures import tax_figure
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
        drawing = session.folder.path("figure.svg")
        tax_figure(record, drawing)
        return {**record, "files": files, "figure": str(drawing)}

    return session.run(work, show_tax)


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


def show_cards(result: dict[str, Any]) -> None:
    """One row a neuron: what it writes and what it alone does."""
    from safety_neurons.analysis.figures import words

    kinds = list(result["log_odds"])
    rows = []
    for card in result["cards"]:
        writes = card["writes"]
        likelier, against = (words(writes[side][:4]) if writes["defined"] else "–" for side in ("top", "bottom"))
        effects = [with_star(card["effects"][kind], result["random"][kind]) for kind in kinds]
        rows.append([card["neuron"].removeprefix("layers."), likelier, against, *effects])
    columns = ["neuron", "makes likelier", "makes less likely", *kinds]
    caption = "change of the refusal's log-odds by this neuron alone; * clear, and the interval lies outside 95 % of random neurons"
    console.print_table("Neuron cards", columns, rows, caption, result["cards"])
    for kind in kinds:
        alone, odds = result["random"][kind], result["log_odds"][kind]
        spread = f"random neurons {alone['low']:+.3f} to {alone['high']:+.3f}" if alone["n"] else "no random neurons"
        together = odds["change_together"]["value"]
        console.say(f"{kind}: untreated {odds['untreated']:+.2f}, all cards together {together:+.2f}, {spread}")


def with_star(number: dict[str, Any], alone: dict[str, Any]) -> str:
    """A signed number, marked where it stands out among random neurons."""
    from safety_neurons.results import stands_out

    if number["value"] is None:
        return "undefined"
    if number["low"] is None:
        return f"{number['value']:+.3f}"
    return f"{number['value']:+.3f}{'*' if stands_out(number, alone) else ''}"


def show_progressive(result: dict[str, Any]) -> None:
    """Every curve as rows, the bands behind them."""
    untreated = result["untreated"]
    rows = [["untreated", "", 0, *measured(untreated)]]
    for curve in result["curves"]:
        for place, point in enumerate(curve["points"]):
            rows.append([curve["order"] if place == 0 else "", point["step"], point["n_neurons"], *measured(point)])
    columns = ["order", "off last", "off", "harmful refused", "harmless", "perplexity", "KL"]
    caption = "off: neurons switched off so far; harmless: harmless requests refused; KL: per token on harmless requests, in nats"
    console.print_table(f"{result['n_neurons']:,} neurons switched off bit by bit", columns, rows, caption, result["curves"])
    for kind, band in result["random"].items():
        line = ", ".join(
            f"{from_to(point['n_neurons'])} off {point['harmful_refused']['low']:.2f} to {point['harmful_refused']['high']:.2f}"
            for point in band
            if point["harmful_refused"]["low"] is not None
        )
        console.say(f"{kind}, harmful refused: {line}")


def from_to(numbers: list[int]) -> str:
    """Numbers of neurons at one step, which differ where orders of layers do."""
    return f"{max(numbers)}" if min(numbers) == max(numbers) else f"{min(numbers)}–{max(numbers)}"


def measured(arm: dict[str, Any]) -> list[Any]:
    """The numbers of one point."""
    return [arm["harmful_refused"], arm["harmless_refused"]["value"], arm["perplexity"], arm["divergence"]]


def show_tax(result: dict[str, Any]) -> None:
    """Pairs of trainings, then the models under cross-patching, then the price in two sentences."""
    from safety_neurons.results import clear_word

    rows = []
    for pair in result["relations"]:
        overlap, ranks, chance = pair["overlap"], pair["spearman"], pair["chance"]
        rows.append(
            [
                " and ".join(pair["pair"]),
                f"{overlap['value']:.0f} of {pair['size']}",
                *(
                    f"{chance[name]['expected']:.1f} [{chance[name]['low']:.0f}, {chance[name]['high']:.0f}]"
                    for name in ("all", "in_activation")
                ),
                with_interval(ranks["all"]),
                with_interval(ranks["given_activation"]),
                with_interval(ranks["union"]),
                None if pair["shared"] is None else pair["shared"]["cosine"],
            ]
        )
    console.print_table(
        f"Top {console.share(result['top'])} of {result['relations'][0]['candidates']:,} neurons, {result['prompts']} prompts",
        ["trainings", "shared", "by chance", "as active", "Spearman", "given activation", "in the union", "cosine"],
        rows,
        caption="by chance: range of random sets; as active: of sets with as many in every layer and tenth of it by activation\n"
        "Spearman of change scores: over all neurons, with activation held fixed, over the union of the two sets (95 % over prompts)\n"
        "cosine: of the two changes of the shared neurons' activations (1 the same way, -1 opposite ways)",
    )
    rows = [[arm["arm"], arm["refused"], arm["helpful"], arm["over_refused"]] for arm in result["arms"]]
    console.print_table(
        f"\nCross-patching of {result['n_shared']} shared neurons ({result['helpfulness']})",
        ["model", "harmful refused", "helpful", "harmless refused"],
        rows,
        compared=result["cross_patching"],
    )
    for direction in result["cross_patching"]:
        receiver, donor = direction["receiver"], direction["donor"]
        told = []
        for name, word in (("refused", "refusals of harmful requests"), ("helpful", "helpful answers")):
            found = direction[name]
            against = found["against_random"]
            clear = "" if against is None else f" (against random neurons {console.shown(against)}, {clear_word(against)})"
            told.append(f"{word} {console.shown(found['change'])}{clear}")
        console.say(f"{receiver} from {donor}: {'; '.join(told)}")


def with_interval(number: dict[str, Any]) -> str | None:
    """A correlation with its interval over prompts."""
    low, high = number["interval"]
    return None if number["value"] is None else console.shown({"value": number["value"], "low": low, "high": high})
