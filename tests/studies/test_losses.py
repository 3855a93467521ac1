"""Losses: what came in the place of refusals adds up, and refusals lost to a broken model are told apart from
refusals lost to answers.
"""

import dataclasses

import pytest

from safety_neurons.results import paired_difference, rate
from safety_neurons.studies.bench import ArmOutcome
from safety_neurons.studies.losses import lost

R, H, N, B, U = "refused", "harm", "neither", "broken", "unscored"
SAID = {
    R: (True, False, False),
    H: (False, True, False),
    N: (False, False, False),
    B: (None, None, True),
    U: (False, None, False),
}
"""By what came: refused, complied, broken."""


def columns(*came):
    return tuple(zip(*(SAID[one] for one in came), strict=True))


def before(*came, perplexity=None):
    refused, complied, broken = columns(*came)
    return ArmOutcome(
        *("untreated", rate(refused), rate([]), perplexity, None, refused, ()),
        harmful_complied=rate(complied),
        complied=complied,
        broken=broken,
    )


def loss(was, now, groups=None, **text):
    perplexity = text.pop("perplexity", None)
    return lost(before(*was, **text), *columns(*now), groups, perplexity)


def test_the_shares_are_of_the_requests_that_were_refused_and_add_up():
    found = loss([R] * 10 + [H] * 5 + [B], [R, R, H, H, H, N, B, B, B, U] + [R] * 6)
    shares = [getattr(found, kind) for kind in (R, H, N, B)]
    assert [round(9 * share.value) for share in shares] == [2, 3, 1, 3]
    assert sum(share.value for share in shares) == pytest.approx(1)
    assert {(share.n, share.unscored) for share in shares} == {(9, 1)}
    assert found.harm == rate([one == H for one in [R, R, H, H, H, N, B, B, B]] + [None])


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ((True, False, True), R),  # refuses over and over: nothing is lost
        ((False, True, True), B),  # whatever a judge says of a loop
        ((None, None, True), B),
        ((False, False, True), B),
    ],
)
def test_an_answer_that_repeats_itself_is_broken_unless_it_refuses(said, kind):
    found = lost(before(R), *((one,) for one in said), None)
    assert {name: getattr(found, name).value for name in (R, H, N, B)} == {
        name: float(name == kind) for name in (R, H, N, B)
    }


def test_shares_know_that_requests_share_a_group():
    was, now = [R] * 12 + [H] * 3, [H] * 6 + [R] * 6 + [R] * 3
    groups = ["one"] * 6 + ["other"] * 6 + ["third"] * 3
    alone, grouped = loss(was, now), loss(was, now, groups)
    assert grouped.harm == rate([True] * 6 + [False] * 6, groups[:12])
    assert grouped.harm.high - grouped.harm.low > alone.harm.high - alone.harm.low


def test_what_is_lost_to_answers_is_the_whole_loss_where_none_is_broken():
    was, now = [R] * 20 + [H] * 4, [H] * 12 + [N] * 4 + [R] * 4 + [H] * 3 + [R]
    found = loss(was, now)
    assert found.sound == paired_difference([one == R for one in was], [one == R for one in now])
    assert found.sound.clear
    assert found.more_broken.value == 0
    assert found.breaks is None


def test_refusals_lost_to_broken_answers_are_no_loss_that_remains():
    found = loss([R] * 20 + [H] * 20, [B] * 10 + [R] * 10 + [H] * 20)
    assert found.broken.value == 0.5
    assert found.sound.value == 0
    assert not found.sound.clear
    assert found.more_broken.clear
    assert found.breaks is None  # a quarter of all answers


@pytest.mark.parametrize(
    ("was", "now", "breaks"),
    [
        ([R] * 24, [B] * 21 + [H] * 3, True),
        ([R] * 12 + [H] * 12, [R] * 12 + [H] * 12, False),
        ([R] * 24, [B] * 12 + [H] * 12, False),  # half is not most
        ([R] * 8 + [B] * 16, [H] * 8 + [B] * 16, False),  # no more than as it is
        ([R] * 4, [B] * 3 + [H], False),  # too few to be clear
    ],
)
def test_a_model_is_broken_where_most_answers_are_and_clearly_more_than_as_it_is(was, now, breaks):
    found = loss(was, now)
    assert (found.breaks is not None) == breaks
    if breaks:
        assert found.breaks == "0.88 of its answers are broken, 0.00 as it is"


@pytest.mark.parametrize(
    ("as_it_is", "off", "breaks"),
    [
        (125.0, (151.0, 140.0), False),
        (125.0, (1149.0, 900.0), True),
        (125.0, (1149.0, 480.0), False),
        (125.0, (1149.0, None), False),
        (None, (1149.0, 900.0), False),
        (125.0, (None, None), False),
    ],
)
def test_a_model_is_broken_where_text_has_clearly_become_that_unlikely(as_it_is, off, breaks):
    value, low = off
    text = dataclasses.replace(rate([True] * 9), value=value, low=low)
    found = loss([R] * 20, [N] * 20)
    assert found.breaks is None
    found = lost(before(*[R] * 20, perplexity=as_it_is), *columns(*[N] * 20), None, text)
    assert (found.breaks is not None) == breaks
    if breaks:
        assert "9.2 times" in found.breaks
