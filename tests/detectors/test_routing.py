import numpy as np
import pytest
import torch
import transformers
from twins import PROMPTS, model, untouched

from families import _COMMON, build, redraw
from safety_neurons.detectors import find_routing
from safety_neurons.errors import UnsupportedModelError
from safety_neurons.model import LanguageModel
from safety_neurons.model.hooks import around
from safety_neurons.prompt_lists import Prompts
from safety_neurons.results import Checkpoint
from tiny import tiny_tokenizer

HARMFUL, HARMLESS = (
    PROMPTS[:3],
    Prompts.from_list(["a small green tree", "write about the red house", "what now"]),
)


def mixture(family: str) -> LanguageModel:
    """A tiny random mixture; OLMoE too, of which `families` knows nothing."""
    if family != "olmoe":
        return LanguageModel(build(family), tiny_tokenizer())
    sizes = {**_COMMON, "intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 3}
    made = transformers.AutoModelForCausalLM.from_config(transformers.OlmoeConfig(**sizes)).eval()
    redraw(made)
    return LanguageModel(made, tiny_tokenizer())


def choices(lm: LanguageModel, ids: list[int]) -> dict[int, torch.Tensor]:
    """The experts that each token is sent to, by layer, as the experts module is told."""
    seen = {}
    before = {
        layer.experts.module: lambda args, kwargs, n=layer.index: seen.__setitem__(
            n, [*args, *kwargs.values()][1]
        )
        for layer in lm.anatomy.layers
        if layer.experts is not None
    }
    with torch.no_grad(), around(before=before):
        lm.model(input_ids=torch.tensor([ids]))
    return seen


def twin(lm: LanguageModel, prompts: Prompts, positions: str) -> dict[tuple[int, int], float]:
    """Mean share of every expert, one prompt after the other."""
    shares: dict[tuple[int, int], list[float]] = {}
    for row in lm.encode(prompts, reserve=4 * (positions == "completion")):
        ids, read = list(row.ids), slice(None)
        if positions == "prompt-last":
            read = slice(len(ids) - 1, None)
        if positions == "completion":
            start = len(ids)
            with torch.no_grad():
                ids = lm.model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)[0].tolist()
            ids = ids[: ids.index(2, start)] if 2 in ids[start:] else ids
            read = slice(start, None)
        for layer, chosen in choices(lm, ids).items():
            mine = chosen[read].flatten()
            for expert in range(lm.anatomy.layers[layer].experts.n_experts):
                shares.setdefault((layer, expert), []).append(float((mine == expert).float().mean()))
    return {place: float(np.mean(values)) for place, values in shares.items()}


@pytest.mark.parametrize(
    ("family", "positions"),
    [
        ("mixtral", "prompt-last"),
        ("mixtral", "completion"),
        ("qwen3_moe", "prompt"),
        ("gpt_oss", "prompt"),
        ("qwen2_moe", "prompt-last"),
        ("olmoe", "prompt"),
    ],
)
def test_scores_are_differences_of_shares_of_one_prompt_after_the_other(family, positions):
    lm = mixture(family)
    found = find_routing(
        lm, HARMFUL, harmless=HARMLESS, positions=positions, max_new_tokens=4, sign="both", batch_size=2
    )
    harmful, harmless = (twin(lm, prompts, positions) for prompts in (HARMFUL, HARMLESS))
    assert {(layer, expert) for layer, expert, _ in found.ranking} == set(harmful)
    for layer, expert, score in found.ranking:
        expected = abs(harmful[layer, expert] - harmless[layer, expert])
        assert score == pytest.approx(expected, abs=1e-6)
        assert (found.scores[f"layers.{layer}.experts.{expert}.down"] == np.float32(score)).all()
    assert any(score > 0 for _, _, score in found.ranking)
    for layer in {layer for layer, _ in harmful}:
        assert sum(share for (at, _), share in harmful.items() if at == layer) == pytest.approx(1)
    assert untouched(lm)


def test_a_sign_keeps_one_side_and_whole_experts_are_chosen_at_all_searched_sites():
    lm = mixture("mixtral")
    options = {"harmless": HARMLESS, "positions": "prompt"}
    both, more, less = (
        find_routing(lm, HARMFUL, **options, sign=sign).ranking for sign in ("both", "harmful", "harmless")
    )
    sides = [dict(((layer, expert), score) for layer, expert, score in rows) for rows in (both, more, less)]
    for place, size in sides[0].items():
        assert size == pytest.approx(sides[1][place] + sides[2][place])
    found = find_routing(lm, HARMFUL, **options, experts=2, sites=("gate", "up", "down"))
    best = {f"layers.{layer}.experts.{expert}" for layer, expert, _ in found.ranking[:2]}
    keys = set(dict(found.neurons.items()))
    assert keys == {f"{prefix}.{site}" for prefix in best for site in ("gate", "up", "down")}
    assert all(len(found.neurons[key]) == lm.table.sizes[key] for key in keys)
    shares = found.scores.provenance.config["shares"]
    layer, expert, score = found.ranking[0]
    harmful, harmless = shares[f"layers.{layer}.experts.{expert}"]
    assert score == pytest.approx(harmful - harmless)


def test_a_dense_model_is_refused_in_one_line():
    with pytest.raises(UnsupportedModelError, match="no routed experts .* expected a mixture of experts"):
        find_routing(model(0), HARMFUL, harmless=HARMLESS)


def test_experts_that_the_anatomy_refuses_are_said_to_be_there():
    hybrid = LanguageModel(build("nemotron_h"), tiny_tokenizer(), template="none")
    with pytest.raises(UnsupportedModelError, match=r"experts are there, .* layers\.3\.experts\.0\.up: "):
        find_routing(hybrid, HARMFUL, harmless=HARMLESS)


def test_a_prompt_that_gives_nan_is_left_out_and_said():
    lm, mark = mixture("mixtral"), 50

    def spoil(_, args, output):
        return torch.where((args[0] == mark)[..., None], torch.nan, output)

    expected = find_routing(lm, HARMFUL, harmless=HARMLESS).scores
    lm.model.get_input_embeddings().register_forward_hook(spoil)
    word = lm.tokenizer.decode([mark])
    marked = Prompts.from_list([*(prompt.text for prompt in HARMFUL), f"{word} {word}"])
    assert mark in lm.encode(marked)[-1].ids
    assert all(mark not in row.ids for row in [*lm.encode(HARMFUL), *lm.encode(HARMLESS)])
    found = find_routing(lm, marked, harmless=HARMLESS)
    assert (found.prompts.used, found.prompts.failed) == (3, 1)
    assert any("NaN" in note for note in found.notes)
    for key, values in expected.items():
        np.testing.assert_array_equal(found.scores[key], values)


def test_a_killed_run_goes_on_behind_its_last_batch_in_evaluation_mode(tmp_path):
    lm, passes = mixture("mixtral"), []
    lm.anatomy.layers[0].module.register_forward_pre_hook(lambda module, _: passes.append(module.training))
    lm.model.train()
    options = {"harmless": HARMLESS, "batch_size": 1}
    whole = find_routing(lm, HARMFUL, **options)
    total = len(passes)

    def dies(done, *_):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_routing(lm, HARMFUL, **options, checkpoint=Checkpoint(tmp_path / "c.safetensors"), progress=dies)
    passes.clear()
    again = find_routing(lm, HARMFUL, **options, checkpoint=Checkpoint(tmp_path / "c.safetensors"))
    assert len(passes) == total - 4
    assert not any(passes)
    assert lm.model.training
    assert again.ranking == whole.ranking
