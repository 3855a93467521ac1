"""What is analysed: sets and scores, each with a name, read from files and find runs."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from safety_neurons.errors import ForeignModelError, InputError, NeuronError, UsageError
from safety_neurons.neurons import NeuronSet, Scores, Selection, SiteTable

NEURONS, SCORES = "neurons.safetensors", "scores.safetensors"


@dataclasses.dataclass(frozen=True)
class Named:
    """A neuron set with a name, and the scores it was taken from where they are known."""

    name: str
    neurons: NeuronSet
    scores: Scores | None = None
    source: str = ""

    @property
    def table(self) -> SiteTable:
        """The matrices of the model.

        Raises:
            NeuronError: the set does not know them.
        """
        if self.neurons.table is None:
            raise NeuronError(f"the set {self.name!r} has no site table; expected a file that a find run wrote, or one beside such a file")
        return self.neurons.table

    @functools.cached_property
    def searched(self) -> SiteTable:
        """The matrices the set could have been taken from: what was scored, what the provenance names, or all of them."""
        if self.scores is not None:
            keys = set(self.scores.keys())
            return SiteTable(self.table.architecture, self.table.n_parameters, tuple(info for info in self.table.sites if info.key in keys))
        config = self.neurons.provenance.config
        try:
            found = self.table.select(config.get("sites") or None, config.get("layers"))
        except (InputError, NeuronError, TypeError):
            return self.table
        return found if all(key in found for key in self.neurons.keys()) else self.table  # noqa: SIM118 - not a mapping

    @property
    def method(self) -> str:
        """The detector, as the provenance says."""
        return self.neurons.provenance.method

    def record(self) -> dict[str, Any]:
        """The set in a few words, as JSON values."""
        return {
            "name": self.name,
            "method": self.method,
            "models": list(self.neurons.provenance.models),
            "source": self.source,
            "n_neurons": len(self.neurons),
            "n_units": self.neurons.n_units,
            "n_candidates": self.searched.n_neurons,
            "share_of_neurons": len(self.neurons) / self.searched.n_neurons,
            "share_of_parameters": self.neurons.share_of_parameters,
            "has_scores": self.scores is not None,
        }


def read_named(specs: Sequence[str], *, top: float | None = None, count: int | None = None, together: bool = True) -> list[Named]:
    """Sets and scores from files.

    Args:
        specs: `[NAME=]PATH` each: a neuron file, a score file, or the folder of a find run (both). Without a name
            it is the name of the folder or file, or the whole path where two share that.
        top: take this fraction of every list of scores, whatever set lies beside it.
        count: take this many of every list of scores.
        together: whether they are to be held against one another, and so have to be of one architecture.

    Raises:
        UsageError: nothing given, two of one name, both `top` and `count`, or scores without a set and neither of the two.
        NeuronError: a file that is missing or damaged.
        ForeignModelError: sets of different architectures.
    """
    if top is not None and count is not None:
        raise UsageError("top and count given together; expected one of them")
    if not specs:
        raise UsageError("no neuron set was given; expected at least one file or find run")
    items = [_read(spec, top, count) for spec in specs]
    return same_table(_with_names(items)) if together else _apart(_with_names(items))


def name_sets(sets: Iterable[tuple[str, NeuronSet]]) -> list[Named]:
    """Sets in memory with names; errors as for `read_named`."""
    return same_table([Named(name, neurons) for name, neurons in sets])


def same_table(items: Sequence[Named]) -> list[Named]:
    """The items, those without a site table on the table of the others.

    Raises:
        ForeignModelError: sets of different architectures. NeuronError: none knows its table, or an index that does not fit.
        UsageError: two items of one name.
    """
    _check_names(items)
    table = next((item.neurons.table for item in items if item.neurons.table is not None), None)
    if table is None:
        raise NeuronError("no set knows its model's matrices; expected at least one file that a find run wrote")
    for item in items:
        if item.neurons.table is not None and item.neurons.table.fingerprint != table.fingerprint:
            raise ForeignModelError(
                f"{item.name!r} belongs to {item.neurons.table.architecture} of other sizes than {items[0].name!r}; "
                "expected sets of one architecture"
            )
    return [item if item.neurons.table is not None else dataclasses.replace(item, neurons=item.neurons.on(table)) for item in items]


def _apart(items: Sequence[Named]) -> list[Named]:
    """The items, each of whatever architecture; one without a site table is on that of the others, as in `same_table`."""
    _check_names(items)
    return list(items) if all(item.neurons.table is not None for item in items) else same_table(items)


def _check_names(items: Sequence[Named]) -> None:
    names = [item.name for item in items]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two sets are called {twice!r}; name them apart: NAME=PATH")


def _read(spec: str, top: float | None, count: int | None) -> tuple[str, Named]:
    name, path = _split(spec)
    source = pathlib.Path(path)
    if not source.exists():
        raise NeuronError(f"no file or folder {path!r}; expected a neuron file, a score file or the folder of a find run")
    scores = _scores(source)
    wanted = Selection(top=top, count=count) if (top is not None or count is not None) else None
    if wanted is not None and scores is not None:
        neurons = scores.select(wanted)
    elif _has_set(source):
        neurons = NeuronSet.load(source)
    else:
        raise UsageError(f"{path!r} holds scores and no set; say how many neurons to take: --top or --count")
    return name, Named(name, neurons, scores if scores is not None and scores.table is not None else None, path)


def _split(spec: str) -> tuple[str, str]:
    """`NAME=PATH`, or a path alone; a path that exists is one even where it holds an equals sign."""
    name, sign, path = spec.partition("=")
    return ("", spec) if not sign or pathlib.Path(spec).exists() else (name.strip(), path)


def _scores(source: pathlib.Path) -> Scores | None:
    file = source / SCORES if source.is_dir() else source
    if not file.is_file():
        return None
    try:
        return Scores.load(file)
    except NeuronError:
        if source.is_dir():
            raise
        return None


def _has_set(source: pathlib.Path) -> bool:
    if source.is_dir():
        return (source / NEURONS).is_file() or not (source / SCORES).is_file()
    try:
        NeuronSet.load(source)
    except NeuronError:
        try:
            Scores.load(source)
        except NeuronError:
            return True  # Neither can be read: loading it as a set says what is wrong.
        return False
    return True


def _with_names(items: Sequence[tuple[str, Named]]) -> list[Named]:
    named = [dataclasses.replace(item, name=given or _called(pathlib.Path(item.source))) for given, item in items]
    names = [item.name for item in named]
    return [
        item if given or names.count(item.name) == 1 else dataclasses.replace(item, name=item.source)
        for (given, _), item in zip(items, named, strict=True)
    ]


def _called(path: pathlib.Path) -> str:
    """The name of a run's folder, also where a file inside it was named."""
    return path.absolute().parent.name if path.name in (NEURONS, SCORES) else path.name if path.is_dir() else path.stem
