"""tune, repair: train only the neurons of a set to refuse, and put a set back."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Annotated, Any, ClassVar

from safety_neurons.cli import console
from safety_neurons.cli.session import (
    ModelName,
    NeuronFile,
    OneModel,
    OtherText,
    Session,
    resolve,
)
from safety_neurons.cli.verb import verb
from safety_neurons.declarations import (
    Declaration,
    Incidental,
    NotNegative,
    Panel,
    Positive,
    Reads,
)
from safety_neurons.errors import RunError, UnsupportedModelError, UsageError
from safety_neurons.tuning.settings import Anchored, BeforeAndAfter, Training

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

    def check(self) -> None:
        """Also that the untouched model itself would be within the limit."""
        super().check()
        if 0 < self.max_perplexity < 1:
            raise UsageError(
                f"--max-perplexity {self.max_perplexity}: expected 0 for no limit, or at least 1"
            )


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

    def look(self) -> None:
        """The gate."""
        super().look()
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
    session.folder.write_json(
        "results.json", {**result, "history": [dataclasses.asdict(step) for step in tuning.tuned.history]}
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

    session.notes.extend(save_checkpoint(session.folder.folder.absolute() / name, model))
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
        session.notes.extend(save_checkpoint(target, model))
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
