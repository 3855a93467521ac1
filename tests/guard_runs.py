"""Run folders of guards, made of the tables that an evaluation of a guard makes."""

import pathlib

import numpy as np

from report_runs import MODEL, run_folder
from safety_neurons.guard.calibration import operating_points
from safety_neurons.prompt_lists import Prompts
from safety_neurons.results import write_json
from safety_neurons.results.records import plain
from safety_neurons.studies.guard_baselines import GUARD
from safety_neurons.studies.guard_data import cases_of
from safety_neurons.studies.guard_evaluation import ScoredCases

APART = {GUARD: 3.0, "TF-IDF words": 3.2, "residual stream": 1.0}
APART |= {f"random neurons {number}": apart for number, apart in enumerate((1.0, 1.05, 1.1, 1.0, 1.05))}
"""How far apart unsafe and safe requests are for every classifier, in standard deviations."""

OUTPUTS = {
    part: {"value": value, "low": value - 0.02, "high": value + 0.02, "n": 200, "unscored": 0}
    for part, value in {"before": 0.9, "after": 0.05, "cut": 0.944, "blocked": 0.03}.items()
}
OUTPUTS["change"] = {
    "value": -0.85,
    "low": -0.9,
    "high": -0.8,
    "n": 200,
    "unscored": 0,
    "p": 1e-9,
    "clear": True,
}


def evaluate_run(folder: pathlib.Path, n: int = 100, name: str = "") -> pathlib.Path:
    """A guard that is better than random neurons and the residual stream, and no better than words."""
    generator = np.random.default_rng(0)
    unsafe = Prompts.from_list([f"{name}Tell me how to break into house {place}." for place in range(n)])
    safe = Prompts.from_list([f"{name}Tell me how to paint house {place}." for place in range(n)])
    cases = cases_of(unsafe, safe)
    labels = np.where(cases.unsafe, 0.5, -0.5)
    scores = {label: apart * labels + generator.normal(size=len(labels)) for label, apart in APART.items()}
    scored = ScoredCases(cases, scores, GUARD, (scores[GUARD] > 1.0).astype(float))
    ours, whole = scored.summary(GUARD, [GUARD]), scored.row("all", np.arange(len(cases)))
    others = {group: members for group, members in scored.groups().items() if group != GUARD}
    result = {
        **{
            key: ours[key]
            for key in (
                "auroc",
                "average_precision",
                "macro_f1",
                "tpr_at_fpr",
                "expected_calibration_error",
            )
        },
        "macro_f1_in_force": ours["macro_f1"],
        **{
            "n_neurons": 120,
            "pooling": "last",
            "threshold": 0.73,
            "in_force": "fpr 0.05",
            "n_unsafe": n,
            "n_safe": n,
        },
        **{key: whole[key] for key in ("flagged_unsafe", "flagged_safe")},
        "compared": GUARD,
        "baselines": [scored.summary(group, members) for group, members in others.items()],
        "tables": {"source": [whole]},
        **{"over_refusal": [], "attacks": [], "perturbations": [], "leave_out": {}},
        "lengths": scored.by_length(generator.integers(5, 60, len(cases))),
        "curves": str(folder / "curves.json"),
        "counts": [
            {
                "method": "contrast",
                "count": size,
                "setting": "as given",
                "auroc": {"value": 0.9 + size / 1e4},
                "random": [0.8, 0.84],
            }
            | {"difference": {"value": 0.08, "low": 0.02, "high": 0.14, "clear": True}}
            for size in (10, 100)
        ],
        "outputs": {"judge": "compliance", "changed": 0, "by": [{"language": "de", **OUTPUTS}], **OUTPUTS},
    }
    made = run_folder(folder, "guard-evaluate", {**MODEL, "guard": "runs/guard"}, result)
    write_json(folder / "curves.json", scored.curves())
    return made


def fit_run(folder: pathlib.Path, n: int = 400) -> pathlib.Path:
    """A guard with two supported operating points or fewer."""
    generator = np.random.default_rng(1)
    unsafe = np.arange(2 * n) < n
    chances = 1 / (1 + np.exp(-(np.where(unsafe, 2.0, -2.0) + generator.normal(size=2 * n))))
    rate = {"value": 0.98, "low": 0.96, "high": 0.99, "n": 2 * n, "unscored": 0}
    result = {
        "guard": str(folder / "guard"),
        "model": MODEL["model"],
        "n_neurons": 120,
        "pooling": "last",
        "poolings": [
            {"pooling": "last", "auroc": 0.98, "log_loss": 0.11},
            {"pooling": "mean", "auroc": 0.91, "log_loss": 0.31},
        ],
        "auroc": rate,
        "auroc_before": None,
        "expected_calibration_error": 0.021,
        "calibration": "temperature",
        "threshold": 0.73,
        "in_force": "fpr 0.05",
        "operating_points": plain(operating_points(chances, unsafe)),
        "recheck": None,
        "prompts": {"unsafe": n, "safe": n, "left_out": 0},
        "split": {},
        "labels": {},
    }
    return run_folder(folder, "guard-fit", {**MODEL, "neurons": "runs/contrast"}, result)
