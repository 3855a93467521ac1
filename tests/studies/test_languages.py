"""languages: what is planted for one language is found as such, and taking a language's neurons off takes its
refusals off.
"""

import pytest

from safety_neurons import analysis, load_pair, organism
from safety_neurons.errors import InputError, UsageError
from safety_neurons.judges import judge_refusal
from safety_neurons.neurons import NeuronSet
from safety_neurons.prompt_lists import Prompt, Prompts
from safety_neurons.results import Completions, paired_difference
from safety_neurons.studies import Groups, deactivation_matrix, find_by_group

LANGUAGES = ("en", "de", "es")
UNITS = 11


@pytest.fixture(scope="module")
def pair():
    return load_pair("organism:planted/base", "organism:planted/aligned")


@pytest.fixture(scope="module")
def planted(pair):
    """By language the units that work in it (at least one hundredth of its effect), and those that work in no
    other.
    """
    units = pair.aligned.table.units()
    works: dict[str, set[int]] = {code: set() for code in LANGUAGES}
    for unit in organism.open("planted").record["truth"]["units"]:
        key, indices = next(iter(unit["neurons"].items()))
        for code in LANGUAGES:
            if unit["shares"][code] >= 0.01:
                works[code].add(int(units[key][indices[0]]))
    return {
        code: (
            works[code],
            works[code] - set().union(*(works[other] for other in LANGUAGES if other != code)),
        )
        for code in LANGUAGES
    }


@pytest.fixture(scope="module")
def found(pair):
    groups = Groups({code: pair.aligned.prompts(f"builtin:harmful/{code}", limit=8) for code in LANGUAGES})
    return find_by_group(pair.base, pair.aligned, groups, method="swap-attribution", units=UNITS)


def units_of(neurons):
    numbers = neurons.table.units()
    return {int(numbers[key][index]) for key, index in neurons}


def test_language_specific_neurons_of_the_planted_organism_are_found_as_such(found, planted):
    sets = analysis.languages(found)
    for code, (working, own) in planted.items():
        assert len(own) >= 2
        assert len(units_of(found[code])) == UNITS
        assert len(units_of(found[code]) & working) / len(working) >= 0.9
        specific = units_of(sets.minus_union[code])
        assert len(own & specific) >= len(own) / 2
        assert len(specific - own) <= 1
    record = sets.record()
    for row in record["languages"]:
        assert row["minus_union"]["verdict"] == "fewer"
        assert row["minus_union"]["value"] == len(sets.minus_union[row["language"]])
    assert record["shared"]["verdict"] == "more"


def test_a_language_loses_its_refusals_with_its_neurons_and_keeps_them_without_those_of_another(
    pair, found, tmp_path
):
    requests = {code: pair.aligned.prompts(f"builtin:harmful-test/{code}", limit=8) for code in LANGUAGES}
    file = tmp_path / "completions.jsonl"
    specific = analysis.languages(found).minus_union
    sets = {
        **found,
        **{f"only {code}": part for code, part in specific.items()},
        "nothing": NeuronSet({}, pair.aligned.table),
    }
    matrix = deactivation_matrix(
        pair.aligned, sets, requests, random=1, max_new_tokens=8, completions_file=file
    )
    record = matrix.record()
    assert all(record["untreated"][code]["value"] == 1 for code in LANGUAGES)
    for code in LANGUAGES:
        own = matrix.cell(code, code)
        assert own.change.value <= -0.9
        assert own.against_random.value < 0
        assert "1 random set," in own.against_random.why
        assert not own.against_random.clear
        assert all(
            matrix.cell(f"only {code}", other).change.value == 0 for other in LANGUAGES if other != code
        )
    assert record["skipped"] == ["nothing"]
    assert len(record["matrix"]) == 18
    kept = Completions.load(file)
    told = [
        [verdict.refused for verdict in judge_refusal(kept.arm(f"{arm}/harmful")).verdicts][8:16]
        for arm in (f"en of {len(found['en'])}", "untreated")
    ]
    change, alone = matrix.cell("en", "de").change, paired_difference(*told, requests["de"].groups)
    assert (change.value, change.n, change.p) == (alone.value, alone.n, alone.p)
    assert change.low <= alone.low <= alone.high <= change.high  # one of many comparisons


def test_both_definitions_are_those_of_the_sets(found):
    sets = analysis.languages(found)
    everything = [set(part) for part in found.values()]
    assert set(sets.shared) == set.intersection(*everything)
    for code, part in found.items():
        others = [set(other) for name, other in found.items() if name != code]
        assert set(sets.minus_intersection[code]) == set(part) - set.intersection(*everything)
        assert set(sets.minus_union[code]) == set(part) - set.union(*others)


def test_groups_tell_prompts_apart_and_outcomes_too():
    items = [
        Prompt(str(number), f"text {number}", category="ab"[number % 2], meta={"source": "x"})
        for number in range(5)
    ]
    groups = Groups.by(Prompts(items), "category")
    assert [(name, len(part)) for name, part in groups.members.items()] == [("a", 3), ("b", 2)]
    assert groups.split([True, False, None, True, True]) == {"a": (True, False, None), "b": (True, True)}
    assert len({prompt.id for prompt in groups.pooled}) == 5
    assert Groups.by(Prompts(items), "source").names == ["x"]
    assert Groups.by(Prompts(items), "category", fewest=3).names == ["a"]
    with pytest.raises(InputError, match="no value of 'language' is that of 1 of the 5 prompts"):
        Groups.by(Prompts(items), "language")
    with pytest.raises(InputError, match="no prompts"):
        Groups({"a": Prompts([])})


def test_methods_that_cannot_be_used_are_refused(pair):
    groups = Groups({"en": pair.aligned.prompts("builtin:harmful", limit=1)})
    with pytest.raises(UsageError, match="needs a pair"):
        find_by_group(None, pair.aligned, groups, method="contrast")
    with pytest.raises(UsageError, match="unknown method"):
        find_by_group(pair.base, pair.aligned, groups, method="luck")
    with pytest.raises(UsageError, match="top 0: expected above 0"):
        find_by_group(pair.base, pair.aligned, groups, method="contrast", top=0)
