"""How often the 95 % intervals cover, and how often "clear" is wrong, by simulation: `python
benchmarks/coverage.py`.

Writes `benchmarks/results/coverage.json`; docs/statistics.md holds the table. About two minutes on one core,
seeded.
"""

import argparse
import functools
import itertools
import json
import pathlib
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.stats

from safety_neurons.results import (
    Estimate,
    against_random,
    causal_effect,
    cohen_kappa,
    difference_over_seeds,
    paired_difference,
    rate,
    rate_over_seeds,
)

RESULTS = pathlib.Path(__file__).parent / "results" / "coverage.json"
TRUTHS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.98, 0.99, 1.0)
Cell = dict[str, Any]


def chances(logits: np.ndarray) -> np.ndarray:
    """Probabilities of log-odds."""
    return 1 / (1 + np.exp(-logits))


def covers(found: Estimate, truth: float) -> bool:
    """Whether the interval holds the truth."""
    return (
        found.low is not None and found.high is not None and found.low - 1e-12 <= truth <= found.high + 1e-12
    )


def rates(n: int, _draws: int) -> list[Cell]:
    """Exactly: every number of successes weighted by its probability."""
    ends = [(found.low, found.high) for found in (rate([1] * yes + [0] * (n - yes)) for yes in range(n + 1))]
    low, high = np.array(ends, float).T
    weights = (scipy.stats.binom.pmf(np.arange(n + 1), n, truth) for truth in np.linspace(0, 1, 201))
    return [
        {"truth": float(truth), "coverage": float(part[(low <= truth) & (truth <= high)].sum())}
        for truth, part in zip(np.linspace(0, 1, 201), weights, strict=True)
    ]


def samples_of_prompts(n: int, draws: int) -> list[Cell]:
    """Outcomes between 0 and 1: the mean of three samples of a prompt, prompts alike or not."""
    generator, cells = np.random.default_rng([n, 1]), []
    for truth, alike in itertools.product((0.01, 0.05, 0.3, 0.5, 0.95), (0.1, 1.0, 30.0)):
        prompts = generator.beta(truth * alike, (1 - truth) * alike, (draws, n))
        inside = sum(covers(rate(row / 3), truth) for row in generator.binomial(3, prompts))
        cells.append({"truth": truth, "alike": alike, "coverage": inside / draws})
    return cells


def differences(n: int, draws: int) -> list[Cell]:
    """Pairs of shares and how far the two go together.

    The interval depends on how many prompts changed either way.
    """

    @functools.cache
    def ends(gained: int, lost: int) -> tuple[float, float]:
        found = paired_difference(
            [1] * gained + [0] * lost + [0] * (n - gained - lost),
            [0] * gained + [1] * lost + [0] * (n - gained - lost),
        )
        return found.low or 0.0, found.high or 0.0

    generator, cells = np.random.default_rng([n, 2]), []
    for first, second, together in itertools.product(TRUTHS, TRUTHS, (0.0, 0.9)):
        both = first * second + (min(first, second) - first * second) * together
        shares = [first - both, second - both]
        counts = generator.multinomial(n, [*shares, max(0.0, 1 - sum(shares))], draws)
        inside = sum(
            low - 1e-12 <= first - second <= high + 1e-12
            for low, high in (ends(int(row[0]), int(row[1])) for row in counts)
        )
        cells.append({"first": first, "second": second, "together": together, "coverage": inside / draws})
    return cells


def effects(n: int, draws: int) -> list[Cell]:
    """A base, an aligned and a patched model on the same prompts; coverage where the effect is defined."""
    generator, cells = np.random.default_rng([n, 3]), []
    for (base, aligned), truth in itertools.product(
        ((0.0, 1.0), (0.02, 0.98), (0.3, 0.9)), (0.0, 0.05, 0.5, 0.95, 1.0)
    ):
        inside = defined = 0
        for _ in range(draws):
            shared = generator.random(n)
            own = generator.random((3, n))
            rows = np.where(generator.random((3, n)) < 0.7, shared, own) < np.array(
                [[base], [aligned], [base + truth * (aligned - base)]]
            )
            found = causal_effect(*rows)
            if found.value is not None:
                defined += 1
                inside += covers(found, truth)
        if defined > draws / 2:
            cells.append(
                {
                    "base": base,
                    "aligned": aligned,
                    "truth": truth,
                    "defined": defined / draws,
                    "coverage": inside / defined,
                }
            )
    return cells


def groups(n: int, draws: int) -> list[Cell]:
    """Prompts of one deed are answered alike: n deeds with four requests each."""
    generator, cells = np.random.default_rng([n, 4]), []
    labels = [str(deed) for deed in range(n) for _ in range(4)]
    for truth in (0.05, 0.3, 0.6):
        inside = apart = 0
        for _ in range(draws):
            first, second = (np.repeat(generator.random(n), 4) < share for share in (truth, 0.2))
            inside += covers(rate(first, labels), truth)
            apart += covers(paired_difference(first, second, labels), truth - 0.2)
        cells += [{"of": "rate", "truth": truth, "coverage": inside / draws}]
        cells += [{"of": "difference", "truth": truth - 0.2, "coverage": apart / draws}]
    return cells


def random_sets(sets: int, draws: int) -> list[Cell]:
    """One more random set against the others: how often it is called clear."""
    generator, cells = np.random.default_rng([sets, 5]), []
    for centre, spread in itertools.product((-3.0, 0.0, 2.5), (0.0, 0.5, 1.5)):
        false = 0
        for _ in range(draws):
            prompts = centre + 1.5 * generator.normal(size=100)
            rows = generator.random((sets + 1, 100)) < chances(
                prompts + spread * generator.normal(size=(sets + 1, 1))
            )
            false += against_random(rows[0], list(rows[1:])).clear
        cells.append({"centre": centre, "spread": spread, "false": false / draws})
    return cells


def seeds(count: int, draws: int) -> list[Cell]:
    """Rates over seeds, and differences of nothing, where seeds and prompts both vary."""
    generator, cells = np.random.default_rng([count, 6]), []
    nodes, weights = np.polynomial.hermite_e.hermegauss(61)
    for centre, spread in itertools.product((-3.0, 0.5, 3.0), (0.0, 0.5, 1.5)):
        truth = float(weights @ chances(centre + np.hypot(1.5, spread) * nodes) / weights.sum())
        inside = apart = 0
        for _ in range(draws):
            prompts = centre + 1.5 * generator.normal(size=100)
            rows = generator.random((2, count, 100)) < chances(
                prompts + spread * generator.normal(size=(2, count, 1))
            )
            inside += covers(rate_over_seeds(list(rows[0])), truth)
            apart += covers(difference_over_seeds(list(rows[0]), list(rows[1])), 0.0)
        cells += [
            {"of": what, "centre": centre, "spread": spread, "coverage": hits / draws}
            for what, hits in (("rate", inside), ("difference", apart))
        ]
    return cells


def agreement(n: int, draws: int) -> list[Cell]:
    """Two judges of which the second repeats the first with a probability that is κ."""
    generator, cells = np.random.default_rng([n, 7]), []
    for share, truth in itertools.product((0.1, 0.3, 0.5), (0.0, 0.3, 0.6, 0.9, 1.0)):
        inside = known = 0
        for _ in range(draws):
            first, other = generator.random((2, n)) < share
            found = cohen_kappa(first, np.where(generator.random(n) < truth, first, other)).kappa
            known += found.value is not None
            inside += covers(found, truth)
        cells.append({"share": share, "truth": truth, "coverage": inside / max(known, 1)})
    return cells


STUDIES: dict[str, tuple[Callable[[int, int], list[Cell]], Sequence[int], int]] = {
    "rate of yes and no (exactly)": (rates, (16, 50, 200, 500), 0),
    "rate of outcomes between 0 and 1": (samples_of_prompts, (16, 50, 200), 300),
    "paired difference": (differences, (16, 50, 200, 500), 2000),
    "causal effect": (effects, (16, 50, 200, 500), 200),
    "rates and differences by deed": (groups, (10, 30), 300),
    "one more random set, false clear": (random_sets, (3, 5, 10, 20), 300),
    "rates and differences over seeds": (seeds, (2, 3, 5, 10), 150),
    "Cohen's kappa": (agreement, (16, 60, 200), 200),
}


def main() -> None:
    """Run every study and write what it gave."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    place = parser.parse_args().out
    found, rows, started = {}, [], time.process_time()
    for name, (study, sizes, draws) in STUDIES.items():
        for size in sizes:
            cells = study(size, draws)
            measure = "false" if "false" in cells[0] else "coverage"
            values = [cell[measure] for cell in cells]
            worst = max(values) if measure == "false" else min(values)
            found[f"{name}, {size}"] = {
                "draws": draws,
                "measure": measure,
                "worst": worst,
                "mean": float(np.mean(values)),
                "cells": cells,
            }
            rows.append(f"| {name} | {size} | {len(cells)} | {worst:.3f} | {np.mean(values):.3f} |")
            print(rows[-1], flush=True)
    record = {"cpu_seconds": round(time.process_time() - started, 1), "studies": found}
    lines = re.sub(r"\n {4,}", " ", json.dumps(record, indent=1))  # a cell a line
    place.write_text(re.sub(r"\d\.\d{5,}", lambda match: f"{float(match[0]):.4g}", lines) + "\n")


if __name__ == "__main__":
    main()
