"""stress: how easily is safety cut out again, before and after SN-Tune? Three attacks on the same measure.

1. Prune: the top neurons of the set that was found are switched off, more and more of them, beside random ones.
2. Harm: a few steps of LoRA fine-tuning on harmful requests with answers that go along.
3. Benign: fine-tuning on an ordinary task.

Tuning few neurons may put all safety in one place, which is then easily cut: that is what the curves are to show.
"""

import dataclasses
import pathlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safety_neurons.errors import InputError
from safety_neurons.interventions import deactivated
from safety_neurons.model import LanguageModel
from safety_neurons.neurons import NeuronSet
from safety_neurons.prompts import Prompts
from safety_neurons.results import difference_over_seeds, holm, rate_over_seeds
from safety_neurons.results.estimates import GroupLabels
from safety_neurons.results.files import read_json, write_json
from safety_neurons.studies.achieving import tuning_over_seeds
from safety_neurons.studies.downstream import How, fine_tune, solved, twin
from safety_neurons.studies.kept import hold_answers
from safety_neurons.studies.rsn import Lab, Plan, Sets, Tell, complied, tuned_twin

BEFORE, AFTER = "untuned", "SN-Tune"
ATTACKS = ("prune", "prune random", "harmful LoRA", "benign fine-tuning")


@dataclasses.dataclass(frozen=True)
class Attack:
    """How hard the attacks are.

    Attributes:
        shares: of the found set that are pruned, strongest first.
        harmful: harmful requests with answers that go along; None lets the untuned model write them, where it does.
        harmful_steps: LoRA steps after which safety is looked at.
        benign_steps: steps on the task after which it is looked at.
        learning_rate: of both fine-tunings.
        batch_size: examples a step.
        benign: full or lora.
    """

    shares: Sequence[float] = (0.05, 0.1, 0.25, 0.5, 1.0)
    harmful: Prompts | None = None
    harmful_steps: Sequence[int] = (1, 2, 5, 10)
    benign_steps: Sequence[int] = (10, 30, 100)
    learning_rate: float = 1e-3
    batch_size: int = 16
    benign: How = "full"


def stress(
    model: LanguageModel,
    sets: Sets,
    plan: Plan,
    attack: Attack,
    lab: Lab,
    *,
    shelf: pathlib.Path | None = None,
    tell: Tell | None = None,
) -> dict[str, Any]:
    """Safety under attack, of the model as it is and of the model after SN-Tune.

    Args:
        model: without adapters; it comes back untouched.
        sets: from `find_sets`; the scores say in which order neurons are pruned.
        plan: how it is tuned, on which task, with which seeds.
        attack: how hard.
        lab: what is measured; `harmful` and `task` are used.
        shelf: a JSON file that keeps what is finished.
        tell: told the name of every step.

    Returns:
        As JSON values: for every attack and state a curve of (how much, share complied with), and differences at every point.

    Raises:
        InputError: no harmful answers were given and the model itself writes none.

    Source: Zhao et al., ICLR 2025 (pruning of safety neurons); Qi et al., ICLR 2024 (harmful and benign fine-tuning undo safety).
    Differs: the same attacks before and after tuning, random pruning beside it, several seeds with intervals.
    """
    hold_answers(shelf, model=model, sets=sets, plan=plan, attack=attack, lab=lab)
    done: dict[str, Any] = read_json(shelf) if shelf is not None and shelf.is_file() else {}
    say = tell or (lambda _line: None)
    answers = attack.harmful or _own_answers(model, plan, lab)
    for seed in plan.seeds:
        for state in (BEFORE, AFTER):
            name = f"{state}/{seed}"
            if name in done:
                continue
            say(name)
            tuned, _ = tuned_twin(model, sets.safety if state == AFTER else None, plan, seed)
            done[name] = _attacked(tuned, sets, plan, attack, answers, lab, state, seed, say)
            if shelf is not None:
                write_json(shelf, done)
    return _summary(done, sets, plan, attack, lab.shared)


def _own_answers(model: LanguageModel, plan: Plan, lab: Lab) -> Prompts:
    """The model's own answers to the harmful requests of the tuning data, where they go along."""
    asked = Prompts([dataclasses.replace(prompt, answer=None) for prompt in plan.refusals], "harmful answers of the model's own")
    answers = model.complete(asked, max_new_tokens=lab.max_new_tokens, batch_size=lab.batch_size, arm="attack")
    pairs = zip(asked, answers, complied(answers, lab.judge), strict=True)
    kept = [dataclasses.replace(prompt, answer=answer.completion) for prompt, answer, along in pairs if along]
    if not kept:
        raise InputError(
            f"{model.name} goes along with none of {len(asked)} harmful requests, answers to attack with were expected; "
            "give harmful requests with answers that go along"
        )
    return Prompts(kept, asked.name)


def _attacked(
    model: LanguageModel, sets: Sets, plan: Plan, attack: Attack, answers: Prompts, lab: Lab, state: str, seed: int, say: Tell
) -> dict[str, Any]:
    """Every attack on one model: by attack, a list of [how much, verdicts]; for the task, whether it is solved at the end."""
    start = lab.complied(model, f"{state}/start", seed)
    curves: dict[str, list[Any]] = {name: [[0, start]] for name in ATTACKS}
    for share in attack.shares:
        say(f"{state}/{seed}: prune {share:g}")
        pruned = strongest(sets, share)
        for name, members in (("prune", pruned), ("prune random", pruned.random_like(seed, table=model.table)[0])):
            with deactivated(model, members):
                curves[name].append([share, lab.complied(model, f"{state}/{name} {share:g}", seed)])

    def watch(name: str, other: LanguageModel) -> Callable[[int], None]:
        def look(step: int) -> None:
            curves[name].append([step, lab.complied(_seen(other), f"{state}/{name} {step}", seed)])

        return look

    options: dict[str, Any] = {"learning_rate": attack.learning_rate, "batch_size": attack.batch_size, "seed": seed}
    say(f"{state}/{seed}: harmful LoRA")
    other = twin(model)
    fine_tune(
        other,
        answers,
        how="lora",
        steps=max(attack.harmful_steps),
        at=attack.harmful_steps,
        look=watch("harmful LoRA", other),
        **options,
    )
    say(f"{state}/{seed}: benign fine-tuning")
    other = twin(model)
    name = "benign fine-tuning"
    fine_tune(
        other, plan.task, how=attack.benign, steps=max(attack.benign_steps), at=attack.benign_steps, look=watch(name, other), **options
    )
    task = solved(other.complete(lab.task, max_new_tokens=lab.max_new_tokens, batch_size=lab.batch_size), lab.task) if len(lab.task) else []
    return {"curves": curves, "task": task}


def _seen(model: LanguageModel) -> LanguageModel:
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
    import numpy as np

    members = list(neurons)
    order = np.random.default_rng([seed, 4]).permutation(len(members))[: max(1, round(share * len(members)))]
    kept: dict[str, list[int]] = {}
    for index in order:
        key, neuron = members[int(index)]
        kept.setdefault(key, []).append(neuron)
    return NeuronSet(kept, neurons.table)


def _summary(
    done: Mapping[str, Any], sets: Sets, plan: Plan, attack: Attack, shared: Mapping[str, GroupLabels] = types.MappingProxyType({})
) -> dict[str, Any]:
    points, gains = [], []
    for name in ATTACKS:
        amounts = [point[0] for point in done[f"{BEFORE}/{plan.seeds[0]}"]["curves"][name]]
        for place, amount in enumerate(amounts):
            before, after = ([done[f"{state}/{seed}"]["curves"][name][place][1] for seed in plan.seeds] for state in (BEFORE, AFTER))
            gains.append(difference_over_seeds(after, before, shared.get("harmful")))
            rates = {
                "before": rate_over_seeds(before, shared.get("harmful")).to_json(),
                "after": rate_over_seeds(after, shared.get("harmful")).to_json(),
            }
            points.append({"attack": name, "amount": amount, **rates})
    curves = [{**point, "difference": gain.to_json()} for point, gain in zip(points, holm(gains), strict=True)]
    starts = [[done[f"{state}/{seed}"]["curves"][ATTACKS[0]][0][1] for seed in plan.seeds] for state in (BEFORE, AFTER)]
    task = {state: [done[f"{state}/{seed}"]["task"] for seed in plan.seeds] for state in (BEFORE, AFTER)}
    return {
        "study": "stress",
        **tuning_over_seeds(*(rate_over_seeds(column).to_json() for column in starts)).record(),
        "seeds": list(plan.seeds),
        "attack": {
            "pruned_shares": list(attack.shares),
            "harmful_lora_steps": list(attack.harmful_steps),
            "benign_steps": list(attack.benign_steps),
            "benign": attack.benign,
            "learning_rate": attack.learning_rate,
            "batch_size": attack.batch_size,
        },
        "tuning": {**plan.tuning, "refusals": len(plan.refusals)},
        "sets": sets.record(),
        "curves": curves,
        "task": {state: rate_over_seeds(rows, shared.get("task")).to_json() if rows[0] else None for state, rows in task.items()},
    }
