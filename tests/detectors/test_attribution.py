import numpy as np
import pytest
import torch
from twins import PROMPTS, adapted, model, separate, untouched

from exact64 import Exact64
from safety_neurons.detectors import attribution as module
from safety_neurons.detectors import find_attribution, find_attribution_patching
from safety_neurons.detectors.attribution import (
    PathMean,
    ScoredRow,
    explained,
    mask_gradients,
    midpoints_of,
    own_completions,
    pairs_of,
    patching_gradients,
    score_rows,
    tokens_behind,
)
from safety_neurons.detectors.methods import AttributionPatching
from safety_neurons.detectors.runner import Run
from safety_neurons.errors import InputError, NumericalError, UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.model.batches import Batch, collate, forward
from safety_neurons.model.hooks import editing, reading
from safety_neurons.prompt_lists import Prompts
from safety_neurons.results import Checkpoint

TEXTS = {"refusal": "sorry i cannot help", "compliance": ["sure here is", "yes you can make"]}


def rows_of(lm: LanguageModel, prompts: Prompts = PROMPTS[:2]) -> tuple[Batch, list[ScoredRow]]:
    """All scored rows of some prompts in one batch."""
    sides = [[TEXTS["refusal"]], TEXTS["compliance"]]
    rows = [
        row
        for one in lm.encode(prompts)
        for row in explained(
            one.ids, *([tokens_behind(lm, one.ids, text) for text in side] for side in sides)
        )
    ]
    return collate([row.ids for row in rows], range(len(rows))), rows


def score(lm: LanguageModel, batch: Batch, rows: list[ScoredRow], editors: dict | None = None) -> float:
    with torch.no_grad(), editing(lm.anatomy, editors or {}):
        return float(score_rows(forward(lm.model, batch, with_logits=True), batch, rows).sum())


def test_the_score_is_mean_log_probability_of_refusal_less_that_of_compliance():
    lm = model(0, dtype=torch.float64)
    batch, rows = rows_of(lm, PROMPTS[:1])
    expected = []
    for row in rows:
        with torch.no_grad():
            chances = lm.model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        expected.append(
            np.mean([float(chances[place - 1, row.ids[place]]) for place in range(row.start, len(row.ids))])
        )
    assert score(lm, batch, rows) == pytest.approx(expected[0] - (expected[1] + expected[2]) / 2, rel=1e-6)
    assert explained([1], [list(range(5, 40))], [[7]])[0].ids == (1, *range(5, 21))


def test_every_site_equals_finite_differences_of_the_score():
    lm = model(0, dtype=torch.float64, attention_bias=True, mlp_bias=True)
    batch, rows = rows_of(lm)
    step = 1e-6
    with Exact64():
        found = find_attribution(lm, PROMPTS[:2], **TEXTS).scores
        exact = mask_gradients(lm, batch, rows, lm.table.sizes, mask=1.0)[0]
        for key, size in lm.table.sizes.items():
            for k in (0, size // 2, int(exact[key].sum(0).abs().argmax())):

                def scaled(values, k=k, factor=1.0):
                    values = values.clone()
                    values[..., k] *= factor
                    return values

                up, down = (
                    score(lm, batch, rows, {key: lambda v, s=s: scaled(v, factor=1 + s)})
                    for s in (step, -step)
                )
                slope, ours = (up - down) / (2 * step), float(exact[key].sum(0)[k])
                assert ours == pytest.approx(slope, rel=1e-5, abs=1e-8), (key, k)
                assert found[key][k] == pytest.approx(ours / 2, rel=1e-4, abs=1e-7)


def test_integrated_attributions_sum_to_the_change_from_everything_silent_to_nothing():
    lm = model(0, dtype=torch.float64)
    batch, rows = rows_of(lm)
    with Exact64():
        found = find_attribution(lm, PROMPTS[:2], sites=("down",), integrated=64, **TEXTS).scores
        silent = {key: torch.zeros_like for key in found.keys()}  # noqa: SIM118 - scores are not a mapping
        change = score(lm, batch, rows) - score(lm, batch, rows, silent)
    assert sum(float(values.sum()) for _, values in found.items()) == pytest.approx(change / 2, rel=1e-3)


def test_positive_pushes_towards_refusal():
    lm = model(0, dtype=torch.float64)
    turned = {"refusal": TEXTS["compliance"], "compliance": TEXTS["refusal"]}
    one, other = (find_attribution(lm, PROMPTS, sites=("down",), **texts).scores for texts in (TEXTS, turned))
    for key, values in one.items():
        np.testing.assert_allclose(values, -other[key], rtol=1e-5, atol=1e-9)


def donors_of(aligned: LanguageModel, batch: Batch, keys) -> dict[str, torch.Tensor]:
    kept = {}
    with (
        torch.no_grad(),
        aligned.running(),
        reading(aligned.anatomy, {key: lambda v, key=key: kept.__setitem__(key, v.clone()) for key in keys}),
    ):
        forward(aligned.model, batch)
    return kept


@pytest.mark.parametrize("mask", [0.0, 0.4])
def test_patching_gradients_equal_finite_differences_in_one_neurons_mask(mask):
    base, aligned = separate(torch.float64)
    sizes, step = base.table.select(sites=("down", "v")).sizes, 1e-5
    with Exact64():
        units, _ = own_completions(Run((base, aligned), PROMPTS[:2], AttributionPatching()))
        rows = [row for unit in units for row in unit]
        batch = collate([row.ids for row in rows], range(len(rows)))
        donors = donors_of(aligned, batch, sizes)
        exact = patching_gradients(base, aligned, sizes, PathMean([mask]).mean)(batch, rows)

        def patched(key, k, share):
            def edit(values, key=key):
                amount = torch.full((values.shape[-1],), mask, dtype=values.dtype)
                if key == wanted:
                    amount[k] = share
                return values + amount * (donors[key] - values)

            wanted = key
            return score(base, batch, rows, {name: lambda v, name=name: edit(v, name) for name in sizes})

        for key in sizes:
            for k in (0, int(exact[key].sum(0).abs().argmax())):
                slope = (patched(key, k, mask + step) - patched(key, k, mask - step)) / (2 * step)
                assert float(exact[key].sum(0)[k]) == pytest.approx(slope, rel=1e-5, abs=1e-8), (key, k)


def test_the_path_sums_to_what_patching_every_neuron_does():
    pair = adapted()
    units, counts = own_completions(Run((pair.base, pair.aligned), PROMPTS, AttributionPatching()))
    rows = [row for unit in units for row in unit]
    batch = collate([row.ids for row in rows], range(len(rows)))
    found = find_attribution_patching(pair.base, pair.aligned, PROMPTS, midpoints=32).scores
    with pair.base.running():
        before = score(pair.base, batch, rows)
    with pair.aligned.running():
        after = score(pair.aligned, batch, rows)
    assert sum(float(values.sum()) for _, values in found.items()) == pytest.approx(
        (after - before) / counts.used, rel=2e-2
    )


def test_the_path_is_the_mean_of_its_midpoints_and_the_base_its_beginning():
    pair = adapted()
    path, start = (
        find_attribution_patching(pair.base, pair.aligned, PROMPTS, at=at, count=5) for at in ("path", "base")
    )
    assert midpoints_of(4) == [0.125, 0.375, 0.625, 0.875]
    assert path.neurons.provenance.config["midpoints"] == 8
    assert start.neurons.provenance.config["midpoints"] == 0
    assert path.scores.rank_correlation(start.scores) < 1


def test_batch_size_changes_no_score():
    lm = model(0)
    pair = adapted()
    for find, models, texts in (
        (find_attribution, (lm,), TEXTS),
        (find_attribution_patching, (pair.base, pair.aligned), {}),
    ):
        whole, single = (
            find(*models, PROMPTS, **texts, batch_size=size, count=9).scores for size in ("auto", 1)
        )
        for key, values in whole.items():
            np.testing.assert_allclose(
                single[key], values, rtol=0, atol=1e-5 * max(np.abs(values).max(), 1e-6)
            )


def test_fused_and_routed_projections_are_attributed_too():
    from families import build
    from tiny import tiny_tokenizer

    for family in ("gpt_neox", "phi3", "mixtral"):
        lm = LanguageModel(build(family), tiny_tokenizer())
        found = find_attribution(lm, PROMPTS[:2], refusal="sorry", compliance="sure here", count=4)
        assert set(found.scores.keys()) == set(lm.table.sizes)
        assert len(found.neurons) == 4


def test_experts_are_moved_on_the_tokens_that_both_models_route_to_them():
    from families import build
    from tiny import tiny_tokenizer

    base, aligned = (LanguageModel(build("mixtral"), tiny_tokenizer()) for _ in range(2))
    with torch.no_grad():
        for parameter in aligned.model.parameters():
            parameter += 0.05 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
            )
    found = find_attribution_patching(base, aligned, PROMPTS[:2], midpoints=1)
    assert set(found.scores.keys()) == set(base.table.select(sites=("down",)).sizes)
    assert any(values.any() for _, values in found.scores.items())


def test_parameters_and_modes_are_left_as_they_were():
    base, aligned = separate()
    for lm in (base, aligned):
        lm.model.train()
        lm.model.lm_head.weight.requires_grad_(False)
    find_attribution_patching(base, aligned, PROMPTS[:2])
    find_attribution(base, PROMPTS[:2])
    for lm in (base, aligned):
        assert untouched(lm)
        assert lm.model.training
        wanted = [name for name, parameter in lm.model.named_parameters() if not parameter.requires_grad]
        assert wanted == ["lm_head.weight"]
        assert all(parameter.grad is None for parameter in lm.model.parameters())


def test_a_killed_run_continues_without_redoing_a_batch_and_gives_the_same(tmp_path, monkeypatch):
    pair = adapted()
    options = {"batch_size": 2, "midpoints": 2, "agreement": 0.4, "count": 20}
    whole = find_attribution_patching(pair.base, pair.aligned, PROMPTS, **options)
    checkpoint = Checkpoint(tmp_path / "state.safetensors")
    passes = []
    real = module.collate
    monkeypatch.setattr(
        module, "collate", lambda *args, **kwargs: (passes.append(1), real(*args, **kwargs))[1]
    )

    def die(done, total, tokens):
        if len(passes) == 2 and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_attribution_patching(
            pair.base, pair.aligned, PROMPTS, checkpoint=checkpoint, progress=die, **options
        )
    again = find_attribution_patching(pair.base, pair.aligned, PROMPTS, checkpoint=checkpoint, **options)
    assert len(passes) == 3
    assert again.neurons == whole.neurons
    for key, values in whole.scores.items():
        np.testing.assert_array_equal(values, again.scores[key])


def test_models_that_say_the_same_leave_nothing_to_explain():
    pair = adapted()
    with pytest.raises(InputError, match="nothing to explain"):
        find_attribution_patching(pair.base, pair.base, PROMPTS)


def test_bad_arguments_and_nan_are_errors_in_one_line():
    lm = model(0)
    pair = adapted()
    with pytest.raises(UsageError, match="integrated -1"):
        find_attribution(lm, PROMPTS, integrated=-1)
    with pytest.raises(InputError, match="has no tokens"):
        find_attribution(lm, PROMPTS, refusal="  ")
    with pytest.raises(UsageError, match="expected one of path, base"):
        find_attribution_patching(pair.base, pair.aligned, PROMPTS, at="middle")
    assert lm.anatomy
    with torch.no_grad():
        lm.model.model.layers[1].mlp.up_proj.weight[3] = float("nan")
    with pytest.raises(NumericalError, match=r"layers\.\d\.\w+ gave NaN"):
        find_attribution(lm, PROMPTS[:1])


@pytest.mark.parametrize("number", range(1, 10))
def test_a_path_is_taken_in_pairs_around_its_middle_every_point_once(number):
    pairs = pairs_of(number)
    assert sorted(one for pair in pairs for one in pair) == list(range(number))
    assert all(pair[0] + pair[-1] == number - 1 for pair in pairs)


def test_points_that_change_nothing_of_the_set_are_left_out_and_others_are_not():
    """Against all points, on a smooth function and on one with a peak in its middle."""
    draw = torch.Generator().manual_seed(0)
    one, two, three = (torch.randn(1, 500, generator=draw, dtype=torch.float64) for _ in range(3))
    points = midpoints_of(8)

    def smooth(point):
        return {"a": one + point * two + point**2 * three}

    def peaked(point):
        return {"a": one + 50.0 * two * (abs(point - 0.5) < 0.1)}

    for function, fewest in ((smooth, 4), (peaked, 6)):
        whole = PathMean(points).mean(function)["a"]
        early = PathMean(points, settle=0.05, n_top=50)
        best, found = (set(one[0].topk(50).indices.tolist()) for one in (whole, early.mean(function)["a"]))
        assert len(best - found) <= 0.05 * 50
        assert early.taken == fewest
        assert bool(early.said(np.array([fewest, 1.0]))) is (fewest < 8)


def test_a_search_that_leaves_points_out_finds_the_set_of_all_points_and_says_so():
    base, aligned = separate(torch.float32)
    options = {"batch_size": 4, "top": 0.1}
    whole = find_attribution_patching(base, aligned, PROMPTS, **options)
    early = find_attribution_patching(base, aligned, PROMPTS, settle=0.3, **options)
    assert any("points of the path were taken" in note for note in early.notes)
    assert not any("points of the path" in note for note in whole.notes)
    assert len(whole.neurons & early.neurons) >= 0.7 * len(whole.neurons)
    assert early.neurons.provenance.config["settle"] == 0.3
