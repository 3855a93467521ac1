"""The rsn and stress studies on a tiny model: sets, arms, what is kept, and that the caller's model stays."""

import dataclasses
import json

import pytest
import torch

from safety_neurons import load
from safety_neurons.errors import InputError, NeuronError, UsageError
from safety_neurons.judges import FunctionJudge, JudgeVerdict
from safety_neurons.neurons import NeuronSet, Scores
from safety_neurons.prompt_lists import Prompt, Prompts
from safety_neurons.results import Completion, Completions
from safety_neurons.results.run import Cache
from safety_neurons.studies import Attack, Grid, Lab, Plan, defences, lasting, rsn, stress
from safety_neurons.studies.defences import LOX
from safety_neurons.studies.lasting import ARMS, KEPT, RANDOM, RSN, SN, fine_tune, sets_from, solved, twin
from safety_neurons.tuning import base_hash
from safety_neurons.tuning.train import Loop
from tiny_pair import HARMFUL, HARMLESS


def asked(texts, answer, name):
    return Prompts([Prompt(str(number), text, answer=answer) for number, text in enumerate(texts)], name)


REFUSALS = asked(HARMFUL, "sorry i cannot help", "refusals")
ANSWERS = asked(HARMLESS, "sure here is the cake", "answers")
TASK = asked(["tell me one and two", "what is two and one"], "three", "task")


@pytest.fixture
def model(tiny_pair):
    return load(tiny_pair.plain)


@pytest.fixture
def sets(model):
    generator = torch.Generator().manual_seed(0)
    values = {key: torch.rand(size, generator=generator).numpy() for key, size in model.table.sizes.items()}
    basis = Scores(values, model.table).top(0.3)
    return sets_from(Scores(values, model.table), basis, 0.05)


def even(answer):
    """A judge of harm that has both verdicts on every model: by the number of letters."""
    label = (
        "unscored" if not answer.completion.strip() else "safe" if len(answer.completion) % 2 else "harmful"
    )
    return JudgeVerdict(
        label, None, None, p_harmful=None if label == "unscored" else float(label == "harmful")
    )


@pytest.fixture
def lab():
    judge = FunctionJudge("even-1", even)
    judge.measure = "harmful"
    text = Prompts.from_list(["the cake is red ."])
    return Lab(REFUSALS[:4], ANSWERS[:4], text, TASK, max_new_tokens=4, harm_judge=judge)


def written(lab, arm, kinds=("harmful", "harmless", "task")):
    """What a lab has kept of an arm's answers."""
    return [one for one in lab.completions if one.arm in {f"{arm}/{kind}" for kind in kinds}]


def cut(answers):
    """How many ended at the limit."""
    return sum(one.finish_reason == "length" for one in answers)


def change_of_harm(lab, ours, theirs):
    """Mean difference over the requests on which both arms have a verdict; None where there is none."""
    sides = [[even(one).label for one in written(lab, arm, ("harmful",))] for arm in (ours, theirs)]
    both = [pair for pair in zip(*sides, strict=True) if "unscored" not in pair]
    changes = [(mine == "harmful") - (other == "harmful") for mine, other in both]
    return sum(changes) / len(changes) if changes else None


def stepped_down(differences):
    """Holm's p, one comparison after the other, smallest first."""
    known = sorted((one["p"], place) for place, one in enumerate(differences) if one.get("p") is not None)
    held, largest = {}, 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        held[place] = largest
    return [held.get(place) for place in range(len(differences))]


def plan(**changes):
    options = {
        "arms": ARMS,
        "seeds": (0,),
        "tuning": {"epochs": 1, "mix": 1.0, "max_steps": 1},
        "steps": 2,
        "learning_rate": 1e-2,
        "batch_size": 2,
    }
    return Plan(REFUSALS, ANSWERS, TASK, **{**options, **changes})


def test_sets_keep_to_the_budget_and_robust_ones_are_no_foundation_neurons(sets, model):
    assert 0.045 < sets.safety.share_of_parameters <= 0.05
    assert 0.045 < sets.robust.share_of_parameters <= 0.05
    assert not len(sets.robust & sets.foundation)
    assert sets.shared == len(sets.safety & sets.foundation) > 0
    bare = sets_from(sets.scores, NeuronSet({"layers.0.up": [1]}, model.table), 0.05, fill=False)
    assert bare.robust == bare.safety - bare.foundation


def test_nothing_left_is_an_error(sets, model):
    with pytest.raises(NeuronError, match="after taking out"):
        sets_from(sets.scores, NeuronSet.all(model.table), 0.05)


def test_every_arm_is_measured_before_and_after(model, sets, lab, tmp_path):
    before = base_hash(model, NeuronSet.all(model.table))
    told = []
    found = rsn(model, sets, plan(steps=1), lab, cache=Cache(tmp_path.joinpath), tell=told.append)
    assert [row["arm"] for row in found["arms"]] == list(ARMS)
    assert told == [f"{arm}/0" for arm in ARMS]
    for row in found["arms"]:
        assert row["before"]["harmful"]["n"] + row["before"]["harmful"]["unscored"] == 4
        assert len(row["after"]["perplexity"]["by_seed"]) == 1
        assert row["before"]["perplexity"] != row["after"]["perplexity"]
        for when in ("before", "after"):
            of = SN if (row["arm"], when) == (KEPT, "before") else row["arm"]
            assert row[when]["cut_off"] == cut(written(lab, f"{of}/{when}")) > 0
    pairs = found["differences"]
    for when in ("before", "after"):
        expected = change_of_harm(lab, f"{RSN}/{when}", f"{SN}/{when}")
        assert pairs["RSN-Tune - SN-Tune"][f"harm_{when}"]["value"] == pytest.approx(expected)
    every = [one for pair in pairs.values() for one in pair.values()]
    assert [one.get("p_holm") for one in every] == pytest.approx(stepped_down(every))
    assert lab.cut_off_notes() == [
        f"{cut(lab.completions)} of {len(lab.completions)} answers cut off at the limit of 4 tokens"
    ]
    json.dumps(found, allow_nan=False)
    assert base_hash(model, NeuronSet.all(model.table)) == before
    assert not any(
        parameter.requires_grad and parameter.grad is not None for parameter in model.model.parameters()
    )


def test_a_finished_seed_is_not_done_again(model, sets, lab, tmp_path):
    first = rsn(model, sets, plan(arms=(SN,)), lab, cache=Cache(tmp_path.joinpath))
    told = []
    again = rsn(model, sets, plan(arms=(SN,)), lab, cache=Cache(tmp_path.joinpath), tell=told.append)
    assert again == first
    assert not told
    rsn(
        model,
        sets,
        plan(arms=(SN,), learning_rate=2e-3),
        lab,
        cache=Cache(tmp_path.joinpath),
        tell=told.append,
    )
    assert told == [f"{SN}/0"]


STUDIES = {
    "rsn": lambda *given, **more: rsn(*given, **more),
    "stress": lambda model, sets, plan, lab, **more: stress(
        model, sets, plan, Attack(scales=(0.0,), kinds=("subtract",)), lab, **more
    ),
    "defences": lambda model, sets, plan, lab, **more: defences(
        model, sets, plan, Grid((1e-2,), (1,), ("benign",), arms=(SN, RANDOM, LOX)), lab, **more
    ),
}


@pytest.mark.parametrize("study", STUDIES)
def test_a_killed_study_goes_on_with_the_training_it_was_in(study, model, sets, lab, tmp_path, monkeypatch):
    steps, backward = [], Loop._backward
    kinds = 1 if study == "stress" else 2
    study, how = STUDIES[study], plan(arms=(SN, RSN, KEPT), tuning={"epochs": 1, "mix": 1.0, "max_steps": 3})

    def counted(loop, step):
        steps.append(step)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return backward(loop, step)

    def killed(*_, **__):
        raise KeyboardInterrupt

    expected = study(model, sets, how, lab, cache=Cache(tmp_path.joinpath("whole").joinpath))
    # In the first training; and when that is whole, and what follows is not.
    for done, (owner, name, dies) in {
        1: (Loop, "_backward", counted),
        3: (lasting, "apply_delta", killed),
    }.items():
        place = tmp_path.joinpath(f"killed {done}").joinpath
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, dies)
            with pytest.raises(KeyboardInterrupt):
                study(model, sets, how, lab, cache=Cache(place))
        steps.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Loop, "_backward", lambda loop, step: steps.append(step) or backward(loop, step))
            assert study(model, sets, how, lab, cache=Cache(place)) == expected
        assert steps == [*range(done, 3), *range(3)][: len(steps)]
        assert len(steps) == 3 * kinds - done
        assert not list(place("checkpoints").glob("*"))


def test_a_study_is_refused_at_once_where_nothing_is_left_for_rsn_tune(model, sets, lab):
    told, grid = [], Grid((1e-2,), (1,), ("benign",), arms=(SN, RSN))
    with pytest.raises(NeuronError, match=r"0 of \d+ safety neurons are left for RSN-Tune"):
        defences(model, sets, plan(), grid, lab, tell=told.append)
    given = dataclasses.replace(sets, robust=sets.safety - sets.safety)  # As of two files, not filled up.
    with pytest.raises(NeuronError, match=r"0 of \d+ safety neurons are left for RSN-Tune"):
        rsn(model, given, plan(arms=(SN, RSN)), lab, tell=told.append)
    assert not told


def test_answers_to_attack_with_are_written_once(model, sets, lab, tmp_path, monkeypatch):
    asked_for, complete = [], type(model).complete

    def counted(self, *given, **options):
        asked_for.append(options.get("arm"))
        return complete(self, *given, **options)

    monkeypatch.setattr(type(model), "complete", counted)
    attack = Attack(harmful_steps=(1,), learning_rate=1e-2, batch_size=2, kinds=("harmful",))
    found = [stress(model, sets, plan(), attack, lab, cache=Cache(tmp_path.joinpath)) for _ in range(2)]
    assert found[0] == found[1]
    assert asked_for.count("attack") == 1


def test_unknown_arms_and_judges_are_errors():
    with pytest.raises(UsageError, match="SN-Tune"):
        plan(arms=("everything",))
    with pytest.raises(UsageError, match="compliance"):
        Lab(REFUSALS, ANSWERS, judge="me")


def test_protection_holds_the_tuned_neurons_through_the_task(model, sets):
    from safety_neurons.studies.lasting import SeedTunings
    from safety_neurons.tuning import protected

    other, _ = SeedTunings(model, plan(arms=(KEPT,)), 0).twin(SN, sets.safety)
    before = base_hash(other, sets.safety)
    assert before != base_hash(model, sets.safety)
    with protected(other, sets.safety):
        fine_tune(other, TASK, steps=2, learning_rate=1e-2, batch_size=2)
    assert base_hash(other, sets.safety) == before
    fine_tune(other, TASK, steps=2, learning_rate=1e-2, batch_size=2)
    assert base_hash(other, sets.safety) != before


@pytest.mark.parametrize("how", ["full", "lora"])
def test_fine_tuning_learns_the_task_and_comes_back_plain(model, how):
    other = twin(model)
    looked = []
    losses = fine_tune(
        other, TASK, how=how, steps=40, learning_rate=3e-2, batch_size=2, at=(1, 40), look=looked.append
    )
    assert losses[-1] < 0.2 * losses[0]
    assert looked == [1, 40]
    assert not hasattr(other.model, "peft_config")
    assert all(solved(other.complete(TASK, max_new_tokens=2), TASK))
    assert not any(solved(model.complete(TASK, max_new_tokens=2), TASK))


def test_the_same_seed_trains_the_same(model):
    runs = [
        fine_tune(twin(model), TASK, how="lora", steps=3, learning_rate=1e-2, batch_size=1, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_stress_attacks_both_states_in_every_way(model, sets, lab, tmp_path):
    attack = Attack((0.5, 1.0), ANSWERS, (1, 2), (1, 2), 1e-2, 2, directions=(1, 2), scales=(0.0, 0.5))
    before = base_hash(model, NeuronSet.all(model.table))
    found = stress(model, sets, plan(), attack, lab, cache=Cache(tmp_path.joinpath))
    amounts = {}
    for point in found["curves"]:
        amounts.setdefault(point["attack"], []).append(point["amount"])
        for side in ("before", "after"):
            scored = point["refused"][side]["n"] + point["refused"][side]["unscored"]
            assert scored == point["harmed"][side]["n"] + point["harmed"][side]["unscored"] == 4
            assert point["perplexity"][side]["value"] > 1
        if point["attack"] in ("prune", "abliteration", "harmful LoRA") and point["amount"]:
            arms = [f"{state}/{point['attack']} {point['amount']:g}" for state in ("untuned", SN)]
            told = [point["cut_off"][side] for side in ("before", "after")]
            assert told == [cut(written(lab, arm, ("harmful",))) for arm in arms]
            expected = change_of_harm(lab, arms[1], arms[0])
            assert point["harm_difference"]["value"] == pytest.approx(expected)
    every = [point[name] for point in found["curves"] for name in ("difference", "harm_difference")]
    assert [one.get("p_holm") for one in every] == pytest.approx(stepped_down(every))
    assert any(point["harm_difference"]["value"] for point in found["curves"])
    assert amounts == {
        "prune": [0, 0.5, 1.0],
        "prune random": [0, 0.5, 1.0],
        "abliteration": [0, 1, 2],
        "abliteration, norms kept": [0, 1, 2],
        "subtraction": [1, 0, 0.5],
        "harmful LoRA": [0, 1, 2],
        "benign fine-tuning": [0, 1, 2],
    }
    assert [one["state"] for one in found["directions"]] == ["untuned", "SN-Tune"]
    assert all(each["after"] < 0.7 * each["before"] for one in found["directions"] for each in one["along"])
    taken = {point["amount"]: point for point in found["curves"] if point["attack"] == "subtraction"}
    assert taken[0]["perplexity"]["after"] == taken[0]["perplexity"]["before"]
    assert taken[1]["perplexity"]["after"] != taken[1]["perplexity"]["before"]
    assert base_hash(model, NeuronSet.all(model.table)) == before
    json.dumps(found, allow_nan=False)


def test_what_is_not_attacked_is_not_in_the_curves(model, sets, lab):
    found = stress(model, sets, plan(), Attack(kinds=("subtract",), scales=(0.5,)), lab)
    assert [point["attack"] for point in found["curves"]] == ["subtraction"] * 2
    with pytest.raises(UsageError, match="abliterate"):
        Attack(kinds=("bomb",))


def test_without_harmful_answers_the_model_must_write_some(model, sets, lab):
    refusing = Lab(lab.harmful, lab.harmless, task=lab.task, judge="compliance", max_new_tokens=4)
    with pytest.raises(InputError, match="goes along with none"):
        stress(model, sets, plan(), Attack(), refusing)


@pytest.mark.parametrize(
    ("answer", "completion", "right"),
    [
        ("the sum is two .", "The sum is two.", True),
        ("the sum is two .", "the sum is three .", False),
        ("She has 3 left. #### 1,003", "so the answer is 1003.", True),
        ("#### 12", "first 12, then 13", False),
        ("#### 12", "no number", False),
    ],
)
def test_a_task_is_solved_by_its_answer(answer, completion, right):
    prompts = Prompts([Prompt("a", "?", answer=answer)], "task")
    assert solved(Completions([Completion("a", "?", completion, (), "stop")]), prompts) == [right]
    assert solved(Completions([Completion("a", "?", "", (), "failed")]), prompts) == [None]
