"""Messages of errors: advice in the words of whoever reads it, and texts of users as they are."""

import pytest

from safety_neurons.errors import InputError, UsageError, command_line


@pytest.mark.parametrize(
    ("message", "in_python"),
    [
        (
            "an empty set; use a larger --top-per-matrix or --dtype float32",
            "an empty set; use a larger top_per_matrix or dtype float32",
        ),
        ("not found (--offline)", "not found (offline)"),
        (
            "'a file --out': cannot be read; choose another --out",
            "'a file --out': cannot be read; choose another out",
        ),
        ("the model's --sites are none's", "the model's sites are none's"),
        (
            "not there; `safety-neurons organism build --out DIR` makes it",
            "not there; `safety-neurons organism build --out DIR` makes it",
        ),
        ("/tmp/--top/x--y: no such file -- none", "/tmp/--top/x--y: no such file -- none"),
    ],
)
def test_an_option_is_named_as_an_argument_outside_of_the_command_line_only(message, in_python):
    error = UsageError(message)
    with command_line():
        assert str(error) == message
        with pytest.raises(InputError, match="^"), command_line():
            raise error
        assert str(error) == message
    assert str(error) == in_python


@pytest.mark.parametrize("sign", ["\n", "\r\n", "\x0b", "\x85", "\u2028", " \n\n "])
def test_a_message_is_one_line_whatever_another_library_says(sign):
    error = InputError(f"cannot read 'a{sign}b' (invalid JSON{sign}here); copy it again")
    assert str(error) == "cannot read 'a b' (invalid JSON here); copy it again"
