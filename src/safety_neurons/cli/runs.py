"""run, report, doctor, demo: repeat a run or follow a recipe, report on several, check a model, tell the
whole story on an organism.

A recipe says what is to be done; what it may do is said on the command line alone: run a model's own code,
write over what is there, talk to a server, choose the folder. Nothing in the file becomes a word of the
command line that its verb does not declare as an option with a value.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from safety_neurons.cli import console
from safety_neurons.cli.session import Common, OneModel, Session, default_folder
from safety_neurons.cli.verb import verb
from safety_neurons.declarations import Declaration, Positional
from safety_neurons.errors import InputError, ModelError, RunError, UsageError

Step = tuple[str, list[str], dict[str, Any]]
"""Name of its folder, words of the verb, arguments."""
PERMISSIONS = ("trust_remote_code", "overwrite", "offline", "force", "out", "json", "debug")
"""Arguments that no file can give."""
SERVERS = ("endpoint", "upstream")
"""Arguments that name a server."""
NOT_FROM_A_FILE = ("run", "demo", "guard serve")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepeatedFile(Declaration):
    """What is repeated."""

    recipe: Annotated[pathlib.Path, Positional]
    """run.json of an earlier run, or a recipe with `verb` and `arguments`, or with `steps` of them."""
    allow_servers: bool = False
    """Let the file name servers that get prompts, and the keys of the environment."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reported(Declaration):
    """What stands in a report."""

    runs: Annotated[list[pathlib.Path], Positional]
    """Folders of finished runs."""
    title: str = "Safety neurons"
    """Title of the page."""


@verb("report")
def report(session: Session, reported: Reported) -> dict[str, Any]:
    """One self-contained HTML page from finished runs; --out names the file."""
    from safety_neurons.report import write_report

    path = write_report(
        reported.runs, session.common.out or pathlib.Path("report.html"), title=reported.title
    )
    if not session.quiet:
        console.say(("dim", "report "), str(path))
    return {"report": str(path)}


@verb("run")
def run(session: Session, repeated: RepeatedFile) -> dict[str, Any]:
    """Repeat a run: the same verb with the same arguments into another --out; common options given here take
    the place of its own.
    """
    common, recipe, servers = session.common, repeated.recipe, repeated.allow_servers
    record = parsed(recipe)
    given = {name: value for name, value in vars(common).items() if value != getattr(Common(), name)}
    if "steps" not in record:
        words, arguments = read(record, recipe)
        return _one(command_words(words, arguments, given, recipe, servers=servers), quiet=common.json)
    out = pathlib.Path(given.pop("out", None) or default_folder(recipe.stem, time.strftime("%Y%m%d-%H%M%S")))
    places = {"{out}": str(out), "{recipe}": str(recipe.resolve().parent)}
    lines = {}
    for name, words, arguments in steps_of(record, recipe):  # All of them, before the first is run.
        filled = {option: _placed(value, places) for option, value in arguments.items()}
        lines[name] = command_words(words, filled, {**given, "out": out / name}, recipe, servers=servers)
    return {
        "steps": {name: _one(line, quiet=common.json) for name, line in lines.items()},
        "run": str(out.absolute()),
    }


def _one(words: list[str], *, quiet: bool) -> Any:
    """Run one command; with `--json` its object is taken, and printed by this verb at its end, unless it
    failed.
    """
    from safety_neurons.cli.verb import build

    failed = None
    with console.caught() if quiet else console.shared() as said:
        try:
            build()(words, standalone_mode=False)
        except SystemExit as stop:
            failed = stop.code
    if not failed:
        return said.result if quiet else None
    if quiet:
        console.streams().out.write(said.text)
    raise SystemExit(failed)


def parsed(recipe: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file."""
    from safety_neurons.results.run import read_json

    if not recipe.is_file():
        what = "is no file" if recipe.exists() else "does not exist"
        raise InputError(f"{recipe} {what}, expected the run.json of an earlier run or a recipe")
    try:
        record = read_json(recipe)
    except InputError as error:
        raise InputError(
            f"{recipe} is not a recipe ({error}), expected JSON with `verb` and `arguments`"
        ) from None
    if not isinstance(record, dict):
        raise InputError(
            f"{recipe} is not a recipe (a {type(record).__name__}), expected JSON with `verb` and `arguments`"
        )
    return record


def read(record: dict[str, Any], recipe: pathlib.Path) -> tuple[list[str], dict[str, Any]]:
    """The words of the verb and its arguments."""
    try:
        verb_name, arguments = record["verb"], record["arguments"]
        if not isinstance(verb_name, str) or not isinstance(arguments, dict):
            raise TypeError("verb is not text or arguments is not an object")
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{recipe} is not a recipe ({error}), expected JSON with `verb` and `arguments`"
        ) from None
    first, _, second = verb_name.partition("-")
    return ([first, second] if second else [first]), arguments


def steps_of(record: dict[str, Any], recipe: pathlib.Path) -> list[Step]:
    """The steps of a recipe; arguments that `shared` holds are every step's, where it has none of its own."""
    from safety_neurons.results.run import plain_name

    steps, shared = record["steps"], record.get("shared", {})
    if (
        not isinstance(steps, list)
        or not steps
        or not isinstance(shared, dict)
        or not all(isinstance(step, dict) for step in steps)
    ):
        raise InputError(
            f"{recipe} is not a recipe, expected `steps` to be a list of objects with `name`, `verb` and "
            "`arguments`"
        )
    read_steps = []
    for step in steps:
        words, arguments = read(step, recipe)
        read_steps.append(
            (
                plain_name(step.get("name", "-".join(words)), f"{recipe} is not a recipe: the step"),
                words,
                shared | arguments,
            )
        )
    names = [name for name, _, _ in read_steps]
    if len({name.casefold() for name in names}) < len(names):
        raise InputError(
            f"{recipe} is not a recipe: its steps are called {', '.join(names)}; expected a name of its "
            "own for each"
        )
    return read_steps


def command_words(
    words: list[str],
    arguments: Mapping[str, Any],
    given: Mapping[str, Any],
    recipe: pathlib.Path,
    *,
    servers: bool,
) -> list[str]:
    """The command line of a verb with the arguments of a file.

    What was given on the command line takes their place.

    Raises:
        UsageError: a verb or option that does not exist, or a value that is none.
        InputError: an argument that a file cannot give.
    """
    name = " ".join(words)
    options = {one.name: one for one in _command(words, recipe).params}
    wanted = {
        option.replace("-", "_"): value
        for option, value in arguments.items()
        if value is not None and value is not False
    }
    for option in PERMISSIONS:
        if option in wanted and option not in given:
            flag = f"--{option.replace('_', '-')}"
            raise InputError(
                f"{recipe} asks for {flag}, which no file can give; add {flag} to this command if you mean it"
            )
    named = [
        option
        for option in wanted
        if option in SERVERS or (option == "judge" and "://" in str(wanted[option]))
    ]
    if named and not servers:
        raise InputError(
            f"{recipe} names a server ({named[0]} {str(wanted[named[0]])[:60]!r}), which would get prompts "
            "and keys; add --allow-servers to this command if you trust it"
        )
    line, behind = list(words), list[str]()
    for option, value in {**wanted, **given}.items():
        if option not in options:
            raise UsageError(
                f"{recipe}: {name} has no option {option[:40]!r}; see `safety-neurons {name} --help`"
            )
        one = options[option]
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(part, str | int | float | pathlib.Path) for part in values):
            raise UsageError(
                f"{recipe}: {option} is {str(value)[:40]!r}; expected text, a number, true or false, "
                "or a list of texts"
            )
        if one.param_type_name == "argument":
            behind += [str(part) for part in values]
        elif getattr(one, "is_flag", False):
            if value is not True:
                raise UsageError(f"{recipe}: {option} is {str(value)[:40]!r}; expected true or false")
            line.append(one.opts[0])
        else:
            line += [f"{one.opts[0]}={part}" for part in values]
    return [*line, *(["--", *behind] if behind else [])]


def _command(words: list[str], recipe: pathlib.Path) -> Any:
    """The command that a file names."""
    from safety_neurons.cli.verb import build

    command: Any = build()
    name = " ".join(words)
    for word in words:
        command = getattr(command, "commands", {}).get(word) if command is not None else None
    if command is None or hasattr(command, "commands"):
        raise UsageError(f"{recipe}: no verb {name[:60]!r}; expected one such as find-contrast or evaluate")
    if name in NOT_FROM_A_FILE:
        raise InputError(
            f"{recipe} names {name!r}, which is started by hand; expected a verb that ends by itself and "
            "keeps a run"
        )
    return command


def _placed(value: Any, places: dict[str, str]) -> Any:
    """`{out}` and `{recipe}` in a text replaced by the folders they stand for."""
    if isinstance(value, list):
        return [_placed(part, places) for part in value]
    if isinstance(value, str):
        for mark, place in places.items():
            value = value.replace(mark, place)
    return value


ORGANISM = "natural"
PLANTED = "planted"
LABELLED = ("--unsafe", "builtin:harmful", "--safe", "builtin:harmless")
WordsOf = Callable[..., list[str]]
"""Words of a command and the name of its folder -> the words with seed and folder."""
METHODS = [
    "--methods",
    "mask,attribution-patching,swap-attribution,contrast,importance-contrast,importance,attribution,weight-change",
]
"""Those of the comparison that the demo has time for."""


@verb("doctor")
def doctor(session: Session, models: OneModel) -> dict[str, Any]:
    """Check on your own model: coverage, identity, padding, self-patch, exactness, cost."""

    def work() -> dict[str, Any]:
        from safety_neurons.studies import doctor as examine

        loaded = session.model(models.model)
        with session.status("doctor") as progress:
            return {**examine(loaded, seed=session.common.seed, progress=progress).record()}

    result = session.run(work)
    if not result["healthy"]:
        failed = [check["check"] for check in result["checks"] if check["passed"] is False]
        raise ModelError(
            f"{len(failed)} checks failed ({', '.join(failed)}); numbers found on this model are not "
            "to be trusted"
        )
    return result


@dataclasses.dataclass(frozen=True)
class Hurried(Declaration):
    """How long the story is."""

    quick: bool = False
    """Fewer prompts and sizes: a minute instead of five."""


@verb("demo")
def tell_story(session: Session, hurried: Hurried) -> dict[str, Any]:
    """The whole story on a small organism; ends with the path of a report."""
    common = session.common
    return tell(
        common, common.out or default_folder("demo", time.strftime("%Y%m%d-%H%M%S")), quick=hurried.quick
    )


def demo(out: str | pathlib.Path = "runs/demo", *, quick: bool = False, seed: int = 0) -> pathlib.Path:
    """The whole story on the organism that ships with the package. Returns the path of the report."""
    return pathlib.Path(
        tell(Common(out=pathlib.Path(out), json=True, seed=seed), pathlib.Path(out), quick=quick)["report"]
    )


def chapters(folder: pathlib.Path, *, quick: bool, seed: int) -> list[tuple[str, list[str]]]:
    """Every step of the story: what it answers, and the command that answers it."""
    pair = ["--base", f"organism:{ORGANISM}/sft", "--aligned", f"organism:{ORGANISM}/dpo"]
    planted = ["--base", f"organism:{PLANTED}/base", "--aligned", f"organism:{PLANTED}/aligned"]
    limit = ["--limit", "20" if quick else "60"]
    measured = [*limit, "--random", "3", "--max-new-tokens", "24"]
    sizes = "0.02,0.1" if quick else "0.01,0.02,0.05,0.1,0.2"

    def step(*words: str, to: str) -> list[str]:
        return [*words, "--seed", str(seed), "--out", str(folder / to)]

    return [
        ("Is the model understood?", step("doctor", "--model", f"organism:{ORGANISM}/dpo", to="doctor")),
        (
            "Paper 1: which rows and columns matter for harmful requests?",
            step(
                "find",
                "importance",
                "--model",
                f"organism:{ORGANISM}/dpo",
                "--top",
                "0.01",
                *limit,
                to="importance",
            ),
        ),
        (
            "Paper 2: which activations differ between the unsafe and the safe model?",
            step("find", "contrast", *pair, "--top", "0.05", *limit, to="contrast"),
        ),
        (
            "Beyond both: which activations would restore the refusal?",
            step("find", "attribution-patching", *pair, "--top", "0.05", *limit, to="attribution-patching"),
        ),
        (
            "Does the paper's ranking carry the safety, and how many neurons does that take?",
            step(
                "verify",
                "patch",
                *pair,
                "--scores",
                str(folder / "contrast"),
                "--sizes",
                sizes,
                *measured,
                to="verify-contrast",
            ),
        ),
        (
            "Does attribution patching need fewer?",
            step(
                *(
                    "verify",
                    "patch",
                    *pair,
                    "--scores",
                    str(folder / "attribution-patching"),
                    "--sizes",
                    sizes,
                    *measured,
                ),
                to="verify-attribution-patching",
            ),
        ),
        (
            "Are they necessary? The safe model with them switched off",
            step(
                *(
                    "verify",
                    "deactivate",
                    "--model",
                    f"organism:{ORGANISM}/dpo",
                    "--neurons",
                    str(folder / "attribution-patching"),
                ),
                *measured,
                to="verify-deactivate",
            ),
        ),
        ("Methods at one budget", step("compare", *pair, "--top", "0.05", *measured, *METHODS, to="compare")),
        (
            "Methods where the truth is planted",
            step(
                "compare",
                *planted,
                "--truth",
                f"organism:{PLANTED}/truth",
                *measured,
                *METHODS,
                to="compare-planted",
            ),
        ),
        *uses(folder, step, quick=quick),
    ]


def uses(folder: pathlib.Path, step: WordsOf, *, quick: bool) -> list[tuple[str, list[str]]]:
    """What can be done with the sets that were found: look at them, and guard the unsafe model with them."""
    sets = [str(folder / method) for method in ("importance", "contrast", "attribution-patching")]
    unsafe = ["--model", f"organism:{ORGANISM}/sft"]
    held_out = ["--limit", "64" if quick else "200", "--random", "3", "--perturbations", "none"]
    return [
        ("Where do the neurons of each method lie?", step("analyze", "layers", *sets, to="layers")),
        ("Do the methods find the same neurons?", step("analyze", "overlap", *sets, to="overlap")),
        (
            "Can they tell before the first token that an answer would be unsafe?",
            step("guard", "fit", *unsafe, "--neurons", sets[-1], *LABELLED, "--fpr", "0.05", to="guard"),
        ),
        (
            "Is such a guard worth more than words or random neurons?",
            step(
                "guard", "evaluate", *unsafe, "--guard", str(folder / "guard"), *held_out, to="guard-evaluate"
            ),
        ),
    ]


def tell(common: Common, out: pathlib.Path, *, quick: bool) -> dict[str, Any]:
    """Run every step, then the report."""
    started = time.monotonic()
    steps = chapters(out, quick=quick, seed=common.seed)
    for number, (question, words) in enumerate(steps, start=1):
        if not common.json:
            console.rule(f"{number}/{len(steps)} {question}")
            console.say(("dim", f"$ safety-neurons {' '.join(words)}\n"))
        call(words, common)
    runs = [words[words.index("--out") + 1] for _, words in steps]
    report = out / "report.html"
    call(
        ["report", *runs, "--title", "Safety neurons of an organism", "--out", str(report)], common, say=False
    )
    result = {"report": str(report.absolute()), "runs": runs, "seconds": time.monotonic() - started}
    if not common.json:
        console.rule()
        console.say(f"done in {result['seconds']:.0f} s\n", ("bold", result["report"]))
    return result


def call(words: list[str], common: Common, *, say: bool = True) -> None:
    """One command in this process; a failure carries its own one-line error."""
    from safety_neurons.cli.verb import build

    quiet = common.json or not say
    line = [*words, *(["--json"] if quiet else []), *(["--overwrite"] if common.overwrite else [])]
    with console.caught() if quiet else console.shared() as said_by:
        try:
            build()(line, standalone_mode=False)
        except SystemExit as stop:
            if not stop.code:
                return
            message = (
                (said_by.result or {}).get("error", "see the line above") if quiet else "see the line above"
            )
            raise RunError(
                f"`safety-neurons {' '.join(words[:2])}` failed: {message}; run it alone with --debug"
            ) from None
