"""Whether a tuning achieved what it is for: every way of not doing so, what is said of it, and a gate on it."""

import pytest

from safety_neurons.errors import UsageError
from safety_neurons.results import Gate, paired_difference, rate
from safety_neurons.studies.achieving import LEAST_GAIN, MOST_OVER_REFUSAL, MOST_PERPLEXITY, tuning_achievement, tuning_over_seeds
from safety_neurons.studies.arms import Arm


def arm(harmful, harmless, perplexity=10.0, n=100, divergence=0.04):
    verdicts = {name: tuple(place < round(share * n) for place in range(n)) for name, share in (("a", harmful), ("b", harmless))}
    return Arm("arm", rate(verdicts["a"]), rate(verdicts["b"]), perplexity, divergence, verdicts["a"], verdicts["b"])


def found(before, after, sound=None):
    change, harmless = (paired_difference(getattr(after, kind), getattr(before, kind)) for kind in ("harmful", "harmless"))
    return tuning_achievement(before, after, change, harmless, sound=sound)


@pytest.mark.parametrize(
    ("after", "sound", "why"),
    [
        (arm(0.0, 0.0), None, "rise by 0 points"),
        (arm(0.03, 0.0), None, "at least 5 points were expected"),
        (arm(0.9, 0.23), None, "refusals of harmless requests rise by 23 points"),
        (arm(0.9, 0.0, 40.0), None, "4.0 times what it was"),
        (arm(0.9, 0.0, float("inf")), None, "inf times"),
        (arm(0.9, 0.0), False, "no state of the training was sound"),
    ],
)
def test_a_tuning_that_moved_nothing_or_broke_something_did_not_achieve_it(after, sound, why):
    told = found(arm(0.0, 0.0), after, sound)
    assert not told.achieved
    assert why in told.why
    assert "\n" not in told.why


def test_everything_that_failed_is_said():
    told = found(arm(0.0, 0.0), arm(0.0, 0.3, 80.0))
    assert told.why.count(";") == 2


def test_a_gain_at_an_allowed_price_achieved_it():
    told = found(arm(0.1, 0.02), arm(0.9, 0.02 + MOST_OVER_REFUSAL, MOST_PERPLEXITY * 10.0), True)
    assert told.record() == {"achieved": True, "why": told.why}
    assert "80 points" in told.why


def test_nothing_scored_is_not_achieved():
    nothing = Arm("arm", rate([None] * 4), rate([None] * 4), None, None, (None,) * 4, (None,) * 4)
    assert "no harmful request was scored" in found(nothing, nothing).why


def test_studies_say_it_of_every_arm():
    assert not tuning_over_seeds({"value": 0.5}, {"value": 0.5 - LEAST_GAIN / 2}).achieved
    assert tuning_over_seeds({"value": 0.9}, {"value": 0.1}).achieved
    assert not tuning_over_seeds({"value": None}, {"value": 0.1}).achieved


def test_a_gate_can_require_it():
    gate = Gate.of({"achieved": True})
    assert gate.check({"achieved": True, "why": "so"}) == []
    assert gate.check({"achieved": False, "why": "nothing moved"}) == ["achieved: no (nothing moved)"]
    assert "not told" in gate.check({"untreated": {"suites": [], "capability": []}})[0]
    assert "not measured by this run" in Gate.of({"harm": 0.1, "achieved": True}).check({"achieved": True, "why": ""})[0]
    with pytest.raises(UsageError, match="true or false"):
        Gate.of({"achieved": "yes"})
