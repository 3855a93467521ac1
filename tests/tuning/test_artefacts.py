import copy
import errno
import pathlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trained import assert_same_bits, batches, bits, model_of, randomised, some

from families import build
from safety_neurons.errors import ForeignModelError, MismatchError, NeuronError, NumericalError, RunError, UnsupportedModelError, UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.neurons import NeuronSet, Provenance
from safety_neurons.results import files
from safety_neurons.tuning import Delta, applied, apply_delta, attach, base_hash, delta_of, load_delta, outside_hash, save_delta, survival

FAMILIES = ["llama", "phi3", "gpt2", "gpt_neox"]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers for a property by its old name


def changed(model: LanguageModel, size: float = 0.05, share: float = 0.3) -> Delta:
    """A change of some rows and columns, from deltas that were attached."""
    with attach(model, some(model, share)) as deltas:
        randomised(deltas.parameters(), size)
        return delta_of(deltas)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_change_in_the_weights_acts_as_the_deltas_did_and_is_undone_bit_for_bit(family: str) -> None:
    model = model_of(family)
    ids = batches(1)[0]
    neurons = some(model)
    before, outside = bits(model.model), outside_hash(model, neurons)
    with attach(model, neurons) as deltas, torch.no_grad():
        randomised(deltas.parameters())
        logits = model.model(input_ids=ids).logits
        delta = delta_of(deltas)
        assert outside_hash(model, neurons) == outside
    with applied(model, delta), torch.no_grad():
        assert (model.model(input_ids=ids).logits - logits).abs().max() <= 1e-11
        assert outside_hash(model, neurons) == outside
        after = bits(model.model)
    assert_same_bits(before, bits(model.model))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {f"{model.anatomy.places[key].module_name}.weight" for key, _ in neurons.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_in_the_weights_is_rounded_once(dtype: torch.dtype) -> None:
    model = model_of("llama", dtype)
    delta = changed(model, 0.01)
    key = "layers.0.down"
    weight = model.anatomy.places[key].projection.base.weight
    columns = torch.from_numpy(delta.neurons[key].copy())
    exact = weight.detach()[:, columns].double() + delta.tensors[key].double()
    apply_delta(model, delta)
    assert torch.equal(weight[:, columns], exact.to(torch.float32).to(dtype))


def test_a_change_of_an_expert_goes_into_its_slice_of_the_tensor() -> None:
    model = LanguageModel(build("mixtral", torch.float32))
    neurons = NeuronSet({"layers.0.experts.1.up": [2, 5], "layers.1.experts.3.down": [0], "layers.0.q": [1]}, model.table)
    sizes = {key: model.table[key].weights_per_neuron for key, _ in neurons.items()}
    tensors = {
        "layers.0.experts.1.up": torch.ones(2, sizes["layers.0.experts.1.up"]),
        "layers.1.experts.3.down": torch.ones(sizes["layers.1.experts.3.down"], 1),
        "layers.0.q": torch.ones(1, sizes["layers.0.q"]),
    }
    delta = Delta(neurons, tensors, Provenance("neurons"))
    outside, before = outside_hash(model, neurons), bits(model.model)
    experts = model.anatomy.layers[0].experts
    assert experts is not None
    up = experts.weight(1, "up").detach().clone()
    with applied(model, delta):
        assert outside_hash(model, neurons) == outside
        added = experts.weight(1, "up") - up
        assert added[[2, 5]].sub(1).abs().max() <= 1e-6
        assert float(added.detach().abs().sum()) == pytest.approx(2 * up.shape[1], rel=1e-4)
    assert_same_bits(before, bits(model.model))


def test_files_give_the_same_change_again(tmp_path: pathlib.Path) -> None:
    model = model_of("llama", torch.float32)
    delta = changed(model)
    save_delta(tmp_path, delta)
    again = load_delta(tmp_path)
    assert again.neurons == delta.neurons == NeuronSet.load(tmp_path)
    assert again.neurons.table == model.table
    assert_same_bits(delta.tensors, again.tensors)
    assert all(tensor.dtype == torch.float32 for tensor in again.tensors.values())
    assert again.base == delta.base != ""
    assert again.provenance.models == (model.name,)
    assert again.n_parameters == sum(tensor.numel() for tensor in delta.tensors.values())


@given(share=st.floats(0.0, 0.4), seed=st.integers(0, 100))
def test_any_change_of_any_set_survives_its_file(share: float, seed: int) -> None:
    import tempfile

    model = _shared_model()
    neurons = some(model, share, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, members in neurons.items():
        n, length = len(members), model.table[key].weights_per_neuron
        shape = (length, n) if key.endswith((".o", ".down")) else (n, length)
        tensors[key] = torch.randn(shape, generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        save_delta(folder, Delta(neurons, tensors, Provenance("neurons")))
        again = load_delta(folder)
    assert again.neurons == neurons
    assert_same_bits(tensors, again.tensors)


_MODELS: list[LanguageModel] = []


def _shared_model() -> LanguageModel:
    if not _MODELS:
        _MODELS.append(model_of("llama", torch.float32))
    return _MODELS[0]


def test_a_disk_that_fills_up_leaves_the_earlier_change_whole(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama", torch.float32)
    first, second = changed(model), changed(model, 0.1)
    save_delta(tmp_path, first)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(RunError, match="No space left"):
        save_delta(tmp_path, second)
    monkeypatch.undo()
    assert_same_bits(first.tensors, load_delta(tmp_path).tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delta.safetensors", "neurons.safetensors"]


def test_damaged_missing_and_foreign_files_are_one_line_errors(tmp_path: pathlib.Path) -> None:
    model = model_of("llama", torch.float32)
    with pytest.raises(NeuronError, match="no file"):
        load_delta(tmp_path)
    delta = changed(model)
    save_delta(tmp_path, delta)
    whole = (tmp_path / "delta.safetensors").read_bytes()
    (tmp_path / "delta.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(NeuronError, match="copy it again"):
        load_delta(tmp_path)
    with pytest.raises(NeuronError, match="expected 'delta'"):
        load_delta(tmp_path / "neurons.safetensors")
    broken = {key: tensor.clone() for key, tensor in delta.tensors.items()}
    next(iter(broken.values()))[0, 0] = float("nan")
    save_delta(tmp_path, Delta(delta.neurons, broken, delta.provenance))
    with pytest.raises(NumericalError, match="NaN"):
        load_delta(tmp_path)
    with pytest.raises(NeuronError, match="were expected"):
        Delta(delta.neurons, {}, delta.provenance)
    with pytest.raises(NeuronError, match="axis"):
        Delta(delta.neurons, {key: tensor.T for key, tensor in delta.tensors.items()}, delta.provenance)


def test_a_change_goes_only_into_the_weights_it_was_trained_on_or_where_the_caller_says_so() -> None:
    model = model_of("llama", torch.float32)
    delta = changed(model)
    other = LanguageModel(build("llama", torch.float32, seed=1))
    with pytest.raises(MismatchError, match="trained on other weights"):
        apply_delta(other, delta)
    apply_delta(other, delta, any_base=True)
    apply_delta(model, delta)
    with pytest.raises(MismatchError, match="trained on other weights"):
        apply_delta(model, delta)
    with pytest.raises(ForeignModelError):
        apply_delta(model_of("gpt2", torch.float32), delta)


def test_a_copy_of_the_base_in_another_type_is_the_same_base() -> None:
    model = model_of("llama", torch.float32)
    half = LanguageModel(copy.deepcopy(model.model).to(torch.bfloat16))
    neurons = some(model)
    assert base_hash(model, neurons) == base_hash(half, NeuronSet(dict(neurons.items()), half.table))
    with attach(model, neurons):
        attached = base_hash(model, neurons)
    assert attached == base_hash(model, neurons) != base_hash(LanguageModel(build("llama", seed=1)), neurons)


def test_attached_deltas_and_adapters_are_no_place_to_write_to() -> None:
    import peft

    model = model_of("llama", torch.float32)
    delta = changed(model)
    with attach(model, delta.neurons), pytest.raises(UsageError, match="detach"):
        apply_delta(model, delta)
    adapted = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(UsageError, match="merge"):
        apply_delta(LanguageModel(adapted), delta)


def test_quantised_weights_take_up_no_change() -> None:
    model = model_of("llama", torch.float32)
    delta = changed(model)
    weight = model.anatomy.places["layers.0.q"].projection.base.weight
    weight.quant_state = object()
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.q: quantised weights cannot take up a change exactly"):
        apply_delta(model, delta)


def test_survival_counts_the_changed_weights_that_are_other_numbers_after_the_cast() -> None:
    model = model_of("llama", torch.float32)
    large, small = changed(model, 0.5), changed(model, 1e-6)
    assert survival(model, large, torch.float32) > 0.999
    assert survival(model, large, torch.bfloat16) > 0.99
    share = survival(model, small, torch.bfloat16)
    assert 0 < share < 0.05
    key, members = next(iter(small.neurons.items()))
    zeros = {name: torch.zeros_like(tensor) for name, tensor in small.tensors.items()}
    assert survival(model, Delta(small.neurons, zeros, small.provenance), torch.bfloat16) == 0.0
    weight = model.anatomy.places[key].weight().detach()[torch.from_numpy(members.copy())]
    only = {**zeros, key: small.tensors[key]}
    expected = ((weight + small.tensors[key]).bfloat16() != weight.bfloat16())[small.tensors[key] != 0].float().mean()
    assert survival(model, Delta(small.neurons, only, small.provenance), torch.bfloat16) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("what", ["norm", "bias", "row", "embedding"])
def test_the_hash_of_the_rest_sees_one_flipped_bit(what: str) -> None:
    model = model_of("llama", torch.float32)
    neurons = NeuronSet({"layers.0.q": [3], "layers.1.down": [4, 5]}, model.table)
    before = outside_hash(model, neurons)
    attention = model.model.model.layers[0].self_attn.q_proj
    target = {
        "norm": model.model.model.norm.weight.detach(),
        "bias": attention.bias.detach()[3:4],
        "row": attention.weight.detach()[4],
        "embedding": model.model.model.embed_tokens.weight.detach()[0],
    }[what]
    with torch.no_grad():
        attention.weight[3] += 1.0
        model.model.model.layers[1].mlp.down_proj.weight[:, 4:6] += 1.0
        assert outside_hash(model, neurons) == before
        target.view(torch.int32)[0] ^= 1
    assert outside_hash(model, neurons) != before
