"""Run a method: encode, write text, keep sums over batches in a state that survives a kill, select, subtract,
count prompts.
"""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from safety_neurons.arguments import well_typed
from safety_neurons.counting import numbered
from safety_neurons.detectors import methods
from safety_neurons.detectors.methods import Method
from safety_neurons.detectors.rules import Ranked
from safety_neurons.errors import InputError, NumericalError, RunError, UnsupportedModelError, UsageError
from safety_neurons.model import LanguageModel, as_prompts, check_pair
from safety_neurons.model.batches import (
    Batch,
    BatchSize,
    Halving,
    collate,
    plan,
    said_of_failed,
    token_budget,
)
from safety_neurons.model.hooks import evaluating
from safety_neurons.model.identity import identity, json_sha256
from safety_neurons.model.language_model import Texts as Asked
from safety_neurons.model.language_model import takes_padding
from safety_neurons.neurons import NeuronSet, Provenance, Scores, Selection, SiteTable, Votes
from safety_neurons.neurons.scores import said_of_zeros
from safety_neurons.prompt_lists import Prompts
from safety_neurons.results import Checkpoint, Completions, html_table

Sums = dict[str, np.ndarray]
Progress = Callable[[int, int, int], None]
MIN_HALVED = 4
"""Prompts from which on two halves of them are compared."""


@dataclass
class BatchSums:
    """What one batch adds.

    Attributes:
        sums: one array per name, added up over batches.
        scores: one entry per prompt of the batch (site key to score of each neuron); only wanted where
            prompts vote.
    """

    sums: Sums = field(default_factory=dict)
    scores: list[dict[str, np.ndarray]] = field(default_factory=list)
    votes: dict[str, np.ndarray] | None = None
    """State of the votes that the prompts of the batch have cast."""


@dataclass(frozen=True)
class Folded:
    """What all batches gave.

    Attributes:
        sums: by name.
        votes: of the prompts; None without agreement.
        failed: why a sequence is not in them, by its index.
    """

    sums: Sums
    votes: Votes | None
    failed: Mapping[int, str]


class Stream:
    """Arrays and plain values of one running `find`, kept in a checkpoint when there is one.

    Args:
        checkpoint: where to keep them; None keeps them in memory only.
        key: identifies the configuration; a checkpoint of another one is refused.

    Raises:
        RunError: the checkpoint belongs to another configuration.
    """

    def __init__(self, checkpoint: Checkpoint | None, key: Mapping[str, Any]) -> None:
        self._checkpoint = checkpoint
        self._key = {} if checkpoint is None else {name: _told(value) for name, value in key.items()}
        self.arrays: Sums = {}
        self.state: dict[str, Any] = {}
        self._new = False
        stored = checkpoint.load() if checkpoint is not None else None
        if stored is not None:
            arrays, state = stored
            theirs = state.get("key")
            theirs = theirs if isinstance(theirs, dict) else {}
            other = sorted(name for name in {*self._key, *theirs} if theirs.get(name) != self._key.get(name))
            if other:
                message = f"the partial result here was made with different {' and '.join(other)}"
                raise RunError(f"{message}: use another output folder, or overwrite this one")
            self.arrays, self.state = dict(arrays), dict(state)

    def save(self) -> None:
        """Write everything at once; a kill in the middle leaves the previous state."""
        if self._checkpoint is not None:
            self._checkpoint.save(self.arrays, {**self.state, "key": self._key})
        self._new = False

    def went_on(self, prepare: Callable[[], None] | None = None) -> None:
        """A step is done and the state is whole: save it, if the last time is some seconds of work ago.

        Args:
            prepare: brings arrays and state up to date before they are written.
        """
        self._new = True
        if self._checkpoint is not None and self._checkpoint.due:
            if prepare is not None:
                prepare()
            self.save()

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """For a block that changes the state: an interruption in it saves nothing."""
        new, self._new = self._new, False
        yield
        self._new = new

    @contextlib.contextmanager
    def kept(self, prepare: Callable[[], None] | None = None) -> Iterator[None]:
        """Save what is new when an error or an interruption ends the block."""
        try:
            yield
        except BaseException:
            if self._new:
                if prepare is not None:
                    prepare()
                self.save()
            raise

    def named(self, prefix: str) -> Sums:
        """Arrays whose name starts with `prefix/`, without the prefix."""
        return {
            name[len(prefix) + 1 :]: values
            for name, values in self.arrays.items()
            if name.startswith(f"{prefix}/")
        }

    def put(self, prefix: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Set arrays under `prefix/`."""
        self.arrays.update({f"{prefix}/{name}": values for name, values in arrays.items()})

    def add(self, sums: Mapping[str, np.ndarray]) -> None:
        """Add arrays, in float64, to those under `sum/`."""
        for name, values in sums.items():
            stored = self.arrays.get(f"sum/{name}")
            self.arrays[f"sum/{name}"] = np.asarray(values, dtype=np.float64) + (
                0.0 if stored is None else stored
            )

    def drop(self, prefix: str) -> None:
        """Forget the arrays under `prefix/`."""
        for name in [name for name in self.arrays if name.startswith(f"{prefix}/")]:
            del self.arrays[name]


def _told(value: Any) -> str:
    """Hash of an entry of the key.

    Models count by their weights, tokenizers and templates, and not by their names.
    """
    if isinstance(value, list):
        value = [identity(item) if isinstance(item, LanguageModel) else item for item in value]
    return json_sha256(value)


def check_finite(sums: Sums) -> None:
    """Raise an error that names the first site whose numbers are not all finite."""
    for name, values in sums.items():
        if not np.isfinite(values).all():
            raise NumericalError(
                f"site {name.rsplit('/', 1)[-1]} gave NaN or infinity: check the model's weights, or use "
                "--dtype float32"
            )


def to_numpy(values: torch.Tensor) -> np.ndarray:
    """A float64 array on the host."""
    return values.detach().to("cpu", torch.float64).numpy()


@dataclasses.dataclass(frozen=True)
class PromptCounts:
    """What became of the prompts."""

    used: int
    """Prompts that are in the scores."""
    failed: int = 0
    """Prompts that could not be used; the notes say why."""
    truncated: int = 0
    """Prompts that were cut to the context length."""

    def without(self, n: int) -> "PromptCounts":
        """The same with so many of the used prompts failed after all."""
        return dataclasses.replace(self, used=self.used - n, failed=self.failed + n)


@dataclasses.dataclass(frozen=True)
class Found:
    """The result of a detector: a score for every neuron searched, and the set chosen from them."""

    scores: Scores
    """One number per neuron of every searched site: mean over prompts, signed where the method is."""
    neurons: NeuronSet
    """The chosen set; may be empty with an agreement, and the notes then say which agreement gives one
    neuron.
    """
    prompts: PromptCounts
    """Prompts used, failed and truncated."""
    notes: tuple[str, ...] = ()
    """Counted warnings, one sentence each."""
    specific: "Specific | None" = None
    """What is left beside the sets of other texts, where some were taken away."""
    ranking: tuple[tuple[int, int, float], ...] = ()
    """Of a method that scores parts (heads, experts): layer, number and score, the largest first."""

    def _repr_html_(self) -> str:
        counts = (
            f"{self.prompts.used:,} used, {self.prompts.failed:,} failed, {self.prompts.truncated:,} "
            "truncated"
        )
        rows = [
            ["prompts", counts],
            ["scored", numbered(len(self.scores), "neuron")],
            *(["note", note] for note in self.notes),
        ]
        return self.neurons._repr_html_() + html_table("Found", ["what", "how many"], rows)


@dataclasses.dataclass(frozen=True)
class OtherSet:
    """What is chosen on another text by the same method and rule, beside the set of the prompts."""

    name: str
    n_prompts: int
    n_neurons: int
    n_shared: int
    """Of the chosen neurons of the prompts."""
    jaccard: float
    """Shared neurons ÷ neurons of either set."""

    @staticmethod
    def of(name: str, chosen: NeuronSet, other: Found) -> "OtherSet":
        """Beside the set chosen on the prompts."""
        shared, either = len(chosen & other.neurons), len(chosen | other.neurons)
        sizes = other.prompts.used, len(other.neurons), shared
        return OtherSet(name, *sizes, shared / either if either else 0.0)


@dataclasses.dataclass(frozen=True)
class Specific:
    """The part of a set that is specific to its prompts: chosen on them, and on none of the other texts."""

    n_chosen: int
    n_specific: int
    share: float | None
    """Specific neurons ÷ chosen ones; None where none was chosen."""
    by_chance: float | None
    """What the same rule calls specific of one half of the prompts beside the other half, mean of both ways:
    as much comes from the choice of prompts alone. None below four prompts.
    """
    minus: tuple[OtherSet, ...]
    sets: Mapping[str, NeuronSet] = dataclasses.field(compare=False, repr=False)
    """What was `chosen` on the prompts, and by name what was chosen on the other texts."""

    def record(self) -> dict[str, object]:
        """As JSON values, without the sets."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del own["sets"]
        return {**own, "minus": [dataclasses.asdict(one) for one in self.minus]}

    def said(self) -> str:
        """As a sentence."""
        others = ", ".join(f"{one.name} (Jaccard {one.jaccard:.2f})" for one in self.minus)
        share = "none" if self.share is None else f"{self.share:.1%}"
        chance = (
            ""
            if self.by_chance is None
            else f"; of half of the prompts beside the other half it would be {self.by_chance:.1%}"
        )
        return (
            f"{self.n_specific:,} of {self.n_chosen:,} chosen neurons ({share}) are specific to the prompts: "
            f"not chosen on {others}{chance}"
        )


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a method's formula returns."""

    values: Mapping[str, np.ndarray]
    """One number per neuron of every searched site."""
    counts: PromptCounts
    votes: Votes | None = None
    """Of the prompts, where they vote."""
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the provenance says beside the options: numbers that were found on the way."""
    selection: Selection | None = None
    """Takes the place of the method's own, where the formula chose the size."""
    members: Mapping[str, np.ndarray] | None = None
    """The set itself, where the formula chose it."""
    ranking: tuple[tuple[int, int, float], ...] = ()
    """Of a method that scores parts: layer, number and score of every part, the largest first."""


@dataclasses.dataclass
class Run:
    """What a method's formula works with."""

    models: tuple[LanguageModel, ...]
    """The base and the aligned model, or one."""
    prompts: Prompts
    method: Method
    harmless: Prompts | None = None
    general: Prompts | None = None
    completions: Completions | None = None
    stream: Stream = dataclasses.field(default_factory=lambda: Stream(None, {}))
    batch_size: BatchSize = "auto"
    progress: Progress | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    """What has to be said; each is one sentence with a count."""

    @property
    def base(self) -> LanguageModel:
        """The less safe model of a pair."""
        return self.models[0]

    @property
    def aligned(self) -> LanguageModel:
        """The safer model of a pair, or the only one."""
        return self.models[-1]

    @functools.cached_property
    def selection(self) -> Selection:
        """The rule of selection, or the method's default."""
        method: Any = (
            self.method
        )  # The rule is one of `Sized`, `Ranked` and `Voted`, beside which a method stands.
        selection: Selection = method.selection
        return selection

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """Neurons of every searched site key."""
        return dict(self.base.table.select(sites=self.method.searched, layers=self.method.layers).sizes)

    @property
    def votes(self) -> bool:
        """Whether every prompt votes."""
        return self.selection.agreement is not None

    def text_config(self) -> dict[str, Any]:
        """The options of the text that both models read; given completions count by their content."""
        method: Any = self.method
        if self.completions is None:
            return {name: getattr(method, name) for name in ("positions", "generate_with", "max_new_tokens")}
        digest = hashlib.sha256(
            repr([(one.prompt_id, one.token_ids, one.completion) for one in self.completions]).encode()
        ).hexdigest()
        return {"positions": method.positions, "completions_sha256": digest}

    def fold(
        self,
        sequences: Sequence[Sequence[int]],
        reduce: Callable[[Batch], BatchSums],
        lm: LanguageModel | None = None,
        budget: int | None = None,
    ) -> Folded:
        """Sum in float64 what `reduce` returns over all batches of `sequences`, in the run's resumable state.

        The state is written every few seconds of work, and when an error ends the run; a call that finds one
        starts behind its last batch. A batch that does not fit in memory is halved; a prompt that gives NaN
        or infinity, or does not fit alone, is left out, counted and noted.

        Args:
            sequences: token ids.
            reduce: batch to sums; must leave nothing behind when it raises, for it is called again on the
                halves of a batch that does not fit.
            lm: model for whose device and padding batches are made; by default the aligned one.
            budget: padded tokens of a batch whose size is `auto`.

        Raises:
            NumericalError: every sequence gives NaN or infinity; the message names the first one's site.
        """
        lm, stream = lm or self.aligned, self.stream
        votes = Votes(dict(self.sizes)) if self.votes else None
        if votes is not None and stream.named("votes"):
            votes.restore(stream.named("votes"))
        lengths = [len(sequence) for sequence in sequences]
        groups = plan(lengths, self.batch_size, token_budget(lm.device, budget), padded=takes_padding(lm))
        failed: dict[int, str] = {
            int(index): reason for index, reason in stream.state.get("failed", {}).items()
        }
        halving = Halving(failed)

        def work(batch: Batch) -> BatchSums:
            added = reduce(batch)
            check_finite(added.sums)
            if votes is None:
                return added
            cast = Votes(dict(self.sizes))
            for scores in added.scores:
                cast.cast(self.selection, scores)
            return BatchSums(added.sums, votes=cast.state())

        def batch_of(number: int) -> Batch:
            return collate(sequences, groups[number], number=number, pad_id=lm.pad_id).to(lm.device)

        def prepare() -> None:
            stream.state["failed"] = {str(index): reason for index, reason in failed.items()}
            if votes is not None:
                stream.put("votes", votes.state())

        with stream.kept(prepare):
            left = range(int(stream.state.get("batches", 0)), len(groups))
            tokens = sum(lengths[index] for group in groups[: left.start] for index in group)
            for number, halves in zip(left, halving.over(left, batch_of, work), strict=True):
                tokens += sum(lengths[index] for index in groups[number])
                with stream.changing():
                    for half in halves:
                        stream.add(half.sums)
                        if votes is not None and half.votes is not None:
                            votes.merge(half.votes)
                    stream.state["batches"] = number + 1
                stream.went_on(prepare)
                if self.progress is not None:
                    self.progress(number + 1, len(groups), tokens)
            if len(failed) == len(sequences) > 0:
                raise NumericalError(
                    f"none of {len(failed)} prompts gave finite numbers; the first: "
                    f"{next(iter(failed.values()))}"
                )
            prepare()
            stream.save()
        self.notes += [*halving.notes, *said_of_failed(failed, len(sequences))]
        return Folded(stream.named("sum"), votes, failed)

    def told(self) -> dict[str, Any]:
        """Resumable state, batch size and progress, for steps that write text."""
        return {"stream": self.stream, "batch_size": self.batch_size, "progress": self.progress}


@well_typed
def find(
    method: Method,
    models: Sequence[LanguageModel],
    prompts: Asked | None = None,
    *,
    harmless: Asked | None = None,
    general: Asked | None = None,
    completions: Completions | None = None,
    subtract: NeuronSet | None = None,
    batch_size: BatchSize = "auto",
    **kept: Any,
) -> Found:
    """Score the neurons of the searched sites by a method, and choose a set.

    Args:
        method: which, with its options.
        models: base and aligned for a method of a pair, else one.
        prompts: usually harmful requests, or a general corpus for foundation neurons.
        harmless: harmless prompts, for methods that are shown some.
        general: general text, for methods that are shown some.
        completions: used instead of generating, by methods that read completions.
        subtract: neurons taken away after selection.
        batch_size: prompts a batch, or "auto".
        **kept: `minus`, other texts by name: neurons that the same method and rule choose on one of them are
            taken away; `checkpoint`, the partial state from which a killed run goes on; `progress`, called
            with (done, in all, tokens).

    Raises:
        MismatchError: the models have other shapes or tokenizers.
        NumericalError: NaN or infinity in a score; the message names the site.
        UnsupportedModelError: the model has nothing that the method scores.
        UsageError: an option that is none, or of the wrong kind for the method.
    """
    checkpoint, progress, minus = (kept.pop(name, None) for name in ("checkpoint", "progress", "minus"))
    if kept:
        raise UsageError(f"unknown option {next(iter(kept))!r} of {method.NAME}")
    method.check()
    others = {"harmless": harmless, "general": general}
    _check_what_is_shown(method, models, prompts, others, completions)
    other_texts = _other_texts(method, minus)
    if method.PAIR:
        check_pair(*models)
    if reason := method.unfit(models[0].table.keys):
        refused = models[0].anatomy.refused.items()
        unknown = next((f"{key}: {why}" for key, why in refused if ".experts." in key), None)
        if unknown and getattr(method, "PART", None) == "expert":
            reason = f"the routed experts are there, and their neurons cannot be told: {unknown}"
        raise UnsupportedModelError(reason)
    requests = as_prompts(prompts) if method.PROMPTS and prompts is not None else Prompts([])
    if method.PROMPTS and not len(requests):
        raise InputError(f"{method.NAME} looks at prompts, and the list is empty; expected at least one")
    shown: Any = {name: None if text is None else as_prompts(text) for name, text in others.items()}
    state: Any = {"completions": completions, "batch_size": batch_size, "progress": progress}
    run = Run(tuple(models), requests, method, **shown, **state)
    config = method.config(run)
    run.stream = Stream(checkpoint, _resume_key(run, config))
    with contextlib.ExitStack() as modes:
        for model in models:
            modes.enter_context(evaluating(model.model))
        scored = method.score(run)
    found = _chosen(run, config, scored, subtract)
    if not other_texts:
        return found
    again: dict[str, Any] = {name: text for name, text in shown.items() if text is not None}
    again |= {"batch_size": batch_size, "progress": progress}
    return _without(found, other_texts, method, models, requests, checkpoint, **again)


def _other_texts(method: Method, minus: Any) -> dict[str, Prompts]:
    """The texts whose neurons are taken away."""
    if minus is not None and not isinstance(minus, Mapping):
        raise UsageError(
            f"minus is a {type(minus).__name__}; expected prompts by name, such as "
            '{"harmless": prompts, "general": prompts}'
        )
    if minus and not method.PROMPTS:
        raise UsageError(f"{method.NAME} looks at no prompts, so there is nothing to take away by prompts")
    if "chosen" in (minus or {}):
        raise UsageError("a text to take away is named 'chosen', as the set itself is; expected another name")
    return {name: as_prompts(text) for name, text in (minus or {}).items()}


def _without(
    found: Found,
    others: Mapping[str, Prompts],
    method: Method,
    models: Sequence[LanguageModel],
    prompts: Prompts,
    checkpoint: Checkpoint | None,
    **again: Any,
) -> Found:
    """What was found, less what the same search finds on other texts; the shares are in `specific`."""
    beside: list[Checkpoint] = []

    def search(name: str, text: Prompts) -> Found:
        if checkpoint is not None:
            beside.append(checkpoint.beside(name))
            return find(method, models, text, checkpoint=beside[-1], **again)
        return find(method, models, text, **again)

    sets = {name: search(f"minus-{number}", text) for number, (name, text) in enumerate(others.items())}
    chance = None
    if len(prompts) >= MIN_HALVED:
        one, other = (search(f"half-{number}", prompts[number::2]).neurons for number in (0, 1))
        whole = len(one) + len(other)
        chance = (whole - 2 * len(one & other)) / whole if whole else None
    chosen = neurons = found.neurons
    for one_set in sets.values():
        neurons = neurons - one_set.neurons
    specific = Specific(
        len(chosen),
        len(neurons),
        len(neurons) / len(chosen) if len(chosen) else None,
        chance,
        tuple(OtherSet.of(name, chosen, one_set) for name, one_set in sets.items()),
        {"chosen": chosen, **{name: one_set.neurons for name, one_set in sets.items()}},
    )
    assert chosen.provenance is not None
    made_of = {**chosen.provenance.config, "specific": specific.record()}
    provenance = dataclasses.replace(chosen.provenance, config=made_of)
    neurons = NeuronSet(dict(neurons.items()), models[0].table, provenance)
    notes = [f"{name}: {note}" for name, one_set in sets.items() for note in one_set.notes]
    for one_checkpoint in beside:
        one_checkpoint.delete()
    return dataclasses.replace(
        found, neurons=neurons, notes=(*found.notes, *notes, specific.said()), specific=specific
    )


def _check_what_is_shown(
    method: Method,
    models: Sequence[LanguageModel],
    prompts: Any,
    others: Mapping[str, Any],
    completions: Completions | None,
) -> None:
    """Whether a method gets what it looks at, and nothing that would have no effect."""
    if len(models) != 1 + method.PAIR:
        raise UsageError(
            f"{method.NAME} looks at {'a base and an aligned model' if method.PAIR else 'one model'}; "
            f"{len(models)} given"
        )
    if method.PROMPTS and prompts is None:
        raise UsageError(f"{method.NAME} looks at prompts; give some")
    needed = method.shown()
    for name, text in others.items():
        if needed.get(name) and text is None:
            raise UsageError(f"{method.NAME} reads {name} prompts too; give some, or leave it out")
        if name not in needed and text is not None:
            raise UsageError(f"{method.NAME} is shown no {name} prompts; leave them out")
    if completions is not None and (
        not method.COMPLETIONS or getattr(method, "compare", "") == "swap-attribution"
    ):
        raise UsageError(f"{method.NAME} explains both models' own completions: give no completions")


def _resume_key(run: Run, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a partial state must have been made with to be continued (a selection without agreement acts only
    at the end).
    """
    return {
        **config,
        "method": run.method.NAME,
        "models": list(run.models),
        "prompts": run.prompts.sha256,
        # A method that has no other rule than a size searches for a set of that size.
        "selection": run.selection.config() if run.votes or not isinstance(run.method, Ranked) else None,
        "units": getattr(run.method, "units", None),
        "batch_size": run.batch_size,
    }


def _chosen(run: Run, config: Mapping[str, Any], scored: Scored, subtract: NeuronSet | None) -> Found:
    """Scores and the chosen set, with the provenance of the run."""
    prompts = run.prompts if len(run.prompts) else None
    origin = {
        "method": run.method.NAME,
        "models": tuple(model.name for model in run.models),
        "prompts_sha256": prompts.sha256 if prompts is not None else "",
        "config": {
            **config,
            **scored.config,
            "prompt_digests": prompts.digests if prompts is not None else [],
        },
    }
    selection = scored.selection or run.selection
    chosen = chosen_from(
        scored.values, run.base.table, selection, origin, scored.votes, members=scored.members
    )
    run.notes += chosen.notes
    neurons = chosen.neurons
    if subtract is not None:
        before = len(neurons)
        neurons = NeuronSet(dict((neurons - subtract).items()), run.base.table, neurons.provenance)
        run.notes.append(f"{before - len(neurons):,} of {numbered(before, 'chosen neuron')} were subtracted")
    return Found(chosen.scores, neurons, scored.counts, tuple(run.notes), ranking=scored.ranking)


def chosen_from(
    values: Mapping[str, np.ndarray],
    table: SiteTable,
    selection: Selection,
    origin: Mapping[str, Any],
    votes: Votes | None = None,
    *,
    members: Mapping[str, np.ndarray] | None = None,
) -> Found:
    """Scores, and the set that a selection takes from them.

    Args:
        values: one number per neuron of every searched site.
        table: the model's whole site table (shares are counted against it).
        selection: acts on the scores, or, with an agreement, on the votes.
        origin: entries of the provenance.
        votes: of the prompts.
        members: the set, where it is chosen already.

    Raises:
        NumericalError: a score is not a number.
    """
    config = {**origin["config"], "selection": selection.config()}
    provenance = {
        **origin,
        "config": {"prompt_digests": [], **config},
        "model_fingerprint": table.fingerprint,
    }
    scores, notes = Scores(finite(values), table, Provenance(kind="scores", **provenance)), []
    if members is not None:
        chosen = members
    elif votes is None:
        chosen = {key: np.flatnonzero(mask) for key, mask in selection.choose(dict(scores.items())).items()}
    else:
        chosen = votes.members(float(selection.agreement or 1.0))
        if not chosen:
            one = votes.agreement_for_one()
            notes.append(
                f"no neuron was chosen in that share of the prompts; an agreement of {one:.4g} gives one"
            )
        notes += votes.said_of(chosen.keys())
    notes += said_of_zeros(dict(scores.items()), chosen)
    return Found(
        scores,
        NeuronSet(chosen, table, Provenance(kind="neurons", **provenance)),
        PromptCounts(0),
        tuple(notes),
    )


def finite(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The values as float32.

    Raises:
        NumericalError: a site holds NaN or infinity.
    """
    for key, scores in values.items():
        if not np.isfinite(scores).all():
            raise NumericalError(
                f"site {key} gave NaN or infinity: check the model's weights, or use --dtype float32"
            )
    return {key: np.asarray(scores, dtype=np.float32) for key, scores in values.items()}


def caller(kind: type[Method]) -> Callable[..., Found]:
    """The Python call of a method: models and prompts, then the method's options and those of `find` by
    keyword.
    """

    def find_by(*given: Any, **options: Any) -> Found:
        bound = signature.bind(*given, **options)
        models = [bound.arguments.pop(name) for name in names]
        prompts = bound.arguments.pop("prompts", None)
        own = {
            one.name: bound.arguments.pop(one.name) for one in kind.options() if one.name in bound.arguments
        }
        return find(kind(**own), models, prompts, **bound.arguments)

    names = ["base", "aligned"] if kind.PAIR else ["model"]
    keywords: list[Any] = [
        *kind.options(),
        *kind.shown(),
        *(["completions"] if kind.COMPLETIONS else []),
        "subtract",
        *(["minus"] if kind.PROMPTS else []),
        "batch_size",
        "checkpoint",
        "progress",
    ]
    behind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, behind, annotation=LanguageModel) for name in names]
    default: Any = inspect.Parameter.empty if kind.PROMPTS else None
    parameters.append(
        inspect.Parameter("prompts", behind, default=default, annotation=Asked if kind.PROMPTS else Any)
    )
    kinds: dict[str, Any] = {"subtract": NeuronSet | None, "completions": Completions | None}
    kinds["batch_size"] = BatchSize
    for one in keywords:
        name, default = (
            (one, "auto" if one == "batch_size" else None)
            if isinstance(one, str)
            else (one.name, one.default)
        )
        kind_of = kinds.get(name, inspect.Parameter.empty)
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(name, keyword, default=default, annotation=kind_of))
    signature = inspect.Signature(parameters, return_annotation=Found)
    find_by.__name__ = find_by.__qualname__ = f"find_{kind.NAME.replace('-', '_')}"
    find_by.__doc__ = f"{inspect.getdoc(kind)}\n\nArgs:\n" + "".join(
        f"    {one.name}: {one.help}\n" for one in kind.options()
    )
    find_by.__doc__ += "    Others as for `find`, which also says what is raised.\n"
    find_by.__signature__ = signature  # type: ignore[attr-defined]
    return well_typed(find_by)


find_activation_magnitude = caller(methods.ActivationMagnitude)
find_attribution = caller(methods.Attribution)
find_attribution_patching = caller(methods.AttributionPatching)
find_cna = caller(methods.Cna)
find_contrast = caller(methods.Contrast)
find_effect_size = caller(methods.EffectSize)
find_heads = caller(methods.SafetyHeads)
find_importance = caller(methods.Importance)
find_importance_contrast = caller(methods.ImportanceContrast)
find_mask = caller(methods.Mask)
find_probe = caller(methods.SparseProbe)
find_probe_weights = caller(methods.ProbeWeights)
find_refusal_direction = caller(methods.RefusalDirection)
find_relp = caller(methods.Relp)
find_routing = caller(methods.RoutingContrast)
find_snip = caller(methods.Snip)
find_swap_attribution = caller(methods.SwapAttribution)
find_wanda = caller(methods.Wanda)
find_weight_change = caller(methods.WeightChange)
find_weight_magnitude = caller(methods.WeightMagnitude)
