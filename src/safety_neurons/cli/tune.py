"""tune: train only the neurons of a set to refuse, watched on held-out prompts; an ordinary adapter comes out."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from safety_neurons.cli import console
from safety_neurons.cli.gating import gated
from safety_neurons.cli.options import Common, Model
from safety_neurons.cli.session import Session, resolve
from safety_neurons.cli.verb import verb
from safety_neurons.errors import RunError, UsageError

DATA, TRAINING, CHECKS, WRITTEN = "Data", "Training", "Checks while training", "What is written"
Stage = Callable[[str, Any], None]


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    verb(app, "tune")(tune)


def tune(
    common: Common,
    model: Model,
    neurons: Annotated[str, typer.Option(help="Neuron file (or the folder of a find run): what is trained.", rich_help_panel="Models")],
    protect: Annotated[str | None, typer.Option(help="Neuron file: neurons that stay as they are.", rich_help_panel="Models")] = None,
    data: Annotated[
        str, typer.Option(help="Harmful requests with refusals: a file or builtin:NAME[/LANG].", rich_help_panel=DATA)
    ] = "builtin:refusals",
    column: Annotated[str | None, typer.Option(help="Column of --data that holds the requests.", rich_help_panel=DATA)] = None,
    answer_column: Annotated[str | None, typer.Option(help="Column of --data that holds the refusals.", rich_help_panel=DATA)] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first N records of --data.", rich_help_panel=DATA)] = None,
    harmless: Annotated[
        str, typer.Option(help="Harmless requests mixed in: a file, builtin:NAME[/LANG] or none.", rich_help_panel=DATA)
    ] = "builtin:harmless",
    mix: Annotated[float, typer.Option(min=0, help="Harmless examples for each harmful one.", rich_help_panel=DATA)] = 1.0,
    learning_rate: Annotated[
        str, typer.Option(help="auto (relative to the size of the weights) or a number.", rich_help_panel=TRAINING)
    ] = "auto",
    epochs: Annotated[int, typer.Option(help="Passes over the examples.", rich_help_panel=TRAINING)] = 6,
    max_steps: Annotated[int | None, typer.Option(help="End after so many steps.", rich_help_panel=TRAINING)] = None,
    accumulate: Annotated[int, typer.Option(help="Batches of a step.", rich_help_panel=TRAINING)] = 1,
    warmup: Annotated[float, typer.Option(help="Share of the steps over which the rate rises.", rich_help_panel=TRAINING)] = 0.1,
    clip: Annotated[float, typer.Option(help="Largest norm of the trained entries' gradient.", rich_help_panel=TRAINING)] = 1.0,
    weight_decay: Annotated[float, typer.Option(help="Pull towards the base.", rich_help_panel=TRAINING)] = 0.0,
    max_length: Annotated[int, typer.Option(help="Tokens of an example.", rich_help_panel=TRAINING)] = 512,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Train to the end on all data, without held-out prompts.", rich_help_panel=CHECKS)
    ] = False,
    check_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between checks. [default: a tenth of all]", rich_help_panel=CHECKS)
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Share of harmless prompts that may be refused beyond before.", rich_help_panel=CHECKS)
    ] = 0.05,
    max_divergence: Annotated[
        float | None, typer.Option(min=0, help="Largest KL per token on harmless prompts, in nats.", rich_help_panel=CHECKS)
    ] = None,
    test_harmful: Annotated[
        str, typer.Option(help="Harmful requests to measure on.", rich_help_panel="Measured before and after")
    ] = "builtin:harmful-test",
    test_harmless: Annotated[
        str, typer.Option(help="Harmless requests to measure on.", rich_help_panel="Measured before and after")
    ] = "builtin:harmless-test",
    text: Annotated[
        str, typer.Option(help="General text for perplexity, or none.", rich_help_panel="Measured before and after")
    ] = "builtin:general-test",
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Length of an answer, in tokens.", rich_help_panel="Measured before and after")
    ] = 64,
    merge: Annotated[bool, typer.Option("--merge", help="Also write the whole model, changed.", rich_help_panel=WRITTEN)] = False,
    vllm: Annotated[bool, typer.Option("--vllm", help="Pad the adapter to one rank, as vLLM wants it.", rich_help_panel=WRITTEN)] = False,
    gate: Annotated[
        pathlib.Path | None, typer.Option(help="TOML file with achieved = true: exit 3 where tuning did not achieve what it is for.")
    ] = None,
) -> dict[str, Any]:
    """SN-Tune: train only the neurons of a set to refuse; everything else stays as it is, bit for bit."""
    options = {name: value for name, value in locals().items() if name != "common"}
    check_training(options)
    if options.pop("gate") is not None:
        from safety_neurons.results import Gate

        Gate.load(gate)  # type: ignore[arg-type]
    session = Session("tune", common, options)

    def work() -> dict[str, Any]:
        loaded = base_of(session, model, merge)
        chosen = session.neurons(neurons, loaded)
        if vllm:
            refuse_ranks(loaded, chosen)
        return trained(session, options, loaded, chosen)

    return gated(session.run(work, show), gate, as_json=common.json)


def check_training(options: dict[str, Any]) -> None:
    """Refuse what would train nothing, before anything is loaded."""
    for name in ("epochs", "max_steps", "accumulate"):
        if options[name] is not None and options[name] < 1:
            raise UsageError(f"--{name.replace('_', '-')} {options[name]}: expected at least 1; with less there would be no step")
    if options["learning_rate"] != "auto":
        try:
            rate = float(options["learning_rate"])
        except ValueError:
            rate = -1.0
        if not 0 < rate < float("inf"):
            raise UsageError(
                f"--learning-rate {options['learning_rate']}: expected auto or a number above 0; at 0 no step changes anything"
            )
    if not options["clip"] > 0:
        raise UsageError(f"--clip {options['clip']}: expected a norm above 0; at 0 no step changes anything")
    if not 0 <= options["warmup"] <= 1:
        raise UsageError(f"--warmup {options['warmup']}: expected a share from 0 to 1")


def base_of(session: Session, spec: str, merge: bool) -> Any:
    """The model to tune; what could not be written in the end is refused before anything is trained."""
    from safety_neurons.model import parse_spec

    loaded = session.model(spec)
    if session.common.merge_adapters and parse_spec(resolve(spec)).adapters:
        keep_model(session, loaded, "base")
        loaded.inner.config._name_or_path = str(session.folder.folder.absolute() / "base")
        session.notes.append("the adapters of the model were merged into its weights; the tuned adapter belongs to base/ of this run")
    if merge or hasattr(loaded.model, "peft_config"):
        refuse_inexact(loaded, "--merge" if merge else "a model with adapters, which are merged for the tuned adapter's base,")
    return loaded


def refuse_inexact(model: Any, what: str) -> None:
    """A quantised base cannot take up a change exactly."""
    from safety_neurons.errors import UnsupportedModelError

    for key, place in model.anatomy.places.items():
        if place.projection.quantised:
            raise UnsupportedModelError(
                f"{what} on a quantised base ({key} is a {type(place.projection.base).__name__}), plain weights were expected: quantised "
                "ones cannot take up a change exactly; leave --merge and adapters out, or load the base unquantised"
            )


def refuse_ranks(model: Any, neurons: Any) -> None:
    """A projection with more trained rows or columns than vLLM allows cannot be written with `--vllm`."""
    from safety_neurons.errors import UnsupportedModelError
    from safety_neurons.tuning.artefacts import VLLM_RANKS

    ranks: dict[str, int] = {}
    for key, members in neurons.items():
        if key in model.anatomy.places:
            name = model.anatomy.places[key].module_name
            ranks[name] = ranks.get(name, 0) + len(members)
    for name, rank in ranks.items():
        if rank > VLLM_RANKS[-1]:
            raise UnsupportedModelError(
                f"--vllm with {rank} trained rows or columns of {name}, at most {VLLM_RANKS[-1]} were expected; use --merge instead"
            )


def trained(session: Session, options: dict[str, Any], model: Any, neurons: Any) -> dict[str, Any]:
    """Train, measure, and write what came out."""
    from safety_neurons.studies import Checking
    from safety_neurons.studies import tune as train

    def read(name: str, **columns: Any) -> Any:
        return None if options[name] == "none" else session.prompts(options[name], model, **columns)

    folder = session.folder.folder.absolute()
    for name in ("completions.jsonl", "harmless-answers.jsonl", "checkpoints/tune.safetensors"):
        session.folder.path(name)
    with training_bar(quiet=session.quiet) as progress:
        tuning = train(
            model,
            neurons,
            read("data", column=options["column"], answer_column=options["answer_column"], limit=options["limit"]),
            harmless=read("harmless"),
            test_harmful=read("test_harmful"),
            test_harmless=read("test_harmless"),
            text=read("text"),
            protect=session.neurons(options["protect"], model) if options["protect"] else None,
            folder=folder,
            check=Checking(options["check_every"], options["tolerance"], options["max_divergence"]) if not options["no_check"] else None,
            batch_size=session.batch_size(),
            seed=session.common.seed,
            progress=progress,
            **{name: options[name] for name in PASSED_ON},
        )
    session.notes.extend(tuning.notes)
    return keep(session, options, model, tuning)


PASSED_ON = (
    "mix",
    "learning_rate",
    "epochs",
    "max_steps",
    "accumulate",
    "warmup",
    "clip",
    "weight_decay",
    "max_length",
    "max_new_tokens",
)
"""Options that go to the study under the same name."""


def keep(session: Session, options: dict[str, Any], model: Any, tuning: Any) -> dict[str, Any]:
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
        session.notes.append("no LoRA module holds routed experts: there is no adapter, and the whole model is in merged/")
    else:
        exported.append(export_lora(folder / "adapter", model, delta, vllm=options["vllm"]))
    if options["merge"] or routed:
        exported.append(export_merged(folder / "merged", model, delta))
    session.notes.extend(note for each in exported for note in each.notes)
    for name in ("delta", "adapter", "merged"):
        own(session, name)
    readable = not any(expert is None and model.anatomy.place(key).projection.quantised for expert, key in parts)
    result = {
        "adapter": None if routed else str(folder / "adapter"),
        "delta": str(folder / "delta"),
        "merged": str(folder / "merged") if options["merge"] or routed else None,
        **tuning.record(),
        "survives_cast": survival(model, delta, model.dtype) if readable else None,
        "completions": str(folder / "completions.jsonl"),
        "results": str(folder / "results.json"),
    }
    write_json(session.folder.path("results.json"), {**result, "history": [dataclasses.asdict(step) for step in tuning.tuned.history]})
    if result["frozen_unchanged"] is False:
        raise RunError(
            "weights outside the set changed while training (their hash differs), expected them bit for bit as before; something else "
            f"wrote into the model. What was trained is kept in {folder}"
        )
    return result


def keep_model(session: Session, model: Any, name: str) -> None:
    """A whole model with its tokenizer, as safetensors."""
    from safety_neurons.tuning.artefacts import save_checkpoint

    save_checkpoint(session.folder.folder.absolute() / name, model)
    own(session, name)


def own(session: Session, name: str) -> None:
    """Note the files of a folder as the run's own."""
    root = session.folder.folder.absolute()
    for file in sorted((root / name).rglob("*")):
        if file.is_file():
            session.folder.path(str(file.relative_to(root)))


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

    refused = f"held out: refuses {percent(checked.harmful_refused)} harmful, {percent(checked.harmless_refused)} harmless"
    return f"{refused}, KL {checked.divergence:.3f}"


def show(result: dict[str, Any]) -> None:
    """What was trained, before and after as rows, and the files."""
    word = ("bold", "Achieved") if result["achieved"] else ("bold red", "Not achieved")
    console.say(word, f": {result['why']}")
    steps = f"{result['steps']:,} of {result['planned_steps']:,} steps ({result['stopped']}), state of step {result['kept_step']:,} kept"
    trained = f"{result['trained_parameters']:,} parameters, {console.share(result['share_of_parameters'])} of the model"
    console.say(("bold", f"{result['n_neurons']:,} neurons tuned"), f": {trained}; {steps}\n")
    rows = [
        [name, arm["harmful_refused"], arm["harmless_refused"], arm["perplexity"], arm["divergence"]]
        for name, arm in (("before", result["before"]), ("after", result["after"]))
    ]
    console.print_table(
        "Before and after, on test prompts",
        ["", "harmful refused", "harmless refused", "perplexity", "KL per token"],
        rows,
        caption="95 % intervals; KL(untreated ‖ tuned) in nats on the harmless prompts",
    )
    checks = [
        [str(check["step"]), check["harmful_refused"]["value"], check["harmless_refused"]["value"], check["divergence"]]
        for check in result["checks"]
    ]
    if checks:
        columns = ["step", "harmful refused", "harmless refused", "KL per token"]
        console.print_table("\nWhile training, on prompts held out of the data", columns, checks)
    survives, frozen = result["survives_cast"], {True: "bit for bit as before", False: "CHANGED", None: "not looked at"}
    cast = "" if survives is None else f"; {console.share(survives)} of the changed weights survive the cast to the model's type"
    console.say(
        f"\nrefusals of harmful requests change by {console.shown(result['change'])}, of harmless ones by "
        f"{console.shown(result['harmless_change'])}\n"
        f"everything outside the set: {frozen[result['frozen_unchanged']]}{cast}"
    )
    for name in ("adapter", "delta", "merged"):
        if result[name]:
            console.say(("dim", f"{name:8} "), result[name])
