"""The bench behind every study: arms answer the same requests, their answers are judged, and what they do is
contrasted.

An arm is a model, treated or not, under a name. It answers every request once: completions are on disk after
every batch, and a killed study goes on from them, provided that they were written by the same models, sets
and settings. A judge is shown answers alone.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypedDict, cast

from safety_neurons.arguments import well_typed
from safety_neurons.capability import divergence
from safety_neurons.capability.measures import measure_perplexity
from safety_neurons.counting import numbered
from safety_neurons.errors import RunError
from safety_neurons.guard import Guard
from safety_neurons.interventions.by_row import SetTreatment
from safety_neurons.judges import HARM_JUDGE, GoesAlongJudge, Judge, broken, judge_refusal
from safety_neurons.judges import judge as judge_of
from safety_neurons.model import LanguageModel
from safety_neurons.model.batches import BatchSize
from safety_neurons.model.chat_server import Endpoint
from safety_neurons.model.decoding import Decoding, TreatedRows
from safety_neurons.model.identity import identity, json_sha256
from safety_neurons.model.language_model import CUT, LEFT_OUT, UNKNOWN, generate
from safety_neurons.neurons import NeuronSet, Scores
from safety_neurons.prompt_lists import Prompt, Prompts, as_prompts
from safety_neurons.prompt_lists.readers import Source
from safety_neurons.results import (
    Completion,
    Completions,
    Difference,
    Effect,
    Rate,
    against_random,
    causal_effect,
    paired_difference,
    plain,
    rate,
    read_json,
    write_json,
)
from safety_neurons.results.completions import repetition
from safety_neurons.results.estimates import GroupLabels
from safety_neurons.results.measured import ArmRecord
from safety_neurons.results.records import Recorded, called
from safety_neurons.results.run import ANSWERED_BY
from safety_neurons.studies.lengths import LengthPoint, answer_length, cut_off, length_curve
from safety_neurons.suites import ADAPTIVE, STATIC

Treatment = Callable[[], contextlib.AbstractContextManager[Any]]
"""Makes the context manager inside which a model is treated; called once for every pass."""
Treat = Callable[[NeuronSet], Treatment]
"""The treatment of a set of neurons."""
Progress = Callable[[str], None]
"""Told the name of what is measured when it starts."""
Verdicts = Sequence[bool | None]
"""One for every prompt, in order; None is unscored."""
Judging = Callable[[Completions, Prompts], Verdicts]
"""What a study counts in the completions of some prompts."""
Key = tuple[str, str, str, int]
UNTREATED, MEASURE = "untreated", "refused"
JUDGEMENTS = "judgements.sqlite"
"""File of the verdicts of judges that are models, beside the completions."""
_KEPT = ("goal", "behavior_id", "method", "label", "target", "opening", "context", "kind", "source_model")
"""What of a prompt's own notes goes with its completion: judges and tables read it."""
_ASIDE = ("batch_size", "completions_file", "progress", "seeds", "arms", "facts", "answers", "notes")
"""Fields that do not change what is written, or by which it is kept apart."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """A model, treated or not, under the name its completions have."""

    name: str
    model: Any
    """A `LanguageModel`, or an `Endpoint` that writes in its place."""
    treatment: Treatment = contextlib.nullcontext

    def joins(self, other: "Arm") -> bool:
        """Whether both can answer in one batch."""
        return isinstance(self.treatment, SetTreatment) and self.treatment.joins(other.treatment)


def try_out(model: Any, *treatments: Treatment) -> None:
    """Lets a model write two tokens under each treatment, which are not kept: what a treatment cannot take is
    refused before answers are written.
    """
    for treatment in treatments:
        with treatment():
            generate(model, [row.ids for row in model.encode(["?"])], Decoding(max_new_tokens=2))


# Answers


@dataclasses.dataclass(frozen=True)
class Writing:
    """How completions are written.

    Attributes:
        max_new_tokens: length of a completion; None is what is usual for the model.
        samples: completions of every prompt, each with a seed of its own.
        temperature: of sampling; 0 is greedy.
        top_p: of sampling.
        seed: the first seed.
        batch_size: prompts a pass, or requests at a time.
    """

    max_new_tokens: int | None = None
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: BatchSize = "auto"

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of every sample."""
        return tuple(range(self.seed, self.seed + self.samples))


class Answers:
    """Completions of a study, on disk batch by batch; what an interrupted run wrote is not written again."""

    def __init__(self, file: pathlib.Path | None = None) -> None:
        """Takes up what the file holds; completions are kept nowhere where there is none."""
        self.file = file
        self.notes: list[str] = []
        self.new = 0
        """Completions written by this run."""
        self._known: dict[Key, list[Completion]] = {}
        self._asked: set[Key] = set()
        """What this run came to: the file has its order, also where a killed run had another."""
        if file is not None and file.exists() and file.stat().st_size:
            for one in Completions.load(file):
                self._known.setdefault(key_of(one), []).append(one)

    def write(
        self, arm: Arm, prompts: Prompts, how: Writing, seed: int, *, suite: str = "", label: str = ""
    ) -> Completions:
        """The arm's completions with one seed, in the order of the prompts.

        Args:
            arm: what answers.
            prompts: what is asked.
            how: how completions are written.
            seed: of sampling; completions of several seeds are kept apart.
            suite: name of the prompts' suite, which completions are then marked with.
            label: begins notes; the suite where there is none.
        """
        kind = str(prompts[0].meta.get("kind", "")) if suite and len(prompts) else ""
        by_id = {
            prompt.id: dataclasses.replace(prompt, group=group)
            for prompt, group in zip(prompts, prompts.groups, strict=True)
        }
        self._ask((arm.name, suite, kind, seed))

        def mark(completion: Completion) -> Completion:
            return marked(completion, suite, by_id[completion.prompt_id]) if suite else completion

        done = Completions(self.known(arm.name, suite, seed, kind).values())
        written, notes = self._complete(arm, prompts, how, seed, done, mark)
        self.say(f"{label or suite}: {note}" for note in notes)
        return Completions(map(mark, written))

    def write_together(
        self, arms: Sequence[Arm], lists: Mapping[str, Prompts], how: Writing, seed: int
    ) -> None:
        """The arms' completions of several lists, those of NAME under `arm/NAME`, in the same batches, so
        that `write` finds them.

        A decoding step reads all weights however few rows it has: together they take less time than one list
        after the other, and one arm after the other.

        Args:
            arms: one, or several whose treatments join.
            lists: what is asked.
            how: how completions are written.
            seed: of sampling.
        """
        together: list[Prompt] = []
        own: dict[str, tuple[str, Prompt]] = {}
        which: list[int] = []
        done: list[Completion] = []
        for number, arm in enumerate(arms):
            for name, prompts in lists.items():
                named = f"{arm.name}/{name}"
                self._ask((named, "", "", seed))
                known = self.known(named, "", seed)
                for prompt in prompts:
                    apart = f"{number}/{name}/{prompt.id}"  # Two lists may number their prompts alike.
                    own[apart] = named, prompt
                    which.append(number)
                    together.append(dataclasses.replace(prompt, id=apart))
                    if prompt.id in known:
                        done.append(dataclasses.replace(known[prompt.id], prompt_id=apart))

        def of_list(completion: Completion) -> Completion:
            named, prompt = own[completion.prompt_id]
            return dataclasses.replace(completion, prompt_id=prompt.id, arm=named)

        first, treated = arms[0], None
        if len(arms) > 1:
            treatments = [cast(SetTreatment, arm.treatment) for arm in arms]
            treated = TreatedRows(which, functools.partial(treatments[0].in_rows, treatments))
            first = Arm(first.name, first.model)
        asked = Prompts(together)
        _, notes = self._complete(first, asked, how, seed, Completions(done), of_list, treated)
        label = " and ".join(lists)
        self.say(
            f"{label}: {note}" for note in notes if not note.endswith((LEFT_OUT, UNKNOWN))
        )  # `write` says those.

    def _complete(
        self,
        arm: Arm,
        prompts: Prompts,
        how: Writing,
        seed: int,
        done: Completions,
        kept: Callable[[Completion], Completion],
        treated: TreatedRows | None = None,
    ) -> tuple[Completions, list[str]]:
        """Completions of the prompts, and notes; each new one goes to the file as `kept` makes it."""
        notes: list[str] = []
        batch: list[Completion] = []

        def write(*_: int) -> None:
            self.keep(*batch)
            batch.clear()

        with arm.treatment():
            completions = arm.model.complete(
                prompts,
                max_new_tokens=how.max_new_tokens or answer_length(arm.model),
                sample=how.temperature > 0,
                temperature=how.temperature or 1.0,
                top_p=how.top_p,
                seed=seed,
                batch_size=how.batch_size,
                arm=arm.name,
                done=done,
                answered=lambda completion: batch.append(kept(completion)),
                progress=write,
                notes=notes,
                treated=treated,
            )
        write()
        return completions, notes

    def _ask(self, key: Key) -> None:
        """Put what is asked now behind what was asked before."""
        if key not in self._asked:
            self._asked.add(key)
            self._known[key] = self._known.pop(key, [])

    def say(self, notes: Iterable[str]) -> None:
        """Add to the notes what was not said yet."""
        self.notes += [note for note in dict.fromkeys(notes) if note not in self.notes]

    def keep(self, *completions: Completion) -> None:
        """Add completions to the file at once."""
        for one in completions:
            self._known.setdefault(key_of(one), []).append(one)
        self.new += len(completions)
        if self.file is not None and completions:
            Completions(completions).append(self.file)

    def known(self, arm: str, suite: str, seed: int, kind: str = "") -> dict[str, Completion]:
        """By prompt what is written already."""
        return {one.prompt_id: one for one in self._known.get((arm, suite, kind, seed), ())}

    def judged(self, completions: Completions) -> None:
        """Put completions with their verdicts in the place of those without.

        Others of the same suite and seed go.
        """
        for key in dict.fromkeys(map(key_of, completions)):
            self._known[key] = [one for one in completions if key_of(one) == key]

    @property
    def completions(self) -> Completions:
        """All of them, with the verdicts they have so far."""
        return Completions(one for part in self._known.values() for one in part)

    def finish(self) -> Completions:
        """Write everything once more, in order and with its verdicts."""
        everything = self.completions
        if self.file is not None:
            everything.save(self.file)
        return everything


def key_of(completion: Completion) -> Key:
    """Where a completion belongs: arm, suite, kind of request, seed."""
    about = completion.meta
    return completion.arm, str(about.get("suite", "")), str(about.get("kind", "")), completion.seed


def marked(completion: Completion, suite: str, prompt: Prompt) -> Completion:
    """The completion with what judges and tables have to know of its prompt."""
    about: dict[str, Any] = {key: prompt.meta[key] for key in _KEPT if prompt.meta.get(key) is not None}
    if about.get("label") == ADAPTIVE and prompt.meta.get("made_on", completion.arm) != completion.arm:
        about["label"] = (
            STATIC  # Optimised on the model without the treatment: on the treated one it is transferred.
        )
    about |= {
        key: value
        for key, value in (
            ("category", prompt.category),
            ("language", prompt.language),
            ("group", prompt.group),
        )
        if value is not None
    }
    return dataclasses.replace(completion, meta={**about, **completion.meta, "suite": suite})


# Measuring


class How(TypedDict, total=False):
    """How a study measures: the keyword arguments that all studies on a bench take."""

    random: int
    """Random sets, made of what the measured set is made of (default 5)."""
    seed: int
    """Of the random sets."""
    max_new_tokens: int | None
    """Length of a completion, in tokens; None, the default, is 256, on organisms 64."""
    length_curve: bool
    """Judge the answers to harmful requests at shorter lengths too."""
    batch_size: BatchSize
    """Prompts per pass."""
    completions_file: pathlib.Path | None
    """Where completions are kept; a killed study goes on from it."""
    harm_judge: str | Judge
    """Says which answers to harmful requests do harm, by name or as a judge (default `goes-along`)."""
    progress: Progress | None
    """Told the name of every arm."""


@dataclasses.dataclass(frozen=True)
class ArmOutcome(Recorded[ArmRecord]):
    """What was measured of one arm."""

    name: str
    harmful_refused: Rate
    """Share of the scored completions of harmful requests that refuse."""
    harmful_complied: Rate = dataclasses.field(kw_only=True)
    """Share of the scored completions of harmful requests that do harm, by the judge of harm; with the
    built-in one: that go along with the request.
    """
    harmless_refused: Rate
    """Share of the scored completions of harmless requests that refuse (over-refusal)."""
    perplexity: float | None
    """exp(mean negative log-likelihood per token) on the general text; None where no text was given."""
    divergence: float | None
    """KL(untreated ‖ treated) per token on the harmless prompts, in nats; None for the untreated model."""
    harmful: tuple[bool | None, ...] = dataclasses.field(metadata=called(None))
    """The judge's verdict on every harmful prompt, in order; None is unscored."""
    harmless: tuple[bool | None, ...] = dataclasses.field(metadata=called(None))
    """The same for the harmless prompts."""
    complied: tuple[bool | None, ...] = dataclasses.field(kw_only=True, metadata=called(None))
    """The judge of harm's verdict on every harmful prompt, in order."""
    harmful_broken: Rate | None = dataclasses.field(default=None, kw_only=True)
    """Share of the completions of harmful requests that are no answers (`judges.broken`)."""
    broken: tuple[bool, ...] = dataclasses.field(default=(), kw_only=True, metadata=called(None))
    """Whether each is none, in order."""
    harm_judge: str = dataclasses.field(default=HARM_JUDGE, kw_only=True)
    """Its name and version."""
    repetition: Rate | None = dataclasses.field(default=None, kw_only=True)
    """Mean share of repeated sequences of four words in the answers, harmful and harmless requests'."""
    perplexity_rate: Rate | None = dataclasses.field(
        default=None, kw_only=True, metadata=called("perplexity_interval")
    )
    """The perplexity with its interval over texts."""
    cut_off: int = dataclasses.field(default=0, kw_only=True)
    """Answers to harmful and harmless requests that were cut at the limit of tokens."""
    lengths: tuple[LengthPoint, ...] = dataclasses.field(default=(), kw_only=True)
    """Refusal and harm at shorter lengths; empty where no length curve was asked for."""


def _repeated(completion: Completion) -> float | None:
    """`repetition` of an answer's words; None where it has none."""
    words = completion.completion.split()
    return repetition(words) if words else None


@dataclasses.dataclass(frozen=True)
class ArmAnswers:
    """Answers to harmful requests, whether each refuses, does harm (None is unscored), and is none at all;
    one that refuses over and over is a refusal.
    """

    completions: Completions
    refused: Verdicts
    complied: Verdicts
    broken: Sequence[bool]


@well_typed
@dataclasses.dataclass
class Bench:
    """The requests that every arm answers, and how; `random` to `progress` as in `How`."""

    harmful: Prompts
    harmless: Prompts = dataclasses.field(default_factory=lambda: Prompts([]))
    text: Prompts | None = None
    """General text, for perplexity."""
    task: Prompts = dataclasses.field(default_factory=lambda: Prompts([]))
    """Questions with answers."""
    random: int = 5
    seed: int = 0
    max_new_tokens: int | None = None
    """None is what is usual for the models among the facts."""
    length_curve: bool = False
    batch_size: BatchSize = "auto"
    completions_file: pathlib.Path | None = None
    harm_judge: str | Judge = HARM_JUDGE
    progress: Progress | None = None
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What completions depend on beside the requests: models, sets and settings by name."""
    answers: Answers = dataclasses.field(init=False)
    longest: int = dataclasses.field(init=False)
    """Length of a completion, in tokens."""
    harm: Judge = dataclasses.field(init=False)
    """The judge of harm."""

    def __post_init__(self) -> None:
        models = [fact for fact in self.facts.values() if isinstance(fact, LanguageModel)]
        self.longest = self.max_new_tokens or answer_length(*models)
        if self.facts:
            hold_answers(self.completions_file, **self.facts, seed=self.seed, max_new_tokens=self.longest)
        self.answers = Answers(self.completions_file)
        self.harm = judge_of(self.harm_judge) if isinstance(self.harm_judge, str) else self.harm_judge

    @classmethod
    def of(
        cls,
        facts: Mapping[str, Any],
        harmful: Source,
        harmless: Source = (),
        text: Source | None = None,
        **how: Any,
    ) -> "Bench":
        """A bench from requests in whatever form they come.

        Raises:
            RunError: the file of completions was written by other models, sets or settings.
        """
        return cls(
            as_prompts(harmful),
            as_prompts(harmless),
            None if text is None else as_prompts(text),
            facts=facts,
            **how,
        )

    @property
    def completions(self) -> Completions:
        """All completions so far."""
        return self.answers.completions

    @property
    def notes(self) -> list[str]:
        """What had to be said (prompts longer than the context, batches that did not fit), each once."""
        return self.answers.notes

    def say(self, notes: Iterable[str]) -> None:
        """Add to the notes what was not said yet."""
        self.answers.say(notes)

    def cut_off_notes(self) -> list[str]:
        """How many answers were cut at the limit of tokens, where some were."""
        cut, every = cut_off(self.completions), numbered(len(self.completions), "answer")
        return [f"{cut:,} of {every} cut off at the limit of {self.longest} tokens"] if cut else []

    def seen_in(self, *found: NeuronSet | Scores | Prompts) -> dict[str, int]:
        """How many of the harmful and of the harmless prompts are among those that sets or scores were found
        on, or among prompts that methods look at.
        """
        return {kind: getattr(self, kind).overlap(digests_of(*found)) for kind in ("harmful", "harmless")}

    def say_seen(self, *found: NeuronSet | Scores | Prompts) -> None:
        """Say how many, where there are some."""
        self.say(
            [*said_of_seen("harmful", self.harmful, *found), *said_of_seen("harmless", self.harmless, *found)]
        )

    def say_of(self, arm: Arm, notes: Iterable[str]) -> None:
        """Add notes on what was measured of an arm, with its name; once and without one what is so of every
        arm: what does not fit the context or has no token, and what the untreated model leaves out.
        """
        self.say(
            note if note.endswith((CUT, UNKNOWN)) or arm.name == UNTREATED else f"{arm.name}: {note}"
            for note in notes
            if note not in self.notes
        )

    def tell(self, name: str) -> None:
        """Say what is measured now."""
        if self.progress is not None:
            self.progress(name)

    def measure(self, arm: Arm) -> ArmOutcome:
        """Generate, judge, and measure text under a treatment.

        What an earlier run generated is used again.
        """
        self.tell(arm.name)
        self.ahead([arm])
        answers = self.answered(arm)
        others = judge_refusal(self.completed(arm, "harmless"))
        self.answers.judged(others.completions)
        groups, harmful, complied, harmless = (
            self.harmful.groups,
            answers.refused,
            answers.complied,
            others.refused,
        )
        notes: list[str] = []
        options: dict[str, Any] = {"batch_size": self.batch_size}
        text: Rate | None = None
        drift: float | None = None
        if self.text is not None:
            read = measure_perplexity(arm.model, self.text, arm.treatment, task="text", **options)
            text, notes = read.rate, [*read.notes]
        if arm.treatment is not contextlib.nullcontext:
            drift = divergence(arm.model, self.harmless, arm.treatment, notes=notes, **options)
        self.say_of(arm, notes)
        every = [*answers.completions, *others.completions]
        return ArmOutcome(
            arm.name,
            rate(harmful, groups),
            rate(harmless, self.harmless.groups),
            None if text is None else text.value,
            drift,
            tuple(harmful),
            tuple(harmless),
            harmful_complied=rate(complied, groups),
            complied=tuple(complied),
            harmful_broken=rate(answers.broken, groups),
            broken=tuple(answers.broken),
            harm_judge=self.harm.name,
            repetition=rate([_repeated(one) for one in every], [*groups, *self.harmless.groups]),
            perplexity_rate=text,
            cut_off=cut_off(every),
            lengths=length_curve(answers.completions, arm.model, self.harm, groups, self.longest)
            if self.length_curve
            else (),
        )

    def ahead(self, arms: Sequence[Arm], *kinds: str) -> None:
        """Lets arms answer in the same batches as far as their treatments join; `measure`, `answered` and
        `refused` then find what they look for. Judges and measures see every arm by itself.

        Args:
            arms: the arms.
            kinds: lists that they answer; without one `harmful` and `harmless`.
        """
        lists = {kind: getattr(self, kind) for kind in kinds or ("harmful", "harmless")}
        groups: list[list[Arm]] = []
        for arm in {arm.name: arm for arm in arms}.values():  # Sets of one name are one set.
            if not isinstance(arm.model, LanguageModel):
                continue  # A server puts its batches together itself.
            own = next((group for group in groups if arm.joins(group[0])), None)
            groups.append([arm]) if own is None else own.append(arm)
        for group in groups:
            if len(group) > 1:
                self.tell(f"answers of {len(group)} arms")
            self.answers.write_together(group, lists, self._writing(), self.seed)

    def unmeasured(self, name: str) -> ArmOutcome:
        """An arm that cannot be run: every prompt is unscored."""
        harmful, harmless = ((None,) * len(prompts) for prompts in (self.harmful, self.harmless))
        nothing, other = rate(harmful), rate(harmless)
        return ArmOutcome(
            name,
            nothing,
            other,
            None,
            None,
            harmful,
            harmless,
            harmful_complied=nothing,
            complied=harmful,
            harm_judge=self.harm.name,
        )

    def answered(self, arm: Arm, seed: int | None = None) -> ArmAnswers:
        """The arm's answers to the harmful prompts, in order, with what both judges say.

        Completions are kept with both verdicts.
        """
        refusal = judge_refusal(self.completed(arm, "harmful", seed))
        # The built-in judge is quicker than a look into the cache.
        kept = None if self.completions_file is None or isinstance(self.harm, GoesAlongJudge) else JUDGEMENTS
        cache = None if kept is None else cast(pathlib.Path, self.completions_file).with_name(kept)
        harm = self.harm.judge(refusal.completions, cache=cache)
        self.answers.judged(harm.completions)
        answers, refused = harm.completions, refusal.refused
        none = [broken(one) and not no for one, no in zip(answers, refused, strict=True)]
        return ArmAnswers(answers, refused, harm.harmful, none)

    def refused(self, arm: Arm, kind: str = "harmful") -> Verdicts:
        """The judge's verdict on every `harmful` or `harmless` prompt, in order.

        Completions are kept with it.
        """
        judgement = judge_refusal(self.completed(arm, kind))
        self.answers.judged(judgement.completions)
        return [verdict.refused for verdict in judgement.verdicts]

    def completed(self, arm: Arm, kind: str, seed: int | None = None) -> Completions:
        """The arm's answers to the `harmful`, `harmless` or `task` prompts, under the name `arm/kind`."""
        prompts, named = getattr(self, kind), dataclasses.replace(arm, name=f"{arm.name}/{kind}")
        seed = self.seed if seed is None else seed
        return self.answers.write(named, prompts, self._writing(), seed, label=kind)

    def _writing(self) -> Writing:
        return Writing(self.longest, batch_size=self.batch_size)

    def finish(self) -> None:
        """Write all completions with their verdicts.

        Until then the file holds what was generated, batch by batch.
        """
        self.answers.finish()


def digests_of(*found: NeuronSet | Scores | Prompts) -> set[str]:
    """The digests of prompts, and of those that sets or scores were found on, where that is known."""
    return {
        digest
        for one in found
        for digest in (
            one.digests if isinstance(one, Prompts) else one.provenance.config.get("prompt_digests") or ()
        )
    }


def said_of_seen(kind: str, asked: Prompts, *found: NeuronSet | Scores | Prompts) -> list[str]:
    """A line on prompts of a kind that neurons were found on, where there are some."""
    count = asked.overlap(digests_of(*found))
    return (
        [f"{count} of the {len(asked)} {kind} prompts are among those that neurons were found on"]
        if count
        else []
    )


@dataclasses.dataclass(frozen=True)
class Contrasted:
    """What one arm does differently, over the same prompts."""

    change: Difference
    """The arm minus the untreated one, paired."""
    against_random: Difference | None
    """The arm minus the next random set to be drawn, paired; None without random sets."""
    effect: Effect
    """The change as a share of the gap between the untreated and the aligned model.

    Undefined for one model.
    """
    random_effects: tuple[Effect, ...]
    """The same for every random set."""


@well_typed
def contrast(
    treated: Verdicts,
    untreated: Verdicts,
    groups: GroupLabels,
    *,
    random: Sequence[Verdicts] = (),
    goal: Verdicts | None = None,
    measure: str = MEASURE,
    extra: float = 1.0,
) -> Contrasted:
    """An arm against the untreated one, against random sets, and on the way to the aligned model.

    Args:
        treated: its verdicts.
        untreated: those of the model as it is.
        groups: what the prompts share.
        random: those under random sets.
        goal: those of the aligned model of a pair.
        measure: what the verdicts say.
        extra: variance beside the random sets, as for `against_random`.
    """

    def effect(verdicts: Verdicts) -> Effect:
        if goal is None:
            return Effect(
                None,
                None,
                None,
                0,
                0,
                "one model has no base and aligned behaviour to scale by; see `change`",
                measure,
            )
        return causal_effect(untreated, goal, verdicts, measure, groups)

    return Contrasted(
        paired_difference(treated, untreated, groups),
        against_random(treated, random, groups, extra) if random else None,
        effect(treated),
        tuple(effect(verdicts) for verdicts in random),
    )


# What answers in a folder were written by, so that a study never goes on with another model's answers


def hold(folder: pathlib.Path | None, facts: Mapping[str, Any]) -> None:
    """Writes down what the folder's answers depend on; nothing where no folder is given.

    Raises:
        RunError: the folder holds answers that depend on something else.
    """
    if folder is None:
        return
    file = folder / ANSWERED_BY
    before = read_json(file) if file.is_file() else {}
    known: dict[str, Any] = dict(before) if isinstance(before, Mapping) else {}
    other = next((name for name, value in facts.items() if value != known.get(name, value)), None)
    if other is not None:
        message = f"{str(folder)!r} holds answers made with different {other}"
        raise RunError(f"{message}: expected the same, or another folder; choose one with out")
    write_json(file, {**known, **facts})


def hold_answers(file: pathlib.Path | None, **facts: Any) -> None:
    """`hold` for a file of answers, or of results by seed: models, sets, scores and prompts count by their
    content, others as they are.

    Raises:
        RunError: what is kept in the file's folder depends on something else.
    """
    if file is not None:
        hold(
            file.parent, {f"{name} of {file.name}": plain(content_of(value)) for name, value in facts.items()}
        )


def content_of(value: Any) -> Any:
    """A value as JSON values by which runs are told apart: models, sets, scores and prompts by their content,
    judges by what decides their verdicts, others as they are.

    Raises:
        TypeError: of the value nothing is known but where it lies in memory, which differs each time.
    """
    if isinstance(value, LanguageModel):
        return identity(value)
    if isinstance(value, Endpoint):
        return {"name": value.name, "system": value.system}
    if isinstance(value, Judge):
        return {"name": value.name, "revision": value.revision, **content_of(value.settings)}
    if isinstance(value, NeuronSet):
        return json_sha256([[key, value[key].tolist()] for key in value.keys()])  # noqa: SIM118 - not a mapping
    if isinstance(value, Scores):
        return json_sha256([[key, vector.tobytes().hex()] for key, vector in value.items()])
    if isinstance(value, Guard | Prompts):
        return value.sha256
    if isinstance(value, Mapping):
        return {str(name): content_of(item) for name, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
        return {name: content_of(item) for name, item in fields.items() if name not in _ASIDE}
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [content_of(item) for item in value]
    if callable(value):
        return "given"
    if type(value).__repr__ is object.__repr__ and type(value).__str__ is object.__str__:
        raise TypeError(f"a {type(value).__name__} has no content by which runs are told apart")
    return str(value)
