"""analyze: where sets lie, how far they agree, what each does to all groups, to single answers bit by bit,
and what shared neurons cost.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from safety_neurons.cli.session import (
    EvaluationPrompts,
    ModelName,
    NeuronFile,
    OneModel,
    OtherText,
    PromptFile,
    Repeats,
    Requested,
    ScoreFile,
    Session,
    Some,
    TwoModels,
    listed,
    resolve,
)
from safety_neurons.cli.verb import verb
from safety_neurons.declarations import Count, Declaration, Panel, Positional, Positive, Reads, Share
from safety_neurons.detectors.methods import HowFound, Positions, by_name
from safety_neurons.detectors.rules import AtSites, Searched
from safety_neurons.errors import UsageError

FIND, MEASURE = "Which neurons", "What is measured"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedSets(Declaration):
    """Sets or scores with names, and what is taken of scores."""

    sets: Annotated[list[str], Positional, Reads("sets")]
    """[NAME=]PATH: neuron files, score files, folders of find runs, or organism:NAME/SET."""
    top: Share | None = None
    """Take this fraction of every list of scores, whatever set lies beside it."""
    count: Positive | None = None
    """Take this many of every list of scores."""


@verb("analyze layers")
def layers(session: Session, given: NamedSets) -> dict[str, Any]:
    """Where neurons lie: layers, sites, heads, and the papers' claims, beside a random set of the same
    size.
    """

    def work() -> dict[str, Any]:
        from safety_neurons import analysis

        items = analysis.read_named(paths(given.sets), top=given.top, count=given.count, together=False)
        session.notes.extend(kept_sizes(given, items))
        tables = [analysis.layers(item) for item in items]
        return with_figure(session, {"sets": [table.record() for table in tables]})

    return session.run(work)


@verb("analyze overlap")
def overlap(session: Session, given: NamedSets) -> dict[str, Any]:
    """How far sets and scores agree: methods, seeds, data sets, checkpoints, before and after tuning."""

    def work() -> dict[str, Any]:
        from safety_neurons import analysis

        items = analysis.read_named(paths(given.sets), top=given.top, count=given.count)
        session.notes.extend(kept_sizes(given, items))
        return with_figure(session, analysis.overlap(items, seed=session.common.seed).record())

    return session.run(work)


def kept_sizes(given: NamedSets, items: Sequence[Any]) -> list[str]:
    """A line on sets that `--top` or `--count` could not take anew."""
    without = [item.name for item in items if item.scores is None]
    if not without or (given.top is None and given.count is None):
        return []
    flag = "--count" if given.top is None else "--top"
    return [f"{flag} takes sets anew from scores, and none lie beside {', '.join(without)}: kept as they are"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaybePair(OneModel):
    """The model, and the less safe one where a method needs a pair."""

    PANEL: ClassVar[str | None] = "Models"

    base: ModelName | None = None
    """The less safe model, for methods that need a pair."""


@dataclasses.dataclass(frozen=True)
class FindLimit(Declaration):
    """How many requests sets are found on."""

    find_limit: Annotated[Positive | None, Panel(FIND)] = None
    """Find on the first N requests of each group."""


@dataclasses.dataclass(frozen=True)
class TestLimit(Declaration):
    """How many requests are measured on."""

    test_limit: Annotated[Positive | None, Panel(MEASURE)] = None
    """Measure on the first N requests of each group."""


@dataclasses.dataclass(frozen=True)
class RandomSets(Repeats):
    """Controls."""

    random: Annotated[Count, Panel(MEASURE)] = 5
    """Random sets for each set."""


@dataclasses.dataclass(frozen=True)
class LanguageLists(Declaration):
    """The languages, and what their sets are found on."""

    PANEL: ClassVar[str | None] = FIND

    languages: Annotated[str, Panel("Options")] = "en,de,es"
    """Comma-separated languages of parallel requests."""
    find_prompts: Annotated[str, Reads("files")] = "builtin:harmful/{language}"
    """Requests to find on; {language} stands for each."""
    sets: Annotated[str | None, Reads("sets")] = None
    """LANGUAGE=FILE,…: sets that are there already, instead of finding."""


@dataclasses.dataclass(frozen=True)
class LanguageTests(Declaration):
    """What languages are measured on."""

    test_prompts: Annotated[str, Reads("files"), Panel(MEASURE)] = "builtin:harmful-test/{language}"
    """Requests to measure on; {language} stands for each."""


@dataclasses.dataclass(frozen=True)
class Definitions(Declaration):
    """What specific means."""

    definitions: Annotated[str, Panel(MEASURE)] = "union,intersection"
    """Which specific sets are deactivated: union, intersection."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageStudy(
    RandomSets, Definitions, TestLimit, LanguageTests, FindLimit, AtSites, HowFound, LanguageLists, MaybePair
):
    """Everything that decides the analysis; the last base has the first options."""

    def check(self) -> None:
        """Also that there are languages to compare, and that the method has the models it needs."""
        super().check()
        _ = self.given
        if self.base is None and by_name(self.chosen).PAIR:
            raise UsageError(
                f"--method {self.chosen} needs a pair; give --base, or choose importance or attribution"
            )
        if len(self.codes) < 2 or len(set(self.codes)) < len(self.codes):
            raise UsageError(
                f"--languages {self.languages!r}: expected at least two, comma-separated, none twice"
            )
        for flag, text in (("--find-prompts", self.find_prompts), ("--test-prompts", self.test_prompts)):
            if "{language}" not in text:
                raise UsageError(
                    f"{flag} {text!r}: expected {{language}} in it, which stands for each language"
                )
        unknown = [part for part in listed(self.definitions) or () if part not in ("union", "intersection")]
        if unknown:
            raise UsageError(f"--definitions {unknown[0]!r} is unknown; expected union, intersection or both")

    @property
    def codes(self) -> tuple[str, ...]:
        """The languages."""
        return listed(self.languages) or ()

    @property
    def chosen(self) -> str:
        """The method that finds."""
        return self.method or ("swap-attribution" if self.base else "importance")

    @property
    def given(self) -> dict[str, str]:
        """Files of sets by language, where they are given."""
        files = named_files(self.sets)
        missing = [code for code in self.codes if files and code not in files]
        if missing:
            raise UsageError(f"--sets has no set for {missing[0]!r}; expected one for every language")
        return files


@verb("analyze languages")
def languages(session: Session, study: LanguageStudy) -> dict[str, Any]:
    """Sets per language, what they share, and refusals in every language while each is off.

    Finds by swap-attribution where --base is given, otherwise by importance.
    """

    def work() -> dict[str, Any]:
        from safety_neurons import analysis, studies

        base, model = models(session, study.base, study.model)

        def texts(pattern: str, limit: int | None) -> dict[str, Any]:
            return {
                code: session.prompts(pattern.replace("{language}", code), model, limit=limit)
                for code in study.codes
            }

        tests = texts(study.test_prompts, study.test_limit)
        with session.status("analyze languages") as tell:
            if study.given:
                sets = {code: session.neurons(path, model) for code, path in study.given.items()}
            else:
                groups = studies.Groups(texts(study.find_prompts, study.find_limit))
                chosen = finding(session, study, study.chosen)
                sets = studies.find_by_group(
                    base, model, groups, **chosen, progress=tell, notes=session.notes
                )
            compared = analysis.languages(sets, seed=session.common.seed)
            matrix = studies.deactivation_matrix(
                model,
                wanted(compared.named(), study.definitions),
                tests,
                random=study.random,
                max_new_tokens=session.answer_length(study.max_new_tokens),
                completions_file=session.folder.path("completions.jsonl"),
                progress=tell,
                **session.running,
            )
        session.notes.extend(matrix.notes)
        method = "given" if study.given else study.chosen
        result = {
            "method": method,
            **compared.record(),
            **matrix.record(),
            "neurons": kept(session, compared.named()),
        }
        return with_figure(session, result)

    return session.run(work)


@dataclasses.dataclass(frozen=True)
class Suites(Declaration):
    """The groups of requests that sets are found on."""

    PANEL: ClassVar[str | None] = FIND

    prompts: PromptFile = "builtin:harmful"
    """Requests to find on, told apart by --by."""
    by: str = "category"
    """category, language, or another field of the prompts."""
    suites: Annotated[str | None, Reads("suites")] = None
    """NAME=FILE,…: one group a file instead; odd records to find on, even ones to measure on, what shares a
    group on one side.
    """
    groups: str | None = None
    """Only these groups, comma-separated."""

    def check(self) -> None:
        """Also the form of the suites."""
        super().check()
        named_files(self.suites)


@dataclasses.dataclass(frozen=True)
class AbilityLists(Declaration):
    """What patching is measured on."""

    PANEL: ClassVar[str | None] = MEASURE

    harmful: PromptFile = "builtin:harmful-test"
    """Requests to measure on."""
    harmless: Annotated[PromptFile, Panel("Prompts")] = "builtin:harmless-test"
    """Harmless requests: a file or builtin:NAME[/LANG]."""
    tasks: str = "perplexity,kl"
    """Capability by name, comma-separated."""
    answers: OtherText = "none"
    """Questions with answers: share given word for word."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferStudy(RandomSets, TestLimit, AbilityLists, FindLimit, AtSites, HowFound, Suites, TwoModels):
    """Everything that decides the analysis; the last base has the first options."""


@verb("analyze transfer")
def transfer(session: Session, study: TransferStudy) -> dict[str, Any]:
    """Neurons found on one red-team set, their causal effect on the others, and general ability under
    patching.

    Finds by contrast, at down, unless a method is given.
    """
    method = study.method or "contrast"

    def work() -> dict[str, Any]:
        from safety_neurons import analysis, studies

        pair = session.pair(study.base, study.aligned)
        find, test = apart(session, study, pair.base)
        limit = None if study.test_limit is None else study.test_limit * len(test.names)
        harmless, answers = (session.read(name, pair.base, limit) for name in ("harmless", "answers"))
        tasks = listed(study.tasks) or ()
        studies.ability_tasks(pair.base, tasks, answers, limit)  # Refused before the search, which is long.
        with session.status("analyze transfer") as tell:
            chosen = finding(session, study, method)
            sets = studies.find_by_group(
                pair.base,
                pair.aligned,
                find,
                **chosen,
                to_patch=True,
                progress=tell,
                notes=session.notes,
            )
            moved = studies.transfer(
                pair.base,
                pair.aligned,
                sets,
                test.members,
                harmless,
                tasks=tasks,
                answers=answers,
                limit=limit,
                random=study.random,
                max_new_tokens=session.answer_length(study.max_new_tokens),
                completions_file=session.folder.path("completions.jsonl"),
                progress=tell,
                **session.running,
            )
        session.notes.extend(moved.notes)
        named = analysis.name_sets(sets.items())
        together = (
            analysis.overlap(named, seed=session.common.seed).record() if len(sets) > 1 else {"pairs": []}
        )
        agreed = {"overlap": together["pairs"], "mean_jaccard": together.get("mean_jaccard")}
        result = {"method": method, **moved.record(), **agreed, "neurons": kept(session, sets)}
        return with_figure(session, result)

    return session.run(work)


def paths(sets: list[str]) -> list[str]:
    """The arguments with `organism:NAME/SET` replaced by the file it stands for.

    A run folder keeps its own name.
    """
    named = [text.partition("=") for text in sets]
    return [
        f"{name}={resolve(path)}" if path.startswith("organism:") else resolve(f"{name}{sign}{path}")
        for name, sign, path in named
    ]


def with_figure(session: Session, result: dict[str, Any]) -> dict[str, Any]:
    """The result with a figure beside it."""
    return session.drawn(result, session.folder.path("figure.svg"))


def named_files(text: str | None) -> dict[str, str]:
    """`NAME=FILE,…` as a dictionary."""
    files: dict[str, str] = {}
    for part in listed(text) or ():
        name, sign, path = part.partition("=")
        if not sign or not name or not path:
            raise UsageError(f"{part!r}: expected NAME=FILE, several of them separated by commas")
        files[name] = resolve(path)
    return files


def models(session: Session, base: str | None, model: str) -> tuple[Any, Any]:
    """The less safe model, where there is one, and the model."""
    if base is None:
        return None, session.model(model)
    pair = session.pair(base, model)
    return pair.base, pair.aligned


def finding(session: Session, study: LanguageStudy | TransferStudy, method: str) -> dict[str, Any]:
    """Arguments of finding a set on every group."""
    return {
        "method": method,
        "units": study.units,
        "top": study.top,
        "sites": listed(study.sites) or (("down",) if method == "contrast" else None),
        "max_new_tokens": session.answer_length(study.max_new_tokens),
        "batch_size": session.batch_size(),
        "place": session.folder.path,
    }


def kept(session: Session, sets: dict[str, Any]) -> dict[str, str]:
    """Write the sets that have members; where they are."""
    files = {}
    for number, (name, neurons) in enumerate(
        (name, neurons) for name, neurons in sets.items() if len(neurons)
    ):
        file = session.folder.path(f"neurons-{number}.safetensors")
        neurons.save(file)
        files[name] = str(file)
    return files


def wanted(sets: dict[str, Any], definitions: str) -> dict[str, Any]:
    """The sets to deactivate: without the definitions that are not asked for."""
    names = listed(definitions) or ()
    left_out = [f"minus {name}" for name in ("union", "intersection") if name not in names]
    return {name: part for name, part in sets.items() if not any(name.endswith(end) for end in left_out)}


def apart(session: Session, study: TransferStudy, model: Any) -> tuple[Any, Any]:
    """Requests to find on and to measure on, by group."""
    from safety_neurons.studies import Groups

    files = named_files(study.suites)
    if files:
        whole = {
            name: session.prompts(path, model) if pathlib.Path(path).exists() else suite(path)
            for name, path in files.items()
        }
        find, test = (dict(side.members) for side in Groups.halves(whole))
    else:
        find, test = (
            dict(Groups.by(session.read(name, model), study.by).members) for name in ("prompts", "harmful")
        )
    names = list(listed(study.groups) or [name for name in find if name in test])
    unknown = [name for name in names if name not in find or name not in test]
    if unknown or not names:
        raise UsageError(
            f"no group {(unknown or [study.by])[0]!r} to find and to measure on; the groups are "
            f"{', '.join(find)}"
        )
    return (
        Groups({name: find[name][: study.find_limit] for name in names}),
        Groups({name: test[name][: study.test_limit] for name in names}),
    )


def suite(name: str) -> Any:
    """The prompts of a named suite."""
    from safety_neurons.suites import suite as open_suite

    return open_suite(name).prompts


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
        path = scores_of(self.neurons, self.scores)
        return None if path is None else session.scores(path, model)


def scores_of(neurons: str | None, scores: str | None) -> str | None:
    """Where the scores of a set are: the file that is named, or one beside the neurons."""
    if scores is not None or neurons is None:
        return scores
    path = pathlib.Path(resolve(neurons))
    folder = path if path.is_dir() else path.parent
    return str(folder) if (folder / SCORES_FILE).is_file() else None


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


@dataclasses.dataclass(frozen=True)
class CardOptions(Declaration):
    """What a neuron card holds."""

    PANEL: ClassVar[str | None] = MEASURE

    refusal: str | None = None
    """Text of a refusal, without --base."""
    compliance: str | None = None
    """Text of a compliance, without --base."""
    tokens: Positive = 10
    """Tokens shown at either end."""
    random: Count = 20
    """Random neurons of the same matrices."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewRequests(Some, Requested):
    """Requests that a model is measured on, a few where no number is said."""

    limit: Positive | None = 32
    """Use the first N prompts."""


@verb("analyze vocabulary")
def vocabulary(
    session: Session,
    given: MaybePair,
    ordered: Ordered,
    carded: Carded,
    requested: FewRequests,
    shown: CardOptions,
) -> dict[str, Any]:
    """Neuron cards: what a neuron writes, where it is active, and what it alone does to the refusal's
    log-odds.
    """
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
            drawn = (
                []
                if ranks is not None
                else ["no scores beside the neurons: the cards are of members drawn at random"]
            )
            session.notes.extend([*notes, *drawn])
        harmful, harmless = (session.read(name, model, requested.limit) for name in ("harmful", "harmless"))
        with session.status("analyze vocabulary") as tell:
            cards = studies.vocabulary(
                model,
                neurons,
                harmful,
                harmless,
                base=base,
                scores=ranks,
                progress=tell,
                **shown.values(),
                **session.running,
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
    max_new_tokens: Annotated[Positive | None, Panel("Prompts")] = None
    """Length of a completion, in tokens. [default: 256, on organisms 64]"""


@verb("analyze progressive")
def progressive(session: Session, given: OneModel, ordered: Ordered, curves: Curves) -> dict[str, Any]:
    """Switch a set off layer by layer and neuron by neuron: curves of safety and capability, with bands of
    random orders.
    """
    if ordered.neurons is None:
        raise UsageError("--neurons is missing; expected a neuron file or the folder of a find run")
    path = ordered.neurons

    def work() -> dict[str, Any]:
        from safety_neurons import studies

        model = session.model(given.model)
        neurons, ranks = session.neurons(path, model), ordered.ranks(session, model)
        harmful, harmless, text = (
            session.read(name, model, curves.limit) for name in ("harmful", "harmless", "text")
        )
        completions = session.folder.path("completions.jsonl")
        options = {
            "random": curves.random,
            "points": curves.points,
            "max_new_tokens": session.answer_length(curves.max_new_tokens),
            "scores": ranks,
            "text": text,
            "completions_file": completions,
            **session.running,
        }
        with session.status("analyze progressive") as tell:
            steps = studies.progressive(model, neurons, harmful, harmless, progress=tell, **options)
        session.notes.extend(steps.notes)
        return with_figure(session, dict(steps.record()))

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
                raise UsageError(
                    f"--control {text!r}: expected NAME=MODEL with a name that no other training has"
                )
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
    max_new_tokens: Positive | None = None
    """Length of a completion, in tokens. [default: 256, on organisms 64]"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaxStudy(SharedNeurons, Searched, Some, Helpfulness, Requested, ScoredOn, TrainedModels):
    """Everything that decides the analysis; the last base has the first options."""


@verb("analyze tax")
def tax(session: Session, study: TaxStudy) -> dict[str, Any]:
    """The alignment tax: overlap of safety and helpfulness neurons, and what patching the shared ones costs
    and brings on both sides.
    """

    def work() -> dict[str, Any]:
        from safety_neurons import studies
        from safety_neurons.analysis.overlap import relations

        before, *loaded = session.several([study.base, *study.specs.values()])
        trained = dict(zip(study.specs, loaded, strict=True))
        measure = study.helpfulness
        if measure == "auto":
            measure = "answered" if before.prompt_folder is None else "taught"
        lists = [session.read(name, before, study.find_limit) for name in ("prompts", "also")]
        scored = lists[0] if lists[1] is None else lists[0] + lists[1]
        requests = [session.read(name, before, study.limit) for name in ("harmful", "harmless")]
        searched: dict[str, Any] = {
            "sites": listed(study.sites) or ("down",),
            "layers": study.layers,
            "positions": study.positions,
        }
        writing: dict[str, Any] = {
            "max_new_tokens": session.answer_length(study.max_new_tokens),
            "batch_size": session.batch_size(),
        }
        with session.status("tax") as tell:
            read = studies.read_trainings(before, trained, scored, progress=tell, **searched, **writing)
            shared = read.shared(SAFETY, HELPFUL, study.top)
            completions = session.folder.path("completions.jsonl")
            crossed = studies.cross_patch(
                {name: trained[name] for name in (SAFETY, HELPFUL)},
                shared,
                *requests,
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
        session.notes.extend([*read.notes, *crossed.bench.notes, *crossed.bench.cut_off_notes()])
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
