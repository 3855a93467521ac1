"""Requests of a tiny language in which a pair of words is unsafe, and a tiny model that reads them."""

import contextlib
import random
from collections.abc import Iterator

import torch

from safety_neurons.model import LanguageModel
from safety_neurons.neurons import NeuronSet
from safety_neurons.prompt_lists import Prompt, Prompts
from tiny import CHAT_TEMPLATE, FILL, tiny_llama, tiny_tokenizer


def tiny_model() -> LanguageModel:
    return LanguageModel(tiny_llama(3), tiny_tokenizer(CHAT_TEMPLATE))


@contextlib.contextmanager
def unreadable(model: LanguageModel, word: str) -> Iterator[None]:
    """What holds the word gives NaN for a block."""
    weight = model.inner.get_input_embeddings().weight
    place = model.encode(word)[0].ids[-2]
    before = weight[place].detach().clone()
    with torch.no_grad():
        weight[place] = torch.nan
    try:
        yield
    finally:
        with torch.no_grad():
            weight[place] = before


def some_neurons(model: LanguageModel, every: int = 2) -> NeuronSet:
    return NeuronSet({f"layers.{layer}.down": range(0, 48, every) for layer in (0, 1)}, model.table)


def requests(n: int, seed: int) -> tuple[Prompts, Prompts]:
    """(unsafe, safe): unsafe ones hold `bomb` as their last word.

    Half of the safe ones hold it earlier and are look-alikes.
    """
    number = random.Random(seed)
    unsafe, safe = {}, {}
    while min(len(unsafe), len(safe)) < n:
        words = number.choices(FILL, k=6)
        language, kind = number.choice(("en", "de")), number.choice(("look_alike", "plain"))
        if len(unsafe) < n:
            unsafe.setdefault(" ".join([*words, "bomb"]), ("harmful", language))
        if len(safe) < n:
            safe.setdefault(
                " ".join([words[0], "bomb" if kind == "look_alike" else "key", *words[1:]]), (kind, language)
            )
    return tuple(
        Prompts(
            [
                Prompt(f"{name}-{seed}-{place}", text, language=code, meta={"kind": kind})
                for place, (text, (kind, code)) in enumerate(found.items())
            ],
            name,
        )
        for name, found in (("bad", unsafe), ("good", safe))
    )
