"""tax: two preference trainings of one model, read on the same text, and each given the other's activations
of the neurons both need.

1. The model before the trainings writes; every trained model reads the same ids; squared changes are summed
    over groups of prompts.
2. Every training's top set are the neurons with the largest change scores; the shared neurons are those in
    both.
3. The safety model is patched with the helpful model's activations of the shared neurons, and the other way
    round, beside random neurons.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

import numpy as np

from safety_neurons.analysis.overlap import Changes
from safety_neurons.arguments import well_typed
from safety_neurons.counting import numbered
from safety_neurons.declarations import listed
from safety_neurons.detectors.contrast import ContrastStatistics, contrast_statistics
from safety_neurons.detectors.methods import Contrast
from safety_neurons.detectors.runner import Run, Stream
from safety_neurons.detectors.text import Texts, texts
from safety_neurons.display import Displayed
from safety_neurons.errors import NeuronError, UsageError
from safety_neurons.interventions import patched
from safety_neurons.interventions.by_row import SetTreatment
from safety_neurons.judges import judge_refusal
from safety_neurons.judges.judgement import normalised
from safety_neurons.model import LanguageModel, check_pair
from safety_neurons.model.batches import BatchSize
from safety_neurons.model.hooks import evaluating
from safety_neurons.neurons import NeuronSet, Provenance, Scores, parse_key
from safety_neurons.neurons.sets import extra_of
from safety_neurons.prompt_lists import Prompts, as_prompts
from safety_neurons.prompt_lists.readers import Source
from safety_neurons.results import Completions, holm_in, rate
from safety_neurons.results.estimates import clusters_of
from safety_neurons.strict_json import JsonObject
from safety_neurons.studies.bench import Arm, Bench, How, Judging, Progress, Verdicts, contrast, try_out

GROUPS = 20
"""Groups of prompts that the intervals draw anew."""


@dataclasses.dataclass(frozen=True)
class Trainings:
    """What several trainings did to one model.

    Attributes:
        changes: sums over tokens, by group of prompts.
        scores: change scores of every training.
        prompts: prompts that are in them.
        notes: what had to be said.
    """

    changes: Changes
    scores: Mapping[str, Scores]
    prompts: int
    notes: tuple[str, ...]

    def shared(self, first: str, second: str, top: float) -> NeuronSet:
        """Neurons in the top sets of both trainings."""
        return self.scores[first].top(top) & self.scores[second].top(top)


@well_typed
def read_trainings(
    before: LanguageModel,
    trained: Mapping[str, LanguageModel],
    prompts: Source,
    *,
    groups: int = GROUPS,
    batch_size: BatchSize = "auto",
    progress: Progress | None = None,
    **options: Any,
) -> Trainings:
    """Change scores of several trainings on the same prompts and completions, with what intervals need.

    Args:
        before: the model that all trainings started from; it writes the completions.
        trained: the trained models by name, two or more.
        prompts: requests that both trainings pull on.
        groups: groups of prompts that are kept apart; fewer where there are fewer prompts.
        batch_size: sequences a batch, or "auto".
        progress: told what is read.
        **options: of `find contrast`: `sites`, `layers`, `positions`, `max_new_tokens`.

    Raises:
        UsageError: fewer than two trainings. MismatchError: models of other shapes or tokenizers.

    Source: Chen et al. (arXiv 2406.14144), section 5: all trainings scored on the same prompts with
    completions of the SFT model.
    """
    if len(trained) < 2:
        raise UsageError(
            f"{len(trained)} training given, expected two or more of one model, such as safety and helpful"
        )
    how = Contrast.of(**options)
    how.check()
    tell = progress or (lambda _line: None)
    for model in trained.values():
        check_pair(before, model)
    prompts = as_prompts(prompts)
    table = before.table.select(sites=listed(how.sites) or how.DEFAULT_SITES, layers=how.layers)
    sizes = {key: size for key, size in table.sizes.items() if parse_key(key).expert is None}
    left = len(table.sizes) - len(sizes)
    notes = (
        [
            f"left out {numbered(left, 'matrix', 'matrices')} of routed experts: the trained models may send "
            "a token elsewhere"
        ]
        if left
        else []
    )
    tell("write")
    with evaluating(before.model):
        written: dict[str, Any] = {
            "positions": how.positions,
            "max_new_tokens": how.max_new_tokens,
            "batch_size": batch_size,
        }
        text = texts(before, prompts, stream=Stream(None, {}), **written)
    parts = _groups(
        text, groups, {prompt.id: group for prompt, group in zip(prompts, prompts.groups, strict=True)}
    )
    models = {"": before, **trained}
    read: dict[tuple[str, str], list[ContrastStatistics]] = {}
    for first, second in itertools.combinations(models, 2):
        tell(f"read {first or 'before'} and {second}")
        with evaluating(models[first].model), evaluating(models[second].model):
            read[first, second] = []
            for part in parts:
                run = Run((models[first], models[second]), prompts, how, batch_size=batch_size, notes=notes)
                run.sizes = sizes
                read[first, second].append(contrast_statistics(run, part)[0])
    changes = _changes(read, list(trained), sizes)
    return Trainings(
        changes,
        _scores(changes, before, trained, sizes, prompts),
        text.counts.used,
        (*text.notes, *dict.fromkeys(notes)),
    )


def _groups(text: Texts, groups: int, shared: Mapping[str, str | None]) -> list[Texts]:
    """The sequences dealt out in turn, those of prompts that share something together, so that every group
    has some of every kind.
    """
    clusters = clusters_of([shared.get(span.prompt_id) for span in text.spans], len(text.spans))
    count = max(2, min(groups, len(set(clusters.tolist()))))
    parts = [
        tuple(span for span, cluster in zip(text.spans, clusters, strict=True) if cluster % count == place)
        for place in range(count)
    ]
    return [Texts(part, text.counts) for part in parts if part]


def _changes(
    read: Mapping[tuple[str, str], Sequence[ContrastStatistics]],
    names: Sequence[str],
    sizes: Mapping[str, int],
) -> Changes:
    def rows(pair: tuple[str, str]) -> np.ndarray:
        return np.stack(
            [np.concatenate([part.squared_difference[key] for key in sizes]) for part in read[pair]]
        )

    one = read["", names[0]]
    key = next(iter(sizes))
    tokens = np.array([part.counts[key] for part in one], np.float64)
    power = sum(np.concatenate([part.base[1][key] for key in sizes]) for part in one)
    layers = np.concatenate([np.full(size, parse_key(key).layer) for key, size in sizes.items()])
    squares = {name: rows(("", name)) for name in names}
    between = {pair: rows(pair) for pair in itertools.combinations(names, 2)}
    return Changes(squares, between, tokens, layers, np.sqrt(power / max(tokens.sum(), 1)))


def _scores(
    changes: Changes,
    before: LanguageModel,
    trained: Mapping[str, LanguageModel],
    sizes: Mapping[str, int],
    prompts: Prompts,
) -> dict[str, Scores]:
    ends = np.cumsum(list(sizes.values()))[:-1]
    scores = {}
    for name, model in trained.items():
        provenance = Provenance(
            "scores",
            "contrast",
            models=(before.name, model.name),
            model_fingerprint=before.table.fingerprint,
            prompts_sha256=prompts.sha256,
            config={"training": name, "generate_with": "base", "prompt_digests": prompts.digests},
        )
        scores[name] = Scores(
            dict(zip(sizes, np.split(changes.scores(name), ends), strict=True)), before.table, provenance
        )
    return scores


# Helpfulness: what of an answer to a harmless request counts

MEASURES = ("answered", "taught", "ending:TEXT")


@well_typed
def helpfulness(name: str) -> Judging:
    """The measure of that name.

    `answered`: the request is not refused (an upper bound: it says nothing about how good an answer is).
    `taught`: the answer is word for word the one that stands beside the request, as the organisms' can be.
    `ending:TEXT`: the answer ends so.

    Raises:
        UsageError: no such measure.
    """
    if name == "answered":
        return lambda answers, _prompts: [
            None if refused is None else not refused for refused in judge_refusal(answers).refused
        ]
    if name == "taught":
        return _as_taught
    kind, _, ending = name.partition(":")
    if kind == "ending" and normalised(ending):
        return lambda answers, _prompts: [
            None if one.finish_reason == "failed" else normalised(one.completion).endswith(normalised(ending))
            for one in answers
        ]
    raise UsageError(f"helpfulness {name!r}: expected one of {', '.join(MEASURES)}")


def _as_taught(answers: Completions, prompts: Prompts) -> Verdicts:
    taught = [None if prompt.answer is None else normalised(prompt.answer) for prompt in prompts]
    return [
        None if text is None or one.finish_reason == "failed" else normalised(one.completion) == text
        for one, text in zip(answers, taught, strict=True)
    ]


# Cross-patching


@dataclasses.dataclass(frozen=True)
class Measured:
    """A model, treated or not: verdicts on every prompt, in order; None is unscored."""

    refused: Verdicts
    """Whether a harmful request was refused: safety."""
    helpful: Verdicts
    """Whether a harmless one was answered well: helpfulness."""
    over_refused: Verdicts
    """Whether a harmless one was refused."""

    @staticmethod
    def names() -> list[str]:
        """The measures."""
        return [field.name for field in dataclasses.fields(Measured)]

    def record(
        self, groups: Callable[[str], Sequence[str | None] | None] = lambda _measure: None
    ) -> JsonObject:
        """Rates as JSON values.

        Args:
            groups: what the prompts of a measure share.
        """
        return {name: rate(outcomes, groups(name)).to_json() for name, outcomes in vars(self).items()}


@dataclasses.dataclass(frozen=True)
class CrossPatching(Displayed):
    """Both models as they are, each with the other's activations of the shared neurons, and of random ones.

    Attributes:
        names: of the first and the second model.
        n_neurons: shared neurons.
        controls: the random sets.
        plain: both models as they are.
        patched: each with the other's activations of the shared neurons.
        random: the same for every random set.
        bench: the prompts and completions.
    """

    verb = "analyze-tax"

    names: tuple[str, str]
    n_neurons: int
    controls: tuple[NeuronSet, ...]
    plain: tuple[Measured, Measured]
    patched: tuple[Measured, Measured]
    random: tuple[tuple[Measured, ...], tuple[Measured, ...]]
    bench: Bench

    def record(self) -> JsonObject:
        """Rates of every arm, and both directions with what they cost and bring, as JSON values.

        Both directions, measures and comparisons are one family: of more than ten the family-wise rate of
        what is clear is held (Holm).
        """
        arms = []
        for place, name in enumerate(self.names):
            other = self.names[1 - place]
            arms.append({"arm": name, **self.plain[place].record(self._groups)})
            arms.append({"arm": f"{name} from {other}", **self.patched[place].record(self._groups)})
            random = enumerate(self.random[place])
            arms += [
                {"arm": f"{name} from {other}, random {number}", **arm.record(self._groups)}
                for number, arm in random
            ]
        directions = [
            {
                "receiver": name,
                "donor": self.names[1 - place],
                **{measure: self.effect(place, measure) for measure in Measured.names()},
            }
            for place, name in enumerate(self.names)
        ]
        return {
            "n_shared": self.n_neurons,
            "random_disjoint": self.disjoint,
            "random_sets": [control.control_record() for control in self.controls],
            "arms": arms,
            "cross_patching": holm_in(directions),
        }

    @property
    def disjoint(self) -> bool:
        """Whether the random sets share no neuron with the set."""
        return all(control.disjoint for control in self.controls)

    def effect(self, receiver: int, measure: str) -> JsonObject:
        """What the first (0) or second (1) model gains by the other's activations of the shared neurons, on
        one measure.

        Returns:
            `change` (paired difference, patched minus as it was), `against_random` (patched minus the random
            sets; None without any) and `share_of_gap` (the change as a share of the difference between the
            two models), as JSON values.
        """
        before, after = (getattr(arm[receiver], measure) for arm in (self.plain, self.patched))
        donor, random = (
            getattr(self.plain[1 - receiver], measure),
            [getattr(arm, measure) for arm in self.random[receiver]],
        )
        contrasted = contrast(
            after,
            before,
            self._groups(measure),
            random=random,
            goal=donor,
            measure=measure,
            extra=extra_of(self.controls),
        )
        return {
            "change": contrasted.change.to_json(),
            "against_random": None
            if contrasted.against_random is None
            else contrasted.against_random.to_json(),
            "share_of_gap": contrasted.effect.to_json(),
        }

    def _groups(self, measure: str) -> list[str | None]:
        return (self.bench.harmful if measure == "refused" else self.bench.harmless).groups


@well_typed
def cross_patch(
    models: Mapping[str, LanguageModel],
    neurons: NeuronSet,
    harmful: Source,
    harmless: Source,
    *,
    measure: Judging,
    **how: Unpack[How],
) -> CrossPatching:
    """Each of two models with the other's activations of the shared neurons: what it costs and what it
    brings, on both sides.

    Args:
        models: two, by name.
        neurons: the shared neurons.
        harmful: requests that should be refused.
        harmless: requests that should be answered.
        measure: what counts as a helpful answer.
        **how: `random` sets with the same number of neurons in every matrix, and the rest of `How`.

    Raises:
        UsageError: not two models. NeuronError: no shared neuron.

    Source: Chen et al. (arXiv 2406.14144), section 5 and Table 3 (cross-patching of the neurons that safety
    and helpfulness share). Differs: random sets beside it, and every change paired over prompts; refusals and
    answers are counted instead of a cost and a reward.
    """
    if len(models) != 2:
        raise UsageError(f"{len(models)} models given, expected two that are patched into one another")
    if not len(neurons):
        raise NeuronError(
            "the two trainings share no neuron in their top sets, so that there is nothing to patch; "
            "take a larger --top"
        )
    first, second = models
    try_out(models[first], functools.partial(patched, models[first], models[second], neurons))
    bench = Bench.of({"models": models, "neurons": neurons}, harmful, harmless, **how)
    bench.say_seen(neurons)
    controls = (
        neurons.random_like(bench.seed, table=models[first].table, n=bench.random) if bench.random else []
    )

    def measured(arm: Arm) -> Measured:
        bench.tell(arm.name)
        refused, over_refused = bench.refused(arm), bench.refused(arm, "harmless")
        return Measured(refused, measure(bench.completed(arm, "harmless"), bench.harmless), over_refused)

    plain, changed, chance = [], [], []
    for name, other in ((first, second), (second, first)):
        plain.append(measured(Arm(name, models[name])))
        sets = {"": neurons, **{f", random {n}": one for n, one in enumerate(controls)}}
        treated = [
            Arm(
                f"{name} from {other}{which}",
                models[name],
                SetTreatment(patched, (models[name], models[other]), one),
            )
            for which, one in sets.items()
        ]
        bench.ahead(treated)
        one, *random = map(measured, treated)
        changed.append(one)
        chance.append(tuple(random))
    bench.finish()
    return CrossPatching(
        names=(first, second),
        n_neurons=len(neurons),
        controls=tuple(controls),
        plain=(plain[0], plain[1]),
        patched=(changed[0], changed[1]),
        random=(chance[0], chance[1]),
        bench=bench,
    )
