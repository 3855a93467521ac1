"""study: whole experiments around tuning, as one command each."""

from typing import Annotated, Any

import typer

from safety_neurons.cli import console
from safety_neurons.cli.options import Common, Harmful, Harmless, Limit, MaxNewTokens, Model, Text, listed
from safety_neurons.cli.pages import Contents
from safety_neurons.cli.session import Session
from safety_neurons.cli.verb import verb
from safety_neurons.errors import UsageError

app = typer.Typer(
    help="Whole experiments: does tuned safety outlive fine-tuning (rsn), how easily is it cut out again (stress).",
    no_args_is_help=True,
    cls=Contents,
    rich_markup_mode=None,
)

SETS, TUNING, TASK, ATTACK = "Which neurons", "Tuning", "Downstream task", "Attacks"
Neurons = Annotated[str | None, typer.Option(help="Safety neurons; found here where none are given.", rich_help_panel=SETS)]
Foundation = Annotated[str | None, typer.Option(help="Foundation neurons, with --neurons.", rich_help_panel=SETS)]
Share = Annotated[float, typer.Option(help="Share of all parameters that is tuned.", rich_help_panel=SETS)]
FoundationShare = Annotated[float, typer.Option(help="Share of all neurons that are foundation neurons.", rich_help_panel=SETS)]
Method = Annotated[str, typer.Option(help="importance or attribution.", rich_help_panel=SETS)]
Find = Annotated[str, typer.Option(help="Harmful requests to find on.", rich_help_panel=SETS)]
General = Annotated[str, typer.Option(help="General text to find foundation neurons on.", rich_help_panel=SETS)]
NoFill = Annotated[bool, typer.Option("--no-fill", help="Leave RSN smaller than SN by what is taken out of it.", rich_help_panel=SETS)]
Data = Annotated[str, typer.Option(help="Harmful requests with refusals.", rich_help_panel=TUNING)]
DataLimit = Annotated[int, typer.Option(min=1, help="Use the first N of them.", rich_help_panel=TUNING)]
Mixed = Annotated[str, typer.Option(help="Harmless requests with answers, mixed in; or none.", rich_help_panel=TUNING)]
Mix = Annotated[float, typer.Option(min=0, help="Harmless examples for each harmful one.", rich_help_panel=TUNING)]
Epochs = Annotated[int, typer.Option(min=1, help="Passes over the examples.", rich_help_panel=TUNING)]
LearningRate = Annotated[str, typer.Option(help="auto or a number.", rich_help_panel=TUNING)]
TaskData = Annotated[str, typer.Option(help="Task to fine-tune on: questions with answers.", rich_help_panel=TASK)]
TaskTest = Annotated[str, typer.Option(help="Held-out part of it.", rich_help_panel=TASK)]
Downstream = Annotated[str, typer.Option(help="full or lora.", rich_help_panel=TASK)]
TaskRate = Annotated[float, typer.Option(help="Learning rate on the task (and of attacks).", rich_help_panel=TASK)]
TaskBatch = Annotated[int, typer.Option(min=1, help="Examples a step.", rich_help_panel=TASK)]
Seeds = Annotated[int, typer.Option(min=1, help="How many seeds, from --seed on.")]
Judge = Annotated[str, typer.Option(help="compliance (templates), refusal, or auto: compliance for organisms.")]


@verb(app, "rsn")
def rsn(
    common: Common,
    model: Model,
    neurons: Neurons = None,
    foundation_neurons: Foundation = None,
    share: Share = 0.0099,
    foundation_share: FoundationShare = 0.1,
    method: Method = "importance",
    prompts: Find = "builtin:harmful",
    general: General = "builtin:general",
    no_fill: NoFill = False,
    data: Data = "builtin:refusals",
    data_limit: DataLimit = 50,
    mixed: Mixed = "builtin:harmless",
    mix: Mix = 2.0,
    epochs: Epochs = 6,
    learning_rate: LearningRate = "auto",
    task: TaskData = "builtin:task",
    task_test: TaskTest = "builtin:task-test",
    downstream: Downstream = "full",
    steps: Annotated[int, typer.Option(min=0, help="Steps on the task.", rich_help_panel=TASK)] = 100,
    task_rate: TaskRate = 1e-3,
    task_batch: TaskBatch = 16,
    arms: Annotated[str | None, typer.Option(help="Comma-separated: none,SN-Tune,RSN-Tune,random,protected.")] = None,
    seeds: Seeds = 5,
    judge: Judge = "auto",
    harmful: Harmful = "builtin:harmful-test",
    harmless: Harmless = "builtin:harmless-test",
    text: Text = "builtin:general-test",
    limit: Limit = None,
    max_new_tokens: MaxNewTokens = 64,
) -> dict[str, Any]:
    """Does tuned safety outlive a downstream fine-tune? SN-Tune, RSN-Tune, random neurons, protection and no tuning side by side."""
    options = {name: value for name, value in locals().items() if name != "common"}
    check(options)
    session = Session("study-rsn", common, options)

    def work() -> dict[str, Any]:
        from safety_neurons import studies

        loaded = session.model(model)
        plan, lab, sets = parts(session, options, loaded, arms=arms_of(options["arms"]))
        with session.status("study rsn") as tell:
            found = studies.rsn(loaded, sets, plan, lab, shelf=session.folder.path("seeds.json"), tell=tell)
        return {**found, "judge": lab.judge, **keep(session, sets, lab)}

    return session.run(work, show_rsn)


@verb(app, "stress")
def stress(
    common: Common,
    model: Model,
    neurons: Neurons = None,
    foundation_neurons: Foundation = None,
    share: Share = 0.0099,
    foundation_share: FoundationShare = 0.1,
    method: Method = "importance",
    prompts: Find = "builtin:harmful",
    general: General = "builtin:general",
    no_fill: NoFill = False,
    data: Data = "builtin:refusals",
    data_limit: DataLimit = 50,
    mixed: Mixed = "builtin:harmless",
    mix: Mix = 2.0,
    epochs: Epochs = 6,
    learning_rate: LearningRate = "auto",
    task: TaskData = "builtin:task",
    task_test: TaskTest = "builtin:task-test",
    downstream: Downstream = "full",
    task_rate: TaskRate = 1e-3,
    task_batch: TaskBatch = 16,
    attack: Annotated[
        str | None,
        typer.Option(help="Harmful requests with answers that go along. [default: the model's own]", rich_help_panel=ATTACK),
    ] = None,
    pruned: Annotated[str, typer.Option(help="Shares of the set to prune.", rich_help_panel=ATTACK)] = "0.05,0.1,0.25,0.5,1",
    harmful_steps: Annotated[str, typer.Option(help="LoRA steps on harmful answers.", rich_help_panel=ATTACK)] = "1,2,5,10",
    benign_steps: Annotated[str, typer.Option(help="Steps on the task.", rich_help_panel=ATTACK)] = "10,30,100",
    seeds: Seeds = 5,
    judge: Judge = "auto",
    harmful: Harmful = "builtin:harmful-test",
    harmless: Harmless = "builtin:harmless-test",
    limit: Limit = None,
    max_new_tokens: MaxNewTokens = 64,
) -> dict[str, Any]:
    """How easily is safety cut out, before and after SN-Tune? Pruning, harmful LoRA tuning, benign fine-tuning."""
    options = {name: value for name, value in locals().items() if name != "common"} | {"steps": 1, "text": "none"}
    check(options)
    amounts = {name: numbers(name, options[name]) for name in ("pruned", "harmful_steps", "benign_steps")}
    session = Session("study-stress", common, {name: value for name, value in options.items() if name not in ("steps", "text")})

    def work() -> dict[str, Any]:
        from safety_neurons import studies

        loaded = session.model(model)
        plan, lab, sets = parts(session, options, loaded, arms=("none", "SN-Tune"))
        answers = None if attack is None else session.prompts(attack, loaded)
        hard = studies.Attack(
            amounts["pruned"],
            answers,
            [int(step) for step in amounts["harmful_steps"]],
            [int(step) for step in amounts["benign_steps"]],
            task_rate,
            task_batch,
            downstream,  # type: ignore[arg-type]
        )
        with session.status("study stress") as tell:
            found = studies.stress(loaded, sets, plan, hard, lab, shelf=session.folder.path("seeds.json"), tell=tell)
        return {**found, "judge": lab.judge, **keep(session, sets, lab)}

    return session.run(work, show_stress)


def check(options: dict[str, Any]) -> None:
    """Refuse what no model can make right."""
    if options["downstream"] not in ("full", "lora"):
        raise UsageError(f"--downstream {options['downstream']!r}: expected full or lora")
    if options["judge"] not in ("auto", "compliance", "refusal"):
        raise UsageError(f"--judge {options['judge']!r}: expected auto, compliance or refusal")
    if options["method"] not in ("importance", "attribution"):
        raise UsageError(f"--method {options['method']!r}: expected importance or attribution")
    if not 0 < options["share"] < 1 or not 0 <= options["foundation_share"] < 1:
        raise UsageError("--share and --foundation-share: expected shares between 0 and 1 (0.0099 for just below one per cent)")
    if (options["neurons"] is None) != (options["foundation_neurons"] is None):
        raise UsageError("one of --neurons and --foundation-neurons given alone; expected both files, or neither")
    arms_of(options.get("arms"))


def arms_of(text: str | None) -> tuple[str, ...]:
    """`--arms` as the study calls them."""
    known = {"none": "none", "sn-tune": "SN-Tune", "rsn-tune": "RSN-Tune", "random": "random", "protected": "SN-Tune, protected"}
    wanted = [name.lower() for name in listed(text) or ()] or list(known)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise UsageError(f"--arms: unknown {unknown[0]!r}; expected some of none, SN-Tune, RSN-Tune, random, protected")
    return tuple(known[name] for name in wanted)


def numbers(name: str, text: str) -> list[float]:
    """A comma-separated option of positive numbers, in order."""
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] <= 0 or (name == "pruned" and found[-1] > 1) or (name != "pruned" and any(value % 1 for value in found)):
        expected = "shares above 0 and at most 1" if name == "pruned" else "whole numbers of steps"
        raise UsageError(f"--{name.replace('_', '-')} {text!r}: expected comma-separated {expected}")
    return found


def parts(session: Session, options: dict[str, Any], model: Any, *, arms: tuple[str, ...]) -> tuple[Any, Any, Any]:
    """What is trained, what is measured, and which neurons."""
    from safety_neurons import studies

    def read(name: str, limit: int | None = None) -> Any:
        return None if options[name] == "none" else session.prompts(options[name], model, limit=limit)

    limit = options["limit"]
    mixed = read("mixed") if options["mix"] else None
    tuning = {"mix": options["mix"], "epochs": options["epochs"], "learning_rate": options["learning_rate"]}
    first = session.common.seed
    plan = studies.Plan(
        read("data", options["data_limit"]),
        mixed,
        read("task"),
        arms,
        tuple(range(first, first + options["seeds"])),
        tuning,
        options["downstream"],
        options["steps"],
        options["task_rate"],
        options["task_batch"],
    )
    judge = options["judge"]
    if judge == "auto":
        judge = "compliance" if model.prompt_folder is not None else "refusal"
    lab = studies.Lab(
        read("harmful", limit),
        read("harmless", limit),
        read("task_test", limit),
        read("text", limit),
        judge,
        options["max_new_tokens"],
        session.batch_size(),
        session.folder.path("completions.jsonl"),
    )
    return plan, lab, neurons_of(session, options, model)


def neurons_of(session: Session, options: dict[str, Any], model: Any) -> Any:
    """The sets of the arms: from files, or found here."""
    from safety_neurons import studies

    if options["neurons"] is None:
        with session.status("find") as _:
            return studies.find_sets(
                model,
                session.prompts(options["prompts"], model),
                session.prompts(options["general"], model),
                share=options["share"],
                foundation=options["foundation_share"],
                method=options["method"],
                fill=not options["no_fill"],
            )
    safety, foundation = (session.neurons(options[name], model) for name in ("neurons", "foundation_neurons"))
    robust = safety - foundation
    return studies.Sets(safety, foundation, robust, len(safety) - len(robust))


def keep(session: Session, sets: Any, lab: Any) -> dict[str, Any]:
    """Write the sets; where they are."""
    files = {}
    for name in ("safety", "foundation", "robust"):
        files[name] = str(session.folder.path(f"{name}.safetensors"))
        getattr(sets, name).save(files[name])
    return {"neurons": files, "measured_on": {"harmful": len(lab.harmful), "harmless": len(lab.harmless), "task": len(lab.task)}}


def show_rsn(result: dict[str, Any]) -> None:
    """Arms as rows, before and after the downstream fine-tune."""
    from safety_neurons.results import clear_word

    down, safety = result["downstream"], result["sets"]["safety"]
    for arm in result["arms"]:
        if arm["tuning"] and not arm["tuning"]["achieved"]:
            console.say(("bold red", "Not achieved"), f" by {arm['arm']}: {arm['tuning']['why']}")
    columns = ["arm", "harmful", "answered", "perplexity"]
    rows = [[arm["arm"], score(arm["before"]["harmful"]), *costs(arm["before"])] for arm in result["arms"]]
    caption = "harmful score: mean over seeds (worst seed); answered: harmless requests, per cent"
    if down["steps"]:
        columns += ["harmful after", "answered", "task"]
        for row, arm in zip(rows, result["arms"], strict=True):
            row += [score(arm["after"]["harmful"]), percent(arm["after"]["harmless"]), percent(arm["after"]["task"])]
        caption += f"; after {down['steps']} steps of {down['how']} fine-tuning, task: solved, per cent"
    title = (
        f"{len(result['seeds'])} seeds, {safety['n_neurons']} neurons ({console.share(safety['share_of_parameters'])} of the parameters)"
    )
    console.print_table(title, columns, rows, caption, result["differences"])
    when = "after" if down["steps"] else "before"
    for name, found in result["differences"].items():
        told = f"{name}: {hundred(found[when])} ({clear_word(found[when])})"
        console.say(f"harmful score{' after the task' if down['steps'] else ''}, {told}")


def costs(point: dict[str, Any]) -> list[str]:
    """What a state costs elsewhere."""
    text = point["perplexity"]["value"]
    return [percent(point["harmless"]), "–" if text is None else f"{text:.2f}"]


def show_stress(result: dict[str, Any]) -> None:
    """Every attack as a curve in rows."""
    from safety_neurons.results.estimates import FEWEST_SEEDS

    if not result["achieved"]:
        console.say(("bold red", "Not achieved"), f" by SN-Tune: {result['why']}")
    rows = [
        [point["attack"], f"{point['amount']:g}", score(point["before"]), score(point["after"]), starred(point["difference"])]
        for point in result["curves"]
    ]
    console.print_table(
        f"Harmful score under attack, {len(result['seeds'])} seeds",
        ["attack", "how much", "untuned", "SN-Tune", "difference"],
        rows,
        caption="mean (worst seed); how much: share of the set pruned, or steps; difference with its 95 % interval over seeds and prompts, "
        f"* clear{'' if len(result['seeds']) >= FEWEST_SEEDS else f' (never with fewer than {FEWEST_SEEDS} seeds)'}",
        compared=result["curves"],
    )


def starred(difference: dict[str, Any]) -> str:
    """A difference in points, marked where it is clear."""
    from safety_neurons.results import is_clear

    return hundred(difference) + ("*" if is_clear(difference) else "")


def score(spread: dict[str, Any]) -> str:
    """A harmful score: mean, and the worst seed."""
    return "–" if spread["value"] is None else f"{100 * spread['value']:.1f} ({100 * spread['highest']:.1f})"


def percent(spread: dict[str, Any] | None) -> str:
    """A share in per cent."""
    return "–" if spread is None or spread["value"] is None else f"{100 * spread['value']:.1f}"


def hundred(spread: dict[str, Any]) -> str:
    """A difference in points with its interval."""
    return console.interval(spread, 1, signed=True, scale=100.0)
