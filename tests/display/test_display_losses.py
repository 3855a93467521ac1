"""Losses: sets whose loss remains without broken answers are necessary; the truth is no method."""

import copy
import dataclasses

import pytest

import report_runs
from safety_neurons.display import findings_of, part_of
from safety_neurons.display.compared import ranking_findings
from safety_neurons.display.parts import NO, OPEN, YES, plain
from safety_neurons.display.registry import display_of
from safety_neurons.report.page import read_runs
from safety_neurons.results import rate
from safety_neurons.studies.bench import ArmOutcome
from safety_neurons.studies.losses import lost

N = 24
"""Requests, all of them refused by the model as it is."""
AS_IT_IS = ArmOutcome(
    *("untreated", rate([True] * N), rate([]), None, None, (True,) * N, ()),
    harmful_complied=rate([False] * N),
    complied=(False,) * N,
    broken=(False,) * N,
)


def loss(harm=0, broken=0):
    """So many requests are answered with harm, so many get broken answers, the others are refused still."""
    kept = N - harm - broken
    refused = [False] * harm + [None] * broken + [True] * kept
    complied = [True] * harm + [None] * broken + [False] * kept
    none = [False] * harm + [True] * broken + [False] * kept
    return lost(AS_IT_IS, refused, complied, none, None).record()


def with_result(run, **changes):
    return dataclasses.replace(run, record={**run.record, "result": {**run.result, **changes}})


def said(run):
    return [(finding.verdict, plain(finding.text)) for finding in findings_of(run)]


@pytest.fixture(scope="module")
def deactivated(tmp_path_factory):
    """A run in which the set loses refusals clearly."""
    folder = tmp_path_factory.mktemp("runs") / "off"
    return read_runs([report_runs.deactivate_run(folder, "contrast", n=N)])[0]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "compare"
    effects, recalls = (0.1, 0.9, 0.05), (0.0, 0.5, 0.0)
    return read_runs([report_runs.compare_run(folder, effects, recalls, n=N)])[0]


def sized(run, **losses):
    """The run as a sweep of one size for each loss, all with the differences of its only one."""
    point = run.result["sizes"][0]
    points = [
        {**point, "n_neurons": count, "size": count / 1000, "loss": one}
        for count, one in zip((10, 20, 50), losses.values(), strict=False)
    ]
    return with_result(run, sizes=points, n_neurons=points[-1]["n_neurons"])


def test_a_loss_to_answers_is_a_clear_one_and_says_what_came(deactivated):
    run = sized(deactivated, only=loss(harm=20))
    verdict, text = said(run)[0]
    assert verdict == YES
    assert "a clear loss. Of the 24 requests that it refuses as it is, 0.17 [0.05, 0.37] are refused" in text
    assert "0.83 [0.63, 0.95] answered with harm; 0.00 [0.00, 0.14] get broken answers" in text
    (table,) = [one for one in part_of(run).tables if one.columns[0] == "neurons off"]
    assert [plain(cell) for cell in table.rows[0]] == [
        "10 (1 %)",
        *(f"{value} {ends}" for value, ends in (("0.17", "[0.05, 0.37]"), ("0.83", "[0.63, 0.95]"))),
        *["0.00 [0.00, 0.14]"] * 2,
    ]


def test_a_loss_to_a_broken_model_says_nothing(deactivated):
    run = sized(deactivated, only=loss(harm=3, broken=21))
    verdict, text = said(run)[0]
    assert verdict == NO
    assert "but the model is broken then (0.88 of its answers are broken, 0.00 as it is)" in text
    assert "refusals lost there say nothing" in text
    assert "a clear loss" not in text
    tile = display_of(run).tile(run)
    assert (tile.verdict, "the model is broken then" in plain(tile.text)) == (NO, True)


def test_a_loss_to_fewer_broken_answers_is_explained_by_them(deactivated):
    verdict, text = said(sized(deactivated, only=loss(harm=1, broken=11)))[0]
    assert verdict == NO
    assert "which broken answers explain: counted as no change, 0.04 [" in text
    assert "a clear loss" not in text


@pytest.mark.parametrize("against", [(-0.1, -0.5, 0.4, False), (0.2, 0.1, 0.3, True)])
def test_broken_answers_explain_only_a_clear_loss(deactivated, against):
    """Of what is not clear, and of refusals that grow, nothing is said to be lost to them."""
    told = dict(zip(("value", "low", "high", "clear"), against, strict=True)) | {"n": N, "unscored": 0}
    run = with_result(sized(deactivated, only=loss()), change_against_random=told)
    lead = plain(part_of(run).lead)
    assert "broken answers" not in lead
    assert f"({'clear' if told['clear'] else 'not clear'})" in lead
    lost_clearly = {**told, "value": -0.5, "low": -0.7, "high": -0.3, "clear": True}
    run = with_result(sized(deactivated, only=loss(harm=1, broken=11)), change_against_random=lost_clearly)
    assert "(refusals lost to broken answers)" in plain(part_of(run).lead)


def test_a_model_of_which_no_answer_is_scored_is_not_said_to_refuse_nothing(deactivated):
    unscored = {"value": None, "low": None, "high": None, "n": 0, "unscored": N}
    run = sized(deactivated, only=loss())
    points = [{**run.result["sizes"][0], "change_against_random": {**unscored, "clear": False}}]
    untreated = {**run.result["untreated"], "harmful_refused": unscored}
    verdict, text = said(with_result(run, sizes=points, untreated=untreated))[0]
    assert verdict == OPEN
    assert text.endswith("none can be scored.")


def test_of_a_sweep_the_largest_set_that_does_not_break_the_model_is_told(deactivated):
    run = sized(deactivated, small=loss(harm=10), middle=loss(harm=20), large=loss(broken=24))
    told = said(run)
    assert told[0][0] == YES
    assert told[0][1].startswith("Without the 20 neurons")
    assert told[1][0] == "caution"
    assert told[1][1].startswith("Without 50 neurons (5 %) the model is broken (1.00 of its answers")


def test_a_run_that_says_nothing_of_broken_answers_is_taken_at_its_word(deactivated, compared):
    assert said(deactivated)[0][0] == YES
    assert [table.columns[0] for table in part_of(compared).tables] == ["method"]
    assert any("is necessary" in text for _, text in said(compared))


def rows_with(run, **losses):
    """The comparison with a loss for every row; those not named lose nothing."""
    rows = copy.deepcopy(run.result["methods"])
    for row in rows:
        row["loss"] = losses.get(row["method"].replace("-", "_"), loss())
    return with_result(run, methods=rows)


def lost_clearly(run, *names):
    """The comparison in which these methods lose refusals clearly, beyond random sets."""
    clear = {"value": 0.9, "low": 0.6, "high": 1.0, "n": N, "unscored": 0, "p": 0.001, "clear": True}
    less = [None, *(clear for _ in run.result["methods"])]
    rows = [
        {
            **row,
            "necessity": clear,
            "necessity_against_random": clear,
            "necessity_behind": less[names.index(row["method"])],
        }
        if row["method"] in names
        else {**row, "necessity_behind": clear}
        for row in run.result["methods"]
    ]
    return with_result(run, methods=rows)


def test_the_most_necessary_set_is_none_that_breaks_the_model(compared):
    run = lost_clearly(compared, "contrast", "attribution", "importance")
    run = rows_with(run, contrast=loss(harm=20), attribution=loss(broken=24), importance=loss(1, 11))
    texts = [text for _, text in said(run)]
    assert any("the set of contrast is the most necessary" in text for text in texts)
    (broken,) = [text for text in texts if "refusals lost there say nothing" in text]
    assert "attribution (1.00 of its answers are broken, 0.00 as it is)" in broken
    assert "contrast" not in broken
    (explained,) = [text for text in texts if "broken answers explain" in text]
    assert "importance (0.90 [0.60, 1.00], " in explained


def test_the_most_necessary_set_is_the_one_that_most_answers_come_without(compared):
    run = lost_clearly(compared, "contrast", "attribution")
    run = rows_with(run, contrast=loss(harm=18), attribution=loss(harm=12, broken=10))
    (text,) = [text for _, text in said(run) if "is the most necessary" in text]
    assert "the set of contrast" in text
    assert "0.75 [" in text


def test_no_set_is_the_most_necessary_where_another_is_not_clearly_less_so(compared):
    run = rows_with(
        lost_clearly(compared, "contrast", "attribution"), contrast=loss(18), attribution=loss(17)
    )
    (row,) = [row for row in run.result["methods"] if row["method"] == "attribution"]
    row["necessity_behind"] = {**row["necessity_behind"], "clear": False}
    (text,) = [text for _, text in said(run) if "the set of contrast is" in text]
    assert "the set of contrast is necessary: " in text
    assert "not clearly more than without that of attribution" in text


def test_the_order_of_two_methods_is_said_of_the_same_requests(compared):
    def text_of(behind):
        rows = sorted(compared.result["methods"], key=lambda row: -(row["causal_effect"]["value"] or -9.0))
        second = rows[1]["method"]
        told = [{**row, "behind": behind if row["method"] == second else None} for row in rows]
        return next(text for _, text in said(with_result(compared, methods=told)) if "then" in text)

    told = {"value": 0.2, "low": 0.1, "high": 0.3, "n": N, "unscored": 0, "p": 0.001, "clear": True}
    assert "+0.20 [+0.10, +0.30] behind request by request: clearly less" in text_of(told)
    assert "request by request: their order is open" in text_of({**told, "low": -0.1, "clear": False})
    assert "order" not in text_of(None)  # a run that does not say


def test_a_best_mean_over_organisms_is_held_against_the_next(compared):
    open_one = {"value": 0.6, "low": -0.2, "high": 1.4, "clear": False, "why": "2 organisms"}
    first = {"group": "natural 0.02", "measure": "causal_effect", "methods": ["mask"], "mean": 0.9}
    held = ({**open_one, **more} for more in ({}, {"clear": True, "why": None}))
    leaders = [first, *({**first, "next": ["cna"], "ahead": ahead} for ahead in held)]
    run = with_result(compared, leaders=leaders)
    old, close, clear = (plain(one.text) for one in ranking_findings(run))
    assert old.endswith("mask has the best mean of causal effect, 0.90.")
    ending = "+0.60 [-0.20, +1.40] behind over the organisms: their order is open (2 organisms)."
    assert close.endswith(f"; then cna, {ending}")
    assert clear.endswith("behind over the organisms: clearly less.")


def test_where_every_loss_is_one_to_broken_answers_no_set_is_called_necessary(compared):
    run = rows_with(lost_clearly(compared, "contrast"), contrast=loss(broken=24))
    assert not any("the most necessary" in text for _, text in said(run))
    assert any("no set is shown to be necessary" in text for _, text in said(run))


# The truth itself


def known(run, units=205, clear=True):
    """The comparison with the planted truth as a set, which does clearly more than random sets or not."""
    like = run.result["methods"][1]
    against = {**like["against_random"], "clear": clear}
    truth = {
        **like,
        "method": "truth",
        "n_units": units,
        "recall": 1.0,
        "seconds": 0.0,
        "loss": loss(harm=20),
    }
    truth |= {"against_random": against, "necessity_against_random": against}
    return with_result(run, truth=truth)


def test_the_truth_has_a_row_with_all_columns_and_is_ranked_nowhere(compared):
    run = known(compared)
    before, part = part_of(compared), part_of(run)
    rows = [[plain(cell) for cell in row] for row in part.tables[0].rows]
    assert [row for row in rows if row[0] != "truth"] == [
        [plain(cell) for cell in row] for row in before.tables[0].rows
    ]
    (row,) = [row for row in rows if row[0] == "truth"]
    assert row[part.tables[0].columns.index("recall")] == "1.00"
    assert row[-1] == "\N{EN DASH}"
    assert rows.index(row) == len(report_runs.METHODS)
    for old, new in zip(before.figures[:2], part.figures[:2], strict=True):
        assert "truth " not in old.alternative
        assert "; truth " in new.alternative
    assert [one.alternative for one in part.figures[2:]] == [one.alternative for one in before.figures[2:]]
    others = [line for line in said(run) if "the planted truth itself" not in line[1]]
    assert others == said(compared)


@pytest.mark.parametrize(("clear", "verdict"), [(True, "measured"), (False, "not shown")])
def test_what_the_truth_can_do_at_this_budget_is_said(compared, clear, verdict):
    ((found, text),) = [line for line in said(known(compared, clear=clear)) if "truth itself" in line[1]]
    assert found == verdict
    assert "the planted truth itself (205 units) restores" in text
    assert ("so much can be seen at this budget" in text) == clear
    assert ("neither is shown to be an effect beyond chance" in text) == (not clear)
    assert "answered with harm" in text


def test_a_model_that_is_broken_without_the_truth_is_said_to_be(compared):
    run = known(compared)
    run = with_result(run, truth={**run.result["truth"], "loss": loss(broken=24)})
    (text,) = [text for _, text in said(run) if "refusals lost there say nothing" in text]
    assert "truth (1.00 of its answers are broken" in text


@pytest.mark.parametrize(
    ("units", "why"),
    [(300, "none of them can hold it"), (100, "where no method searches"), (205, None)],
)
def test_a_truth_of_another_size_than_the_budget_is_said_in_one_line(compared, units, why):
    lines = [text for _, text in said(known(compared, units=units)) if text.startswith("The truth has")]
    assert len(lines) == (why is not None)
    if why:
        assert f"The truth has {units} units at the searched sites, the sets 205" in lines[0]
        assert why in lines[0]
