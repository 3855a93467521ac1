"""run: repeat a run from its run.json, or run a recipe file: one verb, or several in order."""

import contextlib
import io
import pathlib
import sys
import time
from typing import Annotated, Any

import typer

from safety_neurons import strict_json
from safety_neurons.cli.options import Common
from safety_neurons.cli.verb import verb
from safety_neurons.errors import InputError

Step = tuple[str, list[str], dict[str, Any]]
"""Name of its folder, words of the verb, arguments."""


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    verb(app, "run")(run)


def run(
    common: Common,
    recipe: Annotated[
        pathlib.Path, typer.Argument(help="run.json of an earlier run, or a recipe with `verb` and `arguments`, or with `steps` of them.")
    ],
) -> dict[str, Any] | None:
    """Repeat a run: the same verb with the same arguments into another --out; common options given here take the place of its own."""
    from safety_neurons.cli.app import build
    from safety_neurons.cli.session import default_folder

    record = parsed(recipe)
    given = {name: value for name, value in vars(common).items() if value != getattr(Common(), name)}
    if "steps" not in record:
        words, arguments = read(record, recipe)
        build()([*words, *as_words(arguments | given)], standalone_mode=False)
        return None
    out = pathlib.Path(given.pop("out", None) or default_folder(recipe.stem, time.strftime("%Y%m%d-%H%M%S")))
    places = {"{out}": str(out), "{recipe}": str(recipe.resolve().parent)}
    results = {}
    for name, words, arguments in steps_of(record, recipe):
        told = {option: _placed(value, places) for option, value in arguments.items()} | given | {"out": out / name}
        results[name] = _one(build(), [*words, *as_words(told)], quiet=common.json)
    return {"steps": results, "run": str(out.absolute())}


def _one(command: Any, words: list[str], *, quiet: bool) -> Any:
    """Run one step; with `--json` its object is taken, and printed by the whole recipe at its end, unless the step failed."""
    caught = io.StringIO()
    try:
        with contextlib.redirect_stdout(caught) if quiet else contextlib.nullcontext():
            command(words, standalone_mode=False)
    except SystemExit as stop:
        if stop.code:
            sys.stdout.write(caught.getvalue())
            raise
    return strict_json.loads(caught.getvalue()) if caught.getvalue() else None


def parsed(recipe: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        record = strict_json.loads(recipe.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{recipe} does not exist, expected the run.json of an earlier run or a recipe") from None
    except (ValueError, OSError) as error:
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
    steps, shared = record["steps"], record.get("shared", {})
    if not isinstance(steps, list) or not steps or not isinstance(shared, dict) or not all(isinstance(step, dict) for step in steps):
        raise InputError(f"{recipe} is not a recipe, expected `steps` to be a list of objects with `name`, `verb` and `arguments`")
    found = []
    for step in steps:
        words, arguments = read(step, recipe)
        found.append((str(step.get("name", "-".join(words))), words, shared | arguments))
    names = [name for name, _, _ in found]
    if len(set(names)) < len(names) or not all(name and pathlib.PurePath(name).name == name for name in names):
        raise InputError(f"{recipe} is not a recipe: its steps are called {', '.join(names)}; expected a plain name of its own for each")
    return found


def as_words(arguments: dict[str, Any]) -> list[str]:
    """Arguments as words of a command line."""
    return [option for name, value in arguments.items() for option in as_options(name, value)]


def as_options(name: str, value: Any) -> list[str]:
    """One argument as words of a command line; a list is what stands on it without a name."""
    if isinstance(value, list):
        return [str(part) for part in value]
    option = "--" + name.replace("_", "-")
    if value is None or value is False:
        return []
    return [option] if value is True else [f"{option}={value}"]


def _placed(value: Any, places: dict[str, str]) -> Any:
    """`{out}` and `{recipe}` in a text replaced by the folders they stand for."""
    if isinstance(value, str):
        for mark, place in places.items():
            value = value.replace(mark, place)
    return value
