"""What is found of a sweep of factors."""

from safety_neurons.display.doses import scale_findings
from safety_neurons.display.parts import ReportedRun

NOTHING = {"value": None, "low": None, "high": None, "n": 0, "unscored": 0}
SAME = {"value": 0.0, "low": -0.4, "high": 0.4, "n": 8, "unscored": 0}


def dose(factor: float) -> dict[str, object]:
    return {"factor": factor, "treated": {}, "random": [], "change": SAME, "change_against_random": NOTHING}


def said(*factors: float) -> str:
    result = {
        "n_neurons": 5,
        "doses": [dose(factor) for factor in factors],
        "untreated": {},
        "notes": [],
        "overlap_with_find_prompts": {},
    }
    return " ".join(str(one.text) for one in scale_findings(ReportedRun.of("verify-scale", result)))


def test_the_model_as_it_is_is_no_finding_and_the_largest_factor_costs_wherever_it_stands():
    assert "Multiplied by 2," in said(1, 2)
    assert "Multiplied by 4," in said(4, 1)
    assert "At factor 4," in said(4, 1)
    assert "Multiplied by 1," in said(1)
