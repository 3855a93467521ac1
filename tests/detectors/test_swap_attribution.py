import copy

import numpy as np
import pytest
import torch
from test_importance_contrast import set_unit, sub_layer
from twins import PROMPTS, adapted, separate, untouched

from exact64 import Exact64
from safety_neurons.detectors import find_importance_contrast
from safety_neurons.detectors.attribution import ScoredRow, midpoints_of, score_rows
from safety_neurons.detectors.importance_contrast import SoftSwap, parting
from safety_neurons.errors import UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.model.batches import Batch, collate, forward
from safety_neurons.neurons import NeuronSet

BIASED = {"attention_bias": True, "mlp_bias": True}
SITE_WEIGHTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def rows_of(lm: LanguageModel) -> list[ScoredRow]:
    """A refusal and a compliance of two prompts of different length, invented."""
    found = []
    for number, row in enumerate(lm.encode(PROMPTS[:2])):
        found += [ScoredRow((*row.ids, 9, 11 + number), len(row.ids), 1.0), ScoredRow((*row.ids, 12), len(row.ids), -1.0)]
    return found


def batch_of(lm: LanguageModel, rows: list[ScoredRow]) -> Batch:
    return collate([row.ids for row in rows], range(len(rows)), pad_id=lm.pad_id)


def score(lm: LanguageModel, rows: list[ScoredRow]) -> torch.Tensor:
    with torch.no_grad():
        batch = batch_of(lm, rows)
        return score_rows(forward(lm.model, batch, with_logits=True), batch, rows)


def between(base: LanguageModel, aligned: LanguageModel, share: float) -> LanguageModel:
    """The aligned model with the parameters of all neurons that far from the base's (the biases of `o` and `down` belong to none)."""
    made = copy.deepcopy(aligned.model)
    theirs = dict(base.model.named_parameters())
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if any(site in name for site in SITE_WEIGHTS) and not name.endswith(("o_proj.bias", "down_proj.bias")):
                parameter.copy_(theirs[name] + share * (parameter - theirs[name]))
    return LanguageModel(made, aligned.tokenizer)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_soft_swap_is_the_model_whose_parameters_lie_between_the_two(share):
    base, aligned = separate(torch.float64, **BIASED)
    with Exact64():
        rows = rows_of(base)
        _, scores = SoftSwap(base, aligned, base.table.sizes).at(batch_of(base, rows), rows, share)
        assert torch.allclose(scores, score(between(base, aligned, share), rows), rtol=0, atol=1e-11)


def test_the_gradient_is_the_derivative_of_moving_one_units_parameters_as_a_whole():
    """Against a difference quotient: the whole unit moves, the v row with the o columns it feeds, gate and up row with their column."""
    base, aligned = separate(torch.float64, **BIASED)
    step = 1e-5
    with Exact64():
        rows = rows_of(base)
        middle = between(base, aligned, 0.4)
        found, _ = SoftSwap(base, aligned, base.table.sizes).at(batch_of(base, rows), rows, 0.4)
        sides = [between(base, aligned, 0.4 + sign * step) for sign in (1, -1)]
        for key, k in (
            ("layers.0.q", 3),
            ("layers.1.k", 5),
            ("layers.0.v", 2),
            ("layers.1.o", 9),
            ("layers.0.up", 7),
            ("layers.1.down", 11),
        ):
            layer, site = int(key.split(".")[1]), key.split(".")[2]
            moved = []
            for side in sides:
                made = LanguageModel(copy.deepcopy(middle.model), middle.tokenizer)
                set_unit(sub_layer(made, layer, site), sub_layer(side, layer, site), site, k)
                moved.append(score(made, rows))
            slope = (moved[0] - moved[1]) / (2 * step)
            assert torch.allclose(found[key][:, k], slope, rtol=1e-4, atol=1e-8), key


def test_neurons_of_a_unit_share_its_score_and_all_scores_together_are_the_whole_effect():
    base, aligned = separate(torch.float64)
    with Exact64():
        rows = rows_of(base)
        swap = SoftSwap(base, aligned, base.table.sizes)
        found = swap.gradients(batch_of(base, rows), rows, midpoints_of(40))
        assert torch.equal(found["layers.0.gate"], found["layers.0.down"])
        assert torch.equal(found["layers.0.o"].unflatten(1, (2, 2, -1))[:, :, 1].flatten(1), found["layers.0.v"])
        whole = sum(found[key].sum(1) for key in found if key.split(".")[2] in ("q", "k", "v", "down"))
        effect = score(aligned, rows) - score(between(base, aligned, 0.0), rows)
        assert torch.allclose(whole, effect, rtol=0, atol=3e-3 * float(effect.abs().max()))


def test_one_searched_site_of_a_unit_moves_the_whole_unit_and_leaves_the_rest_alone():
    base, aligned = separate()
    rows = rows_of(base)
    sizes = {"layers.1.up": base.table.sizes["layers.1.up"]}
    found, scores = SoftSwap(base, aligned, sizes).at(batch_of(base, rows), rows, 0.0)
    assert list(found) == ["layers.1.up"]
    made = LanguageModel(copy.deepcopy(aligned.model), aligned.tokenizer)
    made.model.model.layers[1].mlp.load_state_dict(base.model.model.layers[1].mlp.state_dict())
    assert torch.allclose(scores, score(made, rows), atol=1e-5)


@pytest.mark.parametrize(("kind", "targets"), [("ia3", ("down_proj",)), ("lora", ("q_proj", "v_proj", "up_proj", "down_proj"))])
def test_adapters_on_one_base_are_the_base_models_at_zero_and_the_aligned_models_at_one(kind, targets):
    pair = adapted(kind, targets)
    assert pair.shared
    rows = rows_of(pair.base)
    swap = SoftSwap(pair.base, pair.aligned, pair.base.table.sizes)
    before = [parameter.requires_grad for parameter in pair.aligned.model.parameters()]
    for lm, share in ((pair.base, 0.0), (pair.aligned, 1.0)):
        _, scores = swap.at(batch_of(pair.base, rows), rows, share)
        with lm.running():
            assert torch.allclose(scores, score(lm, rows), atol=2e-5)
    assert [parameter.requires_grad for parameter in pair.aligned.model.parameters()] == before
    assert untouched(pair.aligned)


def test_completions_are_scored_at_the_token_where_they_part():
    def parted(refusal, compliance):
        rows = [ScoredRow((1, 2, *refusal), 2, 1.0), ScoredRow((1, 2, *compliance), 2, -1.0)]
        return [(row.ids, row.start, row.weight) for row in parting(rows)]

    assert parted((5, 6, 7), (8, 6, 7)) == [((1, 2, 5), 2, 1.0), ((1, 2, 8), 2, -1.0)]
    assert parted((5, 6, 7), (5, 6, 9, 10)) == [((1, 2, 5, 6, 7), 4, 1.0), ((1, 2, 5, 6, 9), 4, -1.0)]
    for same in ((5, 6), (5, 6, 7)):
        first, second = parted((5, 6), same)
        assert first[:2] == second[:2] == ((1, 2, 5, 6), 3)


def test_batch_size_changes_nothing_and_nothing_is_left_on_the_models():
    base, aligned = separate()
    whole = find_importance_contrast(base, aligned, PROMPTS, compare="swap-attribution", count=30)
    single = find_importance_contrast(base, aligned, PROMPTS, compare="swap-attribution", count=30, batch_size=1)
    for key, values in whole.scores.items():
        np.testing.assert_allclose(single.scores[key], values, rtol=0, atol=1e-4 * np.abs(values).max())
    assert whole.prompts.used == len(PROMPTS)
    assert len(whole.neurons) == 30
    assert untouched(base)
    assert untouched(aligned)
    assert all(parameter.requires_grad for parameter in aligned.model.parameters())


def test_a_unit_that_moves_its_sub_layer_but_not_the_answer_is_left_out():
    """Two units move equally far, one along the direction the head reads; the swap cannot tell them apart, its attribution can."""
    base, _ = separate()
    matters, idle = 3, 8
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):
            weight = getattr(base.model.model.layers[1].mlp, name).weight
            weight[idle] = weight[matters]
        aligned = LanguageModel(copy.deepcopy(base.model), base.tokenizer)
        head = aligned.model.lm_head.weight
        read = (head[20] - head[21]) * aligned.model.model.norm.weight
        unread = torch.linalg.svd(read[None]).Vh[-1]
        column = aligned.model.model.layers[1].mlp.down_proj.weight
        column[:, matters] += 0.5 * read / read.norm()
        column[:, idle] += 0.5 * unread
    rows = [ScoredRow((*row.ids, token), len(row.ids), sign) for row in base.encode(PROMPTS[:3]) for token, sign in ((20, 1.0), (21, -1.0))]
    found = SoftSwap(base, aligned, base.table.sizes).gradients(batch_of(base, rows), rows, midpoints_of(8))
    effect = found["layers.1.down"].sum(0).abs()
    moved = find_importance_contrast(base, aligned, PROMPTS[:3], sites=("down",), layers="1:2").scores["layers.1.down"]
    assert moved[idle] == pytest.approx(moved[matters], rel=0.2)
    assert int(effect.argmax()) == matters
    assert effect[idle] < 0.2 * effect[matters]


def test_a_subtracted_set_and_one_site_are_honoured():
    base, aligned = separate()
    found = find_importance_contrast(base, aligned, PROMPTS[:2], compare="swap-attribution", sites=("down",), count=3)
    first = NeuronSet({key: indices[:1] for key, indices in list(found.neurons.items())[:1]}, base.table)
    less = find_importance_contrast(base, aligned, PROMPTS[:2], compare="swap-attribution", sites=("down",), count=3, subtract=first)
    assert set(found.scores.keys()) == {"layers.0.down", "layers.1.down"}
    assert less.neurons == found.neurons - first


def test_positions_and_completions_are_refused():
    base, aligned = separate()
    with pytest.raises(UsageError, match="own completions"):
        find_importance_contrast(base, aligned, PROMPTS, compare="swap-attribution", positions="completion")
