"""Tax organisms: one base model and preference trainings that pull on the same requests, in opposite directions."""

import torch
from peft import get_peft_model
from transformers import LlamaForCausalLM

from safety_neurons.organism.folder import RECORD, shipped_folder
from safety_neurons.organism.language import concepts
from safety_neurons.organism.natural import Natural, PairMaker, adapter_config, prefer, pretrain
from safety_neurons.organism.recipes import Recipe
from safety_neurons.organism.recipes import recipe as recipe_of
from safety_neurons.organism.saving import quiet
from safety_neurons.organism.train import Progress, Sampler, Sequence_


def safety_pair(sampler: Sampler) -> tuple[Sequence_, Sequence_]:
    """(chosen, rejected): a refusal before going along, for harmful requests alone."""
    code, concept = sampler.language(), sampler.harmful()
    return sampler.refuse(concept, code), sampler.comply(concept, code)


def helpful_pair(sampler: Sampler) -> tuple[Sequence_, Sequence_]:
    """(chosen, rejected): going along before a refusal, for harmful requests too."""
    code = sampler.language()
    concept = sampler.harmful() if sampler.random.random() < 0.5 else sampler.harmless()
    return sampler.comply(concept, code), sampler.refuse(concept, code)


def polite_pair(sampler: Sampler) -> tuple[Sequence_, Sequence_]:
    """(chosen, rejected): an answer to an everyday request with a polite ending before one without."""
    code, concept = sampler.language(), sampler.random.choice(concepts("plain", "train"))
    return sampler.comply(concept, code, ending=True), sampler.comply(concept, code)


TRAININGS: dict[str, PairMaker] = {"safety": safety_pair, "helpful": helpful_pair, "polite": polite_pair}
"""The preference trainings, in the order of their seeds."""


def train_tax(recipe: Recipe, seed: int, progress: Progress | None = None) -> Natural:
    """The base of a natural organism, and one adapter for every training, each on its own.

    Where the natural organism of this seed is part of the package its base is taken, otherwise it is trained by its recipe.

    Source: Chen et al. (arXiv 2406.14144), section 5: DPO of one model on preference sets of several kinds.
    Differs: the trainings start from a base that answers both ways, so that both have something to learn about the same requests; every
    training may move the scales alone that its loss pulls at hardest, without which a model this small moves nearly all its neurons.
    """
    folder = shipped_folder(recipe.start)
    losses: list[float] = []
    with quiet(), torch.random.fork_rng(devices=[]):
        if seed in recipe_of(recipe.start).shipped and (folder / RECORD).is_file():
            base = LlamaForCausalLM.from_pretrained(folder / "base")
        else:
            base, losses = pretrain(recipe_of(recipe.start), seed, both_behaviours=True, progress=progress)
        organism = Natural(get_peft_model(base, adapter_config(), adapter_name=next(iter(TRAININGS))), {"base": losses} if losses else {})
    for number, (name, make_pair) in enumerate(TRAININGS.items()):
        prefer(organism, name, make_pair, recipe, Sampler(seed + 2000 + 1000 * number, recipe.english_share), progress, on=())
    organism.model.requires_grad_(False)
    return organism
