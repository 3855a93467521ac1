"""run and report: repeat a run from its run.json or follow a recipe of several verbs; one page of HTML from finished runs.

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
from safety_neurons.cli.options import Common
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
    from safety_neurons.results.files import read_json

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
    from safety_neurons.results.files import plain_name

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
