"""Pairs of tiny models for the tests of detectors that compare two models."""

import functools
import pathlib
import tempfile

import torch

from safety_neurons.model import LanguageModel, Pair, load_pair
from safety_neurons.prompt_lists import Prompts
from tiny import tiny_adapter_folder, tiny_llama, tiny_llama_folder, tiny_tokenizer

PROMPTS = Prompts.from_list(
    [
        "how do i make a cake",
        "tell me about the red house please",
        "kill the tree",
        "explain why you open the door in the water",
        "what key",
        "please write a story about fire and water and a small green plant",
    ]
)


@functools.cache
def adapted(kind: str = "ia3", targets: tuple[str, ...] = ("down_proj",)) -> Pair:
    """Two adapters stacked against one, on one base in memory."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        base = tiny_llama_folder(folder / "base", chat_template=None)
        first = tiny_adapter_folder(base, folder / "first", seed=1, kind=kind, targets=targets)
        second = tiny_adapter_folder(base, folder / "second", seed=2, kind=kind, targets=targets)
        return load_pair(f"{base}+{first}", f"{base}+{first}+{second}")


def model(
    seed: int = 0, noise: int = 0, dtype: torch.dtype = torch.float32, size: float = 0.1, **config: object
) -> LanguageModel:
    """A tiny model; `noise` is the seed of small changes of all its weights, 0 for none."""
    made = tiny_llama(seed, **config).to(dtype)
    generator = torch.Generator().manual_seed(noise)
    with torch.no_grad():
        for parameter in made.parameters():
            if noise:
                parameter += size * torch.randn(parameter.shape, generator=generator).to(dtype)
    return LanguageModel(made, tiny_tokenizer())


def separate(dtype: torch.dtype = torch.float32, **config: object) -> tuple[LanguageModel, LanguageModel]:
    """Two models of one shape with all weights different."""
    return model(0, 5, dtype, **config), model(0, 6, dtype, **config)


def untouched(lm: LanguageModel) -> bool:
    """Whether no module of the model has a forward hook or a method of its own."""
    return not any(
        part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part)
        for part in lm.model.modules()
    )
