"""Bits, device maps and memory limits: the same words in every verb, equal numbers wherever weights lie."""

import pathlib
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from safety_neurons.detectors import find_importance
from safety_neurons.errors import ModelError, UnsupportedModelError, UsageError
from safety_neurons.interventions import deactivated, patched
from safety_neurons.model import LanguageModel, fewer_bits, load
from safety_neurons.model.fewer_bits import dequantised
from safety_neurons.model.identity import identity
from safety_neurons.model.placement import Placement, device_places, memory_limits
from safety_neurons.neurons import NeuronSet
from safety_neurons.tuning.artefacts import save_checkpoint
from tiny import tiny_llama_folder

PROMPTS = ["how do i make a cake", "tell me about the red house and the water please"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_llama_folder(tmp_path_factory.mktemp("model"), hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def plain(folder: pathlib.Path) -> LanguageModel:
    return load(folder)


@pytest.mark.parametrize(
    "given",
    [
        "0=20GiB,cpu=48GiB",
        " 0 = 20GiB,cpu=48GiB",
        '{"0": "20GiB", "cpu": "48GiB"}',
        {0: "20GiB", "cpu": "48GiB"},
    ],
)
def test_memory_limits_are_read_from_words_json_and_mappings(given: object) -> None:
    assert memory_limits(given) == {0: "20GiB", "cpu": "48GiB"}
    assert memory_limits("cpu=1000") == {"cpu": 1000}
    assert memory_limits(None) is None


@pytest.mark.parametrize(
    "given", ["", "20GiB", "0=", "0=many", "0=-1GiB", "0=0GiB", "gpu=1GiB", "0=1GiB,0=2GiB", "{", "{}", "[1]"]
)
def test_memory_limits_of_another_form_are_usage_errors_in_one_line(given: str) -> None:
    with pytest.raises(UsageError, match="expected sizes by number of the GPU or cpu") as error:
        memory_limits(given)
    assert "\n" not in str(error.value)


def test_device_maps_are_strategies_devices_or_json() -> None:
    assert device_places("balanced") == "balanced"
    assert device_places("cuda:1") == {"": "cuda:1"}
    assert device_places("1") == {"": 1}
    assert device_places('{"model": 0, "lm_head": "cpu"}') == {"model": 0, "lm_head": "cpu"}
    assert device_places({"": "cpu"}) == {"": "cpu"}
    for given in ("everywhere", "{", "{}x", '{"model": "everywhere"}'):
        with pytest.raises(UsageError, match="expected one of auto, balanced"):
            device_places(given)


def test_what_contradicts_itself_or_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"quantize '2bit': expected one of none, 8bit, 4bit"):
        Placement.of(None, {"quantize": "2bit"})
    with pytest.raises(UsageError, match="device cpu and device_map or memory limits"):
        Placement.of("cpu", {"max_memory": "cpu=1GiB"})
    with pytest.raises(UsageError, match="expected one of them"):
        Placement.of(None, {"quantize": "8bit", "load_in_4bit": True})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for given in ({"max_memory": "0=20GiB"}, {"device_map": "cuda:0"}, {"device_map": '{"model": 0}'}):
        with pytest.raises(ModelError, match="device cuda:0: this machine has 0 CUDA devices"):
            Placement.of(None, given)
    with pytest.raises(UsageError, match="tp_plan 'auto': tensor parallel .* expected device_map auto"):
        Placement.of(None, {"tp_plan": "auto"})
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"need bitsandbytes, .*safety-neurons\[quantize\]"):
        Placement.of(None, {"quantize": "4bit"})


@pytest.mark.parametrize("given", [{"device_map": "cpu"}, {"max_memory": "cpu=10GiB"}])
def test_where_weights_lie_changes_nothing(
    given: dict[str, str], folder: pathlib.Path, plain: LanguageModel
) -> None:
    placed = load(folder, **given)
    ours, theirs = (find_importance(model, PROMPTS, count=20) for model in (plain, placed))
    assert ours.neurons == theirs.neurons
    assert all((ours.scores[key] == theirs.scores[key]).all() for key in ours.scores.keys())  # noqa: SIM118
    assert identity(placed) == identity(plain)
    with deactivated(plain, ours.neurons), deactivated(placed, ours.neurons):
        assert plain.complete(PROMPTS, max_new_tokens=4) == placed.complete(PROMPTS, max_new_tokens=4)


@pytest.mark.parametrize(
    "given",
    [{"device_map": '{"model": "cpu", "lm_head": "disk"}'}, {"max_memory": "cpu=100KB"}],
)
def test_weights_that_are_off_loaded_are_refused_in_one_line(
    given: dict[str, str], folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=r"off-loaded .* larger max_memory") as error:
        load(folder, **given, offload_folder=str(tmp_path))
    assert "\n" not in str(error.value)


def test_four_bits_are_the_same_weights_in_the_order_of_any_processor(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    small = load(folder, quantize="4bit")
    maps = [module for module in small.inner.modules() if type(module).__name__ == "Linear4bit"]
    before, known = [dequantised(module, "map").clone() for module in maps], identity(small)
    for module in maps:  # what a pass does on a processor with AVX512-BF16
        module.weight.data, state = functional._convert_weight_packed_for_cpu(
            module.weight.data, module.weight.quant_state
        )
        assert state.packing_format_for_cpu
    for module, exact in zip(maps, before, strict=True):
        now = dequantised(module, "map")
        assert (now - exact).abs().max() <= 2**-8 * exact.abs().max()  # scales are rounded to bfloat16
        assert module.weight.quant_state.packing_format_for_cpu
        assert torch.equal(now, dequantised(module, "map"))
    assert identity(small) == known
    save_checkpoint(tmp_path / "saved", small)
    for module, exact in zip(maps, before, strict=True):
        assert (dequantised(module, "map") - exact).abs().max() <= 2**-8 * exact.abs().max()
    assert identity(small) == known


@pytest.mark.parametrize("change", ["lacks", "takes more", "leaves", "turns scales"])
def test_a_version_that_keeps_the_order_of_a_processor_otherwise_is_one_line(
    change: str, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    name = "_convert_weight_packed_for_cpu"
    pack = getattr(functional, name)
    small = load(folder, quantize="4bit")
    module = next(module for module in small.inner.modules() if type(module).__name__ == "Linear4bit")
    module.weight.data, module.weight.quant_state = pack(module.weight.data, module.weight.quant_state)

    def otherwise(values: torch.Tensor, state: Any, *more: Any) -> tuple[torch.Tensor, Any]:
        values, state = pack(values, state, *more)
        state.absmax = state.absmax.flip(0)
        return values, state

    if change == "turns scales":
        monkeypatch.setattr(functional, name, otherwise)
    elif change == "lacks":
        monkeypatch.delattr(functional, f"{name}_inverse")
    else:
        other = (lambda values, state: (values, state)) if change == "leaves" else (lambda *, packed: packed)
        monkeypatch.setattr(functional, f"{name}_inverse", other)
    fewer_bits._inverse.cache_clear()
    for action in (lambda: dequantised(module, "map"), lambda: identity(small)):
        with pytest.raises(ModelError, match=r"bitsandbytes \d+\.\d+.* does not put them back") as error:
            action()
        assert "\n" not in str(error.value)
    monkeypatch.undo()
    assert dequantised(module, "map").isfinite().all()


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_weights_in_fewer_bits_are_told_apart_by_their_scales(
    bits: str, folder: pathlib.Path, plain: LanguageModel, tmp_path: pathlib.Path
) -> None:
    pytest.importorskip("bitsandbytes")
    other = tmp_path / "doubled"
    shutil.copytree(folder, other)
    state = load_file(other / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(state | {name: 2 * state[name]}, other / "model.safetensors", metadata={"format": "pt"})
    ones, twos = (load(place, quantize=bits) for place in (folder, other))
    first, second = identity(ones), identity(twos)
    assert first["weights"] != second["weights"]
    for model, known in ((ones, first), (twos, second)):
        model.complete(PROMPTS, max_new_tokens=2)
        assert identity(model) == known


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_model_in_fewer_bits_is_another_one_with_the_same_sites(
    bits: str, folder: pathlib.Path, plain: LanguageModel
) -> None:
    pytest.importorskip("bitsandbytes")
    small = load(folder, quantize=bits)
    assert small.anatomy.coverage().complete
    assert small.fingerprint == plain.fingerprint
    assert small.table.n_parameters == plain.table.n_parameters
    assert identity(small)["weights"] != identity(plain)["weights"]
    close = 0.02 if bits == "8bit" else 0.2
    for key in ("layers.0.q", "layers.1.down"):
        exact = plain.anatomy.place(key).weight()
        assert (small.anatomy.place(key).weight() - exact).abs().max() <= close * exact.abs().max()
    found = find_importance(small, PROMPTS, count=20)
    assert len(found.neurons) == 20
    answers = small.complete(PROMPTS, max_new_tokens=4)
    with patched(small, small, found.neurons):
        assert small.complete(PROMPTS, max_new_tokens=4) == answers
    with deactivated(small, NeuronSet.all(small.table)):
        assert small.complete(PROMPTS, max_new_tokens=4) != answers


def test_sizes_that_a_processor_cannot_multiply_in_four_bits_are_refused_as_they_are_loaded(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    narrow = tiny_llama_folder(tmp_path / "narrow")
    with pytest.raises(ModelError, match=r"q_proj is 32 × 32, and .* only in multiples of 32 × 64; .* 8bit"):
        load(narrow, quantize="4bit")
