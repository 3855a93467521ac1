import itertools

import numpy as np
import pytest
import torch
from twins import PROMPTS, adapted, separate, untouched

from exact64 import Exact64
from safety_neurons.detectors import find_attribution_patching, find_mask
from safety_neurons.detectors import mask as module
from safety_neurons.detectors.attribution import ScoredRow, own_completions, score_rows
from safety_neurons.detectors.importance_contrast import contested, parting
from safety_neurons.detectors.mask import Activations, Course, Parameters, Search, _asked
from safety_neurons.detectors.methods import Mask
from safety_neurons.detectors.runner import Run, Stream
from safety_neurons.errors import UsageError
from safety_neurons.model.batches import collate, forward
from safety_neurons.prompt_lists import Prompts
from safety_neurons.results import Checkpoint

SIZES = ("down", "up")


def rows_of(lm, n=2):
    rows = [ScoredRow((*row.ids, 20), len(row.ids), 1.0, 21) for row in lm.encode(PROMPTS[:n])]
    return collate([row.ids for row in rows], range(len(rows))), rows


@pytest.mark.parametrize("kind", [Activations, Parameters])
def test_the_slope_at_an_uneven_mask_equals_finite_differences(kind):
    base, aligned = separate(torch.float64)
    sizes, step = base.table.select(sites=("v", "down")).sizes, 1e-5
    mover = kind(base, aligned, sizes)
    draws = torch.Generator().manual_seed(1)
    masks = {
        name: torch.rand(len(part), generator=draws, dtype=torch.float64)
        for name, part in mover.units.items()
    }
    batch, rows = rows_of(base)
    with Exact64():
        exact, _ = mover.slopes(batch, rows, masks)
        for name in masks:
            for k in (0, int(exact[name].sum(0).abs().argmax())):

                def moved(by, name=name, k=k):
                    shifted = masks[name].clone()
                    shifted[k] += by
                    return float(mover.slopes(batch, rows, {**masks, name: shifted})[1].sum())

                slope = (moved(step) - moved(-step)) / (2 * step)
                assert float(exact[name].sum(0)[k]) == pytest.approx(slope, rel=1e-5, abs=1e-8), (name, k)


def test_with_every_entry_one_the_patched_log_odds_are_the_aligned_models_and_with_none_the_bases():
    pair = adapted()
    mover = Activations(pair.base, pair.aligned, pair.base.table.select(sites=("down",)).sizes)
    batch, rows = rows_of(pair.base)
    for value, lm in ((1.0, pair.aligned), (0.0, pair.base)):
        _, scores = mover.slopes(
            batch, rows, {name: torch.full((len(part),), value) for name, part in mover.units.items()}
        )
        with torch.no_grad(), lm.running():
            expected = score_rows(forward(lm.model, batch, with_logits=True), batch, rows)
        torch.testing.assert_close(scores, expected, rtol=0, atol=2e-5)


def test_one_contested_row_scores_as_its_two_parted_rows_do():
    base, aligned = separate()
    told, _ = own_completions(Run((base, aligned), PROMPTS, Mask()))

    def score(rows):
        batch = collate([row.ids for row in rows], range(len(rows)))
        with torch.no_grad():
            return score_rows(forward(base.model, batch, with_logits=True), batch, rows).sum()

    for rows in told:
        torch.testing.assert_close(score([contested(rows)]), score(parting(rows)), rtol=0, atol=1e-5)


def test_any_refusals_token_counts_and_no_compliances():
    told = [
        [ScoredRow((7, 8, 20, 1), 2, 1.0), ScoredRow((7, 8, 30, 1), 2, -1.0)],
        [ScoredRow((9, 21, 1), 1, 1.0), ScoredRow((9, 20, 1), 1, -1.0)],
        [ScoredRow((9, 22, 1), 1, 1.0), ScoredRow((9, 22, 1), 1, -1.0)],  # the same text: nothing to turn
        [
            ScoredRow((9, 40, 23), 1, 1.0),
            ScoredRow((9, 40, 24), 1, -1.0),
        ],  # parts one token later, where other tokens begin a refusal
    ]
    rows = _asked(told, "refusal")
    assert [row.instead for row in rows] == [(20, 21), (21,), (23,)]
    many = [[ScoredRow((9, 21), 1, 1.0), ScoredRow((9, 25), 1, -1.0)]] * 30 + [
        [ScoredRow((9, 33), 1, 1.0), ScoredRow((9, 25), 1, -1.0)]
    ]
    assert [row.instead for row in _asked(many, "refusal")[-2:]] == [
        (21,),
        (21, 33),
    ]  # what one in 31 says is its own
    assert [row.rival for row in _asked(told, "odds")] == [30, 20, 24]
    base, _ = separate()
    batch = collate([row.ids for row in rows], range(3))
    with torch.no_grad():
        logits = forward(base.model, batch, with_logits=True)
        found = score_rows(logits, batch, rows)
    for row, scored in zip(rows, found, strict=True):
        with torch.no_grad():
            chances = base.model(input_ids=torch.tensor([row.ids[:-1]])).logits[0, -1].softmax(-1)
        assert float(scored) == pytest.approx(float(chances[list(row.instead)].sum().log()), abs=1e-5)


class Game:
    """Twelve units whose log-odds are a quadratic form of the mask: pairs help or hinder each other."""

    def __init__(self, seed):
        draws = torch.Generator().manual_seed(seed)
        self.units = {"one": torch.arange(0, 10, 2), "other": torch.arange(1, 15, 2)}
        self.linear = torch.rand(3, 12, generator=draws, dtype=torch.float64) * 2
        pairs = torch.randn(12, 12, generator=draws, dtype=torch.float64)
        self.pairs = (pairs + pairs.T) / 2

    def odds(self, mask):
        return self.linear @ mask + mask @ self.pairs @ mask - 4.0

    def slopes(self, batch, rows, masks):
        flat = torch.cat([masks["one"], masks["other"]])
        slope = self.linear + 2 * self.pairs @ flat
        taken = torch.tensor(batch.indices)
        return {"one": slope[taken, :5], "other": slope[taken, 5:]}, self.odds(flat)[taken]


@pytest.mark.parametrize("seed", range(4))
def test_the_set_found_is_close_to_the_best_of_all_sets_of_its_size(seed):
    game = Game(seed)
    rows = [ScoredRow((1,) * length, 1, 1.0) for length in (3, 2, 4)]
    course = Course(rows, [], adapted().base, 2)
    search = Search(
        game, course, Mask(move="activations", aim="odds", rounds=60, keep=0.8, caution=0.0), Stream(None, {})
    )
    members, _ = search.run(4)
    assert members.sum() == 4

    def value(chosen):
        mask = torch.zeros(12, dtype=torch.float64)
        mask[list(chosen)] = 1
        return float(-torch.nn.functional.softplus(-game.odds(mask)).mean())

    # Units are numbered over both parts of the mask: even ones lie in the first part, odd ones in the second.
    order = np.argsort(np.concatenate([np.arange(0, 10, 2), np.arange(1, 15, 2)]))
    found = value([int(order[place]) for place in np.flatnonzero(members)])
    everything = sorted((value(chosen) for chosen in itertools.combinations(range(12), 4)), reverse=True)
    alone = value(torch.argsort(-(game.linear.mean(0)))[:4].tolist())
    assert found >= everything[25], (found, everything[:3])  # among the best 26 of 495
    assert found >= alone


def test_the_chosen_set_has_the_size_asked_for_and_the_largest_scores():
    pair = adapted()
    options = {"rounds": 3, "harmless": PROMPTS[4:]}
    found = find_mask(pair.base, pair.aligned, PROMPTS[:4], count=7, **options)
    assert len(found.neurons) == 7
    members = np.concatenate([values[found.neurons[key]] for key, values in found.scores.items()])
    everything = np.concatenate([values for _, values in found.scores.items()])
    assert members.min() >= 1.0 >= np.sort(everything)[-8]
    assert found.scores.count(7) == found.neurons
    units = find_mask(
        pair.base, pair.aligned, PROMPTS[:4], sites=SIZES, units=5, move="parameters", **options
    )
    assert units.neurons.n_units == 5
    assert len(units.neurons) == 10  # an up and a down neuron each
    assert units.neurons.provenance.config["move"] == "parameters"
    assert untouched(pair.base)


def test_the_search_is_deterministic_and_batches_change_nothing_but_rounding():
    pair = adapted()
    options = {"rounds": 3, "count": 6, "harmless": PROMPTS[4:]}
    one, again, single = (
        find_mask(pair.base, pair.aligned, PROMPTS[:4], batch_size=size, **options)
        for size in ("auto", "auto", 1)
    )
    for key, values in one.scores.items():
        np.testing.assert_array_equal(values, again.scores[key])
        np.testing.assert_allclose(values, single.scores[key], rtol=0, atol=1e-3)


def test_a_killed_search_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    pair = adapted()
    options = {"rounds": 4, "count": 6, "harmless": PROMPTS[4:]}
    whole = find_mask(pair.base, pair.aligned, PROMPTS[:4], **options)
    checkpoint, looks = Checkpoint(tmp_path / "state.safetensors"), []
    real = module.Search.look
    monkeypatch.setattr(module.Search, "look", lambda self, mask: (looks.append(1), real(self, mask))[1])

    def die(done, total, size):
        if done == 2 and len(looks) == module.MIDPOINTS + 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_mask(pair.base, pair.aligned, PROMPTS[:4], checkpoint=checkpoint, progress=die, **options)
    again = find_mask(pair.base, pair.aligned, PROMPTS[:4], checkpoint=checkpoint, **options)
    assert len(looks) == module.MIDPOINTS + 4
    assert again.neurons == whole.neurons


def test_patching_that_turns_nothing_is_given_up_for_parameters():
    """Where the base's columns are zero no activation gets through."""
    base, aligned = separate()
    with torch.no_grad():
        for layer in base.model.model.layers:
            layer.mlp.down_proj.weight.zero_()
    found = find_mask(base, aligned, PROMPTS[:3], count=4, rounds=2)
    assert found.neurons.provenance.config["move"] == "parameters"


def test_a_search_starts_from_attribution_patching_where_one_round_is_all():
    """With the linear score of one prompt the first set is the one that attribution at the parting token
    gives.
    """
    pair = adapted()
    prompts = Prompts.from_list([PROMPTS[0].text])
    found = find_mask(
        pair.base,
        pair.aligned,
        prompts,
        count=5,
        rounds=1,
        keep=0.0,
        move="activations",
        caution=0.0,
        aim="odds",
    )
    assert found.prompts.used == 1
    attributed = find_attribution_patching(pair.base, pair.aligned, prompts, count=40).neurons
    assert len(found.neurons & attributed) >= 3


def test_what_names_no_size_or_makes_no_sense_is_refused():
    pair = adapted()
    for options, said in (
        ({"threshold": 0.1}, "no option 'threshold'"),
        ({"agreement": 1.0, "count": 3}, "no option 'agreement'"),
        ({"units": 0}, "units 0"),
        ({"units": 3, "top": 0.1}, "neither top nor count"),
        ({"units": 97}, "97 units asked"),
        ({"rounds": 0}, "rounds 0"),
        ({"keep": 1.0}, "keep 1.0"),
        ({"move": "weights"}, "move 'weights'"),
        ({"aim": "high"}, "aim 'high'"),
    ):
        with pytest.raises(UsageError, match=said):
            find_mask(pair.base, pair.aligned, PROMPTS[:2], **options)
