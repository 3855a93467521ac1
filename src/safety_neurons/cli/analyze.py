"""analyze layers, overlap, languages, transfer: where sets lie, how far they agree, what each group's set does to all groups."""

import dataclasses
import pathlib
from typing import Annotated, Any, ClassVar

from safety_neurons.cli.options import ModelName, OneModel, OtherText, PromptFile, Repeats, TwoModels, listed
from safety_neurons.cli.session import Session, resolve
from safety_neurons.cli.verb import verb
from safety_neurons.declarations import Count, Declaration, Panel, Positional, Positive, Reads, Share
from safety_neurons.detectors.methods import AtSites, HowFound, by_name
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
    """Where neurons lie: layers, sites, heads, and the papers' claims, beside a random set of the same size."""

    def work() -> dict[str, Any]:
        from safety_neurons import analysis

        items = analysis.read_named(paths(given.sets), top=given.top, count=given.count, together=False)
        tables = [analysis.layers(item) for item in items]
        return with_figure(session, {"sets": [table.record() for table in tables]})

    return session.run(work)


@verb("analyze overlap")
def overlap(session: Session, given: NamedSets) -> dict[str, Any]:
    """How far sets and scores agree: methods, seeds, data sets, checkpoints, before and after tuning."""

    def work() -> dict[str, Any]:
        from safety_neurons import analysis

        items = analysis.read_named(paths(given.sets), top=given.top, count=given.count)
        return with_figure(session, analysis.overlap(items, seed=session.common.seed).record())

    return session.run(work)


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
class LanguageStudy(RandomSets, Definitions, TestLimit, LanguageTests, FindLimit, AtSites, HowFound, LanguageLists, MaybePair):
    """Everything that decides the analysis; the last base has the first options."""

    def check(self) -> None:
        """Also that there are languages to compare, and that the method has the models it needs."""
        super().check()
        _ = self.given
        if self.base is None and by_name(self.chosen).PAIR:
            raise UsageError(f"--method {self.chosen} needs a pair; give --base, or choose importance or attribution")
        if len(self.codes) < 2:
            raise UsageError(f"--languages {self.languages!r}: expected at least two, comma-separated")
        for flag, text in (("--find-prompts", self.find_prompts), ("--test-prompts", self.test_prompts)):
            if "{language}" not in text:
                raise UsageError(f"{flag} {text!r}: expected {{language}} in it, which stands for each language")
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
            return {code: session.prompts(pattern.replace("{language}", code), model, limit=limit) for code in study.codes}

        tests = texts(study.test_prompts, study.test_limit)
        with session.status("analyze languages") as tell:
            if study.given:
                sets = {code: session.neurons(path, model) for code, path in study.given.items()}
            else:
                groups = studies.Groups(texts(study.find_prompts, study.find_limit))
                sets = studies.find_by_group(base, model, groups, **finding(session, study, study.chosen), progress=tell)
            compared = analysis.languages(sets, seed=session.common.seed)
            matrix = studies.deactivation_matrix(
                model,
                wanted(compared.named(), study.definitions),
                tests,
                random=study.random,
                max_new_tokens=study.max_new_tokens,
                completions_file=session.folder.path("completions.jsonl"),
                progress=tell,
                **session.running,
            )
        session.notes.extend(matrix.notes)
        method = "given" if study.given else study.chosen
        result = {"method": method, **compared.record(), **matrix.record(), "neurons": kept(session, compared.named())}
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
    """NAME=FILE,…: one group a file instead; odd records to find on, even ones to measure on."""
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
    """Neurons found on one red-team set, their causal effect on the others, and general ability under patching.

    Finds by contrast, at down, unless a method is given.
    """
    method = study.method or "contrast"

    def work() -> dict[str, Any]:
        from safety_neurons import analysis, studies

        pair = session.pair(study.base, study.aligned)
        find, test = apart(session, study, pair.base)
        limit = None if study.test_limit is None else study.test_limit * len(test.names)
        with session.status("analyze transfer") as tell:
            sets = studies.find_by_group(pair.base, pair.aligned, find, **finding(session, study, method), progress=tell)
            moved = studies.transfer(
                pair.base,
                pair.aligned,
                sets,
                test.members,
                session.read("harmless", pair.base, limit),
                tasks=listed(study.tasks) or (),
                answers=session.read("answers", pair.base, limit),
                limit=limit,
                random=study.random,
                max_new_tokens=study.max_new_tokens,
                completions_file=session.folder.path("completions.jsonl"),
                progress=tell,
                **session.running,
            )
        session.notes.extend(moved.notes)
        named = analysis.name_sets(sets.items())
        together = analysis.overlap(named, seed=session.common.seed).record() if len(sets) > 1 else {"pairs": []}
        agreed = {"overlap": together["pairs"], "mean_jaccard": together.get("mean_jaccard")}
        result = {"method": method, **moved.record(), **agreed, "neurons": kept(session, sets)}
        return with_figure(session, result)

    return session.run(work)


def paths(sets: list[str]) -> list[str]:
    """The arguments with `organism:NAME/SET` replaced by the file it stands for; a run folder keeps its own name."""
    named = [text.partition("=") for text in sets]
    return [f"{name}={resolve(path)}" if path.startswith("organism:") else resolve(f"{name}{sign}{path}") for name, sign, path in named]


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
        "max_new_tokens": study.max_new_tokens,
        "batch_size": session.batch_size(),
        "place": session.folder.path,
    }


def kept(session: Session, sets: dict[str, Any]) -> dict[str, str]:
    """Write the sets that have members; where they are."""
    files = {}
    for number, (name, neurons) in enumerate((name, neurons) for name, neurons in sets.items() if len(neurons)):
        file = session.folder.path(f"neurons-{number}.safetensors")
        neurons.save(file)
        files[name] = str(file)
    return files


def wanted(sets: dict[str, Any], definitions: str) -> dict[str, Any]:
    """The sets to deactivate: without the definitions that are not asked for."""
    asked = listed(definitions) or ()
    left_out = [f"minus {name}" for name in ("union", "intersection") if name not in asked]
    return {name: part for name, part in sets.items() if not any(name.endswith(end) for end in left_out)}


def apart(session: Session, study: TransferStudy, model: Any) -> tuple[Any, Any]:
    """Requests to find on and to measure on, by group."""
    from safety_neurons.prompt_lists import Prompts
    from safety_neurons.studies import Groups

    files = named_files(study.suites)
    if files:
        whole = {name: session.prompts(path, model) if pathlib.Path(path).exists() else suite(path) for name, path in files.items()}
        find = {name: Prompts(list(prompts)[::2], name) for name, prompts in whole.items()}
        test = {name: Prompts(list(prompts)[1::2], name) for name, prompts in whole.items()}
    else:
        find, test = (dict(Groups.by(session.read(name, model), study.by).members) for name in ("prompts", "harmful"))
    names = list(listed(study.groups) or [name for name in find if name in test])
    unknown = [name for name in names if name not in find or name not in test]
    if unknown or not names:
        raise UsageError(f"no group {(unknown or [study.by])[0]!r} to find and to measure on; the groups are {', '.join(find)}")
    return (
        Groups({name: find[name][: study.find_limit] for name in names}),
        Groups({name: test[name][: study.test_limit] for name in names}),
    )


def suite(name: str) -> Any:
    """The prompts of a named suite."""
    from safety_neurons.suites import suite as open_suite

    return open_suite(name).prompts
