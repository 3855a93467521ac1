"""find: score neurons by one method and keep the ones that a selection takes.

One command a registered method.
"""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import typer
from typer.main import get_command

from safety_neurons.cli.session import OneModel, OtherText, PromptFile, Session, Some, TwoModels, named
from safety_neurons.cli.verb import Contents, add, group
from safety_neurons.declarations import Declaration, Reads
from safety_neurons.detectors.methods import METHODS, Method, installed
from safety_neurons.errors import UsageError


class Methods(Contents):
    """The group of commands of all methods, those registered later included."""

    made: dict[str, Any] = {}

    @property  # type: ignore[override]
    def commands(self) -> dict[str, Any]:
        """One command a registered method."""
        installed()
        self.made |= {name: command(method) for name, method in METHODS.items() if name not in self.made}
        return {name: self.made[name] for name in METHODS}

    @commands.setter
    def commands(self, _: Any) -> None:
        """The registry is where they come from."""


group("find", Methods)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompted(Declaration):
    """The prompts a method looks at."""

    PANEL: ClassVar[str | None] = "Prompts"

    prompts: PromptFile = "builtin:harmful"
    """A file or builtin:NAME[/LANG]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Harmless(Declaration):
    """The harmless prompts that some methods look at too."""

    harmless: Annotated[str, Reads("prompts", column=True, words=("none",))] = "builtin:harmless"
    """Prompts whose answers are to stay: a file or builtin:NAME[/LANG]; none for none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class General(Declaration):
    """The general prompts that some methods look at too."""

    PANEL: ClassVar[str | None] = "Prompts"

    general: OtherText = "builtin:general"
    """General prompts, neither harmful nor their twins: a file or builtin:NAME[/LANG]; none for none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given(Declaration):
    """Completions that take the place of those that would be generated."""

    completions: Annotated[str, Reads("files")] | None = None
    """Completions file to use instead of generating."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subtracting(Declaration):
    """What is taken away from the chosen set."""

    PANEL: ClassVar[str | None] = Method.PANEL

    subtract: Annotated[str, Reads("neurons", words=("foundation",))] | None = None
    """Neuron file, or foundation, to subtract afterwards."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Foundation(Subtracting):
    """Also where foundation neurons are found."""

    PANEL: ClassVar[str | None] = None

    foundation: OtherText = "builtin:general"
    """General text of --subtract foundation: a file or builtin:NAME[/LANG]."""
    minus: Annotated[str, Reads("prompts", several=True)] | None = None
    """Take away what the same search chooses on these prompts: comma-separated FILE, NAME=FILE,
    builtin:NAME.
    """

    def check(self) -> None:
        """Also that the lists of prompts have names of their own."""
        super().check()
        names = [name for name, _ in named(self.minus)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UsageError(f"--minus names {twice[0]!r} twice; expected NAME=FILE with other names")


def declared(method: type[Method]) -> dict[str, type[Declaration]]:
    """The declarations of a method's command."""
    return {
        "models": TwoModels if method.PAIR else OneModel,
        **({"shown": Prompted, "some": Some} if method.PROMPTS else {}),
        "method": method,
        "subtracting": Foundation if method.PROMPTS else Subtracting,
        **({"other": Harmless} if method.HARMLESS != "none" else {}),
        **({"text": General} if method.GENERAL != "none" else {}),
        **({"given": Given} if method.COMPLETIONS else {}),
    }


def command(method: type[Method]) -> Any:
    """The command of a method."""
    holder = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    sentence = (inspect.getdoc(method) or "").split("\n\n")[0]
    add(holder, f"find {method.NAME}", find, declared(method), sentence)
    return get_command(holder)


def find(session: Session, method: Method, models: Declaration, **_: Declaration) -> dict[str, Any]:
    """Load what a method needs, run it, write scores and neurons, show them."""
    specs = list(models.values().values())

    def run() -> dict[str, Any]:
        from safety_neurons.detectors import find as search

        loaded = load(session, specs)
        shown = looked_at(session, loaded[0])
        state = {"batch_size": session.batch_size(), "checkpoint": session.folder.checkpoint("find")}
        subtract = subtracted(session, method, loaded, shown)
        with session.progress("find") as progress:
            less = {"subtract": subtract, **minus(session, loaded[0])}
            result = search(method, loaded, **shown, **less, progress=progress, **state)
        session.notes.extend(result.notes)
        return keep(session, result)

    return session.run(run)


def load(session: Session, specs: Sequence[str]) -> list[Any]:
    """One model, or a pair that shares its base where it can."""
    if len(specs) == 1:
        return [session.model(specs[0])]
    pair = session.pair(*specs)
    return [pair.base, pair.aligned]


def looked_at(session: Session, model: Any) -> dict[str, Any]:
    """The prompts and completions of a run, as `detectors.find` takes them."""
    options = session.options
    lists = {
        name: session.read(name, model, options["limit"])
        for name in ("prompts", "harmless", "general")
        if name in options
    }
    texts: dict[str, Any] = {name: prompts for name, prompts in lists.items() if prompts is not None}
    if options.get("completions"):
        from safety_neurons.results import Completions

        texts["completions"] = Completions.load(options["completions"])
    return texts


def minus(session: Session, model: Any) -> dict[str, Any]:
    """The prompts whose neurons are taken away, by name, as an argument of the search."""
    lists = named(session.options.get("minus"))
    limit = session.options.get("limit")
    texts = {name: session.prompts(path, model, limit=limit) for name, path in lists}
    return {"minus": texts} if texts else {}


def subtracted(session: Session, method: Method, models: Sequence[Any], shown: Mapping[str, Any]) -> Any:
    """The set to subtract: a file, or the foundation neurons found by the same method and selection on
    general text.
    """
    wanted = session.options["subtract"]
    if wanted != "foundation":
        return None if wanted is None else session.neurons(wanted, models[0])
    from safety_neurons.detectors import find as search

    if not method.PROMPTS:
        raise UsageError(
            f"{method.NAME} looks at no prompts, so it has no foundation neurons; expected a neuron file "
            "to subtract"
        )
    general = session.read("foundation", models[0])
    state = {"batch_size": session.batch_size(), "checkpoint": session.folder.checkpoint("foundation")}
    beside = {name: value for name, value in shown.items() if name in method.shown()}
    with session.progress("find foundation neurons") as progress:
        foundation = search(method, models, general, progress=progress, **beside, **state)
    foundation.neurons.save(session.folder.path("foundation.safetensors"))
    session.notes.extend(foundation.notes)
    return foundation.neurons


def keep(session: Session, result: Any) -> dict[str, Any]:
    """Write scores, then neurons; an empty set is an error that leaves the scores."""
    from safety_neurons.errors import NeuronError

    scores, neurons = (
        session.folder.path("scores.safetensors").absolute(),
        session.folder.path("neurons.safetensors").absolute(),
    )
    result.scores.save(scores)
    specific = {} if result.specific is None else {"specific": kept_sets(session, result.specific)}
    if not len(result.neurons):
        why = "; ".join(result.notes) or "the selection takes none"
        raise NeuronError(
            f"no neuron {'is left' if specific else 'was chosen'} ({why}); the scores are in {scores}"
        )
    result.neurons.save(neurons)
    return {
        "neurons": str(neurons),
        "scores": str(scores),
        "n_neurons": result.neurons.n_neurons,
        "n_units": result.neurons.n_units,
        "n_parameters": result.neurons.n_parameters,
        "share_of_neurons": result.neurons.share_of_neurons,
        "share_of_all_neurons": result.neurons.share_of_all_neurons,
        "share_of_parameters": result.neurons.share_of_parameters,
        "prompts": dataclasses.asdict(result.prompts),
        "method": result.scores.provenance.method,
        "notes": list(result.notes),
        **({"ranking": [list(row) for row in result.ranking]} if result.ranking else {}),
        **specific,
    }


def kept_sets(session: Session, specific: Any) -> dict[str, Any]:
    """Write the sets that the specific part is made of, and say what it is and where they are."""
    chosen, *others = specific.sets.values()
    paths = []
    for stem, neurons in (("chosen", chosen), *((f"minus-{n}", one) for n, one in enumerate(others, 1))):
        paths.append(session.folder.path(f"{stem}.safetensors").absolute())
        neurons.save(paths[-1])
    record = specific.record()
    rows = [{**row, "neurons": str(path)} for row, path in zip(record["minus"], paths[1:], strict=True)]
    return {**record, "chosen": str(paths[0]), "minus": rows}
