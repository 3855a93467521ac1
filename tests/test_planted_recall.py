"""benchmarks/planted_recall.py: what a record takes over from an earlier one."""

import pytest

from test_performance_page import module_of

RECORD = {"organism": "planted", "seed": 0, "recipe": {"layers": 4}, "units": 24, "prompts": 60}


def test_methods_of_an_earlier_record_stay_beside_new_ones_where_they_were_measured_alike():
    joined = module_of("planted_recall").joined
    before = {**RECORD, "methods": {"cna": {"recall": 0.25}, "mask": {"recall": 0.5}}}
    record = {**RECORD, "methods": {"mask": {"recall": 0.75}}}
    assert joined(record, before)["methods"] == {"cna": {"recall": 0.25}, "mask": {"recall": 0.75}}
    for name, value in (("recipe", {"layers": 2}), ("units", 23), ("prompts", 8)):
        with pytest.raises(ValueError, match=f"the record there has other {name} .*; expected another --out"):
            joined(record, {**before, name: value})
