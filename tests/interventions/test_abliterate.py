"""Abliteration against a naive twin: directions are gone from what is written, norms stay, bits come back."""

import numpy as np
import pytest
import torch
from torch.nn.utils import parametrizations

import families
from safety_neurons import abliterated, refusal_directions
from safety_neurons.errors import InputError, UnsupportedModelError, UsageError
from safety_neurons.interventions.abliterate import basis_of, share_along, without, writers
from safety_neurons.model import LanguageModel
from safety_neurons.model.loading import load
from safety_neurons.prompt_lists import Prompts
from tiny_pair import HARMFUL, HARMLESS


@pytest.fixture
def model(tiny_pair):
    return load(tiny_pair.plain, dtype="float64")


@pytest.fixture
def directions(model):
    return refusal_directions(model, Prompts.from_list(HARMFUL), Prompts.from_list(HARMLESS))


def test_directions_are_differences_of_means_at_the_last_token(model, directions):
    means = []
    for texts in (HARMFUL, HARMLESS):
        rows = []
        for encoded in model.encode(Prompts.from_list(texts)):
            with torch.no_grad():
                given = torch.tensor([encoded.ids])
                states = model.model(given, output_hidden_states=True).hidden_states
            rows.append(states[1][0, -1])
        means.append(torch.stack(rows).mean(0))
    assert torch.allclose(directions[0], means[0] - means[1], atol=1e-6)


def test_a_basis_is_orthonormal_begins_with_its_layer_and_grows(directions):
    small, large = (basis_of(directions, 1, count) for count in (1, 2))
    assert torch.allclose(large @ large.T, torch.eye(2, dtype=torch.float64), atol=1e-12)
    assert abs(float(small[0] @ directions[1] / directions[1].norm())) == pytest.approx(1, abs=1e-12)
    assert torch.allclose(small[0].abs(), large[0].abs(), atol=1e-12)
    # Two layers' directions span what two vectors span.
    assert torch.allclose((directions @ large.T) @ large, directions, atol=1e-12)
    with pytest.raises(UsageError, match="from 1 to 2"):
        basis_of(directions, 0, 3)


def test_a_naive_twin_takes_the_same_out(model, directions):
    unit = (directions[0] / directions[0].norm()).numpy()
    naive = np.eye(len(unit)) - np.outer(unit, unit)
    old = {writer.name: writer.tensor.clone().numpy() for writer in writers(model)}
    expected = {
        name: weight @ naive if name == "embedding" else naive @ weight for name, weight in old.items()
    }
    with abliterated(model, directions[:1]):
        for writer in writers(model):
            assert np.allclose(writer.tensor.numpy(), expected[writer.name], atol=1e-12), writer.name
    for writer in writers(model):
        assert np.array_equal(writer.tensor.numpy(), old[writer.name])
    with abliterated(model, directions[:1], keep_norms=True):
        for writer in writers(model):
            columns = writer.tensor.numpy() if writer.axis == 0 else writer.tensor.numpy().T
            before = old[writer.name] if writer.axis == 0 else old[writer.name].T
            wanted = [naive @ column for column in before.T]
            wanted = [
                new / np.linalg.norm(new) * np.linalg.norm(column)
                for new, column in zip(wanted, before.T, strict=True)
            ]
            assert np.allclose(columns.T, wanted, atol=1e-12)


@pytest.mark.parametrize("keep_norms", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_nothing_is_left_along_the_directions(family, keep_norms):
    built = families.build(family)
    generator = torch.Generator().manual_seed(0)
    hidden = built.config.hidden_size
    basis = torch.linalg.qr(torch.randn(hidden, 2, generator=generator, dtype=torch.float64)).Q.T
    lm = LanguageModel(built)
    with abliterated(lm, basis, keep_norms=keep_norms):
        for writer in writers(lm):
            vectors = writer.tensor.movedim(writer.axis, -1).double()
            assert float((vectors @ basis.T).abs().max()) < 1e-6, writer.name
            assert vectors.norm() > 0
    n_layers = len(lm.anatomy.layers)
    assert len([writer for writer in writers(lm) if not writer.bias]) >= 2 * n_layers


def test_the_stream_has_nothing_along_it(model, directions):
    some = Prompts.from_list(HARMFUL[:2])
    basis = basis_of(directions, 0, 2)
    assert share_along(model, some, basis) > 0.05
    with abliterated(model, basis):
        tied = model.model.get_output_embeddings().weight is model.model.get_input_embeddings().weight
        left = share_along(model, some, basis)
    assert tied or left < 1e-6


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_learned_positions_write_the_stream_too(family):
    built = families.build(family, torch.float64)
    assert built.get_output_embeddings().weight is not built.get_input_embeddings().weight
    basis = torch.linalg.qr(torch.randn(built.config.hidden_size, 2, dtype=torch.float64)).Q.T
    lm, streams = LanguageModel(built), []
    with abliterated(lm, basis), torch.no_grad():
        kept = [
            one.module.register_forward_hook(lambda *given: streams.append(given[2]))
            for one in lm.anatomy.layers
        ]
        built(input_ids=torch.tensor([[5, 6, 7]]))
    for hook in kept:
        hook.remove()
    streams = [one[0] if isinstance(one, tuple) else one for one in streams]
    assert len(streams) == len(lm.anatomy.layers)
    assert max(float((one @ basis.T).abs().max()) for one in streams) < 1e-12


def test_a_vector_in_the_basis_stays_zero():
    basis = torch.eye(3, dtype=torch.float64)[:1]
    rest = without(torch.tensor([[2.0, 0, 0], [3.0, 4.0, 0]]), basis, keep_norms=True)
    assert rest.tolist() == [[0, 0, 0], [0, 5, 0]]
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(9, 2, generator=generator, dtype=torch.float64)).Q.T
    inside = torch.randn(5, 2, generator=generator, dtype=torch.float64) @ basis
    assert not without(inside, basis, keep_norms=True).any()


def test_models_with_adapters_and_empty_lists_are_refused(tiny_pair, model):
    with pytest.raises(UsageError, match="merge"), abliterated(load(tiny_pair.base), torch.eye(32)[:1]):
        pass
    with pytest.raises(InputError, match="harmless"):
        refusal_directions(model, Prompts.from_list(HARMFUL), Prompts([]))


@pytest.mark.parametrize(
    "path", ["model.layers.1.self_attn.o_proj", "model.layers.0.mlp.down_proj", "model.embed_tokens"]
)
def test_a_weight_that_is_computed_is_refused_since_nothing_can_be_written_into_it(path):
    model = families.build("llama", tie_word_embeddings=False)
    parametrizations.weight_norm(model.get_submodule(path))
    with (
        pytest.raises(UnsupportedModelError, match="computed from other .* take the parametrisation off"),
        abliterated(LanguageModel(model), torch.eye(32)[:1]),
    ):
        pass
