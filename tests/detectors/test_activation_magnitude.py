import numpy as np
import torch
from twins import PROMPTS, adapted, untouched

from safety_neurons.detectors import find_activation_magnitude


def test_the_root_mean_square_is_over_every_token_of_every_prompt():
    lm = adapted().aligned
    found = find_activation_magnitude(lm, PROMPTS, count=4)
    place = lm.anatomy.layers[1].mlp
    seen = []
    handle = place.places["down"].hooked.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad(), lm.running():
        for row in lm.encode(PROMPTS):
            lm.model(input_ids=torch.tensor([row.ids]))
    handle.remove()
    squares = torch.cat([values[0].double() ** 2 for values in seen])
    np.testing.assert_allclose(found.scores["layers.1.down"], squares.mean(0).sqrt().numpy(), rtol=1e-5)
    assert len(found.neurons) == 4
    assert untouched(lm)


def test_experts_count_the_tokens_that_reached_them():
    from families import build
    from safety_neurons.model import LanguageModel
    from tiny import tiny_tokenizer

    lm = LanguageModel(build("mixtral"), tiny_tokenizer())
    found = find_activation_magnitude(lm, PROMPTS[:2], batch_size=1, sites=("down",), count=2)
    assert set(found.scores.keys()) == set(lm.table.select(sites=("down",)).sizes)
    assert any(values.any() for _, values in found.scores.items())
