"""run: repeat a run, or follow a recipe of several steps and hold what they measured beside what was
published.

A recipe says what is to be done; what it may do is said on the command line alone: run a model's own code,
write over what is there, talk to a server, choose the folder. Nothing in the file becomes a word of the
command line that its verb does not declare as an option with a value.

What a recipe leaves open (`places`: a model, files that cannot be shipped) is given on the command line too;
a step that needs a place which nobody filled is left out, and said to be.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from safety_neurons.cli import console
from safety_neurons.cli.session import Common, Session, repeating
from safety_neurons.cli.verb import verb
from safety_neurons.declarations import Declaration, Flag, Positional
from safety_neurons.errors import InputError, UsageError

Step = tuple[str, list[str], dict[str, Any]]
"""Name of its folder, words of the verb, arguments."""
PERMISSIONS = ("trust_remote_code", "overwrite", "offline", "force", "out", "json", "debug")
"""Arguments that no file can give."""
SERVERS = ("endpoint", "upstream")
"""Arguments that name a server."""
_RECIPE = ("about", "places", "shared", "steps", "trial", "published", "told_apart_by")
_STEP_OF_A_RECIPE = ("name", "verb", "arguments", "trial")
"""What a recipe and its steps may say: a word that nobody reads would be left undone in silence."""
NOT_FROM_A_FILE = ("run", "demo", "guard serve")
_MARK = re.compile(r"\{([a-z0-9-]+)\}")
_STEP = re.compile(r"\{out\}/([^/,=+]+)")
"""A step whose folder is named in a text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepeatedFile(Declaration):
    """What is repeated."""

    recipe: Annotated[pathlib.Path, Positional]
    """run.json of an earlier run, or a recipe with `verb` and `arguments`, or with `steps` of them."""
    given: Annotated[list[str] | None, Flag("--with")] = None
    """NAME=VALUE of what a recipe leaves open, such as its model or a file of prompts; once for each."""
    trial: bool = False
    """Follow a recipe on next to no prompts: whether every step works, before it takes hours."""
    allow_servers: bool = False
    """Let the file name servers that get prompts, and the keys of the environment."""


@verb("run")
def run(session: Session, repeated: RepeatedFile) -> dict[str, Any]:
    """Repeat a run: the same verb with the same arguments into another --out; common options given here take
    the place of its own. Of a recipe that lists published numbers, show them beside the measured ones.
    """
    common, recipe, servers = session.common, repeated.recipe, repeated.allow_servers
    record = parsed(recipe)
    if record.get("verb") == "run" and "steps" not in record:
        repeated = _repeated(record, repeated)
        record, recipe = parsed(repeated.recipe), repeated.recipe
    given = {name: value for name, value in vars(common).items() if value != getattr(Common(), name)}
    if "steps" not in record:
        if repeated.given or repeated.trial:
            raise UsageError(
                f"{'--with' if repeated.given else '--trial'} with {recipe}, which is a single run; expected "
                "a recipe with `steps`"
            )
        words, arguments = read(record, recipe)
        line = command_words(words, arguments, given, recipe, servers=servers)
        with repeating(record):
            return _one(line, quiet=common.json)
    given.pop("out", None)
    out = session.into(recipe.stem)
    plan = FilledRecipe.of(record, repeated, out)
    lines = {
        name: command_words(words, arguments, {**given, "out": out / name}, recipe, servers=servers)
        for name, words, arguments in plan.steps
    }  # All of them, before the first is run.
    left_out = {} if "published" in record else {"left_out": dict(plan.left_out)}
    if left_out and not lines:
        name, why = next(iter(plan.left_out.items()))
        raise UsageError(f"{recipe} has no step that can be run: {name} {why}")
    if left_out and not common.json:
        console.print_notes(f"step {name} is left out: it {why}" for name, why in plan.left_out.items())
    done: dict[str, Any] = {}
    try:
        for name, line in lines.items():
            if not common.json and "published" in record:
                console.rule(name)
            done[name] = _one(line, quiet=common.json)
    finally:  # A step that fails takes nothing with it that others measured, now or before.
        shown = plan.kept(list(done)) if "published" in record and (done or not lines) else {}
    if shown and not common.json:
        console.rule()
        console.show(shown.pop("shown"))
        console.say(("dim", "\nrun   "), str(out))
    shown.pop("shown", None)
    return {"steps": done, **left_out, **shown, "run": str(out.absolute())}


def _repeated(record: dict[str, Any], repeated: RepeatedFile) -> RepeatedFile:
    """The recipe that the run.json of a recipe names, with what was given then and is not given now."""
    arguments = record.get("arguments")
    recipe = arguments.get("recipe") if isinstance(arguments, dict) else None
    if (
        not isinstance(arguments, dict)
        or not isinstance(recipe, str)
        or pathlib.Path(recipe) == repeated.recipe
    ):
        raise InputError(
            f"{repeated.recipe} names 'run', which is started by hand; expected a verb that ends by itself "
            "and keeps a run"
        )
    if "steps" not in parsed(pathlib.Path(recipe)):
        raise InputError(f"{repeated.recipe} repeats {recipe}, which has no `steps`; expected a recipe")
    now = {text.partition("=")[0] for text in repeated.given or ()}
    before = [str(text) for text in arguments.get("with") or [] if str(text).partition("=")[0] not in now]
    return dataclasses.replace(
        repeated,
        recipe=pathlib.Path(recipe),
        given=[*before, *(repeated.given or [])] or None,
        trial=repeated.trial or arguments.get("trial") is True,
    )


@dataclasses.dataclass(frozen=True)
class FilledRecipe:
    """A recipe with what it leaves open filled in.

    Attributes:
        repeated: the recipe and what was given with it.
        record: the recipe as JSON values.
        out: the folder of the run.
        values: by place what it holds.
        steps: those that can be run.
        verbs: by step its verb, of all steps.
        left_out: by step that cannot be run what it lacks.
        quantities: what was published.
    """

    repeated: RepeatedFile
    record: Mapping[str, Any]
    out: pathlib.Path
    values: Mapping[str, str]
    steps: Sequence[Step]
    verbs: Mapping[str, str]
    left_out: Mapping[str, str]
    quantities: Sequence[Any]

    @classmethod
    def of(cls, record: dict[str, Any], repeated: RepeatedFile, out: pathlib.Path) -> "FilledRecipe":
        """Fill in every place of every step.

        Raises:
            InputError: a recipe of another shape.
            UsageError: a value for a place that it has not, or none for the one that tells its rows apart.
        """
        from safety_neurons.results.replication import quantities_of

        recipe = repeated.recipe
        steps = steps_of(record, recipe)
        if repeated.trial:
            steps = trial_of(steps, record, recipe)
        places = places_of(record, recipe)
        values = {
            name: place["default"] for name, place in places.items() if place.get("default") is not None
        }
        values |= given_of(repeated.given or (), places, recipe)
        known = {"out": str(out), "recipe": str(recipe.resolve().parent), **values}
        runs, left_out = list[Step](), dict[str, str]()
        for name, words, arguments in steps:
            texts = [str(part) for value in arguments.values() for part in _listed(value)]
            marks = {mark for text in texts for mark in _MARK.findall(text)}
            needed = {name for text in texts for name in _STEP.findall(text)}
            lacking = next((place for place in places if place in marks - values.keys()), None)
            before = next((one for one in left_out if one in needed), None)
            if lacking is not None:
                left_out[name] = f"needs --with {lacking}=…: {places[lacking].get('about', 'see the recipe')}"
            elif before is not None:
                left_out[name] = f"needs step {before}"
            else:
                runs.append(
                    (name, words, {option: _placed(value, known) for option, value in arguments.items()})
                )
        verbs = {name: "-".join(words) for name, words, _ in steps}
        published = quantities_of(record.get("published", []), str(recipe), list(verbs))
        _check_told_apart(record, published, places, values, recipe)
        return cls(repeated, record, out, values, runs, verbs, left_out, published)

    def kept(self, done: Sequence[str]) -> dict[str, Any]:
        """Write the published numbers beside the measured ones as the result of this run."""
        from safety_neurons.display import ReportedRun
        from safety_neurons.results import RunFolder
        from safety_neurons.results.replication import Ran, replication
        from safety_neurons.results.run import contents_of, read_json

        recipe = self.repeated.recipe
        files = {name: self.out / name / "run.json" for name in done}
        results = {name: read_json(file).get("result") for name, file in files.items() if file.is_file()}
        told = self.values.get(str(self.record.get("told_apart_by")))
        ran = Ran(results, self.verbs, self.left_out, told, self.repeated.trial)
        result = replication(str(self.record.get("about", "")), self.quantities, ran)
        config = {
            "recipe": str(recipe.resolve()),
            "with": list(self.repeated.given or ()),
            "trial": self.repeated.trial,
        }
        folder = RunFolder(self.out, "run", config, overwrite=True, inputs={"recipe": contents_of(recipe)})
        folder.finish(dict(result))
        return {"replication": result, "shown": ReportedRun(folder.folder, folder.record)}


def places_of(record: Mapping[str, Any], recipe: pathlib.Path) -> dict[str, dict[str, str]]:
    """By name of a place what it is (`about`), and what it holds where nothing is given (`default`)."""
    places = record.get("places", {})
    fits = isinstance(places, dict) and all(
        re.fullmatch(r"[a-z][a-z0-9-]*", name)
        and isinstance(place, dict)
        and place.keys() <= {"about", "default"}
        and all(isinstance(text, str) for text in place.values())
        for name, place in places.items()
    )
    if not fits or places.keys() & {"out", "recipe"}:
        raise InputError(
            f"{recipe} is not a recipe, expected `places` to be objects with `about` and `default` by names "
            "other than out and recipe"
        )
    return dict(places)


def _check_told_apart(
    record: Mapping[str, Any],
    published: Sequence[Any],
    places: Mapping[str, Mapping[str, str]],
    values: Mapping[str, str],
    recipe: pathlib.Path,
) -> None:
    """Refuses numbers of several models, or whatever else, where nothing says of which one this run is."""
    told = str(record.get("told_apart_by"))
    if "told_apart_by" not in record and all(len(quantity.values) < 2 for quantity in published):
        return
    if told not in places:
        raise InputError(
            f"{recipe} is not a recipe: `told_apart_by` is {told[:40]!r}, expected the place that tells "
            f"its rows apart{', one of ' if places else ''}{', '.join(places)}"
        )
    if published and told not in values:
        raise UsageError(
            f"{recipe} tells its published numbers apart by {told}; expected --with {told}=…: "
            f"{places[told].get('about', 'see the recipe')}"
        )


def given_of(given: Sequence[str], places: Mapping[str, Any], recipe: pathlib.Path) -> dict[str, str]:
    """The values of `--with`, by place."""
    values = {}
    for text in given:
        name, sign, value = text.partition("=")
        if not sign or not value:
            raise UsageError(f"--with {text[:80]!r}: expected NAME=VALUE")
        if name not in places:
            known = f"expected one of {', '.join(places)}" if places else "it leaves nothing open"
            raise UsageError(f"--with {name[:40]}=…: {recipe} has no such place; {known}")
        if name in values:
            raise UsageError(f"--with {name}=… is given twice; expected one value")
        values[name] = value
    return values


def trial_of(steps: Sequence[Step], record: Mapping[str, Any], recipe: pathlib.Path) -> list[Step]:
    """The steps with the arguments that `trial` gives: the recipe's wherever a verb has such an option, a
    step's own in any case.
    """
    shared = record.get("trial", {})
    own = [step.get("trial", {}) for step in record["steps"]]
    if not all(isinstance(changes, dict) for changes in (shared, *own)):
        raise InputError(f"{recipe} is not a recipe, expected `trial` to be an object of arguments")
    changed = []
    for (name, words, arguments), changes in zip(steps, own, strict=True):
        known = {one.name for one in _command(words, recipe).params}
        fitting = {option: value for option, value in shared.items() if option in known}
        changed.append((name, words, {**arguments, **fitting, **changes}))
    if unknown := sorted(shared.keys() - _every_option()):
        raise InputError(
            f"{recipe} is not a recipe: `trial` gives {unknown[0][:40]!r}, which no verb has; expected "
            "options of its steps"
        )
    return changed


def _every_option() -> set[str]:
    """The names of all options of all verbs."""
    from safety_neurons.cli.verb import build

    commands: list[Any] = [build()]
    for command in commands:
        below = getattr(command, "commands", {})  # made when they are asked for
        commands.extend(below[name] for name in below)
    return {one.name for command in commands for one in command.params}


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
    from safety_neurons.results.run import SCHEMA, read_json

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
    if record.get("schema", SCHEMA) != SCHEMA:
        raise InputError(
            f"{recipe} is of schema {str(record['schema'])[:40]!r}; expected {SCHEMA!r}: update the package"
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
    from safety_neurons.results.records import plain_name

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
    for part, known in ((record, _RECIPE), *((step, _STEP_OF_A_RECIPE) for step in steps)):
        if unknown := [key for key in part if key not in known]:
            raise InputError(
                f"{recipe} is not a recipe: it says {unknown[0][:40]!r}; expected {', '.join(known)}"
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
        if value is not None
        and (value is not False or not getattr(options.get(option.replace("-", "_")), "is_flag", True))
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
        several = getattr(one, "multiple", False) or one.nargs != 1
        if isinstance(value, list) and len(value) != 1 and not several:
            raise UsageError(
                f"{recipe}: {option} is a list of {len(value)}, {str(value)[:40]!r}; {name} takes one value: "
                "write one, or one text with commas where it takes those"
            )
        if one.param_type_name == "argument":
            behind += [str(part) for part in values]
        elif getattr(one, "is_flag", False):
            if value is not True:
                raise UsageError(f"{recipe}: {option} is {str(value)[:40]!r}; expected true or false")
            line.append(one.opts[0])
        elif any(isinstance(part, bool) for part in values):
            raise UsageError(f"{recipe}: {option} is {str(value)[:40]!r}; expected text or a number")
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


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _placed(value: Any, places: Mapping[str, str]) -> Any:
    """The names of places in a text, in braces, replaced by what they hold; other braces stay."""
    if isinstance(value, list):
        return [_placed(part, places) for part in value]
    if isinstance(value, str):
        # In one pass: what a place holds is not looked into again.
        return _MARK.sub(lambda mark: places.get(mark[1], mark[0]), value)
    return value
