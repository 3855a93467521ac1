"""run: repeat a run from its run.json, or run a recipe file."""

import json
import pathlib
from typing import Annotated, Any

import typer

from safety_neurons.cli.options import Common
from safety_neurons.cli.verb import verb
from safety_neurons.errors import InputError


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    verb(app, "run")(run)


def run(
    common: Common,
    recipe: Annotated[pathlib.Path, typer.Argument(help="run.json of an earlier run, or a recipe with `verb` and `arguments`.")],
) -> None:
    """Repeat a run: the same verb with the same arguments into another --out; common options given here take the place of its own."""
    from safety_neurons.cli.app import build

    words, arguments = read(recipe)
    arguments |= {name: value for name, value in vars(common).items() if value != getattr(Common(), name)}
    build()([*words, *(option for name, value in arguments.items() for option in as_options(name, value))], standalone_mode=False)


def read(recipe: pathlib.Path) -> tuple[list[str], dict[str, Any]]:
    """The words of the verb and its arguments."""
    try:
        record = json.loads(recipe.read_text(encoding="utf-8"))
        verb_name, arguments = record["verb"], record["arguments"]
        if not isinstance(verb_name, str) or not isinstance(arguments, dict):
            raise TypeError("verb is not text or arguments is not an object")
    except FileNotFoundError:
        raise InputError(f"{recipe} does not exist, expected the run.json of an earlier run") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(f"{recipe} is not a recipe ({error}), expected JSON with `verb` and `arguments`") from None
    first, _, second = verb_name.partition("-")
    return ([first, second] if second else [first]), arguments


def as_options(name: str, value: Any) -> list[str]:
    """One argument as words of a command line."""
    option = "--" + name.replace("_", "-")
    if value is None or value is False:
        return []
    return [option] if value is True else [f"{option}={value}"]
