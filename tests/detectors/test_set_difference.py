"""SNIP and Wanda against twins that write every gradient and norm into whole weights, one prompt at a time."""

import copy

import numpy as np
import pytest
import torch
from twins import PROMPTS, adapted, model, separate, untouched

from safety_neurons.detectors import find_snip, find_wanda
from safety_neurons.errors import UnsupportedModelError, UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.neurons.scores import kept_share
from safety_neurons.results import Checkpoint

HARMFUL, HARMLESS = PROMPTS[:3], PROMPTS[3:]


def answers(lm, prompts):
    """Ids of prompt and answer, and where the answer starts."""
    told = []
    for row, answer in zip(lm.encode(prompts), lm.complete(prompts, max_new_tokens=16, batch_size=1), strict=True):
        ids = [token for token in answer.token_ids if token not in lm.eos_ids]
        if ids:
            told.append(([*row.ids, *ids], len(row.ids)))
    return told


def snip_twin(lm, prompts, name):
    weight = dict(lm.model.named_parameters())[name]
    total = 0.0
    for ids, start in answers(lm, prompts):
        lm.model.zero_grad()
        chances = lm.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        loss = -torch.stack([chances[place - 1, ids[place]] for place in range(start, len(ids))]).mean()
        loss.backward()
        total = total + (weight * weight.grad).abs().detach()
    lm.model.zero_grad(set_to_none=True)
    return total


def wanda_twin(lm, prompts, name):
    part = lm.model.get_submodule(name.removesuffix(".weight"))
    squares = 0.0
    for ids, start in answers(lm, prompts):
        seen = []
        handle = part.register_forward_hook(lambda _, args, __, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            lm.model(input_ids=torch.tensor([ids]))
        handle.remove()
        squares = squares + (seen[0][0, start:] ** 2).sum(0)
    return part.weight.detach().abs() * squares.sqrt()


def share_twin(safety, utility, share, other, columns):
    """Weight by weight, with sets."""
    flat = [{int(place) for place in values.flatten().argsort(descending=True)[:count]} for values, count in
            ((safety, round(share * safety.numel())), (utility, round(other * utility.numel())))]  # fmt: skip
    kept = torch.zeros(safety.numel())
    kept[list(flat[0] - flat[1])] = 1
    kept = kept.reshape(safety.shape)
    return kept.mean(0 if columns else 1).numpy()


@pytest.mark.parametrize(("find", "twin"), [(find_snip, snip_twin), (find_wanda, wanda_twin)])
def test_rows_and_columns_hold_the_share_of_weights_that_the_twin_keeps(find, twin):
    lm, _ = separate()
    found = find(lm, HARMFUL, harmless=HARMLESS, safety=0.2, utility=0.1, count=5).scores
    for site, part in (("q", "self_attn.q_proj"), ("o", "self_attn.o_proj"), ("up", "mlp.up_proj"), ("down", "mlp.down_proj")):
        name = f"model.layers.1.{part}.weight"
        expected = share_twin(twin(lm, HARMFUL, name), twin(lm, HARMLESS, name), 0.2, 0.1, site in ("o", "down"))
        # A tie at the cut may fall either way: at most one weight of a neuron.
        assert np.abs(found[f"layers.1.{site}"] - expected).max() <= 1.01 / 32
        assert np.abs(found[f"layers.1.{site}"] - expected).mean() < 1e-3
    assert untouched(lm)
    assert all(parameter.grad is None for parameter in lm.model.parameters())


def test_adapters_on_the_input_count_with_the_scale_that_the_weights_see():
    """The same network with the scale merged into the columns has the same importances."""
    pair = adapted()
    with pair.aligned.active():
        merged = LanguageModel(copy.deepcopy(pair.aligned.model).merge_and_unload(), pair.aligned.tokenizer)
    for find in (find_snip, find_wanda):
        one, other = (find(lm, HARMFUL, harmless=HARMLESS, sites=("down",), safety=0.2, count=5).scores for lm in (pair.aligned, merged))
        for key, values in one.items():
            assert np.abs(values - other[key]).mean() < 2e-3  # up to weights at the cut


def test_equal_texts_leave_nothing_and_one_share_bounds_the_score():
    lm = model(0)
    same = find_snip(lm, HARMFUL, harmless=HARMFUL, count=3).scores
    assert all(not values.any() for _, values in same.items())
    values = np.arange(20.0)
    assert kept_share(values, -values, 4, 0.25, 0.25).tolist() == [0.0, 0.0, 0.0, 1.0]
    assert kept_share(values, values, 4, 0.5, 0.25).tolist() == [0.0, 0.0, 1.0, 0.0]


def test_a_killed_run_goes_on_and_gives_the_same(tmp_path):
    lm = model(0)
    options = {"harmless": HARMLESS, "batch_size": 1, "count": 9}
    whole = find_snip(lm, HARMFUL, **options)
    checkpoint = Checkpoint(tmp_path / "state.safetensors")

    def die(done, total, tokens):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_snip(lm, HARMFUL, checkpoint=checkpoint, progress=die, **options)
    again = find_snip(lm, HARMFUL, checkpoint=checkpoint, **options)
    for key, values in whole.scores.items():
        np.testing.assert_array_equal(values, again.scores[key])


def test_what_cannot_be_weighed_is_refused():
    from families import build
    from tiny import tiny_tokenizer

    lm = model(0)
    with pytest.raises(UsageError, match="above 0 and below 1"):
        find_wanda(lm, HARMFUL, harmless=HARMLESS, safety=1.5)
    with pytest.raises(UsageError, match="no option 'agreement'"):
        find_snip(lm, HARMFUL, harmless=HARMLESS, count=3, agreement=0.5)
    with pytest.raises(UsageError, match="no option 'utilities'"):
        find_snip(lm, HARMFUL, harmless=HARMLESS, utilities=0.1)
    with pytest.raises(UnsupportedModelError, match="routed experts are not scored"):
        find_wanda(LanguageModel(build("mixtral"), tiny_tokenizer()), HARMFUL, harmless=HARMLESS, sites=("down",))
