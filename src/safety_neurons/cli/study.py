"""study rsn, stress, defences: what does tuned safety outlive?"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

from safety_neurons.cli.session import (
    EvaluationPrompts,
    JudgedBy,
    NeuronFile,
    OneModel,
    OtherText,
    Session,
    listed,
)
from safety_neurons.cli.verb import verb
from safety_neurons.declarations import (
    Between,
    Count,
    Declaration,
    NotNegative,
    OneOf,
    OpenShare,
    Positive,
    Reads,
)
from safety_neurons.errors import UsageError
from safety_neurons.tuning.settings import checked_rate

TaskFile = Annotated[str, Reads("prompts")]
ARMS = {
    "none": "none",
    "sn-tune": "SN-Tune",
    "rsn-tune": "RSN-Tune",
    "random": "random",
    "protected": "SN-Tune, protected",
}


@dataclasses.dataclass(frozen=True)
class WhichNeurons(Declaration):
    """The sets that are tuned: given, or found here."""

    PANEL: ClassVar[str | None] = "Which neurons"

    neurons: NeuronFile | None = None
    """Safety neurons; found here where none are given."""
    foundation_neurons: NeuronFile | None = None
    """Foundation neurons, with --neurons."""
    share: OpenShare = 0.0099
    """Share of all parameters that is tuned."""
    foundation_share: Annotated[float, Between(0, 1, below=True)] = 0.1
    """Share of all neurons that are foundation neurons."""
    method: Annotated[str, OneOf("importance", "attribution")] = "importance"
    """importance or attribution."""
    prompts: TaskFile = "builtin:harmful"
    """Harmful requests to find on."""
    general: TaskFile = "builtin:general"
    """General text to find foundation neurons on."""
    no_fill: bool = False
    """Leave RSN smaller than SN by what is taken out of it."""

    def check(self) -> None:
        """Also that both files are given, or neither."""
        super().check()
        if (self.neurons is None) != (self.foundation_neurons is None):
            raise UsageError(
                "one of --neurons and --foundation-neurons given alone; expected both files, or neither"
            )


@dataclasses.dataclass(frozen=True)
class Tunings(Declaration):
    """How safety is tuned."""

    PANEL: ClassVar[str | None] = "Tuning"

    data: TaskFile = "builtin:refusals"
    """Harmful requests with refusals."""
    data_limit: Positive = 50
    """Use the first N of them."""
    mixed: OtherText = "builtin:harmless"
    """Harmless requests with answers, mixed in; or none."""
    mix: NotNegative = 2.0
    """Harmless examples for each harmful one."""
    epochs: Positive = 6
    """Passes over the examples."""
    learning_rate: str = "auto"
    """auto or a number."""

    def check(self) -> None:
        """Also the learning rate."""
        super().check()
        if self.learning_rate != "auto":
            checked_rate(self.learning_rate)


@dataclasses.dataclass(frozen=True)
class Downstream(Declaration):
    """The task that the model is fine-tuned on afterwards."""

    PANEL: ClassVar[str | None] = "Downstream task"

    task: TaskFile = "builtin:task"
    """Task to fine-tune on: questions with answers."""
    task_test: TaskFile = "builtin:task-test"
    """Held-out part of it."""
    downstream: Annotated[str, OneOf("full", "lora")] = "full"
    """full or lora."""


@dataclasses.dataclass(frozen=True)
class HowLong(Declaration):
    """How long it is fine-tuned on the task."""

    PANEL: ClassVar[str | None] = Downstream.PANEL

    steps: Count = 100
    """Steps on the task."""


@dataclasses.dataclass(frozen=True)
class TaskSteps(Declaration):
    """A step on the task."""

    PANEL: ClassVar[str | None] = Downstream.PANEL

    task_rate: float = 1e-3
    """Learning rate on the task (and of attacks)."""
    task_batch: Positive = 16
    """Examples a step."""


@dataclasses.dataclass(frozen=True)
class WhichArms(Declaration):
    """Which arms are compared."""

    arms: str | None = None
    """Comma-separated: none,SN-Tune,RSN-Tune,random,protected."""

    @property
    def names(self) -> tuple[str, ...]:
        """As the study calls them; by default all."""
        return tuple(ARMS[name.lower()] for name in listed(self.arms) or ARMS)

    def check(self) -> None:
        """Also their names."""
        super().check()
        unknown = [name for name in listed(self.arms) or () if name.lower() not in ARMS]
        if unknown:
            raise UsageError(
                f"--arms: unknown {unknown[0].lower()!r}; expected some of none, SN-Tune, RSN-Tune, "
                "random, protected"
            )


@dataclasses.dataclass(frozen=True)
class AttackOptions(Declaration):
    """How hard safety is attacked."""

    PANEL: ClassVar[str | None] = "Attacks"

    attacks: str | None = None
    """Comma-separated: prune,abliterate,subtract,harmful,benign. [default: all]"""

    attack: TaskFile | None = None
    """Harmful requests with answers that go along. [default: the model's own]"""
    pruned: str = "0.05,0.1,0.25,0.5,1"
    """Shares of the set to prune."""
    harmful_steps: str = "1,2,5,10"
    """LoRA steps on harmful answers."""
    benign_steps: str = "10,30,100"
    """Steps on the task."""
    directions: str = "1,4"
    """Directions that abliteration takes out."""
    scales: str = "0,0.25,0.5,0.75"
    """Factors of the tuned change that are left."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Which attacks; by default all."""
        return tuple(name.lower() for name in listed(self.attacks) or KINDS)

    def check(self) -> None:
        """Also the names and numbers."""
        super().check()
        unknown = [name for name in self.kinds if name not in KINDS]
        if unknown:
            raise UsageError(f"--attacks: unknown {unknown[0]!r}; expected some of {', '.join(KINDS)}")
        for name in ("pruned", "scales"):
            shares(self, name)
        for name in ("harmful_steps", "benign_steps", "directions"):
            counts(self, name)


KINDS = ("prune", "abliterate", "subtract", "harmful", "benign")


def numbers_of(options: Declaration, name: str, fits: Callable[[float], bool], expected: str) -> list[float]:
    """A comma-separated option as numbers, in order.

    Raises:
        UsageError: one that does not fit, or none.
    """
    text = getattr(options, name)
    try:
        numbers = sorted({float(part) for part in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or not all(map(fits, numbers)):
        raise UsageError(f"--{name.replace('_', '-')} {text!r}: expected comma-separated {expected}")
    return numbers


def shares(options: Declaration, name: str) -> list[float]:
    """Shares: above 0, and 0 too where it is a scale."""
    if name == "scales":
        return numbers_of(options, name, lambda value: 0 <= value <= 1, "factors from 0 to 1")
    return numbers_of(options, name, lambda value: 0 < value <= 1, "shares above 0 and at most 1")


def counts(options: Declaration, name: str) -> list[int]:
    """Whole numbers above 0."""
    found = numbers_of(options, name, lambda value: value > 0 and value % 1 == 0, "whole numbers above 0")
    return [int(number) for number in found]


DEFENDED = {
    **ARMS,
    "lox": "LoX",
    "safe-lora": "Safe LoRA",
    "first-frozen": "first layers frozen",
    "safety-frozen": "safety layers frozen",
    "replay": "safety replay",
}


@dataclasses.dataclass(frozen=True)
class WhichDefences(Declaration):
    """Which defences are compared, and what they are made with."""

    PANEL: ClassVar[str | None] = "Defences"

    arms: str | None = None
    """Some of none,SN-Tune,RSN-Tune,random,protected,lox,safe-lora,first-frozen,safety-frozen,replay."""
    lox_rank: Positive = 6
    """Singular vectors that LoX extrapolates."""
    lox_factor: NotNegative = 1.25
    """How far LoX extrapolates."""
    safe_lora_threshold: Annotated[float, Between(-1, 1)] = 0.5
    """Cosine below which Safe LoRA projects."""
    frozen_share: OpenShare = 0.34
    """Share of the layers that is frozen."""
    replay_share: OpenShare = 0.1
    """Share of refusals in the data."""

    @property
    def names(self) -> tuple[str, ...]:
        """As the study calls them; by default all."""
        return tuple(DEFENDED[name.lower()] for name in listed(self.arms) or DEFENDED)

    def check(self) -> None:
        """Also their names."""
        super().check()
        unknown = [name for name in listed(self.arms) or () if name.lower() not in DEFENDED]
        if unknown:
            raise UsageError(
                f"--arms: unknown {unknown[0].lower()!r}; expected some of {', '.join(DEFENDED)}"
            )


@dataclasses.dataclass(frozen=True)
class FineTunes(Declaration):
    """The grid of fine-tunes, and which of them count."""

    PANEL: ClassVar[str | None] = "Fine-tunes"

    mixtures: str = "benign,harmful"
    """Comma-separated: benign, harmful (with harmful requests among the task)."""
    rates: str = "0.0001,0.001"
    """Learning rates."""
    steps: str = "30,100"
    """Steps after which is measured."""
    attack: TaskFile | None = None
    """Harmful requests with answers that go along. [default: the model's own]"""
    harmful_share: OpenShare = 0.1
    """Share of them in the harmful mixture."""
    task_batch: Positive = 16
    """Examples a step."""
    max_perplexity: Annotated[float, Between(1, 1e9)] = 1.5
    """A point counts up to so many times the untuned model's perplexity."""
    least_task: Annotated[float, Between(-1, 1)] = -0.05
    """A point counts from this change of the share of the task that is solved."""

    def check(self) -> None:
        """Also the numbers."""
        super().check()
        counts(self, "steps")
        self.rising()
        unknown = [name for name in listed(self.mixtures) or () if name not in ("benign", "harmful")]
        if unknown:
            raise UsageError(f"--mixtures: unknown {unknown[0]!r}; expected some of benign, harmful")

    def rising(self) -> list[float]:
        """The learning rates, in order."""
        return numbers_of(self, "rates", lambda value: 0 < value < 1, "rates above 0 and below 1")


@dataclasses.dataclass(frozen=True)
class Repeated(Declaration):
    """How often, and who judges."""

    seeds: Positive = 5
    """How many seeds, from --seed on."""
    judge: Annotated[str, OneOf("auto", "compliance", "refusal")] = "auto"
    """compliance (templates), refusal, or auto: compliance for organisms."""


@dataclasses.dataclass(frozen=True)
class Lengths(Declaration):
    """How many prompts are measured on, and how long answers are."""

    PANEL: ClassVar[str | None] = "Prompts"

    limit: Positive | None = None
    """Use the first N prompts."""
    max_new_tokens: Positive | None = None
    """Length of a completion, in tokens. [default: 256, on organisms 64]"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RsnStudy(
    Lengths,
    EvaluationPrompts,
    JudgedBy,
    Repeated,
    WhichArms,
    TaskSteps,
    HowLong,
    Downstream,
    Tunings,
    WhichNeurons,
    OneModel,
):
    """Everything that decides the first study; the last base has the first options."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StressStudy(
    Lengths,
    EvaluationPrompts,
    JudgedBy,
    Repeated,
    AttackOptions,
    TaskSteps,
    Downstream,
    Tunings,
    WhichNeurons,
    OneModel,
):
    """Everything that decides the second study."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DefencesStudy(
    Lengths,
    EvaluationPrompts,
    JudgedBy,
    Repeated,
    FineTunes,
    WhichDefences,
    Downstream,
    Tunings,
    WhichNeurons,
    OneModel,
):
    """Everything that decides the third study."""


@verb("study rsn")
def rsn(session: Session, study: RsnStudy) -> dict[str, Any]:
    """Does tuned safety outlive a downstream fine-tune? SN-Tune, RSN-Tune, random neurons, protection and no
    tuning side by side.
    """

    def work() -> dict[str, Any]:
        from safety_neurons import studies
        from safety_neurons.results.run import Cache

        model = session.model(study.model)
        plan, lab, sets = parts(session, study, model, arms=study.names, steps=study.steps)
        with session.status("study rsn") as tell:
            result = studies.rsn(model, sets, plan, lab, cache=Cache(session.folder.path), tell=tell)
        return {**result, **keep_arms(session, sets, lab)}

    return session.run(work)


@verb("study stress")
def stress(session: Session, study: StressStudy) -> dict[str, Any]:
    """How easily is safety cut out, before and after SN-Tune? Pruning, abliteration, subtraction of the
    change, harmful LoRA tuning, benign fine-tuning.
    """

    def work() -> dict[str, Any]:
        from safety_neurons import studies
        from safety_neurons.results.run import Cache

        model = session.model(study.model)
        plan, lab, sets = parts(session, study, model)
        attack = studies.Attack(
            shares(study, "pruned"),
            session.read("attack", model),
            counts(study, "harmful_steps"),
            counts(study, "benign_steps"),
            study.task_rate,
            study.task_batch,
            study.downstream,  # type: ignore[arg-type]
            counts(study, "directions"),
            shares(study, "scales"),
            study.kinds,
        )
        if sets.scores is None and "prune" in study.kinds and min(attack.shares) < 1:
            session.notes.append(
                "neurons from a file have no order: what is pruned is a random part, not the strongest"
            )
        with session.status("study stress") as tell:
            result = studies.stress(
                model, sets, plan, attack, lab, cache=Cache(session.folder.path), tell=tell
            )
        return {**result, **keep_arms(session, sets, lab)}

    return session.run(work)


@verb("study defences")
def defences(session: Session, study: DefencesStudy) -> dict[str, Any]:
    """What keeps safety through the worst of a grid of fine-tunes? SN-Tune, RSN-Tune, protection, LoX, Safe
    LoRA, frozen layers, safety replay and random neurons.
    """

    def work() -> dict[str, Any]:
        from safety_neurons import studies
        from safety_neurons.results.run import Cache

        model = session.model(study.model)
        plan, lab, sets = parts(session, study, model)
        grid = studies.Grid(
            tuple(study.rising()),
            tuple(counts(study, "steps")),
            tuple(listed(study.mixtures) or ()),
            session.read("attack", model) if "harmful" in study.mixtures else None,
            study.harmful_share,
            study.max_perplexity,
            study.least_task,
            study.lox_rank,
            study.lox_factor,
            study.safe_lora_threshold,
            study.frozen_share,
            study.replay_share,
            study.names,
        )
        with session.status("study defences") as tell:
            result = studies.defences(
                model, sets, plan, grid, lab, cache=Cache(session.folder.path), tell=tell
            )
        return session.drawn(
            {**result, **keep_arms(session, sets, lab)},
            session.folder.path("defences.svg"),
        )

    return session.run(work)


def parts(
    session: Session,
    study: RsnStudy | StressStudy | DefencesStudy,
    model: Any,
    *,
    arms: tuple[str, ...] = ("none", "SN-Tune"),
    steps: int = 1,
) -> tuple[Any, Any, Any]:
    """What is trained, what is measured, and which neurons."""
    from safety_neurons import studies
    from safety_neurons.tuning.artefacts import check_plain

    check_plain(model)  # before neurons are searched, which takes minutes
    first, judge = session.common.seed, study.judge
    plan = studies.Plan(
        session.read("data", model, study.data_limit),
        session.read("mixed", model) if study.mix else None,
        session.read("task", model),
        arms,
        tuple(range(first, first + study.seeds)),
        {"mix": study.mix, "epochs": study.epochs, "learning_rate": study.learning_rate},
        study.downstream,  # type: ignore[arg-type]
        steps,
        getattr(study, "task_rate", 1.0),
        study.task_batch,
    )
    if judge == "auto":
        judge = "compliance" if model.prompt_folder is not None else "refusal"
    harmful, harmless, task = (
        session.read(name, model, study.limit) for name in ("harmful", "harmless", "task_test")
    )
    lab = studies.Lab(
        harmful,
        harmless,
        session.read("text", model, study.limit),
        task,
        judge=judge,
        harm_judge=session.judge(study.harm_judge),
        max_new_tokens=session.answer_length(study.max_new_tokens),
        batch_size=session.batch_size(),
        completions_file=session.folder.path("completions.jsonl"),
    )
    session.notes.extend(studies.cut_short(model, plan, lab))
    return plan, lab, neurons_of(session, study, model)


def neurons_of(session: Session, study: WhichNeurons, model: Any) -> Any:
    """The sets of the arms: from files, or found here."""
    from safety_neurons import studies
    from safety_neurons.studies.lengths import too_long

    if study.neurons is None or study.foundation_neurons is None:
        searched = {name: session.read(name, model) for name in ("prompts", "general")}
        session.notes.extend(too_long(model, searched))
        with session.status("find") as _:
            return studies.find_sets(
                model,
                *searched.values(),
                share=study.share,
                foundation=study.foundation_share,
                method=study.method,
                fill=not study.no_fill,
            )
    safety, foundation = (session.neurons(path, model) for path in (study.neurons, study.foundation_neurons))
    robust = safety - foundation
    return studies.Sets(safety, foundation, robust, len(safety) - len(robust))


def keep_arms(session: Session, sets: Any, lab: Any) -> dict[str, Any]:
    """Write the sets; where they are, and how was measured."""
    session.notes.extend(lab.cut_off_notes())
    files = {}
    for name in ("safety", "foundation", "robust"):
        files[name] = str(session.folder.path(f"{name}.safetensors"))
        getattr(sets, name).save(files[name])
    return {
        "judge": lab.judge,
        "max_new_tokens": lab.longest,
        "neurons": files,
        "measured_on": {"harmful": len(lab.harmful), "harmless": len(lab.harmless), "task": len(lab.task)},
    }
