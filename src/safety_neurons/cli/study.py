"""study: whole experiments around tuning, as one command each."""

import dataclasses
from typing import Annotated, Any, ClassVar

from safety_neurons.cli.options import EvaluationPrompts, NeuronFile, OneModel, OtherText, Requested, listed
from safety_neurons.cli.session import Session
from safety_neurons.cli.verb import verb
from safety_neurons.declarations import Between, Count, Declaration, NotNegative, OneOf, OpenShare, Positive, Reads
from safety_neurons.errors import UsageError
from safety_neurons.tuning.settings import checked_rate

TaskFile = Annotated[str, Reads("prompts")]
ARMS = {"none": "none", "sn-tune": "SN-Tune", "rsn-tune": "RSN-Tune", "random": "random", "protected": "SN-Tune, protected"}


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
            raise UsageError("one of --neurons and --foundation-neurons given alone; expected both files, or neither")


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
            raise UsageError(f"--arms: unknown {unknown[0].lower()!r}; expected some of none, SN-Tune, RSN-Tune, random, protected")


@dataclasses.dataclass(frozen=True)
class AttackOptions(Declaration):
    """How hard safety is attacked."""

    PANEL: ClassVar[str | None] = "Attacks"

    attack: TaskFile | None = None
    """Harmful requests with answers that go along. [default: the model's own]"""
    pruned: str = "0.05,0.1,0.25,0.5,1"
    """Shares of the set to prune."""
    harmful_steps: str = "1,2,5,10"
    """LoRA steps on harmful answers."""
    benign_steps: str = "10,30,100"
    """Steps on the task."""

    def amounts(self, name: str) -> list[float]:
        """One of the comma-separated options as numbers, in order."""
        text, expected = getattr(self, name), "shares above 0 and at most 1" if name == "pruned" else "whole numbers of steps"
        try:
            numbers = sorted({float(part) for part in text.split(",")})
        except ValueError:
            numbers = [0.0]
        if numbers[0] <= 0 or (name == "pruned" and numbers[-1] > 1) or (name != "pruned" and any(value % 1 for value in numbers)):
            raise UsageError(f"--{name.replace('_', '-')} {text!r}: expected comma-separated {expected}")
        return numbers

    def counts(self, name: str) -> list[int]:
        """The same of an option that counts steps."""
        return [int(number) for number in self.amounts(name)]

    def check(self) -> None:
        """Also the numbers."""
        super().check()
        for name in ("pruned", "harmful_steps", "benign_steps"):
            self.amounts(name)


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
    max_new_tokens: Positive = 64
    """Length of a completion, in tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RsnStudy(Lengths, EvaluationPrompts, Repeated, WhichArms, TaskSteps, HowLong, Downstream, Tunings, WhichNeurons, OneModel):
    """Everything that decides the first study; the last base has the first options."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StressStudy(Lengths, Requested, Repeated, AttackOptions, TaskSteps, Downstream, Tunings, WhichNeurons, OneModel):
    """Everything that decides the second study."""


@verb("study rsn")
def rsn(session: Session, study: RsnStudy) -> dict[str, Any]:
    """Does tuned safety outlive a downstream fine-tune? SN-Tune, RSN-Tune, random neurons, protection and no tuning side by side."""

    def work() -> dict[str, Any]:
        from safety_neurons import studies
        from safety_neurons.results.run import Cache

        model = session.model(study.model)
        plan, lab, sets = parts(session, study, model, arms=study.names, steps=study.steps)
        with session.status("study rsn") as tell:
            result = studies.rsn(model, sets, plan, lab, cache=Cache(session.folder.path), tell=tell)
        return {**result, "judge": lab.judge, **keep(session, sets, lab)}

    return session.run(work)


@verb("study stress")
def stress(session: Session, study: StressStudy) -> dict[str, Any]:
    """How easily is safety cut out, before and after SN-Tune? Pruning, harmful LoRA tuning, benign fine-tuning."""

    def work() -> dict[str, Any]:
        from safety_neurons import studies
        from safety_neurons.results.run import Cache

        model = session.model(study.model)
        plan, lab, sets = parts(session, study, model, arms=("none", "SN-Tune"), steps=1)
        attack = studies.Attack(
            study.amounts("pruned"),
            session.read("attack", model),
            study.counts("harmful_steps"),
            study.counts("benign_steps"),
            study.task_rate,
            study.task_batch,
            study.downstream,  # type: ignore[arg-type]
        )
        with session.status("study stress") as tell:
            result = studies.stress(model, sets, plan, attack, lab, cache=Cache(session.folder.path), tell=tell)
        return {**result, "judge": lab.judge, **keep(session, sets, lab)}

    return session.run(work)


def parts(session: Session, study: RsnStudy | StressStudy, model: Any, *, arms: tuple[str, ...], steps: int) -> tuple[Any, Any, Any]:
    """What is trained, what is measured, and which neurons."""
    from safety_neurons import studies

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
        study.task_rate,
        study.task_batch,
    )
    if judge == "auto":
        judge = "compliance" if model.prompt_folder is not None else "refusal"
    harmful, harmless, task = (session.read(name, model, study.limit) for name in ("harmful", "harmless", "task_test"))
    lab = studies.Lab(
        harmful,
        harmless,
        session.read("text", model, study.limit) if isinstance(study, EvaluationPrompts) else None,
        task,
        judge=judge,
        max_new_tokens=study.max_new_tokens,
        batch_size=session.batch_size(),
        completions_file=session.folder.path("completions.jsonl"),
    )
    return plan, lab, neurons_of(session, study, model)


def neurons_of(session: Session, study: WhichNeurons, model: Any) -> Any:
    """The sets of the arms: from files, or found here."""
    from safety_neurons import studies

    if study.neurons is None or study.foundation_neurons is None:
        with session.status("find") as _:
            return studies.find_sets(
                model,
                session.read("prompts", model),
                session.read("general", model),
                share=study.share,
                foundation=study.foundation_share,
                method=study.method,
                fill=not study.no_fill,
            )
    safety, foundation = (session.neurons(path, model) for path in (study.neurons, study.foundation_neurons))
    robust = safety - foundation
    return studies.Sets(safety, foundation, robust, len(safety) - len(robust))


def keep(session: Session, sets: Any, lab: Any) -> dict[str, Any]:
    """Write the sets; where they are."""
    files = {}
    for name in ("safety", "foundation", "robust"):
        files[name] = str(session.folder.path(f"{name}.safetensors"))
        getattr(sets, name).save(files[name])
    return {"neurons": files, "measured_on": {"harmful": len(lab.harmful), "harmless": len(lab.harmless), "task": len(lab.task)}}
