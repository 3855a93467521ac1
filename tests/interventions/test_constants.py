import pytest
import torch
from naive import full, generated, lm, on_sites, shared_pair, some

from families import build, random_ids, sibling
from safety_neurons.errors import NeuronError, UsageError
from safety_neurons.interventions import deactivated, patched
from safety_neurons.model import LanguageModel
from safety_neurons.neurons import NeuronSet


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return lm(build("phi3"))


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return random_ids((2, 6)), torch.ones(2, 6, dtype=torch.long)


def edited(
    model: LanguageModel, neurons: NeuronSet, change: object, batch: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    def act(key: str, tensor: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        new = tensor.clone()
        new[..., where] = change(key, tensor[..., where])
        return new

    with on_sites(model, neurons, act):
        return full(model, *batch)


def test_zero_is_deactivation(model: LanguageModel, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    with deactivated(model, some(model)):
        expected = generated(model, *batch, 4)
    with patched(model, None, some(model), mode="zero"):
        output = generated(model, *batch, 4)
    assert torch.equal(torch.stack(output.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, -2.0])
def test_scale_multiplies_the_neurons_own_activation(
    model: LanguageModel, alpha: float, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    neurons = some(model)
    expected = edited(model, neurons, lambda key, own: alpha * own, batch)
    with patched(model, None, neurons, mode="scale", alpha=alpha):
        assert (full(model, *batch) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("form", ["number", "site", "chosen"])
def test_mean_sets_given_values(
    model: LanguageModel, form: str, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    neurons = some(model)
    whole = {key: torch.linspace(-1, 1, model.table.sizes[key]) for key in neurons.keys()}  # noqa: SIM118
    chosen = {key: whole[key][torch.tensor(index)] for key, index in neurons.items()}
    values: object = {"number": 0.25, "site": whole, "chosen": chosen}[form]

    def change(key: str, own: torch.Tensor) -> torch.Tensor:
        return torch.full_like(own, 0.25) if form == "number" else chosen[key].expand_as(own)

    expected = edited(model, neurons, change, batch)
    with patched(model, None, neurons, mode="mean", values=values):
        assert (full(model, *batch) - expected).abs().max() <= 1e-5


def test_noise_is_repeatable_and_scales_with_the_deviation(
    model: LanguageModel, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    neurons, state = some(model), torch.random.get_rng_state()
    plain = full(model, *batch)

    def noisy(**arguments: object) -> torch.Tensor:
        with patched(model, None, neurons, mode="noise", **arguments):
            return full(model, *batch)

    first = noisy(values=0.1, seed=3)
    assert torch.equal(first, noisy(values=0.1, seed=3))
    assert not torch.equal(first, noisy(values=0.1, seed=4))
    assert torch.equal(noisy(values=0.3, alpha=0.0), plain)
    assert (noisy(values=0.001, seed=3) - plain).abs().max() < (first - plain).abs().max()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_noise_has_the_deviation_that_was_asked_for(model: LanguageModel) -> None:
    seen: list[torch.Tensor] = []
    neurons = NeuronSet({"layers.0.down": range(48)}, model.table)
    ids = random_ids((8, 60))
    module = model.anatomy.places["layers.0.down"].hooked

    def run() -> torch.Tensor:
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        full(model, ids, torch.ones_like(ids))
        handle.remove()
        return seen.pop()

    own = run()
    with patched(model, None, neurons, mode="noise", values=0.5, alpha=3.0):
        difference = run() - own
    assert difference.std().item() == pytest.approx(1.5, rel=0.02)
    assert abs(difference.mean().item()) < 0.02


def test_values_that_do_not_fit_are_refused(model: LanguageModel) -> None:
    neurons = some(model)
    for error, arguments in [
        (UsageError, {"mode": "median"}),
        (UsageError, {"mode": "mean"}),
        (UsageError, {"mode": "noise"}),
        (NeuronError, {"mode": "mean", "values": {"layers.0.q": 1.0}}),
        (NeuronError, {"mode": "mean", "values": {key: torch.ones(3) for key in neurons.keys()}}),  # noqa: SIM118
    ]:
        with pytest.raises(error), patched(model, None, neurons, **arguments):
            pass


def test_a_constant_acts_on_one_view_of_a_pair_alone(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    base, donor = shared_pair("ia3")
    neurons = some(base, 0.3)
    with patched(base, donor, neurons):
        with patched(donor, None, some(base, 0.3, seed=4), mode="scale", alpha=1.0):
            same = full(base, *batch)
        with patched(donor, None, some(base, 0.3, seed=4), mode="scale", alpha=3.0):
            other = full(base, *batch)
        plain = full(base, *batch)
    assert torch.equal(same, plain)
    assert not torch.equal(other, plain)


def test_separate_models_may_each_be_scaled(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    base = lm(build("llama"))
    donor = lm(sibling(base.model))
    with patched(base, donor, some(base)):
        plain = full(base, *batch)
        with patched(donor, None, some(base, seed=3), mode="scale", alpha=2.0):
            assert not torch.equal(full(base, *batch), plain)
