"""Importance against the base model's parameters, and the soft swap, beside brute force."""

import copy

import numpy as np
import pytest
import torch
from twins import PROMPTS, adapted, model, separate, untouched

from exact64 import Exact64
from safety_neurons.detectors import find_importance_contrast, find_weight_change
from safety_neurons.detectors.attribution import PathMean, ScoredRow, midpoints_of, score_rows
from safety_neurons.detectors.importance_contrast import SoftSwap, SwapComparison, parting
from safety_neurons.detectors.methods import ImportanceContrast
from safety_neurons.detectors.runner import Run, Stream
from safety_neurons.detectors.text import Span, texts
from safety_neurons.errors import NumericalError, UnsupportedModelError, UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.model.batches import Batch, collate, forward
from safety_neurons.model.hooks import around
from safety_neurons.neurons import NeuronSet
from safety_neurons.results import Checkpoint

BIASED = {"attention_bias": True, "mlp_bias": True}


def measured(
    base: LanguageModel, aligned: LanguageModel, spans: tuple[Span, ...], compare: str
) -> dict[str, np.ndarray]:
    comparison = SwapComparison(base, aligned, base.table.sizes, compare)
    return comparison.run(Run((base, aligned), PROMPTS, ImportanceContrast(count=1)), spans)[0]


def sub_layer(model_: LanguageModel, layer: int, site: str) -> torch.nn.Module:
    block = model_.model.model.layers[layer]
    return block.self_attn if site in "qkvo" else block.mlp


def output(module: torch.nn.Module, given: tuple, span: Span) -> torch.Tensor:
    with torch.no_grad():
        out = module(*given[0], **given[1])
    return (out[0] if isinstance(out, tuple) else out)[0, span.start : span.stop]


def fed(lm: LanguageModel, layer: int, site: str, span: Span) -> tuple:
    seen = []
    with (
        torch.no_grad(),
        around(before={sub_layer(lm, layer, site): lambda args, kwargs: seen.append((args, kwargs))}),
    ):
        forward(lm.model, collate([span.ids], [0]))
    return seen[0]


def set_unit(
    module: torch.nn.Module, other: torch.nn.Module | None, site: str, k: int, heads: int = 4, groups: int = 2
) -> None:
    """Put the other module's parameters (zeros for None) of the unit of neuron k into the module."""

    def row(name: str, index: int) -> None:
        for kind in ("weight", "bias"):
            getattr(getattr(module, name), kind).data[index] = (
                0 if other is None else getattr(getattr(other, name), kind).data[index]
            )

    def column(name: str, index: int) -> None:
        getattr(module, name).weight.data[:, index] = (
            0 if other is None else getattr(other, name).weight.data[:, index]
        )

    if site in "qk":
        row(f"{site}_proj", k)
        return
    if site in "vo":
        dim = module.head_dim
        group, entry = (k // dim if site == "v" else k // dim // (heads // groups)), k % dim
        row("v_proj", group * dim + entry)
        for head in range(group * heads // groups, (group + 1) * heads // groups):
            column("o_proj", head * dim + entry)
        return
    row("gate_proj", k)
    row("up_proj", k)
    column("down_proj", k)


@pytest.mark.parametrize("positions", ["prompt", "completion"])
def test_swap_equals_copying_the_base_models_parameters_and_running_the_sub_layer_again(positions):
    base, aligned = separate(torch.float64, **BIASED)
    with Exact64():
        spans = texts(base, PROMPTS[:2], positions=positions, max_new_tokens=5, stream=Stream(None, {})).spans
        scores = measured(base, aligned, spans, "swap")
        for key in base.table.sizes:
            layer, site = int(key.split(".")[1]), key.split(".")[2]
            chosen = {int(scores[key].argmax()), 0, 5, len(scores[key]) - 1}
            for k in chosen:
                total = 0.0
                for span in spans:
                    given = fed(aligned, layer, site, span)
                    mine = sub_layer(aligned, layer, site)
                    changed = copy.deepcopy(mine)
                    set_unit(changed, sub_layer(base, layer, site), site, k)
                    total += float((output(changed, given, span) - output(mine, given, span)).norm())
                assert abs(total / len(spans) - scores[key][k]) <= 1e-9 * scores[key].max(), (key, k)


def test_same_input_is_the_difference_of_both_models_importances_on_the_aligned_stream():
    base, aligned = separate(torch.float64, **BIASED)
    with Exact64():
        spans = texts(base, PROMPTS[:1], positions="prompt", max_new_tokens=1, stream=Stream(None, {})).spans
        scores = measured(base, aligned, spans, "same-input")
        for site, k in (("q", 3), ("k", 5), ("v", 7), ("gate", 9), ("up", 11)):
            given = fed(aligned, 1, site, spans[0])
            both = []
            for lm in (aligned, base):
                mine = sub_layer(lm, 1, site)
                changed = copy.deepcopy(mine)
                for kind in ("weight", "bias"):
                    getattr(getattr(changed, f"{site}_proj"), kind).data[k] = 0
                both.append(float((output(changed, given, spans[0]) - output(mine, given, spans[0])).norm()))
            found = scores[f"layers.1.{site}"]
            assert abs(both[0] - both[1] - found[k]) <= 1e-9 * np.abs(found).max(), site


def test_absolute_and_relative_are_made_of_each_models_own_importance():
    base, aligned = separate(torch.float64)
    with Exact64():
        spans = texts(base, PROMPTS[:3], positions="prompt", max_new_tokens=1, stream=Stream(None, {})).spans
        absolute, relative = (measured(base, aligned, spans, compare) for compare in ("absolute", "relative"))
        swapped_roles = measured(aligned, base, spans, "absolute")
        to_itself = measured(aligned, aligned, spans, "absolute")
    for key, values in absolute.items():
        np.testing.assert_allclose(values, -swapped_roles[key], atol=1e-12 * np.abs(values).max())
        assert not to_itself[key].any()
        assert (np.sign(values) == np.sign(relative[key])).all()
        assert (np.abs(relative[key]) < 1).all()


def test_a_shared_base_gives_what_two_models_give():
    pair = adapted("lora", ("up_proj", "q_proj", "v_proj", "down_proj"))
    assert pair.shared
    merged = []
    for lm in (pair.base, pair.aligned):
        made = copy.deepcopy(lm.model)
        made.base_model.set_adapter(list(lm.adapters))
        merged.append(LanguageModel(made.merge_and_unload().eval(), lm.tokenizer))
    one = find_importance_contrast(pair.base, pair.aligned, PROMPTS).scores
    two = find_importance_contrast(*merged, PROMPTS).scores
    for key, values in one.items():
        np.testing.assert_allclose(values, two[key], rtol=0, atol=2e-4 * max(values.max(), 1e-6), err_msg=key)


def test_a_scale_adapter_changes_the_units_of_its_columns_by_the_size_of_the_scale():
    pair = adapted("ia3", ("down_proj",))
    found = find_importance_contrast(pair.base, pair.aligned, PROMPTS).scores
    scales = pair.base.model.get_base_model().model.layers[0].mlp.down_proj.ia3_l
    first, second = (scales[name].detach().flatten().numpy() for name in ("a0", "a1"))
    change = np.abs(first * second - first)
    assert not found["layers.0.q"].any()
    assert not found["layers.0.o"].any()
    ratio = found["layers.0.down"] / change
    np.testing.assert_array_equal(found["layers.0.down"], found["layers.0.up"])
    own = find_importance_contrast(pair.base, pair.base, PROMPTS, compare="absolute").scores
    assert not own["layers.0.down"].any()
    assert (ratio > 0).all()


def test_batch_size_order_and_padding_change_nothing():
    base, aligned = separate()
    whole = find_importance_contrast(base, aligned, PROMPTS, count=30)
    single = find_importance_contrast(base, aligned, PROMPTS, count=30, batch_size=1)
    for key, values in whole.scores.items():
        np.testing.assert_allclose(single.scores[key], values, rtol=0, atol=1e-5 * values.max())


def test_planted_units_are_found_where_a_weight_difference_is_fooled_by_decoys():
    """Units whose weights moved as far as the planted ones', but on inputs that these prompts never give, are
    not chosen.
    """
    base = model(0)
    aligned = model(0, noise=9, size=0.002)
    encoded = base.encode(PROMPTS)
    inputs = []
    for row in encoded:
        span = Span("", tuple(row.ids), 0, len(row.ids))
        inputs.append(fed(base, 0, "up", span)[0][0][0])
    directions = torch.linalg.svd(torch.cat(inputs), full_matrices=True).Vh
    used, unused = directions[0], directions[-1]
    planted, decoys = torch.arange(5), torch.arange(20, 30)
    with torch.no_grad():
        up = aligned.model.model.layers[0].mlp.up_proj.weight
        up[planted] += 0.5 * used
        up[decoys] += 0.6 * unused
    truth = NeuronSet({"layers.0.up": planted.numpy()}, base.table)
    by_weight = find_weight_change(base, aligned, sites=("up",), count=5).neurons
    by_swap = find_importance_contrast(base, aligned, PROMPTS, sites=("up",), count=5).neurons
    assert len(by_weight & truth) == 0
    assert len(by_swap & truth) == 5


def test_a_killed_run_continues_without_redoing_a_batch_and_gives_the_same(tmp_path, monkeypatch):
    base, aligned = separate()
    options = {"batch_size": 2, "compare": "same-input", "agreement": 0.3, "count": 20}
    whole = find_importance_contrast(base, aligned, PROMPTS, **options)
    checkpoint = Checkpoint(tmp_path / "state.safetensors")
    batches = []
    real = SwapComparison.scores
    monkeypatch.setattr(
        SwapComparison,
        "scores",
        lambda self, batch, spans: (batches.append(batch.number), real(self, batch, spans))[1],
    )

    def die(done, total, tokens):
        if done == 2 and len(batches) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_importance_contrast(base, aligned, PROMPTS, checkpoint=checkpoint, progress=die, **options)
    assert untouched(base)
    assert untouched(aligned)
    again = find_importance_contrast(base, aligned, PROMPTS, checkpoint=checkpoint, **options)
    assert batches == [0, 1, 2]
    assert again.neurons == whole.neurons
    for key, values in whole.scores.items():
        np.testing.assert_array_equal(values, again.scores[key])


def test_unknown_comparisons_nan_and_experts_are_refused():
    base, aligned = separate()
    with pytest.raises(UsageError, match="compare 'zero' is unknown"):
        find_importance_contrast(base, aligned, PROMPTS, compare="zero")
    with torch.no_grad():
        assert base.anatomy
        assert aligned.anatomy
        aligned.model.model.layers[1].mlp.up_proj.weight[3] = float("nan")
    with pytest.raises(NumericalError, match=r"layers\.1\."):
        find_importance_contrast(base, aligned, PROMPTS, sites=("down",))


def test_routed_experts_are_refused_by_name_and_their_attention_is_not():
    from families import build
    from tiny import tiny_tokenizer

    mixed = [LanguageModel(build("mixtral"), tiny_tokenizer()) for _ in range(2)]
    with pytest.raises(UnsupportedModelError, match="layers.0.experts"):
        find_importance_contrast(*mixed, PROMPTS[:2])
    assert (
        len(find_importance_contrast(*mixed, PROMPTS[:2], sites=("q", "k", "v", "o"), count=3).neurons) == 3
    )


SITE_WEIGHTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def rows_of(lm: LanguageModel) -> list[ScoredRow]:
    """A refusal and a compliance of two prompts of different length, invented."""
    found = []
    for number, row in enumerate(lm.encode(PROMPTS[:2])):
        found += [
            ScoredRow((*row.ids, 9, 11 + number), len(row.ids), 1.0),
            ScoredRow((*row.ids, 12), len(row.ids), -1.0),
        ]
    return found


def batch_of(lm: LanguageModel, rows: list[ScoredRow]) -> Batch:
    return collate([row.ids for row in rows], range(len(rows)), pad_id=lm.pad_id)


def score(lm: LanguageModel, rows: list[ScoredRow]) -> torch.Tensor:
    with torch.no_grad():
        batch = batch_of(lm, rows)
        return score_rows(forward(lm.model, batch, with_logits=True), batch, rows)


def between(base: LanguageModel, aligned: LanguageModel, share: float) -> LanguageModel:
    """The aligned model with the parameters of all neurons that far from the base's (the biases of `o` and
    `down` belong to none).
    """
    made = copy.deepcopy(aligned.model)
    theirs = dict(base.model.named_parameters())
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if any(site in name for site in SITE_WEIGHTS) and not name.endswith(
                ("o_proj.bias", "down_proj.bias")
            ):
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
    """Against a difference quotient: the whole unit moves, the v row with the o columns it feeds, gate and up
    row with their column.
    """
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
        found = swap.gradients(batch_of(base, rows), rows, PathMean(midpoints_of(40)).mean)
        assert torch.equal(found["layers.0.gate"], found["layers.0.down"])
        assert torch.equal(
            found["layers.0.o"].unflatten(1, (2, 2, -1))[:, :, 1].flatten(1), found["layers.0.v"]
        )
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


@pytest.mark.parametrize(
    ("kind", "targets"), [("ia3", ("down_proj",)), ("lora", ("q_proj", "v_proj", "up_proj", "down_proj"))]
)
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
    single = find_importance_contrast(
        base, aligned, PROMPTS, compare="swap-attribution", count=30, batch_size=1
    )
    for key, values in whole.scores.items():
        np.testing.assert_allclose(single.scores[key], values, rtol=0, atol=1e-4 * np.abs(values).max())
    assert whole.prompts.used == len(PROMPTS)
    assert len(whole.neurons) == 30
    assert untouched(base)
    assert untouched(aligned)
    assert all(parameter.requires_grad for parameter in aligned.model.parameters())


def test_a_unit_that_moves_its_sub_layer_but_not_the_answer_is_left_out():
    """Two units move equally far, one along the direction the head reads.

    The swap cannot tell them apart, its attribution can.
    """
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
    rows = [
        ScoredRow((*row.ids, token), len(row.ids), sign)
        for row in base.encode(PROMPTS[:3])
        for token, sign in ((20, 1.0), (21, -1.0))
    ]
    found = SoftSwap(base, aligned, base.table.sizes).gradients(
        batch_of(base, rows), rows, PathMean(midpoints_of(8)).mean
    )
    effect = found["layers.1.down"].sum(0).abs()
    moved = find_importance_contrast(base, aligned, PROMPTS[:3], sites=("down",), layers="1:2").scores[
        "layers.1.down"
    ]
    assert moved[idle] == pytest.approx(moved[matters], rel=0.2)
    assert int(effect.argmax()) == matters
    assert effect[idle] < 0.2 * effect[matters]


def test_a_subtracted_set_and_one_site_are_honoured():
    base, aligned = separate()
    found = find_importance_contrast(
        base, aligned, PROMPTS[:2], compare="swap-attribution", sites=("down",), count=3
    )
    first = NeuronSet({key: indices[:1] for key, indices in list(found.neurons.items())[:1]}, base.table)
    less = find_importance_contrast(
        base, aligned, PROMPTS[:2], compare="swap-attribution", sites=("down",), count=3, subtract=first
    )
    assert set(found.scores.keys()) == {"layers.0.down", "layers.1.down"}
    assert less.neurons == found.neurons - first


def test_positions_and_completions_are_refused():
    base, aligned = separate()
    with pytest.raises(UsageError, match="own completions"):
        find_importance_contrast(base, aligned, PROMPTS, compare="swap-attribution", positions="completion")
