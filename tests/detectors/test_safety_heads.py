import dataclasses

import numpy as np
import pytest
import torch
from twins import PROMPTS, adapted, model, untouched

from exact64 import Exact64
from families import build
from safety_neurons.detectors import find_heads
from safety_neurons.errors import UnsupportedModelError, UsageError
from safety_neurons.model import LanguageModel
from tiny import tiny_tokenizer

FAMILIES = ("llama", "qwen3", "gemma2", "gpt2", "falcon", "phi3", "mixtral", "qwen3_next")
"""Shared keys, heads wider than the stream's share, soft-caps, transposed and fused maps, experts, a layer
without attention.
"""


def twin(lm: LanguageModel, prompts) -> dict[str, np.ndarray]:
    """Divergence of every head with its columns of the weight zeroed, one prompt after the other, by the
    definition.
    """

    def chances(ids) -> torch.Tensor:
        with torch.no_grad():
            return lm.model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)

    result = {}
    encoded = [row.ids for row in lm.encode(prompts)]
    whole = [chances(ids) for ids in encoded]
    for key in (key for key in lm.table.keys if key.endswith(".o")):
        info, place = lm.table[key], lm.anatomy.place(key)
        weight = place.projection.base.weight
        result[key] = np.zeros(info.n_heads)
        for head in range(info.n_heads):
            earlier = weight.detach().clone()
            columns = slice(head * info.head_dim, (head + 1) * info.head_dim)
            with torch.no_grad():
                (weight.T if not place.transposed else weight)[columns] = 0
            other = [chances(ids) for ids in encoded]
            with torch.no_grad():
                weight.copy_(earlier)
            moved = [(one.exp() * (one - two)).sum() for one, two in zip(whole, other, strict=True)]
            result[key][head] = float(torch.stack(moved).mean())
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_equal_a_loop_with_their_columns_zeroed(family):
    lm = LanguageModel(build(family, dtype=torch.float64), tiny_tokenizer())
    with Exact64():
        found = find_heads(lm, PROMPTS[1:3], batch_size=1)
        expected = twin(lm, PROMPTS[1:3])
    assert set(expected) == set(dict(found.scores.items())) != set()
    for key, heads in expected.items():
        assert (heads > 0).all()
        size = lm.table[key].head_dim
        np.testing.assert_allclose(found.scores[key], np.repeat(heads, size), rtol=1e-6)
    rows = [
        (int(key.split(".")[1]), head, value)
        for key, heads in expected.items()
        for head, value in enumerate(heads)
    ]
    rows.sort(key=lambda row: -row[2])
    assert [row[:2] for row in found.ranking] == [row[:2] for row in rows]
    np.testing.assert_allclose([row[2] for row in found.ranking], [row[2] for row in rows], rtol=1e-6)
    assert untouched(lm)


def test_whole_heads_are_kept_unless_a_rule_for_neurons_is_given():
    lm = model(0)
    best = find_heads(lm, PROMPTS)
    assert len(best.neurons) == 8
    assert "the set is made of whole heads: 1" in best.notes
    three = find_heads(lm, PROMPTS, heads=3)
    for key, members in three.neurons.items():
        layer = int(key.split(".")[1])
        heads = sorted(head for at, head, _ in three.ranking[:3] if at == layer)
        np.testing.assert_array_equal(
            members, np.concatenate([np.arange(8 * head, 8 * head + 8) for head in heads])
        )
    cut = find_heads(lm, PROMPTS, count=12)
    assert len(cut.neurons) == 12
    assert "heads that are only partly in the set: 1; --heads keeps whole ones" in cut.notes
    with pytest.raises(UsageError, match="heads and count given together"):
        find_heads(lm, PROMPTS, heads=3, count=12)
    with pytest.raises(UsageError, match="9 heads asked, but 8 are scored"):
        find_heads(lm, PROMPTS, heads=9)
    with pytest.raises(UnsupportedModelError, match="heads scores o neurons"):
        find_heads(lm, PROMPTS, sites=("down",))


def test_other_sites_score_nothing_and_adapters_are_read():
    lm = adapted("ia3").aligned
    found = find_heads(lm, PROMPTS[:2], sites=("o", "down"))
    assert not found.scores["layers.0.down"].any()
    assert found.scores["layers.0.o"].all()
    again = find_heads(lm, PROMPTS[:2], batch_size=1)
    np.testing.assert_allclose(again.scores["layers.1.o"], found.scores["layers.1.o"], rtol=1e-4)
    assert dataclasses.asdict(found.prompts) == {"used": 2, "failed": 0, "truncated": 0}
