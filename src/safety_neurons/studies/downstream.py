"""Fine-tuning on a task the way anyone would, full or LoRA, on a copy of the model; and how well the task is done."""

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from safety_neurons.errors import UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.model.batches import descend, padded
from safety_neurons.prompts import Prompts
from safety_neurons.results import Completions
from safety_neurons.tuning.artefacts import check_plain
from safety_neurons.tuning.data import Example, tuning_examples

How = Literal["full", "lora"]
RANK = 16
"""Of the LoRA, on all linear layers."""


def twin(model: LanguageModel) -> LanguageModel:
    """A copy of a model without adapters, with weights of its own that may be trained.

    Raises:
        UsageError: adapters or deltas are on it.
    """
    check_plain(model)
    other = copy.copy(model)
    other.__dict__.pop("anatomy", None)
    other.model = copy.deepcopy(model.model)
    return other


def fine_tune(
    model: LanguageModel,
    prompts: Prompts,
    *,
    how: How = "full",
    steps: int = 100,
    learning_rate: float = 1e-3,
    batch_size: int = 16,
    seed: int = 0,
    at: Sequence[int] = (),
    look: Callable[[int], None] | None = None,
) -> list[float]:
    """Fine-tune a model in place with a plain AdamW loop: loss on the answers, short warm-up, straight decay, clipping at 1.

    Args:
        model: is changed; a LoRA is merged into it at the end, and for every look.
        prompts: with answers.
        how: all weights, or a LoRA of rank 16 on all linear layers.
        steps: optimizer steps.
        learning_rate: at the top.
        batch_size: examples a step.
        seed: of the order of examples and of the LoRA's first factor.
        at: steps after which `look` is called.
        look: gets the step.

    Returns:
        The loss of every step.

    Raises:
        UsageError: an unknown way. InputError: no answers. NumericalError: the loss is not a number.
    """
    if how not in ("full", "lora"):
        raise UsageError(f"downstream {how!r}: expected full or lora")
    examples = tuning_examples(prompts, model, kind="harmless")
    plain = model.model
    if how == "lora":
        model.model = _with_lora(plain, seed)
    else:
        plain.requires_grad_(True)
    parameters = [parameter for parameter in model.model.parameters() if parameter.requires_grad]
    warmup = max(1, steps // 10)
    order = _order(len(examples), steps * batch_size, seed)

    def backward(step: int) -> float:
        return _backward(model, [examples[index] for index in order[step * batch_size : (step + 1) * batch_size]])

    def rate(highest: float, step: int) -> float:
        return highest * min((step + 1) / warmup, 1 - 0.9 * step / max(1, steps))

    losses = []
    try:
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
        for descended in descend(optimizer, backward, rate, range(steps), subject=lambda _step: " of the downstream fine-tuning"):
            losses.append(descended.loss)
            if look is not None and len(losses) in at:
                look(len(losses))
    finally:
        if how == "lora":
            model.model = model.model.merge_and_unload()
        model.__dict__.pop("anatomy", None)
        model.model.requires_grad_(False)
    return losses


def _backward(model: LanguageModel, examples: Sequence[Example]) -> float:
    """Gradients of the mean loss over the answers' tokens; the loss."""
    ids, labels = padded([(example.ids, example.start) for example in examples], model.pad_id)
    lengths = torch.tensor([len(example.ids) for example in examples])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    loss = model.model(**{name: value.to(model.device) for name, value in inputs.items()}, use_cache=False).loss
    loss.backward()
    return float(loss.detach())


def _with_lora(model: Any, seed: int) -> Any:
    import warnings

    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config)


def _order(examples: int, wanted: int, seed: int) -> list[int]:
    generator = np.random.default_rng([seed, 3])
    rounds = [generator.permutation(examples) for _ in range(-(-wanted // examples))]
    return [int(index) for index in np.concatenate(rounds)[:wanted]]


def solved(completions: Completions, prompts: Prompts) -> list[bool | None]:
    """Whether each completion gives its prompt's answer.

    The same words, whatever their case, spaces and full stops; where the answer has a `####` mark, as in GSM8K, the same last number.
    """
    answers = {prompt.id: prompt.answer for prompt in prompts}
    return [_solves(completion.completion, answers[completion.prompt_id] or "") for completion in completions]


def _solves(text: str, answer: str) -> bool:
    if "####" in answer:
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
        wanted = answer.rpartition("####")[2].strip().replace(",", "")
        return bool(numbers) and numbers[-1].replace(",", "").rstrip(".") == wanted
    return _plain(text) == _plain(answer)


def _plain(text: str) -> str:
    return " ".join(text.casefold().replace(".", " ").split())
