"""A tiny model with a chat template and a guard on random neurons of it, for tests that do not ask how good a
guard is.
"""

from typing import Any

import numpy as np
import torch

from safety_neurons import NeuronSet
from safety_neurons.guard import Calibration, Classifier, Guard, Pooling, bindings_of
from safety_neurons.model import LanguageModel
from tiny import CHAT_TEMPLATE, WORDS, tiny_llama, tiny_tokenizer


def tiny_model(seed: int = 0, **config: Any) -> LanguageModel:
    """Two layers, hidden 32, whole words, a chat template."""
    return LanguageModel(tiny_llama(seed, **config), tiny_tokenizer(CHAT_TEMPLATE), name="tiny")


def some_neurons(model: LanguageModel, per_key: int = 3, seed: int = 0) -> NeuronSet:
    """A few neurons of every site, scattered."""
    generator = np.random.default_rng(seed)
    return NeuronSet(
        {
            info.key: generator.choice(info.size, min(per_key, info.size), replace=False)
            for info in model.table.sites
        },
        model.table,
    )


def tiny_guard(model: LanguageModel, pooling: str = "last", threshold: float = 0.5, seed: int = 0) -> Guard:
    """A guard with random weights, bound to the model.

    About half of random prompts reach a threshold of one half.
    """
    neurons = some_neurons(model, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    mean, weights = torch.zeros(len(neurons)), torch.randn(len(neurons), generator=generator)
    scale = torch.rand(len(neurons), generator=generator) + 0.5
    classifier = Classifier(mean, scale, weights, 0.1, Calibration("temperature", 2.0, 0.0))
    return Guard(
        neurons,
        Pooling.of(pooling, 3),
        classifier,
        (),
        threshold,
        "given",
        bindings_of(model, neurons),
        model=model,
    )


def texts(count: int, seed: int = 0, longest: int = 12) -> list[str]:
    """Random sentences of different lengths."""
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, generator.integers(1, longest))) for _ in range(count)]
