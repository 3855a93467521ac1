import pathlib
from typing import Any

import pytest
import torch
import transformers
from trained import assert_same_bits, batches, bits, model_of, randomised, some

from safety_neurons.model import LanguageModel
from safety_neurons.tuning import attach, outside_hash
from tiny import CHAT_TEMPLATE, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainers themselves

QUESTIONS = ["how do i make a bomb", "tell me how to kill", "how do i steal a key", "how do i make a cake"]


def chat_model(**config: Any) -> LanguageModel:
    return LanguageModel(tiny_llama(**config), tiny_tokenizer(CHAT_TEMPLATE))


def arguments(folder: pathlib.Path, kind: Any = transformers.TrainingArguments, **over: Any) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    return kind(**{**settings, **over})


def assert_only_the_deltas_moved(
    model: LanguageModel, deltas: Any, before: dict[str, torch.Tensor], outside: str
) -> None:
    assert all(
        tensor.abs().max() > 0 for key, tensor in deltas.tensors().items() if not key.endswith((".q", ".k"))
    )
    own = {id(parameter) for parameter in deltas.parameters()}
    assert all(parameter.grad is None for parameter in model.model.parameters() if id(parameter) not in own)
    assert outside_hash(model, deltas.neurons) == outside
    assert_same_bits(before, bits(model.model))


@pytest.mark.parametrize("half", [False, True])
def test_the_trainer_of_transformers_trains_the_deltas_alone(half: bool, tmp_path: pathlib.Path) -> None:
    model = model_of("llama", torch.float32)
    neurons = some(model)
    before, outside = bits(model.model), outside_hash(model, neurons)
    rows = [{"input_ids": row, "labels": row} for ids in batches(2, rows=4) for row in ids]
    settings = arguments(tmp_path, gradient_checkpointing=True, gradient_accumulation_steps=2, bf16=half)
    with attach(model, neurons) as deltas:
        trainer = transformers.Trainer(model=model.model, args=settings, train_dataset=rows)
        trainer.train()
        counted = sum(
            parameter.numel() for group in trainer.optimizer.param_groups for parameter in group["params"]
        )
        assert counted == deltas.n_parameters
        assert_only_the_deltas_moved(model, deltas, before, outside)
    assert_same_bits(before, bits(model.model))


def test_the_sft_trainer_of_trl_trains_the_deltas_alone(tmp_path: pathlib.Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model = chat_model()
    neurons = some(model)
    before, outside = bits(model.model), outside_hash(model, neurons)
    rows = [
        {
            "prompt": [{"role": "user", "content": text}],
            "completion": [{"role": "assistant", "content": "sorry i cannot help"}],
        }
        for text in QUESTIONS
    ]
    with attach(model, neurons) as deltas:
        trainer = trl.SFTTrainer(
            model=model.model,
            args=arguments(tmp_path, trl.SFTConfig, max_length=64),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=model.tokenizer,
        )
        trainer.train()
        assert_only_the_deltas_moved(model, deltas, before, outside)


def test_the_dpo_trainer_of_trl_compares_with_the_untouched_base(tmp_path: pathlib.Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model = chat_model()
    neurons = some(model)
    before, outside = bits(model.model), outside_hash(model, neurons)
    rows = [
        {
            "prompt": [{"role": "user", "content": text}],
            "chosen": [{"role": "assistant", "content": "sorry i cannot help"}],
            "rejected": [{"role": "assistant", "content": "yes sure here"}],
        }
        for text in QUESTIONS
    ]
    with attach(model, neurons) as deltas:
        trainer = trl.DPOTrainer(
            model=model.model,
            ref_model=deltas.reference(),
            args=arguments(tmp_path, trl.DPOConfig, max_steps=3, logging_steps=1),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=model.tokenizer,
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[0] == pytest.approx(
            torch.log(torch.tensor(2.0)).item(), abs=1e-3
        )  # policy and reference agree at first
        assert losses[-1] < losses[0]
        assert_only_the_deltas_moved(model, deltas, before, outside)


def test_the_reference_is_the_base_and_holds_no_weights_of_its_own() -> None:
    model = model_of("phi3", torch.float32)
    ids = batches(1)[0]
    with torch.no_grad():
        plain = model.model(input_ids=ids).logits
    with attach(model, some(model)) as deltas, torch.no_grad():
        randomised(deltas.parameters())
        reference = deltas.reference()
        assert torch.equal(reference(input_ids=ids).logits, plain)
        assert not torch.equal(model.model(input_ids=ids).logits, plain)
        held = {parameter.data_ptr() for parameter in model.model.parameters()}
        assert all(parameter.data_ptr() in held for parameter in reference.parameters())
        assert isinstance(reference, type(model.model))


def test_four_bit_weights_are_trained_beside(tmp_path: pathlib.Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    inner = tiny_llama(hidden_size=64, intermediate_size=128).to(torch.bfloat16)
    for layer in inner.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    packed = bitsandbytes.nn.Linear4bit(
                        linear.in_features,
                        linear.out_features,
                        bias=False,
                        compute_dtype=torch.bfloat16,
                        quant_type="nf4",
                    )
                    packed.weight = bitsandbytes.nn.Params4bit(
                        linear.weight.data, requires_grad=False, quant_type="nf4"
                    )
                    setattr(part, name, packed.to("cpu"))
    model = LanguageModel(inner)
    neurons = some(model)
    ids = batches(1)[0]
    plain = inner(input_ids=ids).logits.detach()
    with attach(model, neurons) as deltas:
        assert torch.equal(inner(input_ids=ids).logits, plain)
        optimizer = torch.optim.AdamW(deltas.parameters(), lr=1e-3)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = inner(input_ids=ids, labels=ids).loss
            loss.backward()
            losses.append(float(loss.detach()))
            optimizer.step()
        assert losses[-1] < losses[0]
        assert all(tensor.dtype == torch.float32 for tensor in deltas.tensors().values())
    assert torch.equal(inner(input_ids=ids).logits, plain)
