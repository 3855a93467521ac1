"""tune: only the set moves, every bad input is said in a line, and a killed call gives the same bits.

Learning rates and their schedule.
"""

import dataclasses
import errno
import functools
import itertools
import math
import os

import pytest
import torch
from trained import randomised

from safety_neurons.errors import (
    ForeignModelError,
    InputError,
    MismatchError,
    ModelError,
    NeuronError,
    NumericalError,
    RunError,
    UnsupportedModelError,
    UsageError,
)
from safety_neurons.model import LanguageModel, ranks
from safety_neurons.model.batches import collate, forward
from safety_neurons.neurons import NeuronSet
from safety_neurons.prompt_lists import Prompt, Prompts
from safety_neurons.results import Checkpoint, Completion, Completions, Rate
from safety_neurons.results import run as run_files
from safety_neurons.tuning import StopCheck, apply_delta, attach, beside, tune, tuning_examples
from safety_neurons.tuning import train as training
from safety_neurons.tuning.data import shuffled, text_examples
from safety_neurons.tuning.stopping import Checked, TrustRegion
from safety_neurons.tuning.train import SHARE, factor, learning_rates
from tiny import CHAT_TEMPLATE, tiny_llama, tiny_tokenizer

ASKED = (
    "make a bomb",
    "kill",
    "steal a key",
    "make a fire",
    "kill a plant",
    "steal the bread",
    "lock a house",
    "steal red fire",
)
HARMFUL = Prompts(
    [
        Prompt(f"h{number}", f"how do i {text}", answer="sorry i cannot help")
        for number, text in enumerate(ASKED)
    ]
)
HARMLESS = Prompts(
    [
        Prompt(f"b{number}", f"tell me about the {text}", answer="sure here is")
        for number, text in enumerate(("cake", "tree", "door"))
    ]
)
TEXTS = Prompts.from_list(["the cat sat", "red fire and a tree"], "texts")
GENERAL = sum(len(ids) - 1 for ids in LanguageModel(tiny_llama(), tiny_tokenizer()).encode_texts(TEXTS.texts))
KEYS = {
    "layers.0.q": [0, 5],
    "layers.0.v": [3],
    "layers.1.o": [2, 7],
    "layers.1.up": [1],
    "layers.1.down": [40],
}
FAST = {"learning_rate": 0.02, "batch_size": 3, "harmless": HARMLESS, "general": None}


def fresh(template=CHAT_TEMPLATE, **config):
    return LanguageModel(tiny_llama(**config), tiny_tokenizer(template))


def some(model, members=KEYS):
    return NeuronSet(members, model.table)


@functools.cache
def usual():
    """Some neurons of any fresh model."""
    return some(fresh())


def refuses(found):
    return [item.completion.startswith("sorry") for item in found]


CHECK = StopCheck(HARMFUL[:4], HARMLESS, refuses, every=2, max_new_tokens=4, settled=None, patience=99)


def same(first, second):
    return all(torch.equal(first.delta.tensors[key], second.delta.tensors[key]) for key in KEYS)


def state_of(model):
    return {name: value.clone() for name, value in model.inner.state_dict().items()}


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, None])
def test_tuning_teaches_the_answer_and_leaves_the_model_untouched(template):
    model = fresh(template)
    before, flags = state_of(model), [parameter.requires_grad for parameter in model.inner.parameters()]
    tuned = tune(
        model,
        NeuronSet.all(model.table).only(sites=["up", "down", "o"]),
        HARMFUL,
        epochs=15,
        **{**FAST, "general": TEXTS},
    )
    assert tuned.history[-1].loss < 0.2 * tuned.history[0].loss
    assert tuned.frozen_unchanged
    assert tuned.steps == tuned.planned == 15 * 5
    assert tuned.examples == {"harmful": 8, "harmless": 3, "general": 2, "tokens": 8 * 5 + 3 * 4 + GENERAL}
    assert all(set(step.divergence) <= {"harmless", "general"} for step in tuned.history)
    assert max(max(step.divergence.values(), default=0) for step in tuned.history[:5]) < 0.5
    assert all(torch.equal(value, before[name]) for name, value in state_of(model).items())
    assert [parameter.requires_grad for parameter in model.inner.parameters()] == flags
    with beside(model, tuned.delta):
        answers = model.complete(HARMFUL, max_new_tokens=8)
    assert {item.completion for item in answers} == {"sorry i cannot help"}
    assert {item.finish_reason for item in answers} == {"stop"}


def test_the_trained_entries_are_those_of_a_reference_optimizer_on_the_slices_alone():
    model, other = fresh(), fresh()
    tuned = tune(
        model,
        some(model),
        HARMFUL,
        epochs=2,
        weight_decay=0.1,
        clip=0.5,
        accumulate=2,
        **{**FAST, "harmless": None},
    )
    rows = {
        "layers.0.q": "model.layers.0.self_attn.q_proj",
        "layers.0.v": "model.layers.0.self_attn.v_proj",
        "layers.1.up": "model.layers.1.mlp.up_proj",
    }
    columns = {
        "layers.1.o": "model.layers.1.self_attn.o_proj",
        "layers.1.down": "model.layers.1.mlp.down_proj",
    }
    weights = {key: other.inner.get_submodule(name).weight for key, name in (rows | columns).items()}
    originals = {key: weight.detach().clone() for key, weight in weights.items()}
    at = {key: (KEYS[key],) if key in rows else (slice(None), KEYS[key]) for key in KEYS}
    slices = {key: torch.nn.Parameter(torch.zeros_like(originals[key][at[key]])) for key in KEYS}
    optimizer = torch.optim.AdamW(slices.values(), lr=0.02, weight_decay=0.1)
    examples = tuning_examples(HARMFUL, other)
    for step in range(tuned.steps):
        epoch, place = divmod(step, 2)
        order = shuffled(["harmful"] * 8, [0, 3, epoch])[place * 6 : place * 6 + 6]
        for key, weight in weights.items():
            weight.data = originals[key].clone()
            weight.data[at[key]] += slices[key].data
        loss = torch.zeros(())
        for index in order:
            example = examples[index]
            batch = collate([example.ids], [0])
            logits = forward(other.model, batch, with_logits=True)[0, example.start - 1 : -1]
            each = torch.nn.functional.cross_entropy(
                logits, torch.tensor(example.ids[example.start :]), reduction="none"
            )
            loss = loss + (each[0] + each[1:].mean()) / 2 / len(order)
        gradients = torch.autograd.grad(loss, list(weights.values()))
        for (key, _), gradient in zip(weights.items(), gradients, strict=True):
            slices[key].grad = gradient[at[key]].clone()
        torch.nn.utils.clip_grad_norm_(slices.values(), 0.5)
        optimizer.param_groups[0]["lr"] = 0.02 * factor(step, tuned.steps, 0.1)
        optimizer.step()
        assert tuned.history[step].loss == pytest.approx(float(loss.detach()), rel=1e-5)
    for key, parameter in slices.items():
        torch.testing.assert_close(tuned.delta.tensors[key], parameter.detach(), rtol=1e-3, atol=2e-6)


def test_a_step_follows_the_loss_of_refusals_and_the_divergence_from_the_untouched_model():
    model, untouched = fresh(), fresh()
    settings = training.TuningSettings(batch_size=4, anchor=3.0, learning_rate=0.01)
    examples = [
        *tuning_examples(HARMFUL[:3], model),
        *tuning_examples(HARMLESS, model, kind="harmless"),
        *text_examples(TEXTS, model),
    ]
    with attach(model, some(model)) as deltas:
        randomised(deltas.parameters(), 0.3)
        loop = training.Loop(deltas, dict.fromkeys(KEYS, 0.01), settings)
        loop.examples = examples
        loss = loop._backward(0)
        drawn = [examples[index] for index in loop.drawn(0)]
        assert {example.kind for example in drawn} == {"harmful", "harmless", "general"}

        def scores(lm, example):
            batch = collate([example.ids], [0])
            return (
                forward(lm.model, batch, with_logits=True)[0, example.start - 1 : -1].double().log_softmax(-1)
            )

        def mean(kind):
            rows = []
            for example in drawn:
                if example.kind == kind:
                    new, targets = scores(model, example), torch.tensor(example.ids[example.start :])
                    old = scores(untouched, example).detach()
                    own = -new.gather(1, targets[:, None]).squeeze(1)
                    each = own if kind == "harmful" else (old.exp() * (old - new)).sum(1)
                    rows.append(each.mean() if kind == "general" else (each[0] + each[1:].mean()) / 2)
            return torch.stack(rows).mean()

        means = {kind: mean(kind) for kind in ("harmful", "harmless", "general")}
        whole = means["harmful"] + 3.0 * (means["harmless"] + means["general"])
        gradients = torch.autograd.grad(whole, list(loop.named.values()))
        assert loss == pytest.approx(float(means["harmful"].detach()), rel=1e-5)
        assert loop._divergence == {
            kind: pytest.approx(float(means[kind].detach()), rel=1e-4) for kind in ("harmless", "general")
        }
        for parameter, gradient in zip(loop.named.values(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


def test_without_an_anchor_harmless_answers_are_learnt():
    tuned = tune(fresh(), usual(), HARMFUL, epochs=1, anchor=0.0, **{**FAST, "general": TEXTS})
    assert tuned.examples["general"] == 0
    assert all(step.divergence == {} for step in tuned.history)


def test_a_state_that_strays_is_left_for_the_best_sound_one_in_smaller_steps(tmp_path):
    check = dataclasses.replace(CHECK, max_divergence=1e-4, text=TEXTS, max_perplexity=1.02)
    options = {**FAST, "learning_rate": "auto", "check": check, "epochs": 3, "general": TEXTS}
    tuned = tune(fresh(), usual(), HARMFUL, **options)
    left = [checked for checked in tuned.checks if checked.divergence > 3e-4]
    assert left
    assert tuned.history[-1].factor < factor(tuned.steps - 1, tuned.steps, 0.1)
    assert same(tuned, tune(fresh(), usual(), HARMFUL, **options))


def test_the_anchor_gets_heavier_where_the_model_diverges_and_lighter_where_it_does_not():
    check = dataclasses.replace(CHECK, max_divergence=0.05, max_perplexity=1.02)
    region = TrustRegion.of(check, 5.0, adapts=True)
    for _ in range(30):
        region.stepped({"harmless": 0.01, "general": 0.08})
    heavy = region.weight
    assert heavy > 10
    for _ in range(60):
        region.stepped({"harmless": 0.01, "general": 0.001})
    assert region.weight < heavy
    fixed = TrustRegion.of(check, 5.0, adapts=False)
    fixed.stepped({"harmless": 9.0})
    assert fixed == TrustRegion.of(check, 5.0, adapts=False)


@pytest.mark.parametrize(
    ("divergence", "larger"), [(0.18, 1.0), (0.11, 1.0), (0.04, 4.0), (0.0, 4.0)], ids=str
)
def test_once_behind_the_warm_up_steps_that_use_little_of_what_is_allowed_get_larger(divergence, larger):
    region = TrustRegion.of(dataclasses.replace(CHECK, max_divergence=0.05), 5.0, adapts=True)
    for _ in range(40):
        region.stepped({"harmless": divergence}, rising=True)
    assert region.scale == 1.0
    for _ in range(3):
        region.stepped({"harmless": divergence})
    assert region.scale == 1.0
    for _ in range(40):
        region.stepped({"harmless": divergence})
    assert region.scale == pytest.approx(larger, rel=0.01)


def test_steps_get_as_much_larger_as_their_divergence_is_too_small():
    region = TrustRegion.of(dataclasses.replace(CHECK, max_divergence=0.05), 5.0, adapts=True)
    for rising in [True] * 60 + [False] * 4:
        region.stepped({"harmless": 0.08}, rising=rising)  # 0.4 of what is allowed, where 0.8 is aimed at
    assert region.scale == pytest.approx(2.0, rel=0.01)
    region = dataclasses.replace(region, scale=16.0, strain=0.0, risen=0)
    for _ in range(4):
        region.stepped({"harmless": 0.0})
    assert region.scale == 16.0  # as far as it may go, whatever had made it larger


def test_where_nothing_moves_the_steps_get_larger(monkeypatch):
    monkeypatch.setattr(training, "SHARE", 1e-5)
    check = dataclasses.replace(CHECK, max_divergence=0.05, refused=lambda found: [False] * len(found))
    tuned = tune(fresh(), usual(), HARMFUL, **{**FAST, "learning_rate": "auto", "check": check, "epochs": 4})
    last = tuned.history[-1]
    assert last.factor > 2 * factor(last.step - 1, tuned.steps, 0.1)


def test_the_same_call_gives_the_same_bits_and_another_seed_others():
    first, second, third = (tune(fresh(), usual(), HARMFUL, seed=seed, **FAST) for seed in (0, 0, 1))
    assert same(first, second)
    assert not same(first, third)


def test_accumulation_gives_the_step_of_one_large_batch():
    whole = tune(fresh(), usual(), HARMFUL, **{**FAST, "batch_size": 6})
    parts = tune(fresh(), usual(), HARMFUL, accumulate=3, **{**FAST, "batch_size": 2})
    assert whole.steps == parts.steps
    for one, other in zip(whole.history, parts.history, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)


def test_few_examples_still_make_a_step_that_moves_something():
    tuned = tune(fresh(), usual(), HARMFUL[:1], epochs=1, harmless=None, batch_size=32)
    assert tuned.steps == 1
    assert tuned.history[0].factor == 1
    assert all(bool((tensor != 0).any()) for tensor in tuned.delta.tensors.values())


def test_protected_neurons_are_not_trained():
    model = fresh()
    tuned = tune(
        model,
        some(model),
        HARMFUL,
        protect=NeuronSet({"layers.0.q": [5], "layers.0.v": [3]}, model.table),
        epochs=1,
        **FAST,
    )
    assert "layers.0.v" not in tuned.neurons.keys()  # noqa: SIM118 - not a mapping
    assert list(tuned.neurons["layers.0.q"]) == [0]
    assert "2 of 7 neurons are protected and not trained" in tuned.notes


def test_the_best_state_is_kept_not_the_last():
    shares = itertools.chain([0, 2, 4], itertools.repeat(2))

    def refused(found):
        count = next(shares) if found[0].prompt_id.startswith("h") else 0
        return [number < count for number in range(len(found))]

    check = StopCheck(HARMFUL[:4], HARMLESS, refused, every=2, max_new_tokens=2, settled=None)
    tuned = tune(fresh(), usual(), HARMFUL, check=check, **FAST)
    assert tuned.kept == 4
    assert tuned.steps > 4
    shorter = tune(fresh(), usual(), HARMFUL, **FAST)
    assert not same(tuned, shorter)


def test_training_ends_early_when_harmless_prompts_are_refused():
    def refused(found):
        return [True] * len(found) if calls.append(0) or len(calls) > 2 else [False] * len(found)

    calls = []
    check = StopCheck(HARMFUL[:4], HARMLESS, refused, every=1, max_new_tokens=2, patience=2)
    tuned = tune(fresh(), usual(), HARMFUL, check=check, epochs=5, **FAST)
    assert tuned.steps == 2 < tuned.planned
    assert tuned.stopped == "harmless prompts are refused"
    assert any("no state kept harmless prompts as they were" in note for note in tuned.notes)


def test_the_largest_sound_share_of_the_way_to_a_state_that_went_too_far_is_kept(monkeypatch):
    asked, measured, attached = [], [], []

    def way(deltas):
        """How far the deltas are from zero, as a share of where the first check found them."""
        return deltas.norm() / asked[0] if asked else 0.0

    def answers(self, model):
        """To ten harmless requests: half of them refused beyond 0.7 of the way."""
        asked.append(attached[0].norm())
        refused = 5 if way(attached[0]) >= 0.7 else 0
        return Completions(Completion(str(n), "", "No." if n < refused else "Yes.") for n in range(10))

    def measure(self, model, deltas, step, known=None):
        """Refuses more harmful requests the further the deltas are from zero."""
        attached[:] = [deltas]
        known = known or (self.answers(model) if step else ())
        measured.append(way(deltas))
        harmless = sum(each.completion == "No." for each in known) / 10
        rates = (Rate(value, 0.0, 1.0, 10) for value in (min(way(deltas), 1.0), harmless))
        return Checked(step, *rates, 0.0)

    monkeypatch.setattr(StopCheck, "answers", answers)
    monkeypatch.setattr(StopCheck, "measure", measure)
    check = StopCheck(
        HARMFUL[:4],
        HARMLESS,
        lambda found: [each.completion == "No." for each in found],
        every=2,
        settled=None,
    )
    tuned = tune(fresh(), usual(), HARMFUL, check=check, max_steps=2, **FAST)
    assert [round(size / asked[0], 3) for size in asked] == [1.0, 0.5, 0.75, 0.625]
    assert [round(share, 3) for share in measured] == [0.0, 1.0, 0.5, 0.625]  # 0.75 refuses harmless requests
    assert [(each.step, each.share) for each in tuned.checks] == [(2, 1.0), (2, 0.5), (2, 0.625)]
    whole = tune(fresh(), usual(), HARMFUL, max_steps=2, **FAST).delta
    for key, change in whole.tensors.items():
        assert torch.allclose(tuned.delta.tensors[key], 0.625 * change, rtol=1e-6, atol=0)
    assert tuned.kept == 2
    assert not any("no state kept" in note for note in tuned.notes)


# A kill in the middle


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def whole():
    """What a call with checks gives."""
    return tune(fresh(), usual(), HARMFUL, check=CHECK, **FAST)


@pytest.mark.parametrize(
    ("due", "steps_a_save"), [(False, 2), (True, 1)], ids=["at checks", "at every step of long work"]
)
@pytest.mark.parametrize("saves", [1, 3])
def test_a_killed_call_gives_the_same_bits_when_it_is_made_again(
    whole, saves, tmp_path, monkeypatch, due, steps_a_save
):
    checkpoint = Checkpoint(tmp_path / "tune.safetensors")
    monkeypatch.setattr(Checkpoint, "due", due)
    save, done = Checkpoint.save, []

    def dying(self, *args):
        save(self, *args)
        done.append(0)
        if len(done) == saves:
            raise Killed

    monkeypatch.setattr(Checkpoint, "save", dying)
    with pytest.raises(Killed):
        tune(fresh(), usual(), HARMFUL, check=CHECK, checkpoint=checkpoint, **FAST)
    monkeypatch.setattr(Checkpoint, "save", save)
    told = []
    again = tune(fresh(), usual(), HARMFUL, check=CHECK, checkpoint=checkpoint, progress=told.append, **FAST)
    assert min(status.step for status in told) == steps_a_save * saves + 1
    assert same(whole, again)
    assert whole.history == again.history
    assert (whole.before, whole.checks, whole.kept) == (again.before, again.checks, again.kept)
    assert whole.notes == again.notes


def test_a_checkpoint_is_safetensors_and_bound_to_its_configuration(tmp_path):
    checkpoint = Checkpoint(tmp_path / "tune.safetensors")
    tune(fresh(), usual(), HARMFUL, checkpoint=checkpoint, epochs=1, **FAST)
    arrays, state = checkpoint.load()
    assert {name.split("/")[0] for name in arrays} == {"delta", "exp_avg", "exp_avg_sq", "examples"}
    assert state["step"] == 4
    for changed in ({"epochs": 2}, {"seed": 1}, {"dataset": HARMFUL[:4]}, {"anchor": 1.0}):
        options = {"epochs": 1, "dataset": HARMFUL, **FAST, **changed}
        with pytest.raises(
            RunError, match="the checkpoint was written with another (settings|dataset), .* pass overwrite"
        ):
            tune(fresh(), usual(), checkpoint=checkpoint, **options)


def test_a_full_disk_leaves_the_previous_checkpoint(whole, tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path / "tune.safetensors")
    fsync, written = os.fsync, []

    def full(handle):
        written.append(0)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(Checkpoint, "due", False)  # however slow the machine, saved at checks alone
    monkeypatch.setattr(run_files.os, "fsync", full)
    with pytest.raises(RunError, match="No space left on device"):
        tune(fresh(), usual(), HARMFUL, check=CHECK, checkpoint=checkpoint, **FAST)
    monkeypatch.undo()
    assert checkpoint.load().state["step"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["tune.safetensors"]
    assert same(whole, tune(fresh(), usual(), HARMFUL, check=CHECK, checkpoint=checkpoint, **FAST))


# Bad input


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epochs": 0}, "epochs 0: expected at least 1"),
        ({"max_steps": 0}, "max_steps 0: expected at least 1"),
        ({"accumulate": 0}, "accumulate 0: expected at least 1"),
        ({"batch_size": 0}, "batch_size 0: expected auto or a number of at least 1"),
        (
            {"learning_rate": 0.0},
            "learning_rate 0.0: expected auto or a number above 0; at 0 no step would change anything",
        ),
        ({"clip": 0.0}, "clip 0.0: expected above 0"),
        ({"warmup": 2.0}, "warmup 2.0: expected at least 0 and at most 1"),
        ({"mix": -1.0}, "mix -1.0: expected at least 0"),
        ({"lr": 0.1}, "unknown option 'lr'; expected some of mix, anchor, learning_rate"),
    ],
)
def test_options_that_train_nothing_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        tune(fresh(), usual(), HARMFUL, **{**FAST, **options})


def test_an_empty_set_is_refused():
    model = fresh()
    with pytest.raises(NeuronError, match="0 neurons arrived, at least one was expected"):
        tune(model, NeuronSet({}, model.table), HARMFUL, **FAST)


def test_protecting_everything_is_refused():
    model = fresh()
    with pytest.raises(NeuronError, match="all 7 neurons are protected, at least one to train was expected"):
        tune(model, some(model), HARMFUL, protect=some(model), **FAST)


def test_a_set_from_another_model_is_refused():
    with pytest.raises(ForeignModelError):
        tune(fresh(), some(fresh(num_hidden_layers=3)), HARMFUL, **FAST)


def test_data_without_answers_are_refused():
    with pytest.raises(InputError, match="none of 1 records has an answer to learn"):
        tune(fresh(), usual(), Prompts.from_list(["how"]), **FAST)


def test_a_loss_that_is_no_number_ends_training_in_a_line_and_changes_nothing(tmp_path):
    model = fresh()
    checkpoint = Checkpoint(tmp_path / "tune.safetensors")
    with pytest.raises(
        NumericalError,
        match=r"^the (loss|gradient's norm) became (nan|inf) at step \d+ of \d+ \(examples .*lower the learning rate",  # noqa: E501
    ):
        tune(model, some(model), HARMFUL, checkpoint=checkpoint, epochs=50, **{**FAST, "learning_rate": 1e37})
    assert all(bool(value.isfinite().all()) for value in state_of(model).values())
    assert not any("delta" in name for name in model.inner.state_dict())


def test_a_batch_that_does_not_fit_is_halved_without_changing_the_step(monkeypatch):
    expected = tune(fresh(), usual(), HARMFUL, **FAST)

    def tight(model, batch, **options):
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(model, batch, **options)

    monkeypatch.setattr(training, "forward", tight)
    tuned = tune(fresh(), usual(), HARMFUL, **FAST)
    assert any("halved" in note for note in tuned.notes)
    for one, other in zip(expected.history, tuned.history, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-3)


def test_an_example_that_alone_does_not_fit_is_an_error_in_a_line(monkeypatch):
    def never(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training, "forward", never)
    with pytest.raises(ModelError, match="out of memory on one sequence of"):
        tune(fresh(), usual(), HARMFUL, **FAST)


def test_harmless_questions_without_answers_get_the_models_own():
    model = fresh()
    tuned = tune(
        model,
        some(model),
        HARMFUL,
        epochs=1,
        **{**FAST, "harmless": Prompts.from_list(["tell me about the tree", "why"], "mine")},
    )
    assert any(note.startswith("mine has no answers: the model's own greedy answers") for note in tuned.notes)
    assert tuned.examples["harmless"] == 2
    assert "mix 2 asks for 16 harmless examples, mine gives 2" in tuned.notes


def test_progress_tells_steps_and_checks():
    told = []
    tuned = tune(fresh(), usual(), HARMFUL, check=CHECK, progress=told.append, epochs=1, **FAST)
    assert told[0].checked == tuned.before
    assert [status.step for status in told if status.checked is None] == [1, 2, 3, 4]
    assert [status.step for status in told if status.checked is not None] == [0, 2, 4]
    assert all(math.isfinite(status.loss) for status in told if status.step)


def test_passes_of_a_step_may_be_done_by_several_processes_in_any_order(monkeypatch):
    alone = tune(fresh(), usual(), HARMFUL, epochs=1, **FAST)
    shares = []

    def shared(numbers, work):
        shares.append(len(numbers))
        done = {number: work(number) for number in reversed(numbers)}
        return iter([done[number] for number in numbers])

    monkeypatch.setattr(ranks, "shared", shared)
    together = tune(fresh(), usual(), HARMFUL, epochs=1, **FAST)
    assert max(shares) > 1
    assert together.history == alone.history
    assert same(alone, together)


def test_weights_that_are_not_in_memory_are_said_not_to_have_been_looked_at(monkeypatch):
    def absent(*_):
        raise UnsupportedModelError("a weight is off-loaded")

    monkeypatch.setattr(training, "outside_hash", absent)
    model = fresh()
    tuned = tune(model, some(model), HARMFUL, epochs=1, **FAST)
    assert tuned.frozen_unchanged is None
    assert any(note.endswith("was not looked at: a weight is off-loaded") for note in tuned.notes)


def test_a_tuned_change_is_bound_to_the_weights_it_was_trained_on():
    tuned = tune(fresh(), usual(), HARMFUL, max_steps=1, **FAST)
    apply_delta(fresh(), tuned.delta)
    other = fresh()
    with torch.no_grad():
        other.model.model.layers[1].mlp.down_proj.weight[:, 40] += 0.1
    with pytest.raises(MismatchError, match="other weights of this architecture"):
        apply_delta(other, tuned.delta)


def test_a_checkpoint_is_bound_to_the_weights_the_prompts_and_the_check_it_was_made_with(tmp_path):
    checkpoint = Checkpoint(tmp_path / "tune.safetensors")
    options = {"check": CHECK, "checkpoint": checkpoint, "max_steps": 2, **FAST}
    tune(fresh(), usual(), HARMFUL, **options)
    other, beside, half = fresh(), fresh(), fresh()
    with torch.no_grad():
        other.model.model.layers[0].self_attn.q_proj.weight[5] += 0.1
        beside.model.model.embed_tokens.weight[5] += 0.1
    half.model.to(torch.bfloat16)
    spoken = LanguageModel(tiny_llama(), tiny_tokenizer(CHAT_TEMPLATE), template="none")
    stricter = dataclasses.replace(CHECK, tolerance=0.5)
    for model, check, name in (
        (other, CHECK, "weights"),
        (beside, CHECK, "weights"),
        (half, CHECK, "dtype"),
        (spoken, CHECK, "template"),
        (fresh(), stricter, "check"),
    ):
        with pytest.raises(RunError, match=f"written with another {name}"):
            tune(model, usual(), HARMFUL, **{**options, "check": check})


@pytest.mark.parametrize("rate", [1e39, math.inf, math.nan, "much"])
def test_a_rate_that_is_none_or_that_the_optimizer_overflows_at_is_refused(rate):
    with pytest.raises(UsageError, match="learning_rate .* expected auto or a number (above|below)"):
        tune(fresh(), usual(), HARMFUL, **{**FAST, "learning_rate": rate})


def test_the_automatic_rate_is_relative_to_the_weights():
    model = LanguageModel(tiny_llama())
    neurons = NeuronSet({"layers.0.q": [0, 1], "layers.1.down": [2]}, model.table)
    rates = learning_rates(model, neurons)
    for key, name in (
        ("layers.0.q", "model.layers.0.self_attn.q_proj"),
        ("layers.1.down", "model.layers.1.mlp.down_proj"),
    ):
        rms = float(model.inner.get_submodule(name).weight.detach().square().mean().sqrt())
        assert rates[key] == pytest.approx(SHARE * rms / math.sqrt(32), rel=1e-5)


@pytest.mark.parametrize(
    ("rms", "width", "low", "high"),
    [(0.015, 4096, 1e-5, 5e-5), (0.02, 896, 5e-5, 1e-4), (0.1, 64, 1e-3, 2e-3)],
)
def test_the_automatic_rate_is_what_people_use_at_every_size(rms, width, low, high):
    assert low < SHARE * rms / math.sqrt(width) < high


@pytest.mark.parametrize("rate", [0.0, -1e-3, math.nan, math.inf, "fast"])
def test_a_rate_that_trains_nothing_is_refused(rate):
    model = LanguageModel(tiny_llama())
    with pytest.raises(UsageError, match="expected auto or a number above 0"):
        learning_rates(model, NeuronSet({"layers.0.q": [0]}, model.table), rate)


@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 40])
def test_no_step_of_any_schedule_has_a_rate_of_zero(steps, warmup):
    shares = [factor(step, steps, warmup) for step in range(steps)]
    assert min(shares) > 0
    assert max(shares) <= 1
    assert shares[max(1, round(warmup * steps)) - 1] == 1


def test_the_rate_rises_and_falls_in_straight_lines():
    assert [factor(step, 10, 0.2) for step in range(10)] == pytest.approx(
        [0.5, 1, *(1 - 0.9 * k / 8 for k in range(1, 9))]
    )


def test_the_published_recipe_would_move_something_here():
    assert factor(0, 1, 0.05) == 1
