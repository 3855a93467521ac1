"""`stress`: attacks on safety before and after SN-Tune, on one measure.

1. Prune: the top neurons of the set that was found are switched off, more and more of them, beside random
    ones.
2. Abliteration: one or more directions of the residual stream, of harmful against harmless requests, are
    taken out of all weights that write it; plainly, or so that what every neuron writes keeps its norm.
3. Subtraction: of a released change, a part is taken away again, down to nothing.
4. Harm: a few steps of LoRA fine-tuning on harmful requests with answers that go along.
5. Benign: fine-tuning on an ordinary task.

Tuning few neurons may put all safety in one place, which is then easily cut: that is what the curves are to
show.
"""

import dataclasses
import functools
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from safety_neurons.arguments import well_typed
from safety_neurons.capability import divergence
from safety_neurons.errors import InputError, UsageError
from safety_neurons.interventions import abliterated, deactivated, refusal_directions
from safety_neurons.interventions.abliterate import basis_of, share_along
from safety_neurons.model import LanguageModel
from safety_neurons.model.likelihood import token_log_probabilities
from safety_neurons.neurons import NeuronSet
from safety_neurons.prompt_lists import Prompts
from safety_neurons.results import Difference, difference_over_seeds, holm, rate_over_seeds
from safety_neurons.results.estimates import GroupLabels
from safety_neurons.results.run import Cache
from safety_neurons.strict_json import JsonObject
from safety_neurons.studies.bench import Arm, Progress
from safety_neurons.studies.lasting import (
    SN,
    Downstream,
    Lab,
    Plan,
    SeedOf,
    SeedTunings,
    Sets,
    complied,
    facts_of,
    fine_tune,
    measured,
    twin,
)
from safety_neurons.studies.tuning import tuning_over_seeds
from safety_neurons.tuning import Tuned, apply_delta
from safety_neurons.tuning.data import tuning_examples

BEFORE, AFTER = "untuned", SN
KINDS = {
    "prune": ("prune", "prune random"),
    "abliterate": ("abliteration", "abliteration, norms kept"),
    "subtract": ("subtraction",),
    "harmful": ("harmful LoRA",),
    "benign": ("benign fine-tuning",),
}
"""By kind of attack, the curves it gives."""
GAINS = {"difference": "harmful", "harm_difference": "harmed"}
"""By name of a paired difference, tuned minus untuned, what of a point it is of."""
MOST_PROMPTS, MOST_DIVERGENCE, FIRST_LAYERS = 16, 0.1, 0.8
"""For the choice of a direction: prompts of a kind, KL per token on harmless ones in nats, and the share of
the layers that is looked at.
"""


@dataclasses.dataclass(frozen=True)
class Attack:
    """How hard the attacks are.

    Attributes:
        shares: of the found set that are pruned, strongest first.
        harmful: harmful requests with answers that go along; None lets the untuned model write them, where it
            does.
        harmful_steps: LoRA steps after which safety is looked at.
        benign_steps: steps on the task after which it is looked at.
        learning_rate: of both fine-tunings.
        batch_size: examples a step.
        benign: full or lora.
        directions: how many are taken out of the residual stream; at most as many as there are layers.
        scales: what is left of the tuned change, as a factor λ of it.
        kinds: which attacks are made, some of `KINDS`.
    """

    shares: Sequence[float] = (0.05, 0.1, 0.25, 0.5, 1.0)
    harmful: Prompts | None = None
    harmful_steps: Sequence[int] = (1, 2, 5, 10)
    benign_steps: Sequence[int] = (10, 30, 100)
    learning_rate: float = 1e-3
    batch_size: int = 16
    benign: Downstream = "full"
    directions: Sequence[int] = (1, 4)
    scales: Sequence[float] = (0.75, 0.5, 0.25, 0.0)
    kinds: Sequence[str] = tuple(KINDS)

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise UsageError(f"attacks {list(self.kinds)}: expected some of {', '.join(KINDS)}")

    @property
    def curves(self) -> list[str]:
        """Names of the curves, in order."""
        return [name for kind, names in KINDS.items() if kind in self.kinds for name in names]


@well_typed
def stress(
    model: LanguageModel,
    sets: Sets,
    plan: Plan,
    attack: Attack,
    lab: Lab,
    *,
    cache: Cache | None = None,
    tell: Progress | None = None,
) -> JsonObject:
    """Safety under attack, of the model as it is and of the model after SN-Tune.

    Args:
        model: without adapters; it comes back untouched.
        sets: from `find_sets`; the scores say in which order neurons are pruned.
        plan: how it is tuned, on which task, with which seeds.
        attack: how hard.
        lab: what is measured; `harmful`, `text` and `task` are used.
        cache: keeps what is finished.
        tell: told the name of every step.

    Returns:
        As JSON values: for every attack and state a curve of (how much, share complied with, refused, doing
        harm, perplexity), and differences at every point.

    Raises:
        InputError: no harmful answers were given and the model itself writes none.

    Source: Zhao et al., ICLR 2025 (pruning of safety neurons); Arditi et al., NeurIPS 2024 (abliteration); Qi
    et al., ICLR 2024 (harmful and benign fine-tuning undo safety). Differs: the same attacks before and after
    tuning, random pruning beside it, several seeds with intervals.
    """
    facts = facts_of(lab, model=model, sets=sets, plan=plan, attack=attack)
    cache, done = cache or Cache(), dict[str, Any]()
    say = tell or (lambda _line: None)
    if "harmful" in attack.kinds and attack.harmful is None:
        attack = dataclasses.replace(attack, harmful=own_answers(model, plan, lab, cache, facts))

    def work(state: str, tunings: SeedTunings) -> dict[str, Any]:
        say(f"{state}/{tunings.seed}")
        found = _Attacked(tunings, sets, attack, lab, state, say).curves()
        lab.finish()
        return found

    for seed in plan.seeds:
        tunings = SeedTunings(model, plan, seed, cache, facts)
        for state in (BEFORE, AFTER):
            name = f"{state}/{seed}"
            done[name] = cache.cached(SeedOf("stress", name, facts), functools.partial(work, state, tunings))
        tunings.finish()
    return stress_summary(done, sets, plan, attack, lab.shared)


def own_answers(model: LanguageModel, plan: Plan, lab: Lab, cache: Cache, facts: Any) -> Prompts:
    """The model's own answers to the harmful requests of the tuning data, where they go along; a killed study
    finds them in its cache.

    Raises:
        InputError: it goes along with none.
    """
    requests = Prompts(
        [dataclasses.replace(prompt, answer=None) for prompt in plan.refusals],
        "harmful answers of the model's own",
    )

    def written() -> list[str | None]:
        options: dict[str, Any] = {"max_new_tokens": lab.longest, "batch_size": lab.batch_size}
        answers = model.complete(requests, arm="attack", **options)
        pairs = zip(answers, complied(answers, lab.judge), strict=True)
        return [answer.completion if along else None for answer, along in pairs]

    texts = cache.cached(SeedOf("attack", "own answers", facts), written)
    answered = [
        dataclasses.replace(prompt, answer=text)
        for prompt, text in zip(requests, texts, strict=True)
        if text is not None
    ]
    if not answered:
        raise InputError(
            f"{model.name} goes along with none of {len(requests)} harmful requests, answers to attack "
            "with were expected; give harmful requests with answers that go along"
        )
    return Prompts(answered, requests.name)


class _Attacked:
    """Every attack on one model: by curve, a list of [how much, point]."""

    def __init__(
        self,
        tunings: SeedTunings,
        sets: Sets,
        attack: Attack,
        lab: Lab,
        state: str,
        say: Progress,
    ) -> None:
        self.base, self.plan, self.seed = tunings.model, tunings.plan, tunings.seed
        self.sets, self.attack, self.lab, self.state, self.say = sets, attack, lab, state, say
        self.model, self.tuned = tunings.twin(state, sets.safety if state == AFTER else None)
        self.facts: dict[str, Any] = {}

    def curves(self) -> dict[str, Any]:
        """The curves, what was found on the way, and for the task whether it is solved at the end."""
        start = self.look("start", self.model)
        curves: dict[str, Any] = {}
        for name in self.attack.curves:
            first = 1.0 if name == "subtraction" else 0
            curves[name] = [[first, start]]
        if "prune" in self.attack.kinds:
            self.prune(curves)
        if "abliterate" in self.attack.kinds:
            self.abliterate(curves)
        if "subtract" in self.attack.kinds:
            curves["subtraction"] += [
                [scale, start if self.tuned is None else self.subtracted(self.tuned, scale)]
                for scale in self.attack.scales
                if scale != 1
            ]
        if "harmful" in self.attack.kinds:
            assert self.attack.harmful is not None
            self.fine_tuned(curves, "harmful LoRA", self.attack.harmful, "lora", self.attack.harmful_steps)
        task: Sequence[bool | None] = []
        if "benign" in self.attack.kinds:
            options = (self.plan.task, self.attack.benign, self.attack.benign_steps)
            other = self.fine_tuned(curves, "benign fine-tuning", *options)
            task = self.lab.solved(Arm(f"{self.state}/benign fine-tuning", other), self.seed)
        return {"curves": curves, "task": task, **self.facts}

    def look(self, name: str, model: LanguageModel, treatment: Any = None) -> dict[str, Any]:
        """What a model does with harmful requests, and its perplexity."""
        arm = Arm(f"{self.state}/{name}", model, *([treatment] if treatment else []))
        return dataclasses.asdict(self.lab.point(arm, self.seed, harmful_alone=True))

    def tell(self, what: str) -> None:
        self.say(f"{self.state}/{self.seed}: {what}")

    def prune(self, curves: dict[str, Any]) -> None:
        for share in self.attack.shares:
            self.tell(f"prune {share:g}")
            pruned = strongest(self.sets, share)
            for name, members in (
                ("prune", pruned),
                ("prune random", pruned.random_like(self.seed, table=self.model.table)[0]),
            ):
                treatment = functools.partial(deactivated, self.model, members)
                curves[name].append([share, self.look(f"{name} {share:g}", self.model, treatment)])

    def abliterate(self, curves: dict[str, Any]) -> None:
        self.tell("abliteration")
        options: dict[str, Any] = {"batch_size": self.lab.batch_size}
        harmless = self.plan.harmless or self.plan.task
        directions = refusal_directions(self.model, self.plan.refusals, harmless, **options)
        layer, drift = best_layer(self.model, directions, self.plan.refusals, harmless, self.lab.batch_size)
        some = self.plan.refusals[:MOST_PROMPTS]
        self.facts["abliteration"] = {"layer": layer, "divergence": drift, "along": []}
        for count in sorted({min(count, len(directions)) for count in self.attack.directions}):
            basis = basis_of(directions, layer, count)
            for name, keep_norms in (("abliteration", False), ("abliteration, norms kept", True)):
                treatment = functools.partial(abliterated, self.model, basis, keep_norms=keep_norms)
                curves[name].append([count, self.look(f"{name} {count}", self.model, treatment)])
                before = share_along(self.model, some, basis, **options)
                with treatment():
                    after = share_along(self.model, some, basis, **options)
                self.facts["abliteration"]["along"].append(
                    {"attack": name, "directions": count, "before": before, "after": after}
                )

    def subtracted(self, tuned: Tuned, scale: float) -> dict[str, Any]:
        self.tell(f"subtraction {scale:g}")
        other = twin(self.base)
        tensors = {key: scale * change for key, change in tuned.delta.tensors.items()}
        apply_delta(other, dataclasses.replace(tuned.delta, tensors=tensors))
        return self.look(f"subtraction {scale:g}", other)

    def fine_tuned(
        self, curves: dict[str, Any], name: str, data: Prompts, how: Downstream, at: Sequence[int]
    ) -> LanguageModel:
        self.tell(name)
        other = twin(self.model)

        def look(step: int) -> None:
            curves[name].append([step, self.look(f"{name} {step}", seen(other))])

        options: dict[str, Any] = {
            "learning_rate": self.attack.learning_rate,
            "batch_size": self.attack.batch_size,
            "seed": self.seed,
        }
        fine_tune(other, data, how=how, steps=max(at), at=at, look=look, **options)
        return other


def best_layer(
    model: LanguageModel,
    directions: Float[Tensor, "layer hidden"],
    refusals: Prompts,
    harmless: Prompts,
    batch_size: Any = "auto",
) -> tuple[int, float]:
    """The layer whose direction, taken out, makes refusals least likely, among those that change the model
    little on harmless prompts; and its KL per token there.

    The last fifth of the layers is not looked at. Where every layer changes too much, the one that changes
    least is taken.

    Source: Arditi et al., NeurIPS 2024, appendix C. Differs: by the likelihood of whole refusals, which needs
    no list of tokens that refuse.
    """
    answers, asked = tuning_examples(refusals[:MOST_PROMPTS], model), harmless[:MOST_PROMPTS]
    found: list[tuple[bool, float, int, float]] = []
    for layer in range(max(1, int(FIRST_LAYERS * len(directions)))):
        if not float(directions[layer].norm()):
            continue
        treatment = functools.partial(abliterated, model, directions[layer : layer + 1])
        drift = divergence(model, asked, treatment, batch_size=batch_size)
        spans = [(one.start, len(one.ids)) for one in answers]
        with treatment():
            ids = [one.ids for one in answers]
            rows = token_log_probabilities(model, ids, spans, batch_size=batch_size)
        likely = float(np.mean([row.mean() for row in rows]))
        far = drift is None or not drift <= MOST_DIVERGENCE
        changed = float("inf") if drift is None else drift
        found.append((far, changed if far else likely, layer, changed))
    if not found:
        raise InputError(
            "harmful and harmless prompts have one mean in every layer, two were expected; give other prompts"
        )
    _, _, layer, drift = min(found)
    return layer, drift


def seen(model: LanguageModel) -> LanguageModel:
    """The model in the middle of its fine-tuning; where the adapters are is found out anew."""
    model.__dict__.pop("anatomy", None)
    return model


def strongest(sets: Sets, share: float) -> NeuronSet:
    """The share of the safety neurons with the highest scores; any, where no scores are known."""
    count = max(1, round(share * len(sets.safety)))
    if sets.scores is None:
        return _part(sets.safety, share, 0)
    return sets.scores.count(count) & sets.safety if count < len(sets.safety) else sets.safety


def _part(neurons: NeuronSet, share: float, seed: int) -> NeuronSet:
    """A random share of a set."""
    members = list(neurons)
    order = np.random.default_rng([seed, 4]).permutation(len(members))[: max(1, round(share * len(members)))]
    chosen: dict[str, list[int]] = {}
    for index in order:
        key, neuron = members[int(index)]
        chosen.setdefault(key, []).append(neuron)
    return NeuronSet(chosen, neurons.table)


def stress_summary(
    done: Mapping[str, Any],
    sets: Sets,
    plan: Plan,
    attack: Attack,
    shared: Mapping[str, GroupLabels] = types.MappingProxyType({}),
) -> JsonObject:
    """What the seeds say together: `before` and `after` are the shares complied with at every point."""
    points, gains = list[dict[str, Any]](), list[Difference]()
    for name, place, amount in _places(done[f"{BEFORE}/{plan.seeds[0]}"]["curves"]):
        before, after = (
            [done[f"{state}/{seed}"]["curves"][name][place][1] for seed in plan.seeds]
            for state in (BEFORE, AFTER)
        )
        for kind in GAINS.values():
            tuned, untuned = ([point[kind] for point in side] for side in (after, before))
            gains.append(difference_over_seeds(tuned, untuned, shared.get("harmful")))
        rates = {"before": measured(before, shared), "after": measured(after, shared)}
        others = {
            kind: {side: rate[kind] for side, rate in rates.items()}
            for kind in ("refused", "harmed", "perplexity", "cut_off")
        }
        complied_with = {side: rate["harmful"] for side, rate in rates.items()}
        points.append({"attack": name, "amount": amount, **complied_with, **others})
    held = iter(holm(gains))
    curves = [{**point, **{name: next(held).to_json() for name in GAINS}} for point in points]
    first = attack.curves[0]
    starts = [
        [done[f"{state}/{seed}"]["curves"][first][0][1]["harmful"] for seed in plan.seeds]
        for state in (BEFORE, AFTER)
    ]
    task = {state: [done[f"{state}/{seed}"]["task"] for seed in plan.seeds] for state in (BEFORE, AFTER)}
    directions = [
        {"state": state, "seed": seed, **done[f"{state}/{seed}"]["abliteration"]}
        for state in (BEFORE, AFTER)
        for seed in plan.seeds
        if "abliteration" in done[f"{state}/{seed}"]
    ]
    return {
        "study": "stress",
        **tuning_over_seeds(*(rate_over_seeds(column).to_json() for column in starts)).record(),
        "seeds": list(plan.seeds),
        "attack": {
            "kinds": list(attack.kinds),
            "pruned_shares": list(attack.shares),
            "directions": list(attack.directions),
            "scales": list(attack.scales),
            "harmful_lora_steps": list(attack.harmful_steps),
            "benign_steps": list(attack.benign_steps),
            "benign": attack.benign,
            "learning_rate": attack.learning_rate,
            "batch_size": attack.batch_size,
        },
        "tuning": {**plan.tuning, "refusals": len(plan.refusals)},
        "sets": sets.record(),
        "curves": curves,
        "directions": directions,
        "task": {
            state: rate_over_seeds(rows, shared.get("task")).to_json() if rows[0] else None
            for state, rows in task.items()
        },
    }


def _places(curves: Mapping[str, Any]) -> Iterator[tuple[str, int, float]]:
    for name, points in curves.items():
        for place, (amount, _) in enumerate(points):
            yield name, place, amount
