"""The section on studies around tuning."""

import numpy as np
import pytest

from report_runs import MODEL, run_folder, table
from safety_neurons.errors import InputError
from safety_neurons.neurons import NeuronSet
from safety_neurons.prompt_lists import Prompt, Prompts
from safety_neurons.report import write_report
from safety_neurons.studies.attacks import Attack, stress_summary
from safety_neurons.studies.lasting import ARMS, Plan, Sets, summary

SEEDS = (0, 1, 2)


@pytest.fixture
def sets():
    safety = NeuronSet({"layers.0.up": [1, 2, 3], "layers.1.down": [4]}, table())
    return Sets(
        safety, NeuronSet({"layers.0.up": [3]}, table()), NeuronSet({"layers.0.up": [1, 2, 5]}, table()), 1
    )


@pytest.fixture
def plan():
    prompts = Prompts([Prompt("0", "how ?", answer="so .")])
    return Plan(prompts, prompts, prompts, seeds=SEEDS)


def drawn(share, seed, n=40):
    return [bool(value) for value in np.random.default_rng(seed).random(n) < share]


def attacked(share, seed):
    verdicts = drawn(share, seed)
    others = {"refused": [not one for one in verdicts], "harmed": verdicts, "perplexity": 3.5}
    return {"harmful": verdicts, "harmless": [], "task": [], **others}


@pytest.fixture
def rsn_run(tmp_path, sets, plan):
    done = {}
    for place, arm in enumerate(ARMS):
        for seed in SEEDS:
            points = {
                when: {
                    "harmful": drawn(share, seed + 7 * place),
                    "harmed": drawn(share / 2, seed + 7 * place),
                    "harmless": drawn(0.95, seed),
                    "task": drawn(0.8, seed),
                    "perplexity": 3.5,
                }
                for when, share in (("before", 0.1), ("after", 0.2 * place))
            }
            done[f"{arm}/{seed}"] = {**points, "trained_parameters": 100, "steps": 9}
    return run_folder(tmp_path / "rsn", "study-rsn", MODEL, summary(done, plan, sets))


def test_arms_stand_beside_one_another_with_their_intervals(rsn_run, tmp_path):
    page = write_report([rsn_run], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Does tuned safety last?" in page
    for arm in ARMS:
        assert arm in page
    assert "RSN-Tune - SN-Tune" in page
    assert "Other runs" not in page


def test_attacks_are_a_table(tmp_path, sets, plan):
    curves = {
        "prune": [0, 0.5],
        "prune random": [0, 0.5],
        "abliteration": [0, 4],
        "abliteration, norms kept": [0, 4],
        "subtraction": [1, 0.5],
        "harmful LoRA": [0, 10],
        "benign fine-tuning": [0, 100],
    }
    done = {
        f"{state}/{seed}": {
            "curves": {
                name: [[amount, attacked(share + amount / 500, seed)] for amount in amounts]
                for name, amounts in curves.items()
            },
            "task": [],
            "abliteration": {
                "layer": 1,
                "divergence": 0.01,
                "along": [{"attack": "abliteration", "directions": 4, "before": 0.3, "after": 0.0}],
            },
        }
        for state, share in (("untuned", 0.7), ("SN-Tune", 0.1))
        for seed in SEEDS
    }
    folder = run_folder(
        tmp_path / "stress", "study-stress", MODEL, stress_summary(done, sets, plan, Attack())
    )
    page = write_report([folder], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "harmful LoRA" in page
    assert "benign fine-tuning" in page
    assert "abliteration, norms kept" in page
    assert "tuned harms" in page
    assert "Directions that abliteration took out" in page


def test_a_damaged_record_is_named(tmp_path):
    folder = run_folder(tmp_path / "rsn", "study-rsn", MODEL, {"arms": 3})
    with pytest.raises(InputError, match="study-rsn"):
        write_report([folder], tmp_path / "report.html")
