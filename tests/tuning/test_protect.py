"""protected and repair: the set stays, or comes back, bit for bit, whatever trains the rest."""

import copy
import warnings

import peft
import pytest
import torch
import transformers
from trained import lora, some

from families import build as tiny_model
from safety_neurons.errors import MismatchError, NeuronError, UnsupportedModelError
from safety_neurons.model import LanguageModel
from safety_neurons.neurons import NeuronSet
from safety_neurons.tuning import protect
from safety_neurons.tuning.protect import entries_of, protected, repair
from tiny import tiny_llama

IDS = torch.randint(4, 90, (3, 12), generator=torch.Generator().manual_seed(0))


def train(parameters, model, steps=4, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW(list(parameters), lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        loss = model(input_ids=IDS % model.config.vocab_size, labels=IDS % model.config.vocab_size).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def weights_of(model: LanguageModel, neurons: NeuronSet) -> dict[str, torch.Tensor]:
    """What the model computes with: weights with the adapters' share, and bias entries."""
    found = {}
    for key, members in neurons.items():
        place = model.anatomy.places[key]
        whole = place.weight().detach()
        found[key] = (
            whole[members.tolist()] if place.side == "output" else whole[:, members.tolist()]
        ).clone()
        if place.bias() is not None:
            found[f"{key}.bias"] = place.bias().detach()[members.tolist()].clone()
    return found


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox", "qwen2"])
def test_full_fine_tuning_leaves_the_set_as_it_was_and_moves_the_rest(family):
    model = LanguageModel(tiny_model(family))
    neurons = some(model)
    rest = NeuronSet.all(model.table) - neurons
    before, others = weights_of(model, neurons), weights_of(model, rest)
    model.model.train().requires_grad_(True)
    with protected(model, neurons) as protection:
        train(model.model.parameters(), model.model)
        assert protection.changed() == 0
    assert protection.steps == 4
    assert protection.moved_outside == 0
    assert equal(before, weights_of(model, neurons))
    after = weights_of(model, rest)
    assert not any(torch.equal(others[key], after[key]) for key in others)


def test_after_the_context_the_set_is_trained_again():
    model = LanguageModel(tiny_llama())
    neurons = some(model)
    before = weights_of(model, neurons)
    with protected(model, neurons):
        optimizer = train(model.model.parameters(), model.model, 1)
    train(None, model.model, 1, optimizer)
    assert not equal(before, weights_of(model, neurons))


def test_optimizer_state_of_the_set_stays_empty():
    model = LanguageModel(tiny_llama())
    neurons = NeuronSet({"layers.0.up": [3, 5]}, model.table)
    with protected(model, neurons):
        optimizer = train(model.model.parameters(), model.model)
    moments = optimizer.state[model.model.model.layers[0].mlp.up_proj.weight]["exp_avg"]
    assert not moments[[3, 5]].any()
    assert moments[4].any()


def test_momentum_from_before_the_context_does_not_move_the_set():
    model = LanguageModel(tiny_llama())
    neurons = some(model)
    optimizer = train(
        model.model.parameters(),
        model.model,
        3,
        torch.optim.SGD(model.model.parameters(), lr=1e-2, momentum=0.9),
    )
    before = weights_of(model, neurons)
    with protected(model, neurons):
        train(None, model.model, 3, optimizer)
    assert equal(before, weights_of(model, neurons))


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("phi3", {}),
        ("llama", {"use_rslora": True}),
        ("gpt2", {"lora_bias": True}),
        ("gpt2", {"bias": "all"}),
    ],
    ids=str,
)
def test_a_lora_has_no_share_in_the_set_before_or_after_merging(family, config):
    plain = tiny_model(family)
    adapted = lora(copy.deepcopy(plain), **config)
    model = LanguageModel(adapted)
    neurons = some(model)
    rest = NeuronSet.all(model.table) - neurons
    original = LanguageModel(plain)
    with protected(model, neurons) as protection:
        train([p for p in adapted.parameters() if p.requires_grad], adapted)
        assert protection.changed() == 0
    assert equal(weights_of(original, neurons), weights_of(model, neurons))
    assert not equal(weights_of(original, rest), weights_of(model, rest))
    merged = LanguageModel(adapted.merge_and_unload())
    assert equal(weights_of(original, neurons), weights_of(merged, neurons))


def test_a_lora_that_has_changed_the_set_is_an_error_until_it_is_repaired():
    plain = tiny_llama()
    adapted = lora(copy.deepcopy(plain))
    train([p for p in adapted.parameters() if p.requires_grad], adapted)
    model, original = LanguageModel(adapted), LanguageModel(plain)
    neurons = some(model)
    with pytest.raises(MismatchError, match="repair"), protected(model, neurons):
        pass
    done = repair(model, original, neurons)
    assert done.adapter_changed > 0
    assert done.changed == 0
    assert equal(weights_of(original, neurons), weights_of(model, neurons))
    with protected(model, neurons):
        train([p for p in adapted.parameters() if p.requires_grad], adapted)
    assert equal(weights_of(original, neurons), weights_of(model, neurons))


def test_what_moved_without_an_optimizer_step_is_put_back_and_counted():
    model = LanguageModel(tiny_llama())
    neurons = NeuronSet({"layers.1.down": [7]}, model.table)
    before = weights_of(model, neurons)
    with protected(model, neurons) as protection, torch.no_grad():
        model.model.model.layers[1].mlp.down_proj.weight += 1
    assert protection.moved_outside == 32
    assert equal(before, weights_of(model, neurons))


def test_the_hooks_come_off_when_training_fails():
    model = LanguageModel(tiny_llama())
    neurons = some(model)
    with pytest.raises(RuntimeError, match="out of memory"), protected(model, neurons):
        raise RuntimeError("out of memory")
    before = weights_of(model, neurons)
    train(model.model.parameters(), model.model, 1)
    assert not equal(before, weights_of(model, neurons))


def test_dora_cannot_be_told_apart():
    model = LanguageModel(lora(tiny_llama(), use_dora=True))
    with (
        pytest.raises(UnsupportedModelError, match="DoRA"),
        protected(model, NeuronSet({"layers.0.up": [1]}, model.table)),
    ):
        pass


def test_an_empty_set_is_an_error():
    model = LanguageModel(tiny_llama())
    with pytest.raises(NeuronError, match="empty"), protected(model, NeuronSet({}, model.table)):
        pass
    with pytest.raises(NeuronError, match="empty"):
        repair(model, model, NeuronSet({}, model.table))


def test_experts_stay_too():
    model = LanguageModel(tiny_model("mixtral"))
    neurons = NeuronSet(
        {"layers.0.experts.1.down": [2], "layers.0.experts.0.gate": [1, 3], "layers.1.experts.0.up": [0]},
        model.table,
    )
    experts = model.anatomy.layers[0].experts
    before = (
        experts.weight(1, "down")[:, 2].clone(),
        experts.weight(0, "gate")[[1, 3]].clone(),
        experts.weight(0, "gate")[[0, 2]].clone(),
    )
    model.model.train().requires_grad_(True)
    with protected(model, neurons) as protection:
        train(model.model.parameters(), model.model)
        assert protection.changed() == 0
    assert torch.equal(before[0], experts.weight(1, "down")[:, 2])
    assert torch.equal(before[1], experts.weight(0, "gate")[[1, 3]])
    assert not torch.equal(before[2], experts.weight(0, "gate")[[0, 2]])


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_repair_puts_the_set_back_and_leaves_the_rest(family):
    reference = LanguageModel(tiny_model(family))
    model = LanguageModel(copy.deepcopy(reference.model).requires_grad_(True))
    neurons = some(model)
    rest = NeuronSet.all(model.table) - neurons
    train(model.model.parameters(), model.model)
    tuned = weights_of(model, rest)
    done = repair(model, reference, neurons)
    assert 0 < done.changed <= done.n_entries == neurons.n_parameters
    assert done.rounded == 0
    assert equal(weights_of(reference, neurons), weights_of(model, neurons))
    assert equal(tuned, weights_of(model, rest))
    assert repair(model, reference, neurons).changed == 0


def test_repair_counts_the_references_adapters_in():
    base = tiny_llama()
    adapted = lora(copy.deepcopy(base))
    train([p for p in adapted.parameters() if p.requires_grad], adapted)
    model, reference = LanguageModel(copy.deepcopy(base)), LanguageModel(adapted)
    neurons = some(model)
    repair(model, reference, neurons)
    assert equal(weights_of(reference, neurons), weights_of(model, neurons))


def test_repair_puts_the_scales_of_a_reference_into_columns_of_a_model_whose_own_it_clears():
    """(IA)³ on the down projection is on its input, in no weight: the columns came back without it."""
    settings = peft.IA3Config(
        target_modules=["down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    )
    base = tiny_llama().double()
    reference, model = (peft.get_peft_model(copy.deepcopy(base), settings) for _ in range(2))
    with torch.no_grad():
        for one, low in ((reference, 0.5), (model, 2.0)):
            for name, scale in one.named_parameters():
                if "ia3_l" in name:
                    scale.copy_(torch.linspace(low, low + 1, scale.numel()).view_as(scale))
    before = reference(input_ids=IDS).logits
    assert not torch.allclose(model(input_ids=IDS).logits, before)
    table = LanguageModel(base).table
    whole = NeuronSet.all(table).only(sites=["down"])
    repair(LanguageModel(model), LanguageModel(reference), whole)
    torch.testing.assert_close(model(input_ids=IDS).logits, before)


def test_repair_says_what_a_coarser_type_rounds():
    reference = LanguageModel(tiny_llama())
    model = LanguageModel(tiny_llama().bfloat16())
    assert repair(model, reference, NeuronSet({"layers.0.q": [0]}, model.table)).rounded > 0


def test_repair_from_another_architecture_is_an_error():
    model, other = LanguageModel(tiny_llama()), LanguageModel(tiny_llama(intermediate_size=64))
    with pytest.raises(MismatchError, match="architectures"):
        repair(model, other, NeuronSet({"layers.0.q": [0]}, model.table))


def test_the_trainer_of_transformers_is_protected(tmp_path):
    plain = tiny_llama()
    model = LanguageModel(copy.deepcopy(plain))
    neurons = some(model)
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        weight_decay=0.1,
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with protected(model, neurons) as protection:
            transformers.Trainer(model.model, arguments, train_dataset=rows).train()
    assert protection.steps == 3
    assert equal(weights_of(LanguageModel(plain), neurons), weights_of(model, neurons))


class Torn(torch.optim.SGD):
    """Fails after it has moved the weights."""

    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter += 1
        raise RuntimeError("killed in the middle of a step")


def test_a_step_that_fails_after_it_moved_the_set_is_undone_too():
    model = LanguageModel(tiny_llama())
    neurons = some(model)
    before = weights_of(model, neurons)
    with pytest.raises(RuntimeError, match="in the middle"), protected(model, neurons):
        train(None, model.model, 1, Torn(model.model.parameters(), lr=0.1))
    assert equal(before, weights_of(model, neurons))


def test_quantised_rows_whose_bias_alone_could_be_written_are_not_half_repaired(monkeypatch):
    reference = LanguageModel(tiny_model("qwen2"))
    model = LanguageModel(copy.deepcopy(reference.model))
    neurons = NeuronSet({"layers.0.q": [0, 3]}, model.table)
    with torch.no_grad():
        model.model.model.layers[0].self_attn.q_proj.bias += 1
    before = model.model.model.layers[0].self_attn.q_proj.bias.clone()
    whole = entries_of(model, neurons)
    half = [entries for entries in whole if entries.name == "bias"]
    assert half
    original = protect.entries_of
    monkeypatch.setattr(
        protect, "entries_of", lambda of, members: half if of is model else original(of, members)
    )
    with pytest.raises(MismatchError, match="quantised"):
        repair(model, reference, neurons)
    assert torch.equal(before, model.model.model.layers[0].self_attn.q_proj.bias)
