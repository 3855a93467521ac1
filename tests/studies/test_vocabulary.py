"""Neuron cards: tokens, activations and effects held against the weights and a model whose weights were set
to zero.
"""

import copy

import numpy as np
import pytest
import torch

from families import build
from safety_neurons import organism
from safety_neurons.cli.analyze import CardOptions
from safety_neurons.detectors.methods import ExplainedTexts
from safety_neurons.errors import NeuronError, NumericalError, UnsupportedModelError
from safety_neurons.model import LanguageModel, load_pair
from safety_neurons.neurons import NeuronSet, Scores
from safety_neurons.prompt_lists import Prompts
from safety_neurons.studies import strongest, vocabulary, with_cards
from safety_neurons.studies.vocabulary import CardSettings, RefusalOdds
from tiny import CHAT_TEMPLATE, tiny_llama, tiny_tokenizer
from tiny_pair import HARMFUL, HARMLESS

TEXTS = ExplainedTexts("sorry i cannot", "sure here is")
NEURONS = [("layers.0.down", 3), ("layers.1.o", 5), ("layers.1.v", 2), ("layers.0.up", 4), ("layers.1.q", 1)]


@pytest.fixture(scope="module")
def lm():
    return LanguageModel(tiny_llama().double(), tiny_tokenizer(CHAT_TEMPLATE), name="tiny")


@pytest.fixture(scope="module")
def made(lm):
    texts = TEXTS.values()
    prompts = Prompts.from_list(HARMFUL[:4]), Prompts.from_list(HARMLESS[:3])
    return vocabulary(lm, NEURONS, *prompts, **texts, tokens=5, places=4, random=4, batch_size=3)


def test_tokens_are_those_of_the_output_direction(made, lm):
    model = lm.model
    down, o = model.model.layers[0].mlp.down_proj.weight, model.model.layers[1].self_attn.o_proj.weight
    attention = lm.anatomy.layers[1].attention
    heads, size = attention.n_heads // attention.n_kv_heads, attention.head_dim
    fed = [head * size + 2 for head in range(heads)]
    directions = {0: down[:, 3], 1: o[:, 5], 2: o[:, fed].sum(1), 3: down[:, 4]}
    for place, direction in directions.items():
        with torch.no_grad():
            logits = model.lm_head(model.model.norm(direction))
        logits = logits - logits.mean()
        writes = made.cards[place].writes
        assert [entry["id"] for entry in writes["top"]] == logits.topk(5).indices.tolist()
        assert [entry["id"] for entry in writes["bottom"]] == (-logits).topk(5).indices.tolist()
        assert writes["top"][0]["score"] == pytest.approx(float(logits.max()), rel=1e-4)
        assert writes["top"][0]["token"] == lm.tokenizer.decode([writes["top"][0]["id"]])
    assert "unit's down" in made.cards[3].writes["how"]
    assert made.cards[4].writes["defined"] is False
    assert "nothing" in made.cards[4].writes["how"]


def test_activations_are_those_that_the_projection_sees(made, lm):
    seen: list[torch.Tensor] = []
    handle = lm.model.model.layers[0].mlp.down_proj.register_forward_pre_hook(
        lambda _, args: seen.append(args[0][0, :, 3])
    )
    try:
        encoded = lm.encode(Prompts.from_list(HARMFUL[:4]))
        with torch.no_grad():
            for one in encoded:
                lm.model(torch.tensor([one.ids]))
    finally:
        handle.remove()
    active = made.cards[0].active
    assert active["harmful"]["largest"] == pytest.approx(max(float(part.max()) for part in seen))
    assert active["harmful"]["smallest"] == pytest.approx(min(float(part.min()) for part in seen))
    assert active["harmful"]["mean"] == pytest.approx(np.mean([float(part.mean()) for part in seen]))
    harmful = [place for place in active["most_active"] if place["prompts"] == "harmful"]
    for place in harmful:
        part, ids = seen[int(place["prompt_id"])], encoded[int(place["prompt_id"])].ids
        assert place["value"] == pytest.approx(float(part[place["position"]]))
        assert place["token"] == lm.tokenizer.decode([ids[place["position"]]])
    assert harmful[0]["value"] == pytest.approx(active["harmful"]["largest"])
    values = [place["value"] for place in active["most_active"]]
    assert values == sorted(values, reverse=True)
    assert {place["prompts"] for place in active["most_active"]} <= {"harmful", "harmless"}
    assert len({(place["before"], place["token"]) for place in active["most_active"]}) == len(values) > 1
    for place in active["most_active"]:  # A tokenizer of whole words puts blanks between them.
        read = f"{place['before']}{place['token']}{place['after']}"
        assert read.split() == f"{place['before']} {place['token']} {place['after']}".split()
    assert active["least_active"][0]["value"] == min(place["value"] for place in active["least_active"])


def test_the_effect_of_a_neuron_is_that_of_a_model_without_its_weights(made, lm):
    odds = RefusalOdds.of(lm, None, Prompts.from_list(HARMFUL[:4]), TEXTS)
    untreated = odds.measure(lm)
    for place, (layer, part, index) in {0: (0, "mlp.down_proj", 3), 1: (1, "self_attn.o_proj", 5)}.items():
        cut = copy.deepcopy(lm.model)
        with torch.no_grad():
            cut.model.layers[layer].get_submodule(part).weight[:, index] = 0
        change = odds.measure(LanguageModel(cut, lm.tokenizer)) - untreated
        effect = made.cards[place].effects["deactivate"]
        assert effect["value"] == pytest.approx(change.mean(), rel=1e-6)
        assert effect["n"] == 4
    assert made.log_odds["deactivate"]["untreated"] == pytest.approx(untreated.mean())


def test_log_odds_are_mean_log_probabilities_of_the_two_texts(lm):
    odds = RefusalOdds.of(lm, None, Prompts.from_list(HARMFUL[:2]), TEXTS)
    for prompt, value in zip(lm.encode(Prompts.from_list(HARMFUL[:2])), odds.measure(lm), strict=True):
        means = []
        for text in ("sorry i cannot", "sure here is"):
            ids = lm.tokenizer(" " + text, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                table = lm.model(torch.tensor([prompt.ids + ids])).logits[0].log_softmax(-1)
            start = len(prompt.ids)
            means.append(np.mean([float(table[start - 1 + place, token]) for place, token in enumerate(ids)]))
        assert value == pytest.approx(means[0] - means[1])


def test_log_odds_that_are_no_numbers_are_said_and_prompts_that_are_too_long_too(lm, monkeypatch):
    long = Prompts.from_list([f"kill {'tree ' * 200}", HARMFUL[0]])
    cards = vocabulary(lm, NEURONS[:1], long, None, **TEXTS.values(), tokens=2, places=1, random=2)
    assert cards.notes == ("harmful: 1 of 2 prompts were longer than the context: their middle was left out",)
    odds = RefusalOdds.of(lm, None, Prompts.from_list(HARMFUL[:2]), TEXTS)
    unembed = lm.model.lm_head.forward
    monkeypatch.setattr(
        lm.model.lm_head,
        "forward",
        lambda hidden: unembed(hidden).index_fill(0, torch.tensor([1]), torch.nan),
    )
    with pytest.raises(
        NumericalError, match="1 of 2 prompts gave NaN or infinity where log-odds were measured"
    ):
        odds.measure(lm)


def test_random_neurons_are_of_the_same_matrices_and_give_a_range(made):
    reference = made.random["deactivate"]
    assert reference["n"] == len(reference["values"]) == 4
    assert (
        min(reference["values"])
        <= reference["low"]
        <= reference["value"]
        <= reference["high"]
        <= max(reference["values"])
    )
    for card in made.cards:
        effect = card.effects["deactivate"]
        assert effect["as_large_among_random"] == sum(
            abs(value) >= abs(effect["value"]) for value in reference["values"]
        )
        assert effect["p_among_random"] == (1 + effect["as_large_among_random"]) / 5


def test_a_pair_is_patched_too_and_writes_its_own_texts(tiny_pair):
    pair = load_pair(tiny_pair.base, tiny_pair.aligned)
    found = vocabulary(
        pair.aligned,
        [("layers.1.down", 0)],
        Prompts.from_list(HARMFUL[:3]),
        base=pair.base,
        random=0,
        tokens=2,
    )
    assert set(found.cards[0].effects) == {"deactivate", "patch"}
    assert found.texts["refusal"] == "the aligned model's"
    assert found.cards[0].effects["patch"]["p_among_random"] is None
    assert found.record()["cards"][0]["neuron"] == "layers.1.down:0"


def test_members_with_the_largest_scores_come_first(lm):
    scores = Scores({"layers.0.down": np.arange(lm.table["layers.0.down"].size)[::-1].copy()}, lm.table)
    neurons = NeuronSet({"layers.0.down": [9, 2, 30]}, lm.table)
    assert strongest(neurons, scores, 2) == [("layers.0.down", 2), ("layers.0.down", 9)]
    assert set(strongest(neurons, None, 2)) <= set(neurons)
    with pytest.raises(NeuronError, match="out of range"):
        vocabulary(lm, [("layers.0.down", 10**6)], Prompts.from_list(["a"]))
    with pytest.raises(NeuronError, match="at least one"):
        vocabulary(lm, [], Prompts.from_list(["a"]))


def test_members_at_routed_experts_are_left_out_and_counted():
    mixture = LanguageModel(build("mixtral"), tiny_tokenizer())
    routed = next(key for key in mixture.table.keys if key not in mixture.anatomy.places)
    dense, notes = with_cards(mixture, NeuronSet({routed: [0, 1], "layers.0.o": [3]}, mixture.table))
    assert list(dense) == [("layers.0.o", 3)]
    assert notes == ["2 of 3 neurons belong to routed experts and have no card"]
    with pytest.raises(UnsupportedModelError, match="all 1 neurons belong to routed experts"):
        with_cards(mixture, NeuronSet({routed: [0]}, mixture.table))


def test_cards_of_the_organism_tell_who_writes_the_opening_and_who_moves_the_refusal():
    """Of the natural organism's strongest neurons by attribution patching one stands out alone.

    Another fires where answers begin.
    """
    pair = organism.load_pair("organism:natural/sft", "organism:natural/dpo")
    requests = pair.aligned.prompts("builtin:harmful-test", limit=32)  # eight are of too few deeds
    found = vocabulary(
        pair.aligned,
        [("layers.2.down", 306), ("layers.2.down", 57)],
        requests,
        base=pair.base,
        random=5,
        tokens=3,
    )
    alone, opening = found.cards
    assert (
        alone.effects["deactivate"]["high"]
        < found.random["deactivate"]["low"]
        < 0
        < alone.effects["patch"]["value"]
    )
    assert "sorry" in {entry["token"].strip() for entry in opening.writes["top"]}
    assert opening.active["most_active"][0]["token"] == "<|assistant|>"


def test_the_command_line_makes_the_cards_that_python_makes_without_a_word():
    typed, called = CardOptions().values(), CardSettings().values()
    assert typed == {name: called[name] for name in typed}
