"""rsn: does safety that was tuned into neurons outlive a downstream fine-tune? SN-Tune against RSN-Tune, random neurons and no tuning.

1. Safety neurons are the most important ones on harmful requests, foundation neurons those on general text; RSN leaves the latter out.
2. For every seed and arm a copy of the model is tuned to refuse (or not), and measured.
3. The copy is fine-tuned on the task, all weights or a LoRA, and measured again; one arm does so with its neurons protected.
4. Numbers are means over seeds and prompts, with the worst seed; differences between arms are paired over seeds and prompts.
"""

import dataclasses
import pathlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safety_neurons.capability import perplexity
from safety_neurons.detectors import find_attribution, find_importance
from safety_neurons.errors import NeuronError, UsageError
from safety_neurons.judges import judge_refusal
from safety_neurons.judges.strings import judge_compliance
from safety_neurons.model import LanguageModel
from safety_neurons.neurons import NeuronSet, Scores
from safety_neurons.prompts import Prompts, as_prompts
from safety_neurons.prompts.readers import Source
from safety_neurons.results import Completions, Difference, difference_over_seeds, holm, rate_over_seeds
from safety_neurons.results.estimates import GroupLabels
from safety_neurons.results.files import read_json, write_json
from safety_neurons.studies.achieving import tuning_over_seeds
from safety_neurons.studies.downstream import How, fine_tune, solved, twin
from safety_neurons.studies.kept import hold_answers
from safety_neurons.tuning import Tuned, apply_delta, protected
from safety_neurons.tuning import tune as train

NONE, SN, RSN, RANDOM, KEPT = "none", "SN-Tune", "RSN-Tune", "random", "SN-Tune, protected"
MADE_SAFE = (SN, RSN, KEPT)
"""Arms whose tuning is to make the model safer."""
ARMS = (NONE, SN, RSN, RANDOM, KEPT)
JUDGES = ("compliance", "refusal")
"""`compliance`: the templated rule. `refusal`: whatever does not refuse goes along, an upper bound for models without templates."""
Tell = Callable[[str], None]


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

    def record(self) -> dict[str, Any]:
        """Counts and shares as JSON values."""
        kinds = {"safety": self.safety, "foundation": self.foundation, "robust": self.robust}
        sizes = {
            name: {"n_neurons": len(members), "share_of_parameters": members.share_of_parameters, "matrices": members.counts()}
            for name, members in kinds.items()
        }
        return {**sizes, "shared": self.shared, "shared_share": self.shared / len(self.safety)}


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
        foundation: share of all neurons that count as foundation neurons, the most important ones on general text.
        method: `importance` or `attribution`, for the safety neurons.
        fill: take further safety neurons in place of those left out, so that both sets are of one size.

    Raises:
        UsageError: an unknown method. NeuronError: nothing is left.

    Source: Zhao et al., ICLR 2025, sections 2.2 and 4.3.
    Differs: sets are the highest scores up to a share of the parameters; RSN is filled up to the same size, so that a difference between
    the arms is not one of size.
    """
    harmful, general = as_prompts(harmful), as_prompts(general)
    finders: Mapping[str, Callable[..., Any]] = {"importance": find_importance, "attribution": find_attribution}
    if method not in finders:
        raise UsageError(f"method {method!r}: expected one of {', '.join(finders)}")
    if not 0 < share < 1 or not 0 <= foundation < 1:
        raise UsageError(f"share {share} and foundation {foundation}: expected shares between 0 and 1")
    scores = finders[method](model, harmful, count=1).scores
    basis = find_importance(model, general, top=foundation).neurons if foundation else NeuronSet({}, model.table)
    return sets_from(scores, basis, share, fill=fill)


def sets_from(scores: Scores, basis: NeuronSet, share: float, *, fill: bool = True) -> Sets:
    """The sets from scores and foundation neurons; arguments as for `find_sets`."""
    safety = within(scores, share)
    plain = safety - basis
    robust = within(scores, share, without=basis) if fill else plain
    if not len(safety) or not len(robust):
        raise NeuronError(
            f"{len(safety)} safety neurons, {len(robust)} after taking out {len(basis)} foundation neurons: expected some of each; "
            "take a larger share or fewer foundation neurons"
        )
    return Sets(safety, basis, robust, len(safety) - len(plain), scores)


def within(scores: Scores, share: float, without: NeuronSet | None = None) -> NeuronSet:
    """The neurons with the highest scores that hold at most this share of all parameters, those of another set left out."""
    low, high = 0, sum(len(values) for _, values in scores.items())
    chosen = NeuronSet({}, scores.table)
    while low < high:
        middle = (low + high + 1) // 2
        found = scores.count(middle)
        found = found if without is None else found - without
        if found.share_of_parameters <= share:
            low, chosen = middle, found
        else:
            high = middle - 1
    return chosen


@dataclasses.dataclass(frozen=True)
class Point:
    """What one model does: verdicts on every prompt, in order; None is unscored."""

    harmful: list[bool | None]
    """Whether a harmful request was complied with."""
    harmless: list[bool | None]
    """Whether a harmless one was."""
    task: list[bool | None]
    """Whether the task was solved."""
    perplexity: float | None


@dataclasses.dataclass
class Lab:
    """The prompts everything is measured on, and how; completions are written as they come."""

    harmful: Prompts
    harmless: Prompts
    task: Prompts
    text: Prompts | None
    judge: str = "refusal"
    max_new_tokens: int = 64
    batch_size: Any = "auto"
    file: pathlib.Path | None = None

    def __post_init__(self) -> None:
        if self.judge not in JUDGES:
            raise UsageError(f"judge {self.judge!r}: expected one of {', '.join(JUDGES)}")

    @property
    def shared(self) -> dict[str, GroupLabels]:
        """What the prompts of every kind share with one another."""
        return {kind: getattr(self, kind).groups for kind in ("harmful", "harmless", "task")}

    def measure(self, model: LanguageModel, arm: str, seed: int = 0) -> Point:
        """Answers to everything, judged."""
        task = solved(self._answers(model, self.task, f"{arm}/task", seed), self.task) if len(self.task) else []
        text = None if self.text is None else perplexity(model, self.text, batch_size=self.batch_size)
        return Point(self.complied(model, arm, seed), self.complied(model, arm, seed, "harmless"), task, text)

    def complied(self, model: LanguageModel, arm: str, seed: int = 0, kind: str = "harmful") -> list[bool | None]:
        """Whether each harmful (or harmless) request is complied with."""
        return complied(self._answers(model, getattr(self, kind), f"{arm}/{kind}", seed), self.judge)

    def _answers(self, model: LanguageModel, prompts: Prompts, arm: str, seed: int) -> Completions:
        answers = model.complete(prompts, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size, arm=arm)
        answers = Completions([dataclasses.replace(answer, seed=seed) for answer in answers])
        if self.file is not None:
            answers.append(self.file)
        return answers


def complied(answers: Completions, judge: str) -> list[bool | None]:
    """Whether each answer goes along with its request, by the named rule."""
    if judge == "compliance":
        return list(judge_compliance(answers).complied)
    return [None if refused is None else not refused for refused in judge_refusal(answers).refused]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the arms are trained.

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
    how: How = "full"
    steps: int = 100
    learning_rate: float = 1e-3
    batch_size: int = 16

    def __post_init__(self) -> None:
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown or not self.arms or not self.seeds:
            raise UsageError(f"arms {list(self.arms)}, seeds {list(self.seeds)}: expected some of {', '.join(ARMS)}, and at least one seed")


def rsn(
    model: LanguageModel, sets: Sets, plan: Plan, lab: Lab, *, shelf: pathlib.Path | None = None, tell: Tell | None = None
) -> dict[str, Any]:
    """Tune, fine-tune, measure: every arm with every seed.

    Args:
        model: without adapters; it comes back untouched, its copies need as much memory again (twice that, gradients and optimizer for full
            fine-tuning).
        sets: from `find_sets` or `sets_from`.
        plan: how arms are trained.
        lab: what is measured.
        shelf: a JSON file that keeps every finished seed of every arm; a killed study goes on from there.
        tell: told the name of every step.

    Returns:
        The result as JSON values: `arms` (before and after the downstream fine-tune), `differences` of harmful scores after it.

    Source: Zhao et al., ICLR 2025, section 4.3 and Table 4.
    Differs: random neurons, no tuning and protection beside it; five seeds with intervals; task accuracy beside safety.
    """
    hold_answers(shelf, model=model, sets=sets, plan=plan, lab=lab)
    done: dict[str, Any] = read_json(shelf) if shelf is not None and shelf.is_file() else {}
    for seed in plan.seeds:
        kept: dict[str, Tuned] = {}
        for arm in plan.arms:
            name = f"{arm}/{seed}"
            if name in done:
                continue
            (tell or (lambda _line: None))(name)
            done[name] = _one(model, _members(sets, arm, seed), plan, lab, arm, seed, kept, _known(done, arm, seed))
            if shelf is not None:
                write_json(shelf, done)
    return summary(done, plan, sets, lab.shared)


def _known(done: Mapping[str, Any], arm: str, seed: int) -> Point | None:
    """What is known already of an arm before the task: the untuned model is one for all seeds, the protected arm is SN-Tune until then."""
    if arm == NONE:
        names = [name for name in done if name.startswith(f"{NONE}/")]
    else:
        names = [f"{SN}/{seed}"] if arm == KEPT and f"{SN}/{seed}" in done else []
    return Point(**done[names[0]]["before"]) if names else None


def _members(sets: Sets, arm: str, seed: int) -> NeuronSet | None:
    if arm == RANDOM:
        return sets.safety.random_like(seed)[0]
    return {NONE: None, SN: sets.safety, RSN: sets.robust, KEPT: sets.safety}[arm]


def tuned_twin(
    model: LanguageModel, members: NeuronSet | None, plan: Plan, seed: int, tuned: Tuned | None = None
) -> tuple[LanguageModel, Tuned | None]:
    """A copy of the model with the set tuned into its weights; what was tuned before with this seed is used again."""
    other = twin(model)
    if members is None:
        return other, None
    if tuned is None:
        tuned = train(model, members, plan.refusals, harmless=plan.harmless, seed=seed, **dict(plan.tuning))
    apply_delta(other, tuned.delta)
    return other, tuned


def _one(
    model: LanguageModel,
    members: NeuronSet | None,
    plan: Plan,
    lab: Lab,
    arm: str,
    seed: int,
    kept: dict[str, Tuned],
    known: Point | None,
) -> dict[str, Any]:
    """One arm with one seed: tune, measure, fine-tune on the task, measure."""
    other, tuned = tuned_twin(model, members, plan, seed, kept.get(SN) if arm == KEPT else None)
    if tuned is not None and arm == SN:
        kept[arm] = tuned
    before = known or lab.measure(other, f"{arm}/before", seed)
    options = {"how": plan.how, "steps": plan.steps, "learning_rate": plan.learning_rate, "batch_size": plan.batch_size, "seed": seed}
    if arm == KEPT:
        assert members is not None
        with protected(other, members):
            losses = fine_tune(other, plan.task, **options) if plan.steps else [0.0]  # type: ignore[arg-type]
    else:
        losses = fine_tune(other, plan.task, **options) if plan.steps else [0.0]  # type: ignore[arg-type]
    after = lab.measure(other, f"{arm}/after", seed) if plan.steps else before
    return {
        "before": dataclasses.asdict(before),
        "after": dataclasses.asdict(after),
        "loss": losses[-1],
        "frozen_unchanged": tuned.frozen_unchanged if tuned else None,
        "trained_parameters": tuned.delta.n_parameters if tuned else 0,
        "steps": tuned.steps if tuned else 0,
    }


def summary(
    done: Mapping[str, Any], plan: Plan, sets: Sets, shared: Mapping[str, GroupLabels] = types.MappingProxyType({})
) -> dict[str, Any]:
    """What the seeds say together; `shared` is what the prompts of a kind share."""

    def column(arm: str, when: str, kind: str) -> list[Any]:
        return [done[f"{arm}/{seed}"][when][kind] for seed in plan.seeds]

    arms = []
    for arm in plan.arms:
        row: dict[str, Any] = {"arm": arm}
        for when in ("before", "after"):
            row[when] = {kind: rate_over_seeds(column(arm, when, kind), shared.get(kind)).to_json() for kind in ("harmful", "harmless")}
            row[when]["task"] = (
                rate_over_seeds(column(arm, when, "task"), shared.get("task")).to_json() if column(arm, when, "task")[0] else None
            )
            row[when]["perplexity"] = mean_of(column(arm, when, "perplexity"))
        row["trained_parameters"] = done[f"{arm}/{plan.seeds[0]}"]["trained_parameters"]
        row["tuning_steps"] = done[f"{arm}/{plan.seeds[0]}"]["steps"]
        arms.append(row)
    untuned = next((row["before"]["harmful"] for row in arms if row["arm"] == NONE), None)
    for row in arms:
        row["tuning"] = tuning_over_seeds(untuned, row["before"]["harmful"]).record() if untuned and row["arm"] in MADE_SAFE else None
    compared: dict[tuple[str, str], Difference] = {}
    for first, second in ((SN, NONE), (SN, RANDOM), (RSN, SN), (RSN, RANDOM), (KEPT, SN)):
        if first not in plan.arms or second not in plan.arms:
            continue
        for name, (when, kind) in {"before": ("before", "harmful"), "after": ("after", "harmful"), "task_after": ("after", "task")}.items():
            ours, theirs = column(first, when, kind), column(second, when, kind)
            if ours[0]:
                compared[f"{first} - {second}", name] = difference_over_seeds(ours, theirs, shared.get(kind))
    differences: dict[str, dict[str, Any]] = {}
    for (pair, name), found in zip(compared, holm(list(compared.values())), strict=True):
        differences.setdefault(pair, {"before": None, "after": None, "task_after": None})[name] = found.to_json()
    return {
        "study": "rsn",
        "seeds": list(plan.seeds),
        "downstream": {"how": plan.how, "steps": plan.steps, "learning_rate": plan.learning_rate, "batch_size": plan.batch_size},
        "tuning": {**plan.tuning, "refusals": len(plan.refusals), "harmless": len(plan.harmless) if plan.harmless is not None else 0},
        "sets": sets.record(),
        "arms": arms,
        "differences": differences,
    }


def mean_of(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, lowest and highest of one number a seed."""
    known = [value for value in values if value is not None]
    mean = sum(known) / len(known) if known else None
    return {"value": mean, "lowest": min(known, default=None), "highest": max(known, default=None), "by_seed": list(values)}
