import copy

import pytest
import torch
from trained import Reference, assert_same_bits, batches, bits, loss_of, model_of, randomised, some

from exact64 import Exact64
from families import MOE_FAMILIES, build
from safety_neurons.errors import ForeignModelError, NeuronError, UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.model.hooks import reading
from safety_neurons.neurons import NeuronSet
from safety_neurons.tuning import NeuronDelta, attach
from safety_neurons.tuning.deltas import TrainedSite

FAMILIES = ["llama", "phi3", "gpt2", "gpt_neox", "falcon", "qwen3", "gemma2", "opt"]


def adam(parameters: object, rate: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)


def checkpointed(model: LanguageModel, reentrant: bool) -> None:
    """Activations are computed again in the backward pass.

    The method's name depends on the version of transformers.
    """
    inner = model.model
    enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def trained(model: LanguageModel, neurons: NeuronSet, steps: int = 3) -> dict[str, torch.Tensor]:
    with attach(model, neurons) as deltas:
        optimizer = adam(deltas.parameters())
        for ids in batches(steps):
            optimizer.zero_grad()
            loss_of(model.model, ids).backward()
            optimizer.step()
        return deltas.tensors()


@pytest.mark.parametrize("family", [*FAMILIES, *MOE_FAMILIES])
def test_selected_entries_move_as_sliced_parameters_of_a_plain_model_do_and_nothing_else_moves(
    family: str,
) -> None:
    model = model_of(family, tie_word_embeddings=family == "llama")
    before = bits(model.model)
    for seed in (0, 1):
        neurons = some(model, 0.3, seed=seed)
        reference = Reference(model, neurons)
        optimizer = adam(reference.parameters.values())
        with (
            Exact64()
        ):  # Routers round to float32 in between, and Adam's first steps divide by gradients of any size.
            for ids in batches(3):
                reference.step(ids, optimizer)
            ours = trained(model, neurons)
        assert ours.keys() == reference.moved.keys()
        for key, moved in reference.moved.items():
            assert moved.abs().max() > 0 or ".experts." in key  # no token may have been sent to an expert
            assert (ours[key] - moved).abs().max() <= 1e-12, key
        assert_same_bits(before, bits(model.model))


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_in_float32_they_move_as_in_float64_up_to_rounding(family: str) -> None:
    model, exact = model_of(family, torch.float32), model_of(family)
    neurons = some(model)
    ours, expected = trained(model, neurons), trained(exact, NeuronSet(dict(neurons.items()), exact.table))
    for key, moved in expected.items():
        assert ours[key].dtype == torch.float32
        difference = (ours[key] - moved).abs()
        assert difference.median() <= 1e-7
        assert difference.max() <= 3e-4  # a tenth of the way: Adam magnifies gradients that are nearly zero


def test_the_gradients_are_those_of_the_whole_weights() -> None:
    model = model_of("phi3")
    neurons = some(model)
    reference = Reference(model, neurons)
    ids = batches(1)[0]
    loss_of(reference.model.model, ids).backward()
    with attach(model, neurons) as deltas:
        loss_of(model.model, ids).backward()
        for key, parameter in deltas.named_parameters().items():
            wanted = reference.taken(key, reference.where[key][0].grad)
            assert (parameter.grad - wanted).abs().max() <= 1e-12 * wanted.abs().max()


def test_the_base_gets_no_gradient_and_its_flags_come_back() -> None:
    model = model_of("llama")
    model.model.model.embed_tokens.weight.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.model.named_parameters()}
    with attach(model, some(model)) as deltas:
        own = {id(parameter) for parameter in deltas.parameters()}
        assert {id(parameter) for parameter in model.model.parameters() if parameter.requires_grad} == own
        loss_of(model.model, batches(1)[0]).backward()
        assert all(
            (parameter.grad is not None) == (id(parameter) in own) for parameter in model.model.parameters()
        )
    assert {name: parameter.requires_grad for name, parameter in model.model.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in model.model.parameters())


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_moe", "gpt_oss"])
def test_fresh_deltas_change_nothing_disabled_ones_neither_and_detached_modules_are_the_old_ones(
    family: str,
) -> None:
    model = model_of(family, torch.float32)
    modules = dict(model.model.named_modules())
    ids = batches(1)[0]
    with torch.no_grad():
        plain = model.model(input_ids=ids).logits
        deltas = attach(model, some(model))
        assert torch.equal(model.model(input_ids=ids).logits, plain)
        randomised(deltas.parameters())
        changed = model.model(input_ids=ids).logits
        assert not torch.allclose(changed, plain)
        with deltas.disabled():
            assert torch.equal(model.model(input_ids=ids).logits, plain)
            with deltas.disabled():
                pass
            assert torch.equal(model.model(input_ids=ids).logits, plain)
        assert torch.equal(model.model(input_ids=ids).logits, changed)
        deltas.detach()
        assert torch.equal(model.model(input_ids=ids).logits, plain)
    assert dict(model.model.named_modules()) == modules
    assert not any(isinstance(module, NeuronDelta) for module in model.model.modules())


def test_bias_entries_are_not_trained() -> None:
    model = model_of("llama")
    neurons = some(model)
    with attach(model, neurons) as deltas:
        per_neuron = {key: model.table[key].weights_per_neuron for key in neurons.keys()}  # noqa: SIM118
        assert deltas.n_parameters == sum(len(members) * per_neuron[key] for key, members in neurons.items())
        assert deltas.n_parameters < neurons.n_parameters


def test_weight_decay_pulls_towards_the_base_and_moves_nothing_else() -> None:
    model = model_of("llama", torch.float32)
    before = bits(model.model)
    with attach(model, some(model)) as deltas:
        randomised(deltas.parameters())
        norm = deltas.norm()
        optimizer = torch.optim.AdamW(deltas.parameters(), lr=1e-2, weight_decay=10.0)
        for parameter in deltas.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        assert deltas.norm() == pytest.approx(0.9 * norm, rel=1e-4)
    assert_same_bits(before, bits(model.model))


def test_updates_of_a_millionth_are_kept_beside_bfloat16_weights() -> None:
    model = model_of("llama", torch.bfloat16)
    before = bits(model.model)
    with attach(model, some(model)) as deltas:
        optimizer = adam(deltas.parameters(), rate=1e-6)
        for ids in batches(3):
            optimizer.zero_grad()
            loss_of(model.model, ids).backward()
            assert all(parameter.grad.dtype == torch.float32 for parameter in deltas.parameters())
            optimizer.step()
        moved = torch.cat([tensor.flatten() for tensor in deltas.tensors().values()]).abs()
        assert moved.dtype == torch.float32
        assert (moved > 0).float().mean() > 0.9
        assert 1e-6 < moved.max() < 1e-5
    assert_same_bits(before, bits(model.model))


@pytest.mark.parametrize("side", ["output", "input"])
def test_under_bfloat16_the_sum_is_rounded_once(side: str) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(64, 32, bias=False).to(torch.bfloat16)
    randomised([linear.weight], 0.2)
    x = torch.randn(5, 64, generator=generator).to(torch.bfloat16)
    positions = torch.tensor([3, 4, 17])
    wrapper = NeuronDelta(
        linear, 64, 32, [TrainedSite("q", side, positions)], torch.float32, torch.device("cpu")
    )
    randomised([wrapper.delta("q")], 0.01)
    with torch.no_grad():
        delta = wrapper.delta("q").double()
        exact = linear(x).double()
        if side == "output":
            exact[:, positions] += x.double() @ delta.T
        else:
            exact += x[:, positions].double() @ delta.T
        assert torch.equal(wrapper(x), exact.float().to(torch.bfloat16))


def test_autocast_computes_the_delta_in_float32() -> None:
    model = model_of("llama", torch.float32)
    with attach(model, some(model)) as deltas:
        randomised(deltas.parameters(), 0.01)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model.model, batches(1)[0])
        loss.backward()
        exact = [parameter.grad.clone() for parameter in deltas.parameters()]
        assert all(grad.dtype == torch.float32 and grad.abs().max() > 0 for grad in exact)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            wrapper = next(module for module in model.model.modules() if isinstance(module, NeuronDelta))
            x = torch.randn(2, wrapper.in_features)
            added = wrapper(x).double() - wrapper.base_layer(x).double()
        wanted = x.double() @ wrapper.delta("q").detach().double().T
        assert (added[:, wrapper.positions("q")] - wanted).abs().max() <= 2**-8 * wrapper(x).abs().max()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model = model_of("llama")
    ids = batches(1)[0]
    with attach(model, some(model)) as deltas:
        loss_of(model.model, ids).backward()
        plain = [parameter.grad.clone() for parameter in deltas.parameters()]
        for parameter in deltas.parameters():
            parameter.grad = None
        model.model.train()
        checkpointed(model, reentrant)
        if reentrant:
            model.model.enable_input_require_grads()
        loss_of(model.model, ids).backward()
        for parameter, wanted in zip(deltas.parameters(), plain, strict=True):
            assert torch.equal(parameter.grad, wanted)


def test_accumulated_batches_add_up() -> None:
    model = model_of("gpt2")
    one, two = batches(2)
    with attach(model, some(model)) as deltas:
        for ids in (one, two):
            (loss_of(model.model, ids) / 2).backward()
        added = [parameter.grad.clone() for parameter in deltas.parameters()]
        for parameter in deltas.parameters():
            parameter.grad = None
        loss_of(model.model, torch.cat([one, two])).backward()
        for parameter, wanted in zip(deltas.parameters(), added, strict=True):
            assert (parameter.grad - wanted).abs().max() <= 1e-12


def test_readers_see_what_the_deltas_do_and_weights_include_them() -> None:
    model = model_of("phi3")
    neurons = some(model)
    ids = batches(1)[0]
    seen: dict[str, torch.Tensor] = {}

    def read() -> dict[str, torch.Tensor]:
        seen.clear()
        readers = {
            key: (lambda values, key=key: seen.__setitem__(key, values.detach().clone()))
            for key in model.table.sizes
        }
        with torch.no_grad(), reading(model.anatomy, readers):
            model.model(input_ids=ids)
        return dict(seen)

    plain, anatomy = read(), model.anatomy
    with attach(model, neurons) as deltas:
        randomised(deltas.parameters())
        changed = read()
        key = "layers.0.up"
        place = model.anatomy.places[key]
        assert not torch.equal(changed[key], plain[key])
        with torch.no_grad():
            added = place.weight() - anatomy.places[key].weight()
        rows = added.abs().amax(1).nonzero().flatten()
        assert rows.tolist() == neurons[key].tolist()
        assert (added[rows] - deltas.tensors()[key]).abs().max() <= 1e-12
        again = LanguageModel(model.model)  # proved anew, through the wrappers
        assert again.table == model.table == anatomy.table
    assert model.anatomy is anatomy


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers for a property by its old name
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_deltas_stand_beside_an_adapter_and_are_undone(kind: str) -> None:
    import peft

    targets = ["q_proj", "v_proj", "down_proj"]
    config = (
        peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
        if kind == "lora"
        else peft.IA3Config(target_modules=targets, feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    )
    adapted = peft.get_peft_model(build("llama", torch.float64), config).to(torch.float64)
    randomised(
        [parameter for name, parameter in adapted.named_parameters() if "lora_" in name or "ia3_" in name],
        0.3,
    )
    model = LanguageModel(adapted)
    ids = batches(1)[0]
    plain = model.model(input_ids=ids).logits.detach()
    merged = copy.deepcopy(adapted).merge_and_unload()
    with attach(model, some(model)) as deltas:
        randomised(deltas.parameters())
        tensors = deltas.tensors()
        ours = model.model(input_ids=ids).logits.detach()
        trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
        assert all("delta_" in name for name in trainable)
    assert torch.equal(model.model(input_ids=ids).logits, plain)
    vars(merged).pop("peft_config", None)
    other = LanguageModel(merged)
    with attach(other, NeuronSet(dict(deltas.neurons.items()), other.table)) as again:
        again.load_tensors(tensors)
        assert (other.model(input_ids=ids).logits - ours).abs().max() <= 1e-11


def test_tensors_are_copies_and_come_back() -> None:
    model = model_of("llama", torch.float32)
    with attach(model, some(model)) as deltas:
        randomised(deltas.parameters())
        kept = deltas.tensors()
        norm = deltas.norm()
        with torch.no_grad():
            for parameter in deltas.parameters():
                parameter.zero_()
        assert deltas.norm() == 0
        deltas.load_tensors(kept)
        assert deltas.norm() == norm
        assert all(torch.equal(parameter, kept[key]) for key, parameter in deltas.named_parameters().items())
        with pytest.raises(NeuronError, match="first odd one"):
            deltas.load_tensors({})
        with pytest.raises(NeuronError, match="was expected for this set"):
            deltas.load_tensors({key: tensor[:, :1] for key, tensor in kept.items()})


def test_what_cannot_be_trained_is_refused_in_one_line_and_leaves_the_model_alone() -> None:
    model = model_of("llama")
    modules = dict(model.model.named_modules())
    with pytest.raises(NeuronError, match="nothing to train"):
        attach(model, NeuronSet({}, model.table))
    other = model_of("gpt2")
    with pytest.raises(ForeignModelError):
        attach(model, some(other))
    with attach(model, some(model)), pytest.raises(UsageError, match="detach"):
        attach(model, some(model))
    assert dict(model.model.named_modules()) == modules
    assert all(parameter.requires_grad for parameter in model.model.parameters())


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_reference_of_a_mixture_of_experts_is_its_base(family: str) -> None:
    model = model_of(family, torch.float32)
    ids = batches(1)[0]
    with torch.no_grad():
        plain = model.model(input_ids=ids).logits
        with attach(model, some(model)) as deltas:
            randomised(deltas.parameters())
            changed = model.model(input_ids=ids).logits
            assert torch.equal(deltas.reference()(input_ids=ids).logits, plain)
            assert torch.equal(model.model(input_ids=ids).logits, changed)
            assert not torch.equal(changed, plain)


def test_experts_trained_through_checkpointing_get_the_same_gradients() -> None:
    model = model_of("mixtral")
    ids = batches(1)[0]
    with attach(model, some(model)) as deltas:
        loss_of(model.model, ids).backward()
        plain = {key: parameter.grad for key, parameter in deltas.named_parameters().items()}
        for parameter in deltas.parameters():
            parameter.grad = None
        model.model.train()
        checkpointed(model, False)
        loss_of(model.model, ids).backward()
        for key, parameter in deltas.named_parameters().items():
            assert torch.equal(parameter.grad, plain[key]), key
