"""Lasting safety: does safety that was tuned into neurons outlive fine-tuning, and how easily is it cut out
again?

`rsn`, SN-Tune against RSN-Tune, random neurons and no tuning:

1. Safety neurons are the most important ones on harmful requests, foundation neurons those on general text;
    RSN leaves the latter out.
2. For every seed and arm a copy of the model is tuned to refuse (or not), and measured.
3. The copy is fine-tuned on the task, all weights or a LoRA, and measured again; one arm does so with its
    neurons protected.
4. Numbers are means over seeds and prompts, with the worst seed; differences between arms are paired over
    seeds and prompts.

`stress` (attacks.py) and `defences` are measured in the same lab.
"""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict

import numpy as np
import torch

from safety_neurons.arguments import well_typed
from safety_neurons.capability import perplexity
from safety_neurons.counting import numbered
from safety_neurons.detectors import find_attribution, find_importance
from safety_neurons.errors import InputError, NeuronError, UsageError
from safety_neurons.judges import judge_refusal
from safety_neurons.judges.wording import judge_compliance
from safety_neurons.model import LanguageModel
from safety_neurons.model.batches import descend, padded
from safety_neurons.neurons import NeuronSet, Scores
from safety_neurons.prompt_lists import Prompts, as_prompts
from safety_neurons.prompt_lists.readers import Source
from safety_neurons.results import Completions, Difference, difference_over_seeds, holm, rate_over_seeds
from safety_neurons.results.estimates import GroupLabels
from safety_neurons.results.run import Cache, Checkpoint
from safety_neurons.strict_json import JsonObject
from safety_neurons.studies.bench import Arm, Bench, Progress, Verdicts, content_of, hold_answers
from safety_neurons.studies.lengths import answer_length, cut_off, too_long
from safety_neurons.studies.tuning import tuning_over_seeds
from safety_neurons.tuning import Tuned, apply_delta, protected
from safety_neurons.tuning import tune as train
from safety_neurons.tuning.artefacts import check_plain
from safety_neurons.tuning.data import Example, tuning_examples

NONE, SN, RSN, RANDOM, KEPT = "none", "SN-Tune", "RSN-Tune", "random", "SN-Tune, protected"
MADE_SAFE = (SN, RSN, KEPT)
"""Arms whose tuning is to make the model safer."""
ARMS = (NONE, SN, RSN, RANDOM, KEPT)
JUDGES = ("compliance", "refusal")
"""`compliance`: the templated rule.

`refusal`: whatever does not refuse goes along, an upper bound for models without templates.
"""
Downstream = Literal["full", "lora"]
RANK = 16
"""Of the LoRA, on all linear layers."""


@dataclasses.dataclass(frozen=True)
class Sets:
    """The neurons of the arms.

    Attributes:
        safety: what SN-Tune trains.
        foundation: what RSN-Tune leaves out.
        robust: what RSN-Tune trains.
        shared: safety neurons that are foundation neurons too.
        scores: of safety, in the order of which neurons are taken.
    """

    safety: NeuronSet
    foundation: NeuronSet
    robust: NeuronSet
    shared: int
    scores: Scores | None = None

    def record(self) -> JsonObject:
        """Counts and shares as JSON values."""
        kinds = {"safety": self.safety, "foundation": self.foundation, "robust": self.robust}
        sizes = {
            name: {
                "n_neurons": len(members),
                "share_of_parameters": members.share_of_parameters,
                "matrices": members.counts(),
            }
            for name, members in kinds.items()
        }
        return {**sizes, "shared": self.shared, "shared_share": self.shared / len(self.safety)}


@well_typed
def find_sets(
    model: LanguageModel,
    harmful: Source,
    general: Source,
    *,
    share: float = 0.0099,
    foundation: float = 0.1,
    method: str = "importance",
    fill: bool = True,
) -> Sets:
    """Safety neurons, foundation neurons, and safety neurons that are no foundation neurons.

    Args:
        model: the model to be tuned.
        harmful: requests.
        general: text of everyday kind.
        share: of all parameters that a tuned set holds at most.
        foundation: share of all neurons that count as foundation neurons, the most important ones on general
            text.
        method: `importance` or `attribution`, for the safety neurons.
        fill: take further safety neurons in place of those left out, so that both sets are of one size.

    Raises:
        UsageError: an unknown method. NeuronError: nothing is left.

    Source: Zhao et al., ICLR 2025, sections 2.2 and 4.3. Differs: sets are the highest scores up to a share
    of the parameters; RSN is filled up to the same size, so that a difference between the arms is not one of
    size.
    """
    harmful, general = as_prompts(harmful), as_prompts(general)
    finders: Mapping[str, Callable[..., Any]] = {
        "importance": find_importance,
        "attribution": find_attribution,
    }
    if method not in finders:
        raise UsageError(f"method {method!r}: expected one of {', '.join(finders)}")
    if not 0 < share < 1 or not 0 <= foundation < 1:
        raise UsageError(f"share {share} and foundation {foundation}: expected shares between 0 and 1")
    scores = finders[method](model, harmful, count=1).scores
    basis = (
        find_importance(model, general, top=foundation).neurons if foundation else NeuronSet({}, model.table)
    )
    return sets_from(scores, basis, share, fill=fill)


def sets_from(scores: Scores, basis: NeuronSet, share: float, *, fill: bool = True) -> Sets:
    """The sets from scores and foundation neurons; arguments as for `find_sets`."""
    safety = within(scores, share)
    plain = safety - basis
    robust = within(scores, share, without=basis) if fill else plain
    if not len(safety) or not len(robust):
        raise NeuronError(
            f"{len(safety)} safety neurons, {len(robust)} after taking out {len(basis)} foundation "
            "neurons: expected some of each; take a larger share or fewer foundation neurons"
        )
    return Sets(safety, basis, robust, len(safety) - len(plain), scores)


def check_left(arms: Sequence[str], robust: NeuronSet, sets: Sets) -> None:
    """Refuses RSN-Tune before anything is trained where it has nothing to train."""
    if RSN in arms and not len(robust):
        raise NeuronError(
            f"0 of {len(sets.safety)} safety neurons are left for {RSN} after taking out "
            f"{len(sets.foundation)} foundation neurons, some were expected; take a larger share, fewer "
            "foundation neurons, or leave it out"
        )


def within(scores: Scores, share: float, without: NeuronSet | None = None) -> NeuronSet:
    """The neurons with the highest scores that hold at most this share of all parameters, those of another
    set left out.
    """
    low, high = 0, sum(len(values) for _, values in scores.items())
    chosen = NeuronSet({}, scores.table)
    while low < high:
        middle = (low + high + 1) // 2
        members = scores.count(middle)
        members = members if without is None else members - without
        if members.share_of_parameters <= share:
            low, chosen = middle, members
        else:
            high = middle - 1
    return chosen


@dataclasses.dataclass(frozen=True)
class Point:
    """What one model does: verdicts on every prompt, in order; None is unscored."""

    harmful: Verdicts
    """Whether a harmful request was complied with."""
    harmless: Verdicts
    """Whether a harmless one was."""
    task: Verdicts
    """Whether the task was solved."""
    perplexity: float | None
    refused: Verdicts = ()
    """Whether a harmful request was refused."""
    harmed: Verdicts = ()
    """Whether its answer does harm, by the judge of harm."""
    cut_off: int = 0
    """Answers of every kind that were cut at the limit of tokens."""


@dataclasses.dataclass
class Lab(Bench):
    """A bench on which models are measured that go along, by a named rule, once for every seed they are
    trained with.
    """

    judge: str = "refusal"

    def __post_init__(self) -> None:
        if self.judge not in JUDGES:
            raise UsageError(f"judge {self.judge!r}: expected one of {', '.join(JUDGES)}")
        self.task = questions_of(self.task)
        super().__post_init__()

    @property
    def shared(self) -> dict[str, GroupLabels]:
        """What the prompts of every kind share with one another."""
        return {kind: getattr(self, kind).groups for kind in ("harmful", "harmless", "task")}

    def point(self, arm: Arm, seed: int, *, harmful_alone: bool = False) -> Point:
        """Answers to everything, judged; or to the harmful requests alone."""
        text, notes = None, list[str]()
        if self.text is not None:
            text = perplexity(arm.model, self.text, arm.treatment, batch_size=self.batch_size, notes=notes)
        self.say_of(arm, notes)
        answers = self.answered(arm, seed)
        others = [Completions()] * 2
        if not harmful_alone:
            others = [self.completed(arm, kind, seed) for kind in ("harmless", "task")]
        harmless, task = others
        return Point(
            complied(answers.completions, self.judge),
            complied(harmless, self.judge),
            solved(task, self.task),
            text,
            answers.refused,
            answers.complied,
            cut_off([*answers.completions, *harmless, *task]),
        )

    def solved(self, arm: Arm, seed: int) -> Verdicts:
        """Whether each question of the task is answered as it should be."""
        return solved(self.completed(arm, "task", seed), self.task)


def complied(answers: Completions, judge: str) -> list[bool | None]:
    """Whether each answer goes along with its request, by the named rule."""
    if judge == "compliance":
        return list(judge_compliance(answers).complied)
    return [None if refused is None else not refused for refused in judge_refusal(answers).refused]


class Learning(TypedDict):
    """How a downstream task is learnt."""

    how: Downstream
    steps: int
    learning_rate: float
    batch_size: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Downstream the arms are trained.

    Attributes:
        refusals: harmful requests with refusals.
        harmless: harmless requests mixed in, with answers.
        task: the downstream task, with answers.
        arms: some of `ARMS`.
        seeds: one tuning and one fine-tuning each.
        tuning: further arguments of `tune`.
        how: full or lora.
        steps, learning_rate, batch_size: of the downstream fine-tuning.
    """

    refusals: Prompts
    harmless: Prompts | None
    task: Prompts
    arms: Sequence[str] = ARMS
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    tuning: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    how: Downstream = "full"
    steps: int = 100
    learning_rate: float = 1e-3
    batch_size: int = 16

    def __post_init__(self) -> None:
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown or not self.arms or not self.seeds:
            raise UsageError(
                f"arms {list(self.arms)}, seeds {list(self.seeds)}: expected some of {', '.join(ARMS)}, "
                "and at least one seed"
            )

    @property
    def downstream(self) -> Learning:
        """How the task is learnt."""
        return {
            "how": self.how,
            "steps": self.steps,
            "learning_rate": self.learning_rate,
            "batch_size": self.batch_size,
        }


@well_typed
def cut_short(model: LanguageModel, plan: Plan, lab: Lab) -> list[str]:
    """Notes on examples and requests of which the model learns or reads a part only.

    They are read for it once more: what a study has to say must not depend on what an earlier start of it
    has finished.
    """
    notes: list[str] = []
    for learnt in (plan.refusals, plan.harmless, plan.task):
        if learnt is not None and any(prompt.answer for prompt in learnt):
            tuning_examples(learnt, model, notes=notes)
    asked = {kind: getattr(lab, kind) for kind in ("harmful", "harmless", "task")}
    return [*notes, *too_long(model, asked, lab.max_new_tokens or answer_length(model))]


@well_typed
def rsn(
    model: LanguageModel,
    sets: Sets,
    plan: Plan,
    lab: Lab,
    *,
    cache: Cache | None = None,
    tell: Progress | None = None,
) -> JsonObject:
    """Tune, fine-tune, measure: every arm with every seed.

    Args:
        model: without adapters; it comes back untouched, its copies need as much memory again (twice that,
            gradients and optimizer for full fine-tuning).
        sets: from `find_sets` or `sets_from`.
        plan: how arms are trained.
        lab: what is measured.
        cache: keeps every finished seed of every arm; a killed study goes on from there.
        tell: told the name of every step.

    Returns:
        The result as JSON values: `arms` (before and after the downstream fine-tune), `differences` of
        harmful scores after it.

    Raises:
        NeuronError: nothing is left for RSN-Tune.

    Source: Zhao et al., ICLR 2025, section 4.3 and Table 4. Differs: random neurons, no tuning and protection
    beside it; five seeds with intervals; task accuracy beside safety.
    """
    check_left(plan.arms, sets.robust, sets)
    facts = facts_of(lab, model=model, sets=sets, plan=plan)
    cache, done = cache or Cache(), dict[str, Any]()

    def work(arm: str, tunings: SeedTunings) -> dict[str, Any]:
        seed = tunings.seed
        (tell or (lambda _line: None))(f"{arm}/{seed}")
        found = _one(tunings, _members(sets, arm, seed), lab, arm, _known(done, arm, seed))
        lab.finish()  # What is kept of an arm is kept with its verdicts.
        return found

    for seed in plan.seeds:
        tunings = SeedTunings(model, plan, seed, cache, facts)
        for arm in plan.arms:
            name = f"{arm}/{seed}"
            done[name] = cache.cached(SeedOf("rsn", name, facts), functools.partial(work, arm, tunings))
        tunings.finish()
    return summary(done, plan, sets, lab.shared)


@dataclasses.dataclass(frozen=True)
class SeedOf:
    """What decides one seed of one arm, by content."""

    study: str
    name: str
    facts: Any


def facts_of(lab: Lab, **facts: Any) -> Any:
    """All that a seed depends on, by content; completions are gone on with only where it is the same."""
    hold_answers(lab.completions_file, **facts, lab=lab)
    return content_of({**facts, "lab": lab})


def _known(done: Mapping[str, Any], arm: str, seed: int) -> Point | None:
    """What is known already of an arm before the task: the untuned model is one for all seeds, the protected
    arm is SN-Tune until then.
    """
    if arm == NONE:
        names = [name for name in done if name.startswith(f"{NONE}/")]
    else:
        names = [f"{SN}/{seed}"] if arm == KEPT and f"{SN}/{seed}" in done else []
    return Point(**done[names[0]]["before"]) if names else None


def _members(sets: Sets, arm: str, seed: int) -> NeuronSet | None:
    if arm == RANDOM:
        return sets.safety.random_like(seed)[0]
    return {NONE: None, SN: sets.safety, RSN: sets.robust, KEPT: sets.safety}[arm]


@dataclasses.dataclass
class SeedTunings:
    """What is tuned with one seed, every kind once; a killed study goes on where its training was.

    Attributes:
        model: is left untouched.
        plan: how it is tuned.
        seed: of the tuning.
        cache: says where the state of a training is kept, from its first check until `finish`.
        facts: all that the study depends on, by content.
    """

    model: LanguageModel
    plan: Plan
    seed: int
    cache: Cache = dataclasses.field(default_factory=Cache)
    facts: Any = None
    _done: dict[str, Tuned] = dataclasses.field(default_factory=dict)

    def twin(self, kind: str, members: NeuronSet | None) -> tuple[LanguageModel, Tuned | None]:
        """A copy of the model with a set tuned into its weights; the kind tells the sets apart."""
        other = twin(self.model)
        if members is None:
            return other, None
        if kind not in self._done:
            self._done[kind] = train(
                self.model,
                members,
                self.plan.refusals,
                harmless=self.plan.harmless,
                checkpoint=self._state(kind),
                seed=self.seed,
                **dict(self.plan.tuning),
            )
        apply_delta(other, self._done[kind].delta)
        return other, self._done[kind]

    def finish(self) -> None:
        """Removes what was kept of them: nothing needs them any more."""
        for state in map(self._state, self._done):
            if state is not None:
                state.delete()

    def _state(self, kind: str) -> Checkpoint | None:
        if self.cache.place is None:
            return None
        key = dataclasses.asdict(SeedOf("tuning", f"{kind}/{self.seed}", self.facts))
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return Checkpoint(self.cache.place(f"checkpoints/{name}.safetensors"))


def _one(
    tunings: SeedTunings, members: NeuronSet | None, lab: Lab, arm: str, known: Point | None
) -> dict[str, Any]:
    """One arm with one seed: tune, measure, fine-tune on the task, measure."""
    plan, seed = tunings.plan, tunings.seed
    other, tuned = tunings.twin(SN if arm == KEPT else arm, members)
    before = known or lab.point(Arm(f"{arm}/before", other), seed)
    losses, after = [0.0], before
    if plan.steps:
        with protected(other, members) if arm == KEPT and members is not None else contextlib.nullcontext():
            losses = fine_tune(other, plan.task, seed=seed, **plan.downstream)
        after = lab.point(Arm(f"{arm}/after", other), seed)
    return {
        "before": dataclasses.asdict(before),
        "after": dataclasses.asdict(after),
        "loss": losses[-1],
        "frozen_unchanged": tuned.frozen_unchanged if tuned else None,
        "trained_parameters": tuned.delta.n_parameters if tuned else 0,
        "steps": tuned.steps if tuned else 0,
    }


def summary(
    done: Mapping[str, Any],
    plan: Plan,
    sets: Sets,
    shared: Mapping[str, GroupLabels] = types.MappingProxyType({}),
) -> JsonObject:
    """What the seeds say together; `shared` is what the prompts of a kind share."""

    def column(arm: str, when: str, kind: str) -> list[Any]:
        return [done[f"{arm}/{seed}"][when][kind] for seed in plan.seeds]

    arms = []
    for arm in plan.arms:
        row: dict[str, Any] = {"arm": arm}
        for when in ("before", "after"):
            row[when] = measured([done[f"{arm}/{seed}"][when] for seed in plan.seeds], shared)
        row["trained_parameters"] = done[f"{arm}/{plan.seeds[0]}"]["trained_parameters"]
        row["tuning_steps"] = done[f"{arm}/{plan.seeds[0]}"]["steps"]
        arms.append(row)
    untuned = next((row["before"]["harmful"] for row in arms if row["arm"] == NONE), None)
    for row in arms:
        row["tuning"] = (
            tuning_over_seeds(untuned, row["before"]["harmful"]).record()
            if untuned and row["arm"] in MADE_SAFE
            else None
        )
    compared: dict[tuple[str, str], Difference] = {}
    for first, second in ((SN, NONE), (SN, RANDOM), (RSN, SN), (RSN, RANDOM), (KEPT, SN)):
        if first not in plan.arms or second not in plan.arms:
            continue
        for name, (when, kind) in COMPARED.items():
            ours, theirs = column(first, when, kind), column(second, when, kind)
            if ours[0]:
                labels = shared.get(MEASURES[kind])
                compared[f"{first} - {second}", name] = difference_over_seeds(ours, theirs, labels)
    differences: dict[str, dict[str, Any]] = {}
    for (pair, name), difference in zip(compared, holm(list(compared.values())), strict=True):
        differences.setdefault(pair, dict.fromkeys(COMPARED))[name] = difference.to_json()
    return {
        "study": "rsn",
        "seeds": list(plan.seeds),
        "downstream": plan.downstream,
        "tuning": {
            **plan.tuning,
            "refusals": len(plan.refusals),
            "harmless": len(plan.harmless) if plan.harmless is not None else 0,
        },
        "sets": sets.record(),
        "arms": arms,
        "differences": differences,
    }


MEASURES = {
    "harmful": "harmful",
    "refused": "harmful",
    "harmed": "harmful",
    "harmless": "harmless",
    "task": "task",
}
"""What is counted at a point, and on which prompts."""
COMPARED = {
    "before": ("before", "harmful"),
    "after": ("after", "harmful"),
    "task_after": ("after", "task"),
    "harm_before": ("before", "harmed"),
    "harm_after": ("after", "harmed"),
}
"""By name of a difference when it is measured, and what."""


def measured(points: Sequence[Mapping[str, Any]], shared: Mapping[str, GroupLabels]) -> JsonObject:
    """The points of several seeds as rates over seeds and prompts, None where nothing was counted; and how
    many answers of all seeds were cut off.
    """
    rates = {}
    for name, prompts in MEASURES.items():
        column = [point.get(name, ()) for point in points]
        rates[name] = rate_over_seeds(column, shared.get(prompts)).to_json() if len(column[0]) else None
    cut = [
        point["cut_off"] for point in points if "cut_off" in point
    ]  # Seeds of an earlier version do not say.
    return {
        **rates,
        "perplexity": mean_of([point["perplexity"] for point in points]),
        "cut_off": sum(cut) if len(cut) == len(points) else None,
    }


def mean_of(values: Sequence[float | None]) -> JsonObject:
    """Mean, lowest and highest of one number a seed."""
    known = [value for value in values if value is not None]
    mean = sum(known) / len(known) if known else None
    return {
        "value": mean,
        "lowest": min(known, default=None),
        "highest": max(known, default=None),
        "by_seed": list(values),
    }


# Fine-tuning on a task the way anyone would, full or LoRA, on a copy of the model; and how well the task is
# done


def twin(model: LanguageModel) -> LanguageModel:
    """A copy of a model without adapters, with weights of its own that may be trained.

    Raises:
        UsageError: adapters or deltas are on it.
    """
    check_plain(model)
    other = copy.copy(model)
    other.__dict__.pop("anatomy", None)
    other.model = copy.deepcopy(model.model)
    return other


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """How a model is fine-tuned downstream."""

    how: Downstream = "full"
    """All weights, or a LoRA of rank 16 on all linear layers."""
    steps: int = 100
    """Optimizer steps."""
    learning_rate: float = 1e-3
    """At the top of the schedule."""
    batch_size: int = 16
    """Examples a step."""
    seed: int = 0
    """Of the order of examples and of the LoRA's first factor."""
    frozen: Sequence[int] = ()
    """Numbers of layers whose parameters stay as they are, a LoRA's included."""

    def rate(self, highest: float, step: int) -> float:
        """The learning rate of a step: a short warm-up, then a straight decay."""
        return highest * min((step + 1) / max(1, self.steps // 10), 1 - 0.9 * step / max(1, self.steps))


def fine_tune(
    model: LanguageModel,
    prompts: Prompts,
    *,
    at: Sequence[int] = (),
    look: Callable[[int], None] | None = None,
    **options: Any,
) -> list[float]:
    """Fine-tune a model in place with a plain AdamW loop: loss on the answers, short warm-up, straight decay,
    clipping at 1.

    Args:
        model: is changed; a LoRA is merged into it at the end, and for every look.
        prompts: with answers.
        at: steps after which `look` is called.
        look: gets the step.
        **options: the fields of `FineTuning`.

    Returns:
        The loss of every step.

    Raises:
        UsageError: an unknown way. InputError: no answers. NumericalError: the loss is not a number.
    """
    how = FineTuning(**options)
    if how.how not in ("full", "lora"):
        raise UsageError(f"downstream {how.how!r}: expected full or lora")
    examples = tuning_examples(prompts, model, kind="harmless")
    plain = model.model
    layers = [layer.module for layer in model.anatomy.layers]
    if how.how == "lora":
        model.model = _with_lora(plain, how.seed)
    else:
        plain.requires_grad_(True)
    for number in how.frozen:
        layers[number].requires_grad_(False)
    parameters = [parameter for parameter in model.model.parameters() if parameter.requires_grad]
    order = _order(len(examples), how.steps * how.batch_size, how.seed)

    def backward(step: int) -> float:
        return _backward(
            model, [examples[index] for index in order[step * how.batch_size : (step + 1) * how.batch_size]]
        )

    losses = []
    try:
        optimizer = torch.optim.AdamW(parameters, lr=how.learning_rate, weight_decay=0.0)
        subject = " of the downstream fine-tuning"
        for descended in descend(
            optimizer, backward, how.rate, range(how.steps), subject=lambda _step: subject
        ):
            losses.append(descended.loss)
            if look is not None and len(losses) in at:
                look(len(losses))
    finally:
        if how.how == "lora":
            model.model = model.model.merge_and_unload()
        model.__dict__.pop("anatomy", None)
        model.model.requires_grad_(False)
    return losses


def _backward(model: LanguageModel, examples: Sequence[Example]) -> float:
    """Gradients of the mean loss over the answers' tokens; the loss."""
    ids, labels = padded([(example.ids, example.start) for example in examples], model.pad_id)
    lengths = torch.tensor([len(example.ids) for example in examples])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    loss = model.model(
        **{name: value.to(model.device) for name, value in inputs.items()}, use_cache=False
    ).loss
    loss.backward()
    return float(loss.detach())


def _with_lora(model: Any, seed: int) -> Any:
    import warnings

    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config)


def _order(examples: int, wanted: int, seed: int) -> list[int]:
    generator = np.random.default_rng([seed, 3])
    rounds = [generator.permutation(examples) for _ in range(-(-wanted // examples))]
    return [int(index) for index in np.concatenate(rounds)[:wanted]]


def questions_of(source: Source) -> Prompts:
    """Questions of a task.

    Raises:
        InputError: one without an answer, by which it could be solved.
    """
    questions = as_prompts(source)
    without = sum(not prompt.answer for prompt in questions)
    if without:
        raise InputError(
            f"{without} of {numbered(len(questions), 'question')} of {questions.name} without an answer; "
            "expected one each, in a column such as answer"
        )
    return questions


def solved(completions: Completions, prompts: Prompts) -> list[bool | None]:
    """Whether each completion gives its prompt's answer.

    None where the model gave NaN and there is none. The same words, whatever their case, spaces and full
    stops; where the answer has a `####` mark, as in
    GSM8K, the same last number.
    """
    answers = {prompt.id: prompt.answer for prompt in prompts}
    return [
        None
        if completion.finish_reason == "failed"
        else _solves(completion.completion, answers[completion.prompt_id] or "")
        for completion in completions
    ]


def _solves(text: str, answer: str) -> bool:
    if "####" in answer:
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
        wanted = answer.rpartition("####")[2].strip().replace(",", "")
        return bool(numbers) and numbers[-1].replace(",", "").rstrip(".") == wanted
    return _plain(text) == _plain(answer)


def _plain(text: str) -> str:
    return " ".join(text.casefold().replace(".", " ").split())
