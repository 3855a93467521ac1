"""One strict reader for every JSON text, and nothing beside it."""

import json
import pathlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import safety_neurons
from safety_neurons import strict_json
from safety_neurons.strict_json import RefusedJSON, each, loads

SOURCE = pathlib.Path(safety_neurons.__file__).parent
REFUSED = {
    "deep lists": ("[" * 200 + "]" * 200, "nested_too_deeply"),
    "very deep": ("[" * 300_000 + "]" * 300_000, "nested_too_deeply"),
    "deep objects": ('{"a":' * 200 + "1" + "}" * 200, "nested_too_deeply"),
    "a name twice": ('{"a": 1, "b": {"c": 1, "c": 2}}', "duplicate_name"),
    "NaN": ('{"a": NaN}', "number"),
    "infinity": ("[-Infinity]", "number"),
    "a float beyond floats": ("[1e999]", "number"),
    "a float of many digits": (f"[{'9' * 400}.5]", "number"),
    "a whole number beyond 64 bits": (f"[{2**64}]", "number"),
    "below 64 bits": (f"[{-(2**63) - 1}]", "number"),
    "a number of 5000 digits": (f"[{'9' * 5000}]", "number"),
    "half a pair in a value": ('["\\ud83d"]', "surrogate"),
    "half a pair in a name": ('{"\\udc00": 1}', "surrogate"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_two_readers_understand_differently_is_refused_with_a_value_error(case):
    text, code = REFUSED[case]
    with pytest.raises(RefusedJSON) as caught:
        loads(text)
    assert caught.value.code == code
    assert len(str(caught.value)) < 100


def test_what_other_tools_write_is_read_where_that_is_asked_for():
    assert loads('{"a": NaN, "b": 1e999, "c": "\\ud83d"}', lenient=True) == {
        "a": None,
        "b": None,
        "c": "\ud83d",
    }
    assert loads(f"[{10**40}]", lenient=True) == [10**40]
    assert loads('{"limit": Infinity}', constants=True) == {"limit": float("inf")}
    for text in (f"[{'9' * 65}]", '{"a": 1, "a": 2}', "[" * 200 + "]" * 200):
        with pytest.raises(RefusedJSON):
            loads(text, lenient=True)


def test_numbers_up_to_64_bits_depth_and_whole_pairs_pass():
    value = [2**64 - 1, -(2**63), "\U0001f600", 1.5e300, {"[[[": "{{{" * 100}]
    assert loads(json.dumps(value)) == value
    assert loads(json.dumps(value).encode()) == value
    assert loads(b"\xef\xbb\xbf[1]") == [1]
    assert loads("[" * 64 + "]" * 64) is not None
    with pytest.raises(RefusedJSON):
        loads("[" * 65 + "]" * 65)


def test_a_document_of_too_many_values_is_refused_before_it_is_built(monkeypatch):
    monkeypatch.setattr(strict_json, "MOST_VALUES", 1000)
    assert len(loads("[" + "1," * 900 + "1]")) == 901
    with pytest.raises(RefusedJSON) as caught:
        loads("[" + "{}," * 900 + "{}]")
    assert caught.value.code == "too_large"


def test_elements_come_one_by_one_and_a_refused_one_costs_no_other():
    found = list(each('[1, {"a": 1, "a": 2}, "x", NaN]'))
    assert (found[0], found[2]) == (1, "x")
    assert [one.code for one in found if isinstance(one, RefusedJSON)] == ["duplicate_name", "number"]
    assert list(each('{"a": 1}\n\n{"a": 2},\n{"a": 3}')) == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert list(each(" [ ] ")) == []
    for broken in ("[1 2]", "[1,]", "[1", "[1] 2", "", "{"):
        with pytest.raises(json.JSONDecodeError):
            list(each(broken))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(st.sampled_from('[]{}",:0123456789eE+-.\\ud8aNInfty \n'), max_size=40))
def test_any_text_is_a_value_or_a_value_error(text):
    for lenient in (False, True):
        try:
            found = loads(text, lenient=lenient)
        except ValueError:
            continue
        assert lenient or found == json.loads(text)


def test_no_reader_goes_round_it():
    """Every JSON text is read by the one strict reader."""
    allowed = {
        "strict_json.py",
        "judges/guards.py",
    }  # the judge searches a chat's reply for an object, within 20,000 characters
    bad = [
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        if str(path.relative_to(SOURCE)) not in allowed
        and re.search(r"(?<!strict_)json\.loads?\(|JSONDecoder\(", path.read_text())
    ]
    assert not bad
