"""tune, repair, study: train only the neurons of a set to refuse, put a set back, and ask what tuned safety
outlives.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Annotated, Any, ClassVar

from safety_neurons.cli import console
from safety_neurons.cli.session import (
    EvaluationPrompts,
    JudgedBy,
    ModelName,
    NeuronFile,
    OneModel,
    OtherText,
    Session,
    listed,
    resolve,
)
from safety_neurons.cli.verb import verb
from safety_neurons.declarations import (
    Between,
    Count,
    Declaration,
    Incidental,
    NotNegative,
    OneOf,
    OpenShare,
    Panel,
    Positive,
    Reads,
)
from safety_neurons.errors import RunError, UnsupportedModelError, UsageError
from safety_neurons.tuning.settings import Anchored, BeforeAndAfter, Training, checked_rate

Stage = Callable[[str, Any], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained(OneModel):
    """The model, and which of its neurons are trained."""

    PANEL: ClassVar[str | None] = "Models"

    neurons: NeuronFile
    """Neuron file (or the folder of a find run): what is trained."""
    protect: NeuronFile | None = None
    """Neuron file: neurons that stay as they are."""


@dataclasses.dataclass(frozen=True)
class Taught(Anchored):
    """What is learnt, and what the model is held to itself on."""

    PANEL: ClassVar[str | None] = "Data"

    data: Annotated[str, Reads("prompts", column=True, answers="answer_column")] = "builtin:refusals-wide"
    """Harmful requests with refusals: a file or builtin:NAME[/LANG]."""
    column: str | None = None
    """Column of --data that holds the requests."""
    answer_column: str | None = None
    """Column of --data that holds the refusals."""
    limit: Positive | None = None
    """Use the first N records of --data."""
    harmless: OtherText = "builtin:harmless-wide"
    """Harmless requests mixed in: a file, builtin:NAME[/LANG] or none."""


@dataclasses.dataclass(frozen=True)
class Watched(Declaration):
    """How training is watched."""

    PANEL: ClassVar[str | None] = "Checks while training"

    no_check: bool = False
    """Train to the end on all data, without held-out prompts."""
    check_every: Positive | None = None
    """Steps between checks. [default: a tenth of all]"""
    tolerance: NotNegative = 0.07
    """Share of harmless prompts that may be refused beyond before."""
    max_divergence: NotNegative = 0.05
    """Largest KL per token on harmless answers, in nats; 0: no limit."""
    max_perplexity: NotNegative = 1.02
    """Largest perplexity of general text, times the untouched model's; 0: no limit."""


@dataclasses.dataclass(frozen=True)
class Written(Declaration):
    """What is written beside the adapter, and what it is held to."""

    PANEL: ClassVar[str | None] = "What is written"

    merge: bool = False
    """Also write the whole model, changed."""
    vllm: bool = False
    """Pad the adapter to one rank, as vLLM wants it."""
    gate: Annotated[pathlib.Path | None, Incidental, Panel("Options")] = None
    """TOML file with achieved = true: exit 3 where tuning did not achieve what it is for."""

    def check(self) -> None:
        """Also that the gate can be read."""
        super().check()
        if self.gate is not None:
            from safety_neurons.results import Gate

            Gate.load(self.gate)


@verb("tune")
def tune(
    session: Session,
    models: Trained,
    taught: Taught,
    training: Training,
    watched: Watched,
    measured: BeforeAndAfter,
    written: Written,
) -> dict[str, Any]:
    """SN-Tune: train only the neurons of a set to refuse; everything else stays as it is, bit for bit."""

    def work() -> dict[str, Any]:
        from safety_neurons.studies import Checking
        from safety_neurons.studies import tune as train

        loaded = base_of(session, models.model, written.merge)
        chosen = session.neurons(models.neurons, loaded)
        if written.vllm:
            refuse_ranks(loaded, chosen)
        for name in ("completions.jsonl", "harmless-answers.jsonl", "checkpoints/tune.safetensors"):
            session.folder.path(name)
        check = (
            None
            if watched.no_check
            else Checking(
                watched.check_every,
                watched.tolerance,
                watched.max_divergence or None,
                watched.max_perplexity or None,
            )
        )
        others = ("harmless", "general", "test_harmful", "test_harmless", "text")
        with training_bar(quiet=session.quiet) as progress:
            tuning = train(
                loaded,
                chosen,
                session.read("data", loaded, taught.limit),
                protect=session.neurons(models.protect, loaded) if models.protect else None,
                folder=session.folder.folder.absolute(),
                check=check,
                max_new_tokens=measured.max_new_tokens,
                progress=progress,
                **{name: session.read(name, loaded) for name in others},
                **training.values(),
                **session.running,
            )
        session.notes.extend(tuning.notes)
        return keep(session, written, loaded, tuning)

    return session.gated(session.run(work), written.gate)


def base_of(session: Session, spec: str, merge: bool) -> Any:
    """The model to tune; what could not be written in the end is refused before anything is trained."""
    from safety_neurons.model import parse_spec

    loaded = session.model(spec)
    if session.common.merge_adapters and parse_spec(resolve(spec)).adapters:
        keep_model(session, loaded, "base")
        loaded.inner.config._name_or_path = str(session.folder.folder.absolute() / "base")
        session.notes.append(
            "the adapters of the model were merged into its weights; the tuned adapter belongs to "
            "base/ of this run"
        )
    if merge or hasattr(loaded.model, "peft_config"):
        refuse_inexact(
            loaded,
            "--merge" if merge else "a model with adapters, which are merged for the tuned adapter's base,",
        )
    return loaded


def refuse_inexact(model: Any, what: str) -> None:
    """A quantised base cannot take up a change exactly."""
    for key, place in model.anatomy.places.items():
        if place.projection.quantised:
            raise UnsupportedModelError(
                f"{what} on a quantised base ({key} is a {type(place.projection.base).__name__}), plain "
                "weights were expected: quantised ones cannot take up a change exactly; leave --merge and "
                "adapters out, or load the base unquantised"
            )


def refuse_ranks(model: Any, neurons: Any) -> None:
    """A projection with more trained rows or columns than vLLM allows cannot be written with `--vllm`."""
    from safety_neurons.tuning.artefacts import VLLM_RANKS

    ranks: dict[str, int] = {}
    for key, members in neurons.items():
        if key in model.anatomy.places:
            name = model.anatomy.places[key].module_name
            ranks[name] = ranks.get(name, 0) + len(members)
    for name, rank in ranks.items():
        if rank > VLLM_RANKS[-1]:
            raise UnsupportedModelError(
                f"--vllm with {rank} trained rows or columns of {name}, at most {VLLM_RANKS[-1]} were "
                "expected; use --merge instead"
            )


def keep(session: Session, written: Written, model: Any, tuning: Any) -> dict[str, Any]:
    """Write delta, adapter and, where it was asked for, the merged model; the result."""
    from safety_neurons.neurons import parse_key
    from safety_neurons.results import write_json
    from safety_neurons.tuning import export_lora, export_merged, save_delta, survival

    delta, folder = tuning.tuned.delta, session.folder.folder.absolute()
    save_delta(folder / "delta", delta)
    parts = [(parse_key(key).expert, key) for key in delta.neurons.keys()]  # noqa: SIM118 - not a mapping
    routed = any(expert is not None for expert, _ in parts)
    exported = []
    if routed:
        session.notes.append(
            "no LoRA module holds routed experts: there is no adapter, and the whole model is in merged/"
        )
    else:
        exported.append(export_lora(folder / "adapter", model, delta, vllm=written.vllm))
    if written.merge or routed:
        exported.append(export_merged(folder / "merged", model, delta))
    session.notes.extend(note for each in exported for note in each.notes)
    for name in ("delta", "adapter", "merged"):
        session.own(name)
    readable = not any(
        expert is None and model.anatomy.place(key).projection.quantised for expert, key in parts
    )
    result = {
        "adapter": None if routed else str(folder / "adapter"),
        "delta": str(folder / "delta"),
        "merged": str(folder / "merged") if written.merge or routed else None,
        **tuning.record(),
        "survives_cast": survival(model, delta, model.dtype) if readable else None,
        "completions": str(folder / "completions.jsonl"),
        "results": str(folder / "results.json"),
    }
    write_json(
        session.folder.path("results.json"),
        {**result, "history": [dataclasses.asdict(step) for step in tuning.tuned.history]},
    )
    if result["frozen_unchanged"] is False:
        raise RunError(
            "weights outside the set changed while training (their hash differs), expected them bit for "
            f"bit as before; something else wrote into the model. What was trained is kept in {folder}"
        )
    return result


def keep_model(session: Session, model: Any, name: str) -> None:
    """A whole model with its tokenizer, as safetensors."""
    from safety_neurons.tuning.artefacts import save_checkpoint

    save_checkpoint(session.folder.folder.absolute() / name, model)
    session.own(name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repaired(OneModel):
    """The model to repair, and what is put back from which one."""

    PANEL: ClassVar[str | None] = "Models"

    reference: ModelName
    """The model whose neurons are as they should be."""
    neurons: NeuronFile
    """Neuron file (or the folder of a find run): what is put back."""


@verb("repair")
def repair(session: Session, repaired: Repaired) -> dict[str, Any]:
    """Put neurons back: their rows and columns become the reference's again, everything else stays as it was
    fine-tuned.
    """

    def work() -> dict[str, Any]:
        from safety_neurons.tuning import repair as put_back

        loaded, before = session.model(repaired.model), session.model(repaired.reference)
        members = session.neurons(repaired.neurons, loaded)
        done = put_back(loaded, before, members)
        if done.rounded:
            session.notes.append(
                f"{done.rounded:,} of {done.n_entries:,} entries of the reference were rounded to "
                f"{loaded.dtype}"
            )
        return {**dataclasses.asdict(done), **saved(session, loaded, done)}

    return session.run(work)


def saved(session: Session, model: Any, done: Any) -> dict[str, str]:
    """Write what was repaired: the adapter where only that changed, else the model."""
    from safety_neurons.model.adapters import is_adapted
    from safety_neurons.results.run import whole_folder
    from safety_neurons.tuning.artefacts import save_checkpoint

    adapted = is_adapted(model.model)
    if adapted and done.changed:
        raise UnsupportedModelError(
            f"{done.changed} entries of the base below the adapter differ from the reference's, an adapter "
            "can only be cleared of its own share; pass --merge-adapters to repair the merged model"
        )
    name = "adapter" if adapted else "model"
    target = session.folder.folder.absolute() / name
    if adapted:
        active = list(model.adapters or [model.model.active_adapter])
        with whole_folder(target) as partial:
            model.model.save_pretrained(str(partial), selected_adapters=active, save_embedding_layers=False)
    else:
        save_checkpoint(target, model)
    session.own(name)
    return {name: str(target)}


# What a person sees


@contextlib.contextmanager
def training_bar(*, quiet: bool) -> Iterator[Stage | None]:
    """A bar with loss and the last held-out rates on a terminal; None in a pipe or when quiet."""
    if quiet or not console.streams().err.isatty():
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [
        TextColumn("{task.description}", style=console.ACCENT, markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}", markup=False),
        TextColumn("{task.fields[held]}", style="dim", markup=False),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console.err(), transient=True) as bars:
        task = bars.add_task("tune", total=None, loss="", held="")

        def report(stage: str, status: Any) -> None:
            if status is None:
                bars.update(task, description=stage, total=None, loss="")
                return
            bars.update(task, description=stage, completed=status.step, total=status.steps)
            if status.loss is not None:
                bars.update(task, loss=f"loss {status.loss:.3f}")
            if status.checked is not None:
                bars.update(task, held=held_out(status.checked))

        yield report


def held_out(checked: Any) -> str:
    """A check in a few words."""

    def percent(rate: Any) -> str:
        return "–" if rate.value is None else f"{rate.value:.0%}"

    refused = (
        f"held out: refuses {percent(checked.harmful_refused)} harmful, "
        f"{percent(checked.harmless_refused)} harmless"
    )
    return f"{refused}, KL {checked.divergence:.3f}"


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
        return {**result, "judge": lab.judge, **keep_arms(session, sets, lab)}

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
        plan, lab, sets = parts(session, study, model, arms=("none", "SN-Tune"), steps=1)
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
        with session.status("study stress") as tell:
            result = studies.stress(
                model, sets, plan, attack, lab, cache=Cache(session.folder.path), tell=tell
            )
        return {**result, "judge": lab.judge, **keep_arms(session, sets, lab)}

    return session.run(work)


def parts(
    session: Session, study: RsnStudy | StressStudy, model: Any, *, arms: tuple[str, ...], steps: int
) -> tuple[Any, Any, Any]:
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


def keep_arms(session: Session, sets: Any, lab: Any) -> dict[str, Any]:
    """Write the sets; where they are."""
    files = {}
    for name in ("safety", "foundation", "robust"):
        files[name] = str(session.folder.path(f"{name}.safetensors"))
        getattr(sets, name).save(files[name])
    return {
        "neurons": files,
        "measured_on": {"harmful": len(lab.harmful), "harmless": len(lab.harmless), "task": len(lab.task)},
    }
