"""The suite's own check of annotations: first calls in every test are checked, of inner functions those that
are about arrays.
"""

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

import type_checking


def _inner_about_arrays():
    @type_checking.checked
    def length(values: Float[Tensor, " neuron"] | None) -> int:
        return 0 if values is None else len(values)

    return length


def test_an_inner_function_about_arrays_is_checked():
    length = _inner_about_arrays()
    assert length(torch.zeros(3)) == 3
    with pytest.raises(TypeError, match="violates type hint"):
        length(torch.zeros(3, 2))


def test_an_inner_function_about_anything_else_is_left_alone():
    def double(count: int) -> int:
        return 2 * count

    assert type_checking.checked(double) is double


def test_the_package_is_checked():
    from safety_neurons.model.likelihood import token_losses

    with pytest.raises(TypeError, match="violates type hint"):
        token_losses("not a model", 3)


def test_axes_of_one_name_have_one_size_in_a_call():
    @type_checking.checked
    def joined(left: Float[Tensor, " neuron"], right: Float[Tensor, " neuron"]) -> Float[Tensor, " neuron"]:
        return left + right if len(left) < 3 else left[1:]

    assert len(joined(torch.zeros(2), torch.zeros(2))) == 2
    for sizes in ((2, 1), (3, 3)):
        with pytest.raises(TypeError, match="violates type hint"):
            joined(*map(torch.zeros, sizes))


def test_the_first_calls_in_every_test_are_checked():
    @type_checking.checked
    def length(values: Float[Tensor, " neuron"]) -> int:
        return len(values)

    for _ in range(2):
        for _ in range(type_checking.CALLS):
            with pytest.raises(TypeError, match="violates type hint"):
                length(torch.zeros(3, 2))
        assert length(torch.zeros(3, 2)) == 3
        type_checking.begin_test()
