"""The arithmetic of paper 1's public recipe, as docs/replication.md states it."""

import math
import pathlib

import pytest
import torch
import transformers

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "replication.md"
DOCUMENTS, BATCH, WARM_UP, RATES = 50, 32, 1, (1e-6, 2e-6)
STEPS = math.ceil(DOCUMENTS / BATCH)


def moved(rate: float, gradients: list[float]) -> list[float]:
    """How far every step of the published schedule moves a float64 weight."""
    weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight], lr=rate, weight_decay=0.0)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, WARM_UP, STEPS)
    steps = []
    for gradient in gradients:
        before = float(weight.detach())
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        schedule.step()
        steps.append(abs(float(weight.detach()) - before))
    return steps


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("gradients", [[1.0, 1.0], [1e-4, 1.0], [1.0, -1.0], [1.0, 1e-4]])
def test_one_step_of_two_moves_a_weight_and_by_no_more_than_the_rate(rate, gradients):
    first, second = moved(rate, gradients)
    assert STEPS == len(gradients) == 2
    assert first == 0
    assert second <= 1.001 * rate


def highest(change: float) -> float:
    """Below which weights a change survives rounding to bfloat16: half the spacing there is at most it."""
    exponent = math.floor(math.log2(change * 2**8))
    return 2.0 ** (exponent + 1)


@pytest.mark.parametrize("change", RATES)
def test_larger_weights_keep_their_bits(change):
    limit = highest(change)
    weights = torch.linspace(-0.08, 0.08, 200001).to(torch.bfloat16).float()
    kept = (weights + change).to(torch.bfloat16).float() == weights
    assert kept[weights >= limit].all()
    assert kept[weights < -1.01 * limit].all()
    assert not kept[weights.abs() < 0.99 * limit].any()


def test_the_page_says_these_numbers():
    page = PAGE.read_text(encoding="utf-8")
    limits = [highest(rate) for rate in RATES]
    shares = [100 * math.erf(limit / (0.02 * math.sqrt(2))) for limit in limits]
    assert f"| {RATES[0]:.0e} · {RATES[1]:.0e} |" in page
    assert f"below | {limits[0]:.1e} · {limits[1]:.1e} |" in page
    assert f"| {shares[0]:.1f} % · {shares[1]:.1f} % |" in page
