"""Weights in 8 and 4 bits by bitsandbytes, as the numbers that a model computes with."""

import copy
import functools
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from safety_neurons.errors import ModelError, UnsupportedModelError


def dequantised(base: nn.Module, name: str) -> Tensor:
    """The weight of a linear map in fewer bits; the map stays as it is.

    Args:
        base: the map.
        name: what errors call it.

    Raises:
        UnsupportedModelError: a weight that is kept in another way.
    """
    weight: Any = getattr(base, "weight", None)
    if type(weight).__name__ == "Int8Params":
        # Not by PEFT: on a CPU that leaves the weight without the scales its own product needs afterwards.
        factors: Any = scales(base)
        eight: Tensor = weight.data * factors.to(weight.device).view(-1, 1) / 127
        return eight
    if type(weight).__name__ == "Params4bit":
        return _from_four(weight)
    raise UnsupportedModelError(
        f"{name}: its weights are quantised ({type(base).__name__}) and cannot be read; methods that "
        "only read activations work, for this one load the model unquantised or in bitsandbytes 4 or 8 "
        "bits"
    )


def codes(weight: Tensor) -> Tensor:
    """A parameter as it is stored; of one in 4 bits the codes, in the order of its matrix."""
    state = getattr(weight, "quant_state", None)
    return _unpacked(weight.data, state)[0] if getattr(state, "packing_format_for_cpu", False) else weight


def scales(module: nn.Module) -> Tensor | None:
    """What the codes of a linear map are multiplied with, as far as every pass keeps it; None where a map has
    no codes.
    """
    weight: Any = getattr(module, "weight", None)
    if type(weight).__name__ == "Int8Params":
        state: Any = module.state
        eight: Tensor = weight.SCB if state.SCB is None else state.SCB
        return eight
    if type(weight).__name__ != "Params4bit" or weight.quant_state is None:
        return None
    return _scales(weight.quant_state).to(torch.bfloat16)


def put_in_order(model: nn.Module) -> None:
    """Keep all weights in 4 bits in the order of their matrices until the next pass.

    `state_dict` of bitsandbytes does so by itself, and leaves the scales where the processor wanted them:
    what is saved, and the model from then on, is another one.
    """
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            weight.data, weight.quant_state = _unpacked(weight.data, weight.quant_state)


def _from_four(weight: Any) -> Tensor:
    """Not by PEFT, which takes no notice of the order of a processor's products."""
    from bitsandbytes import functional

    values, state = weight.data, weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        values, state = _unpacked(values, state)
    return functional.dequantize_4bit(values, state)


def _unpacked(values: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Codes in the order of the matrix, and a copy of the state with the scales in it.

    From the first pass on a processor with AVX512-BF16 keeps codes and scales in another order, and the
    scales rounded to bfloat16.
    """
    copied = copy.copy(state)
    copied.original_nested = False  # or the scales are quantised again
    values, unpacked = _inverse()(values, copied)
    unpacked.absmax = _scales(state)
    return values, unpacked


@functools.cache
def _inverse() -> Callable[[Tensor, Any], tuple[Tensor, Any]]:
    """What puts codes back in the order of their matrix: a private function of bitsandbytes, which another
    version may lack or change, so that it is tried on a small weight first.

    Raises:
        ModelError: it is not there, or does something else.
    """
    from bitsandbytes import functional

    try:
        inverse: Callable[[Tensor, Any], tuple[Tensor, Any]]
        inverse, pack = (
            getattr(functional, f"_convert_weight_packed_for_cpu{end}") for end in ("_inverse", "")
        )
        codes_, state = functional.quantize_4bit(torch.linspace(-1, 2, 2**13).reshape(64, 128))
        values, packed = pack(codes_.clone(), copy.copy(state))
        scales_ = _scales(packed)
        found, _ = inverse(values, packed)
        whole = torch.equal(found, codes_) and torch.allclose(scales_, state.absmax, rtol=2**-8)
        why = "" if whole else "it gives other numbers"
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:120]
    if why:
        raise ModelError(
            f"weights in 4 bits lie in this processor's own order, and bitsandbytes "
            f"{importlib.metadata.version('bitsandbytes')} does not put them back as expected ({why}); "
            "expected a version such as 0.49.0 or 0.50.2, or the model in 8 bits or without --quantize"
        )
    return inverse


def _scales(state: Any) -> Tensor:
    """Of the blocks of a weight in 4 bits, in the order of its matrix."""
    from bitsandbytes import functional

    if getattr(state, "packing_format_for_cpu", False):
        return state.absmax.T.reshape(-1).float()
    if state.nested:
        return functional.dequantize_blockwise(state.absmax, state.state2).float() + state.offset
    return state.absmax.float()


_ROWS = 32
"""Of which bitsandbytes packs so many at a time for the products of a processor."""


def refuse_unpackable(model: nn.Module) -> None:
    """Refuse a model with weights in 4 bits whose sizes bitsandbytes cannot put into the order of this
    processor's products, which it does in the first pass.

    Raises:
        ModelError: names the first of them.
    """
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        packs = getattr(module, "support_avx512bf16_for_cpu", False)
        if state is None or not packs or next(module.parameters()).device.type != "cpu":
            continue
        rows, columns = state.shape
        if rows % _ROWS or columns % state.blocksize:
            raise ModelError(
                f"{name} is {rows} × {columns}, and bitsandbytes multiplies weights in 4 bits on this "
                f"processor only in multiples of {_ROWS} × {state.blocksize}; "
                "expected --quantize 8bit, or a GPU"
            )
