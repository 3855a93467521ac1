"""evaluate: harm, over-refusal and capability of a model as it is or treated, held to a gate."""

import pathlib
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from safety_neurons.cli import console
from safety_neurons.cli.gating import gated
from safety_neurons.cli.options import Column, Common, Limit, MaxNewTokens, listed, parse_object
from safety_neurons.cli.session import Session
from safety_neurons.cli.verb import verb
from safety_neurons.errors import InputError, UsageError

MODELS, TREATMENT, ASKED, WRITTEN, COMPARED = "Models", "Treatment", "What is asked", "How it answers", "What it is compared with"

ModelOrNone = Annotated[str | None, typer.Option(help="ID[@REVISION][+ADAPTER…], a folder, or organism:NAME.", rich_help_panel=MODELS)]
EndpointUrl = Annotated[
    str | None,
    typer.Option(help="An OpenAI-compatible server in the place of --model: URL#MODEL; its key in OPENAI_API_KEY.", rich_help_panel=MODELS),
]
RequestFields = Annotated[
    str | None,
    typer.Option(
        "--request", help="JSON object: further fields of each request to --endpoint; null leaves one out.", rich_help_panel=MODELS
    ),
]
Reference = Annotated[str | None, typer.Option(help="The model that capability kl compares with.", rich_help_panel=MODELS)]
Deactivate = Annotated[str | None, typer.Option(help="Neuron file: these are off.", rich_help_panel=TREATMENT)]
PatchNeurons = Annotated[str | None, typer.Option("--patch", help="Neuron file: patched from --donor.", rich_help_panel=TREATMENT)]
Donor = Annotated[str | None, typer.Option(help="The model that gives the activations of --patch.", rich_help_panel=TREATMENT)]
GuardFolder = Annotated[
    pathlib.Path | None, typer.Option("--guard", help="Folder of a guard: flagged prompts get its refusal.", rich_help_panel=TREATMENT)
]
SuiteNames = Annotated[
    str, typer.Option(help="Comma-separated: builtin:NAME, names of `data list`, files, NAME=FILE, hub:…", rich_help_panel=ASKED)
]
OverRefusal = Annotated[
    str, typer.Option(help="Harmless requests, asked where no suite has any; none leaves them out.", rich_help_panel=ASKED)
]
JudgeNames = Annotated[str | None, typer.Option(help="Comma-separated judges. [default: refusal,strings:advbench]", rich_help_panel=ASKED)]
Capability = Annotated[
    str | None,
    typer.Option(
        help="Comma-separated: perplexity[:FILE], kl[:PROMPTS], wikitext:FILE, gsm8k:FILE, mmlu:FOLDER, lm-eval:TASK",
        rich_help_panel=ASKED,
    ),
]
AttackNames = Annotated[
    str, typer.Option(help="Comma-separated attacks put around harmful requests; direct is none.", rich_help_panel=ASKED)
]
DataFolder = Annotated[
    pathlib.Path | None, typer.Option(help="Folder of the suites' files. [default: SAFETY_NEURONS_DATA]", rich_help_panel=ASKED)
]
TaskLimit = Annotated[int | None, typer.Option(min=1, help="Items of each capability task.", rich_help_panel=ASKED)]
Shots = Annotated[int | None, typer.Option(min=0, help="Examples shown by tasks. [default: what is usual]", rich_help_panel=ASKED)]
TasksFolder = Annotated[pathlib.Path | None, typer.Option(help="Task files of lm-evaluation-harness.", rich_help_panel=ASKED)]
Samples = Annotated[int, typer.Option(min=1, help="Completions of every prompt, each with its own seed.", rich_help_panel=WRITTEN)]
Temperature = Annotated[float, typer.Option(min=0, help="Of sampling; 0 is greedy.", rich_help_panel=WRITTEN)]
TopP = Annotated[float, typer.Option(help="Of sampling.", rich_help_panel=WRITTEN)]
TaskTokens = Annotated[int, typer.Option(min=1, help="Length of an answer in tasks that generate.", rich_help_panel=WRITTEN)]
BaselineRun = Annotated[
    pathlib.Path | None,
    typer.Option(help="Folder of an earlier evaluate run, in place of the untreated arm.", rich_help_panel=COMPARED),
]
GateFile = Annotated[pathlib.Path | None, typer.Option(help="Thresholds in TOML; exit 3 where one is not met.", rich_help_panel=COMPARED)]


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    verb(app, "evaluate")(evaluate)


def evaluate(
    common: Common,
    model: ModelOrNone = None,
    endpoint: EndpointUrl = None,
    request: RequestFields = None,
    reference: Reference = None,
    deactivate: Deactivate = None,
    patch: PatchNeurons = None,
    donor: Donor = None,
    guard: GuardFolder = None,
    suite: SuiteNames = "builtin:harmful-test",
    over_refusal: OverRefusal = "builtin:harmless-test",
    attack: AttackNames = "direct",
    judge: JudgeNames = None,
    capability: Capability = None,
    folder: DataFolder = None,
    column: Column = None,
    limit: Limit = None,
    capability_limit: TaskLimit = None,
    shots: Shots = None,
    tasks_folder: TasksFolder = None,
    max_new_tokens: MaxNewTokens = 128,
    answer_tokens: TaskTokens = 256,
    samples: Samples = 1,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    baseline: BaselineRun = None,
    gate: GateFile = None,
) -> dict[str, Any] | None:
    """Harm, over-refusal and capability of a model as it is or treated, by several judges, held to a gate."""
    options = {name: value for name, value in locals().items() if name != "common"}
    check(options)
    session = Session("evaluate", common, options)
    result = session.run(lambda: work(session, options), show)
    return gated(result, gate, as_json=common.json)


def check(options: Mapping[str, Any]) -> None:
    """What no model can make right, found out before one is loaded."""
    if (options["model"] is None) == (options["endpoint"] is None):
        raise UsageError(f"{'neither' if options['model'] is None else 'both'} of --model and --endpoint given, expected one of them")
    if parse_object("--request", options["request"]) is not None and options["endpoint"] is None:
        raise UsageError("--request without --endpoint; expected --endpoint URL#MODEL, whose requests these fields are for")
    treatments = [f"--{name}" for name in ("deactivate", "patch", "guard") if options[name] is not None]
    if options["endpoint"] is not None and (treatments or options["reference"]):
        raise UsageError(f"{[*treatments, '--reference'][0]} with --endpoint; expected --model, whose activations can be reached")
    if len(treatments) > 1:
        raise UsageError(f"{' and '.join(treatments)} given together; expected one treatment")
    if (options["patch"] is None) != (options["donor"] is None):
        raise UsageError("--patch and --donor belong together; expected both, or neither")
    if options["samples"] > 1 and not options["temperature"]:
        raise UsageError(f"--samples {options['samples']} at --temperature 0 are all the same; expected a temperature above 0, such as 1")
    if not 0 < options["top_p"] <= 1:
        raise UsageError(f"--top-p {options['top_p']}: expected above 0 and at most 1")
    for name in ("suite", "attack"):
        if not listed(options[name]):
            raise UsageError(f"--{name} names nothing; expected at least one, comma-separated")
    if options["gate"] is not None:
        from safety_neurons.results import Gate

        Gate.load(options["gate"])
    if options["guard"] is not None:
        from safety_neurons.guard import Guard

        Guard.load(options["guard"])
    if options["tasks_folder"] is not None and not options["tasks_folder"].is_dir():
        raise InputError(f"--tasks-folder {str(options['tasks_folder'])!r} is no folder; expected task files of lm-evaluation-harness")


def work(session: Session, options: dict[str, Any]) -> dict[str, Any]:
    """Load the models, evaluate, and say where everything is."""
    from safety_neurons.capability import Settings
    from safety_neurons.studies import evaluate as study

    common, found = session.common, models(session, options)
    for name in ("completions.jsonl", "judgements.sqlite", "capability.json", "answered_by.json"):
        session.folder.path(name)
    settings = Settings(
        options["capability_limit"],
        options["shots"],
        options["answer_tokens"],
        session.batch_size(),
        common.seed,
        tasks_folder=options["tasks_folder"],
        offline=common.offline,
    )
    judges: dict[str, Any] = {"judges": listed(options["judge"])} if options["judge"] else {}
    with session.status("evaluate") as progress:
        evaluation = study(
            found.pop("model"),
            listed(options["suite"]) or (),
            capability=listed(options["capability"]) or (),
            over_refusal=None if options["over_refusal"] == "none" else options["over_refusal"],
            attacks=listed(options["attack"]) or (),
            baseline=options["baseline"],
            gate=options["gate"],
            limit=options["limit"],
            data=options["folder"],
            column=options["column"],
            offline=common.offline,
            settings=settings,
            judge_options={name: value for name, value in (("device", common.device), ("offline", common.offline)) if value},
            out=session.folder.folder,
            progress=progress,
            batch_size=session.batch_size(),
            seed=common.seed,
            **{name: options[name] for name in ("max_new_tokens", "samples", "temperature", "top_p")},
            **judges,
            **found,
        )
    session.notes.extend(evaluation.notes)
    return {**evaluation.record(), "completions": str(session.folder.path("completions.jsonl"))}


def models(session: Session, options: Mapping[str, Any]) -> dict[str, Any]:
    """The model, its treatment and its reference, as the study takes them."""
    if options["endpoint"] is not None:
        from safety_neurons.model.chat_server import Endpoint

        session.device = "endpoint"
        return {
            "model": Endpoint(
                options["endpoint"],
                system=session.common.system,
                request=parse_object("--request", options["request"]),
                think_end=session.common.think_end,
                offline=session.common.offline,
            )
        }
    found: dict[str, Any] = {}
    if options["patch"] is not None:
        pair = session.pair(options["model"], options["donor"])
        found = {"model": pair.base, "donor": pair.aligned, "patch": session.neurons(options["patch"], pair.base)}
    else:
        found["model"] = session.model(options["model"])
        if options["deactivate"] is not None:
            found["deactivate"] = session.neurons(options["deactivate"], found["model"])
    if options["guard"] is not None:
        from safety_neurons.guard import Guard

        found["guard"] = Guard.load(options["guard"], found["model"])
    if options["reference"] is not None:
        found["reference"] = session.model(options["reference"])
    return found


# What a person sees


def show(result: dict[str, Any]) -> None:
    """Suites by judge as rows and arms as columns; capability; what changed; agreement of the judges."""
    from safety_neurons.results import clear_word

    arms = [(name, result[name]) for name in ("baseline", "untreated", "treated") if result[name]]
    rows = []
    for entry in arms[-1][1]["suites"]:
        for judge in entry["judges"]:
            for measure in ("harm", "refused", "over_refusal"):
                cells = [_rate(arm, entry["suite"], entry["kind"], judge, measure) for _, arm in arms]
                if any(cells) and measure != "refused":
                    rows.append([_short(entry["suite"]), _word(entry["judges"][judge], measure), judge, *cells, _unscored(cells[-1])])
    title = result["model"] + (f", {result['treatment']}" if result["treatment"] else "")
    columns = ["suite", "measure", "judge", *(name for name, _ in arms), "unscored"]
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    console.print_table(title, columns, rows, caption="95 % intervals; what could not be judged is unscored, never safe")
    _show_capability(result, arms)
    changed = [
        [
            _short(change["suite"]),
            change["measure"].replace("_", "-"),
            change["judge"],
            _signed(change["difference"]),
            clear_word(change["difference"]),
            _p(change["mcnemar"]),
        ]
        for change in result["changes"]
        if change["measure"] != "refused"
    ]
    if changed:
        console.print_table(
            "\nChange, paired over prompts",
            ["suite", "measure", "judge", "difference", "", "McNemar p"],
            changed,
            compared=result["changes"],
        )
    for pair in result["agreement"]:
        about = "harmful" if pair["kind"] == "harmful" else "harmless"
        kappa = console.shown(pair["kappa"])
        console.say(f"agreement on {about} requests, {pair['first']} and {pair['second']}: κ {kappa}")
    if result["gate"]:
        console.say("gate: passed" if result["gate"]["passed"] else "gate: not met")


def _show_capability(result: Mapping[str, Any], arms: list[tuple[str, Any]]) -> None:
    tasks = list(dict.fromkeys((entry["task"], entry["metric"]) for _, arm in arms for entry in arm["capability"]))
    if not tasks:
        return
    drops = {change["task"]: change["drop"] for change in result["capability_changes"]}
    rows = []
    for task, metric in tasks:
        found = [next((entry for entry in arm["capability"] if entry["task"] == task), None) for _, arm in arms]
        lost = drops.get(task)
        kind, _, source = task.partition(":")
        short = f"{kind} {pathlib.PurePath(source).name}" if source and not source.startswith("builtin") else task
        rows.append([short, metric, *found, "–" if lost is None else console.share(lost)])
    console.print_table("\nCapability", ["task", "metric", *(name for name, _ in arms), "lost"], rows)


def _rate(arm: Mapping[str, Any], suite: str, kind: str, judge: str, measure: str) -> Any:
    entry = next((entry for entry in arm["suites"] if (entry["suite"], entry["kind"]) == (suite, kind)), None)
    return None if entry is None else entry["judges"].get(judge, {}).get(measure)


def _short(suite: str) -> str:
    return suite.removeprefix("builtin:")


def _word(judged: Mapping[str, Any], measure: str) -> str:
    return str(judged["harm_is"]) if measure == "harm" else measure.replace("_", "-")


def _unscored(rate: Any) -> int | None:
    return None if rate is None else rate["unscored"]


def _signed(difference: Mapping[str, Any]) -> str:
    return console.interval(difference, signed=True)


def _p(test: Mapping[str, Any] | None) -> str:
    return "–" if test is None or test["p"] is None else f"{test['p']:.2g}"
