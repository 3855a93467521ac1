"""A kill after any amount of work costs at most ten seconds of it, in every detector that keeps a state, by a
clock of the test's own.
"""

import inspect
import os
import pickle
import warnings

import numpy as np
import pytest
import twins

import safety_neurons as sn
from safety_neurons.model import LanguageModel, ranks
from safety_neurons.model.language_model import LEFT_OUT, UNKNOWN
from safety_neurons.prompt_lists import Prompts
from safety_neurons.results import Checkpoint

SECONDS = 0.4
"""What a forward pass takes, by the test's clock."""
WORDS = ("red", "green", "blue", "small", "large", "water")
PROMPTS = Prompts.from_list(
    [f"tell me about the {word} tree {'please ' * (n % 3)}" for n, word in enumerate(WORDS)]
)
MORE = Prompts.from_list([f"write {word} words about a {other} tree" for word in WORDS for other in WORDS])
HARMLESS = Prompts.from_list([f"write a story about {word}" for word in WORDS[:2]])

FINDERS = {
    "activation_magnitude": lambda base, _, **kept: sn.find_activation_magnitude(base, PROMPTS, **kept),
    "attribution": lambda base, _, **kept: sn.find_attribution(base, PROMPTS, integrated=2, **kept),
    "attribution_patching": lambda base, aligned, **kept: sn.find_attribution_patching(
        base, aligned, PROMPTS, midpoints=2, **kept
    ),
    "cna": lambda base, _, **kept: sn.find_cna(base, PROMPTS, harmless=MORE, general=MORE, **kept),
    "contrast": lambda base, aligned, **kept: sn.find_contrast(
        base, aligned, PROMPTS, max_new_tokens=12, **kept
    ),
    "effect_size": lambda base, _, **kept: sn.find_effect_size(
        base, PROMPTS, harmless=HARMLESS, positions="completion", max_new_tokens=8, **kept
    ),
    "heads": lambda base, _, **kept: sn.find_heads(base, PROMPTS, **kept),
    "importance": lambda base, _, **kept: sn.find_importance(base, PROMPTS, agreement=0.5, **kept),
    "importance, specific": lambda base, _, **kept: sn.find_importance(
        base, PROMPTS, minus={"harmless": HARMLESS, "general": MORE[:6]}, **kept
    ),
    "importance_contrast": lambda base, aligned, **kept: sn.find_importance_contrast(
        base, aligned, PROMPTS, **kept
    ),
    "mask": lambda base, aligned, **kept: sn.find_mask(
        base, aligned, PROMPTS, harmless=HARMLESS, rounds=3, **kept
    ),
    "probe": lambda base, _, **kept: sn.find_probe(base, PROMPTS, harmless=MORE, **kept),
    "probe_weights": lambda base, _, **kept: sn.find_probe_weights(base, PROMPTS, harmless=MORE, **kept),
    "refusal_direction": lambda base, _, **kept: sn.find_refusal_direction(
        base, PROMPTS, harmless=MORE, **kept
    ),
    "relp": lambda base, _, **kept: sn.find_relp(base, PROMPTS, **kept),
    "snip": lambda base, _, **kept: sn.find_snip(base, PROMPTS, harmless=HARMLESS, sites=["down"], **kept),
    "swap_attribution": lambda base, aligned, **kept: sn.find_swap_attribution(
        base, aligned, PROMPTS, **kept
    ),
    "wanda": lambda base, _, **kept: sn.find_wanda(base, PROMPTS, harmless=HARMLESS, sites=["down"], **kept),
}


SECONDS_LONG = {"weight_change", "weight_magnitude"}
"""They look at weights alone."""


NEEDS_A_MIXTURE = {"routing"}
"""In test_routing.py."""


class Killed(BaseException):
    """The process is gone."""


class Machine:
    """Counts the passes of models, lets each take its time, and dies in the middle of one."""

    def __init__(self, *models: LanguageModel) -> None:
        self.passes, self.dies_at = 0, None
        self._handles = [lm.anatomy.layers[0].module.register_forward_pre_hook(self._passed) for lm in models]

    def _passed(self, *_) -> None:
        self.passes += 1
        if self.passes == self.dies_at:
            raise Killed

    def now(self) -> float:
        return self.passes * SECONDS

    def off(self) -> None:
        for handle in self._handles:
            handle.remove()


class Disk(Checkpoint):
    """A checkpoint to which a dead process writes nothing."""

    def __init__(self, path, machine) -> None:
        super().__init__(path, clock=machine.now)
        self.machine = machine

    def save(self, arrays, state) -> None:
        if self.machine.dies_at is None or self.machine.passes < self.machine.dies_at:
            super().save(arrays, state)


@pytest.fixture(scope="module")
def pair():
    return twins.separate(num_hidden_layers=1, hidden_size=16, intermediate_size=24)


@pytest.fixture
def machine(pair):
    made = Machine(*pair)
    yield made
    made.off()


def test_every_detector_that_takes_a_checkpoint_is_here():
    takes = {
        name.removeprefix("find_")
        for name in sn.__all__
        if name.startswith("find_") and "checkpoint" in inspect.signature(getattr(sn, name)).parameters
    }
    assert takes == {name.split(",")[0] for name in FINDERS} | SECONDS_LONG | NEEDS_A_MIXTURE


@pytest.mark.parametrize("name", FINDERS)
def test_a_kill_costs_at_most_ten_seconds(pair, machine, name, tmp_path):
    options = {"batch_size": 1}
    whole = FINDERS[name](*pair, **options)
    total = machine.passes
    for share in (0.8,):
        machine.passes, machine.dies_at = 0, int(share * total)
        path = tmp_path / f"{share}.safetensors"
        with pytest.raises(Killed):
            FINDERS[name](*pair, checkpoint=Disk(path, machine), **options)
        machine.passes, machine.dies_at = 0, None
        again = FINDERS[name](*pair, checkpoint=Disk(path, machine), **options)
        assert (int(share * total) + machine.passes - total) * SECONDS <= 10
        assert again.neurons == whole.neurons
        assert again.prompts == whole.prompts
        for key, scores in whole.scores.items():
            np.testing.assert_array_equal(again.scores[key], scores)
        path.unlink()


SETTLING = {
    name: lambda base, aligned, name=name, **kept: getattr(sn, f"find_{name}")(
        base, aligned, PROMPTS, settle=0.9, top=0.3, **kept
    )
    for name in ("attribution_patching", "swap_attribution")
}


def by_turns(numbers, work):
    """`ranks.shared` where every second piece of work is done by another process."""
    for number in numbers:
        if number % 2 == 0:
            yield work(number)
            continue
        read, write = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            try:
                with os.fdopen(write, "wb") as pipe:
                    pickle.dump(work(number), pipe)
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            done = pickle.load(pipe)
        os.waitpid(child, 0)
        yield done


@pytest.mark.parametrize("name", [*FINDERS, *(f"{name}, settling" for name in SETTLING)])
def test_what_a_process_leaves_of_its_share_is_in_what_it_gives(pair, name, monkeypatch):
    """Notes too: in each process they are of all batches."""
    find = SETTLING[name.partition(",")[0]] if name.endswith("settling") else FINDERS[name]
    whole = find(*pair, batch_size=1)
    monkeypatch.setattr(ranks, "shared", by_turns)
    found = find(*pair, batch_size=1)
    assert (found.neurons, found.prompts, found.notes) == (whole.neurons, whole.prompts, whole.notes)
    for key, scores in whole.scores.items():
        np.testing.assert_array_equal(found.scores[key], scores)
    assert not name.endswith("settling") or "points of the path were taken" in " ".join(found.notes)


def test_saving_takes_at_most_a_tenth_of_the_time(tmp_path):
    time = [0.0]
    checkpoint = Checkpoint(tmp_path / "c", clock=lambda: time[0])
    assert not checkpoint.due
    time[0] = 5.0
    assert checkpoint.due
    checkpoint._cost = 2.0
    assert not checkpoint.due
    time[0] = 20.0
    assert checkpoint.due
    checkpoint.save({}, {})
    assert not checkpoint.due


@pytest.mark.parametrize("name", FINDERS)
def test_prompts_that_are_not_read_whole_are_counted_and_said_by_every_method(pair, name, monkeypatch):
    long = Prompts.from_list([f"{prompt.text} 炸弹 {'please ' * 60}" for prompt in PROMPTS])
    monkeypatch.setitem(globals(), "PROMPTS", long)
    monkeypatch.setattr(LanguageModel, "max_length", 40)
    found = FINDERS[name](*pair, batch_size=3)
    assert found.prompts.truncated == 6
    for what in (LEFT_OUT, f"prompts {UNKNOWN}"):
        assert any(note.endswith(f"6 of 6 {what}") for note in found.notes), found.notes
