"""Arguments of public calls: what is of another kind is refused in one line before anything runs."""

import collections.abc
import contextlib
import inspect
import pathlib
from typing import Literal

import numpy as np
import pytest
import torch
from jaxtyping import Float64

import safety_neurons as sn
import type_checking
from safety_neurons.arguments import fits, fitted, well_typed
from safety_neurons.detectors import methods
from safety_neurons.errors import InputError, SafetyNeuronsError, UsageError


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    """Without the suite's own check, which would refuse first what a user gives."""
    monkeypatch.setattr(type_checking, "CALLS", 0)
    type_checking.begin_test()


FUNCTIONS = [name for name in sn.__all__ if name[0].islower() and name != "demo"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_call_refuses_what_is_of_no_kind(name):
    """Whatever it is given in the place of a model, a set, a list or a path, the error is of this package."""
    call = getattr(sn, name)
    needed = [
        one.name
        for one in inspect.signature(call).parameters.values()
        if one.default is inspect.Parameter.empty and one.kind is one.POSITIONAL_OR_KEYWORD
    ]

    def use():
        made = call(*(object() for _ in needed))
        with made if hasattr(made, "__enter__") else contextlib.nullcontext():
            pass

    with pytest.raises(SafetyNeuronsError) as refused:
        use()
    assert "expected" in str(refused.value)
    assert "object" in str(refused.value)


@pytest.mark.parametrize(
    "name", [name for name in FUNCTIONS if name.startswith("find_") and name != "find_random"]
)
def test_a_finder_given_the_name_of_a_model_says_how_to_load_it(name):
    names = list(inspect.signature(getattr(sn, name)).parameters)
    with pytest.raises(UsageError, match=rf"{names[0]} is 'organism:planted'; expected LanguageModel: load"):
        getattr(sn, name)(*["organism:planted"] * 3)
    with pytest.raises(UsageError, match="has no option 'fraction'; expected some of .*top"):
        getattr(sn, name)("organism:planted", fraction=0.1)


def test_advice_names_classes_that_there_are():
    from safety_neurons.analysis import Named
    from safety_neurons.arguments import ADVICE

    assert all(hasattr(sn, word) or word == Named.__name__ for word in ADVICE)


@pytest.mark.parametrize(
    ("value", "hint", "taken"),
    [
        (3, int, 3),
        (np.int64(3), int, 3),
        (torch.tensor(3), int, 3),
        (np.float32(0.5), float, 0.5),
        (np.bool_(True), bool, True),
        (3, float, 3),
        (np.int64(3), float | int | None, 3),
        (None, float | None, None),
        ("auto", int | Literal["auto"], "auto"),
        ("a/b", pathlib.Path | None, pathlib.Path("a/b")),
        ("a/b", str | pathlib.Path, "a/b"),
        ([0.5], Float64[np.ndarray, " prompt"], [0.5]),
    ],
)
def test_numbers_and_paths_come_in_as_pythons(value, hint, taken):
    got = fitted(value, hint)
    assert got == taken
    assert type(got) is type(taken)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("3", int),
        (True, int),
        (1.5, int),
        (True, float),
        (None, float),
        (1, bool),
        ("4", int | Literal["auto"]),
        (3, pathlib.Path),
        (3, collections.abc.Sequence[str]),
        ({"a": 1}, collections.abc.Sequence[int]),
        ("text", collections.abc.Sequence[int]),
        (["text"], collections.abc.Sequence[sn.NeuronSet]),
        ([1], collections.abc.Mapping[str, int]),
        (0.5, Float64[np.ndarray, " prompt"]),
    ],
)
def test_what_is_of_another_kind_does_not_fit(value, hint):
    assert not fits(value, hint)


def test_a_class_is_held_to_its_fields_and_a_missing_argument_is_pythons_own_error():
    @well_typed
    def half(number: int, *others: int, name: str = "") -> float:
        return (number + sum(others)) / 2

    assert half(np.int64(3), 4) == 3.5
    with pytest.raises(UsageError, match="others is 'a'; expected a whole number"):
        half(1, 2, "a")
    with pytest.raises(UsageError, match="half has no option 'nam'; expected some of number, name"):
        half(1, nam="x")
    with pytest.raises(TypeError, match="missing"):
        half()
    with pytest.raises(UsageError, match="count is 1.5; expected a whole number or None"):
        sn.Selection(count=1.5)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"count": "3"}, "count '3': expected a whole number"),
        ({"count": 1.5}, "count 1.5: expected a whole number"),
        ({"top": "0.05"}, "top '0.05': expected a number"),
        ({"threshold": "x"}, "threshold 'x': expected a number"),
        ({"agreement": True}, "agreement True: expected a number"),
        ({"as_published": "yes"}, "as_published 'yes': expected True or False"),
        ({"sites": 3}, "3 arrived; expected names, separated by commas or in a list"),
        ({"layers": 1.5}, "layers 1.5; expected A:B"),
    ],
)
def test_a_method_refuses_options_of_another_kind(wrong, said):
    method = methods.Importance(**wrong)

    def use():
        method.check()
        method.unfit(["layers.0.down"])

    with pytest.raises(UsageError, match=said.replace("'", ".")):
        use()


def test_outcomes_that_are_no_numbers_are_refused():
    with pytest.raises(InputError, match="outcomes are no numbers .*; expected one a prompt"):
        sn.rate([("layers.0.down", 1)])
