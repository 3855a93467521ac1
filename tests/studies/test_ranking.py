"""Ranking: what is averaged over organisms, who leads, and one command over folders of organisms."""

import json
import pathlib
import shutil
import types

import pytest

from conforming import misfits
from safety_neurons.errors import InputError, UsageError
from safety_neurons.results.measured import RankingRecord
from safety_neurons.results.run import write_json
from safety_neurons.studies.comparison import Comparison, MethodResult
from safety_neurons.studies.ranking import Entry, Ranking, rank, standings
from tiny_pair import HARMFUL, HARMLESS


def made(kind, **fields):
    """An instance with these fields alone."""
    one = object.__new__(kind)
    for name, value in fields.items():
        object.__setattr__(one, name, value)
    return one


def row(method, recall, effect, refused=0.0, seconds=1.0):
    told = {
        name: types.SimpleNamespace(value=value)
        for name, value in (
            ("causal_effect", effect),
            ("harmless_refused", refused),
            ("harmful_complied", 0.5),
        )
    }
    return made(
        MethodResult,
        method=method,
        recall=recall,
        necessity=types.SimpleNamespace(value=0.5),
        seconds=seconds,
        **told,
    )


def entry(name, kind, share, *rows, truth=None):
    return Entry(name, kind, share, made(Comparison, methods=rows, truth=truth))


ENTRIES = [
    entry(
        "natural-0",
        "natural",
        0.02,
        row("a", None, 0.9),
        row("b", None, 0.8),
        row("random 0", None, 0.1),
        row("random 1", None, 0.3),
    ),
    entry(
        "natural-1",
        "natural",
        0.02,
        row("a", None, 0.5, 0.2),
        row("b", None, 0.8),
        row("random 0", None, None),
    ),
    entry("natural-1", "natural", 0.05, row("a", None, 1.0), row("b", None, 0.9)),
    entry(
        "planted-0", "planted", 0.01, row("a", 0.6, None), row("b", 0.99, 0.0), truth=row("truth", 1.0, 1.0)
    ),
    entry("planted-1", "planted", 0.03, row("a", 0.8, None), row("b", 0.9, 0.0)),
]


def test_means_are_over_organisms_and_the_worst_is_the_least_good():
    found = {(one.group, one.measure, one.method): one for one in standings(ENTRIES)}
    effect = found["natural 0.02", "causal_effect", "a"]
    assert (effect.mean, effect.worst) == (pytest.approx(0.7), 0.5)
    assert effect.by_organism == {"natural-0": 0.9, "natural-1": 0.5}
    random = found[
        "natural 0.02", "causal_effect", "random"
    ]  # two sets of one organism are one value; an undefined one is none
    assert random.by_organism == {"natural-0": pytest.approx(0.2), "natural-1": None}
    assert random.mean == pytest.approx(0.2)
    assert found["natural 0.02", "harmless_refused", "a"].worst == 0.2
    assert found["planted", "recall", "b"].mean == pytest.approx(0.945)
    assert found["planted", "causal_effect", "a"].mean is None
    assert ("natural 0.02", "recall", "a") not in found


def test_the_leader_of_a_row_has_its_best_mean_and_random_sets_and_the_truth_lead_nothing():
    ranking = Ranking(tuple(ENTRIES), tuple(standings(ENTRIES)))
    leaders = {(one["group"], one["measure"]): one["methods"] for one in ranking.leaders}
    assert leaders["natural 0.02", "causal_effect"] == ["b"]
    assert leaders["natural 0.05", "causal_effect"] == ["a"]
    assert leaders["planted", "recall"] == ["b"]
    assert leaders["natural 0.02", "harmless_refused"] == ["b"]
    assert ("planted", "seconds") not in leaders
    order = [one.method for one in ranking.standings if (one.group, one.measure) == ("planted", "recall")]
    assert order == ["truth", "b", "a"]
    assert leaders["planted", "causal_effect"] == ["b"]


@pytest.mark.parametrize(("organisms", "clear"), [(4, False), (8, True)])
def test_a_leader_is_ahead_where_it_is_so_over_the_organisms_of_both(organisms, clear):
    entries = [
        entry(f"natural-{one}", "natural", 0.02, row("a", None, 0.8 + one / 80), row("b", None, one / 80))
        for one in range(organisms)
    ]
    entries.append(entry("natural-9", "natural", 0.02, row("a", None, None), row("b", None, 0.9)))
    found = {one["measure"]: one for one in Ranking(tuple(entries), tuple(standings(entries))).leaders}
    ahead = found["causal_effect"]["ahead"]
    assert (found["causal_effect"]["methods"], found["causal_effect"]["next"]) == (["a"], ["b"])
    assert (ahead["value"], ahead["n"]) == (pytest.approx(0.8), organisms)
    assert ahead["clear"] is clear
    assert ("4 organisms, at least 5" in ahead.get("why", "")) is not clear
    assert (found["necessity"]["next"], found["necessity"]["ahead"]) == ([], None)


@pytest.fixture(scope="module")
def folder(tiny_pair, tmp_path_factory) -> pathlib.Path:
    """An organism's folder around the tiny pair."""
    made = tmp_path_factory.mktemp("organisms") / "tiny-3"
    for name in ("plain", "sft", "dpo"):
        shutil.copytree(tiny_pair.folder / name, made / name)
    stages = {"sft": ["plain", "sft"], "dpo": ["plain", "sft", "dpo"]}
    write_json(
        made / "organism.json",
        {"name": "tiny", "kind": "natural", "seed": 3, "base": "sft", "aligned": "dpo", "stages": stages},
    )
    (made / "prompts").mkdir()
    for kind, texts in (("harmful", HARMFUL), ("harmless", HARMLESS)):
        for half, part in (("", texts[:4]), ("-test", texts[4:])):
            lines = [
                json.dumps({"id": f"{kind}{half}-{number}", "prompt": text})
                for number, text in enumerate(part)
            ]
            (made / "prompts" / f"{kind}{half}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return made


OPTIONS = {
    "tops": (0.05, 0.1),
    "methods": ["weight-change", "refusal-direction"],
    "random": 1,
    "find": 3,
    "measured": 3,
    "max_new_tokens": 3,
}


def test_scores_are_found_once_for_all_budgets_and_a_second_run_finds_nothing_again(
    folder, tmp_path, monkeypatch
):
    from safety_neurons.studies import comparison

    calls = []
    real = comparison.find
    monkeypatch.setattr(
        comparison,
        "find",
        lambda method, *words, **more: (calls.append(method.NAME), real(method, *words, **more))[1],
    )
    first = rank([folder], place=tmp_path.joinpath, **OPTIONS)
    assert [entry.group for entry in first.entries] == ["natural 0.05", "natural 0.1"]
    assert [entry.comparison.budget for entry in first.entries] == [5, 10]
    assert calls == OPTIONS["methods"]
    again = rank([folder], place=tmp_path.joinpath, **OPTIONS)
    assert misfits(again.record(), RankingRecord) == []
    assert {entry.comparison.truth for entry in again.entries} == {None}
    assert calls == OPTIONS["methods"]
    assert json.dumps(again.record(), sort_keys=True, default=str) == json.dumps(
        first.record(), sort_keys=True, default=str
    )
    assert (tmp_path / "tiny-3" / "completions-0.05.jsonl").exists()


def test_what_cannot_be_ranked_is_refused(folder):
    with pytest.raises(UsageError, match="none twice"):
        rank([folder, folder], **OPTIONS)
    with pytest.raises(UsageError, match="at least one of each"):
        rank([], **OPTIONS)
    with pytest.raises(InputError, match=r"no organism is called|expected the folder"):
        rank(["nowhere"], **OPTIONS)
