"""Every verb runs every model in evaluation mode, whatever mode it was left in, and puts each module's own
flag back.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch

import safety_neurons as sn
from safety_neurons import organism
from safety_neurons.model import LanguageModel, kl_divergence, token_losses
from safety_neurons.neurons import NeuronSet
from safety_neurons.prompt_lists import Prompt, Prompts
from tiny import CHAT_TEMPLATE, tiny_llama, tiny_tokenizer

WORDS = ("kill", "make a bomb")
BAD = Prompts(
    [Prompt(f"b{n}", f"how do i {what}", answer="sorry i cannot help") for n, what in enumerate(WORDS)]
)
GOOD = Prompts(
    [
        Prompt(f"g{n}", f"tell me about {what}", answer="sure here")
        for n, what in enumerate(("a cake", "water"))
    ]
)
COLOURS, THINGS = ("red", "green", "blue", "small"), ("cake", "tree", "house", "door", "key", "plant")
MANY = [
    Prompts(
        [
            Prompt(f"{end}{n}", f"tell me about the {colour} {thing} {end}")
            for n, (colour, thing) in enumerate(product(COLOURS, THINGS))
        ]
    )
    for end in ("bomb", "please")
]
TINY = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24, "attention_dropout": 0.3}
SHORT: dict[str, Any] = {"max_new_tokens": 2, "batch_size": 4}
Call = Callable[[LanguageModel, LanguageModel], Any]


@contextlib.contextmanager
def left_training(*models: LanguageModel) -> Iterator[list[str]]:
    """Models in training mode but for some modules; yields the names of modules that ran in training mode."""
    ran: list[str] = []
    flags, handles = {}, []
    for number, lm in enumerate({id(lm.model): lm.model for lm in models}.values()):
        for place, (name, module) in enumerate(lm.model.named_modules()):
            module.training = place % 3 != 1
            flags[module] = module.training
            if name.count(".") > 2:  # nothing on the whole model, where a hook changes how it is run

                def note(module: torch.nn.Module, *_: Any, told: str = f"{number}:{name}") -> None:
                    if module.training:
                        ran.append(told)

                handles.append(module.register_forward_pre_hook(note))
    try:
        yield ran
        assert [module for module, flag in flags.items() if module.training is not flag] == []
    finally:
        for handle in handles:
            handle.remove()


def neurons(lm: LanguageModel) -> NeuronSet:
    return NeuronSet({"layers.0.down": range(0, 24, 2), "layers.0.gate": range(9)}, lm.table)


def guard(lm: LanguageModel) -> Any:
    return sn.fit_guard(
        lm, neurons(lm), MANY[0], MANY[1], pooling="last", penalties=(0.1,), fpr=0.2, batch_size=8
    )


def inside(context: Any, lm: LanguageModel) -> None:
    with context:
        lm.model(input_ids=torch.tensor([[4, 5, 6]]))
        lm.model.generate(input_ids=torch.tensor([[4, 5, 6]]), max_new_tokens=2, do_sample=False)
        lm.complete(BAD, **SHORT)


def patching(one: LanguageModel, other: LanguageModel) -> None:
    inside(sn.patched(one, other, neurons(one)), one)


CALLS: dict[str, Call] = {
    "find_activation_magnitude": lambda one, _: sn.find_activation_magnitude(one, BAD),
    "find_attribution": lambda one, _: sn.find_attribution(one, BAD),
    "find_attribution_patching": lambda one, other: sn.find_attribution_patching(
        one, other, BAD, midpoints=1
    ),
    "find_contrast": lambda one, other: sn.find_contrast(one, other, BAD, max_new_tokens=3),
    "find_heads": lambda one, _: sn.find_heads(one, BAD),
    "find_importance": lambda one, _: sn.find_importance(one, BAD),
    "find_importance_contrast": lambda one, other: sn.find_importance_contrast(one, other, BAD),
    "find_swap_attribution": lambda one, other: sn.find_swap_attribution(one, other, BAD),
    "find_mask": lambda one, other: sn.find_mask(one, other, BAD, harmless=GOOD, rounds=1),
    "find_cna": lambda one, _: sn.find_cna(one, BAD, harmless=GOOD, general=GOOD),
    "find_effect_size": lambda one, _: sn.find_effect_size(one, BAD, harmless=GOOD),
    "find_probe": lambda one, _: sn.find_probe(one, BAD, harmless=GOOD, strength=1.0),
    "find_probe_weights": lambda one, _: sn.find_probe_weights(one, BAD, harmless=GOOD),
    "find_refusal_direction": lambda one, _: sn.find_refusal_direction(one, BAD, harmless=GOOD),
    "find_relp": lambda one, _: sn.find_relp(one, BAD),
    "find_snip": lambda one, _: sn.find_snip(one, BAD, harmless=GOOD, sites=["down"]),
    "find_wanda": lambda one, _: sn.find_wanda(one, BAD, harmless=GOOD, sites=["down"]),
    "activation_statistics": lambda one, _: sn.activation_statistics(one, [[3, 4, 5]]),
    "complete": lambda one, _: one.complete(BAD, **SHORT),
    "token_losses": lambda one, _: token_losses(one, ["how do i grow a tree"]),
    "kl_divergence": lambda one, other: kl_divergence(one, [[3, 4, 5]], other),
    "anatomy": lambda one, _: LanguageModel(one.model, one.tokenizer).table,
    "deactivated": lambda one, _: inside(sn.deactivated(one, neurons(one)), one),
    "patched": patching,
    "patched, the other way": lambda one, other: patching(other, one),
    "patched with constants": lambda one, _: inside(sn.patched(one, None, neurons(one), mode="zero"), one),
    "verify_deactivate": lambda one, _: sn.verify_deactivate(
        one, neurons(one), BAD, GOOD, text=GOOD, random=1, **SHORT
    ),
    "verify_patch": lambda one, other: sn.verify_patch(
        one, other, neurons(one), BAD, GOOD, text=GOOD, random=1, **SHORT
    ),
    "compare": lambda one, other: sn.compare(
        one, other, BAD, GOOD, find_prompts=BAD, methods=["contrast"], random=1, **SHORT
    ),
    "evaluate": lambda one, other: sn.evaluate(
        one, [BAD], over_refusal=None, patch=neurons(one), donor=other, reference=other, **SHORT
    ),
    "doctor": lambda one, _: sn.doctor(one, n_sampled=1),
    "gcg": lambda one, _: sn.gcg(
        one, BAD[:1], targets={"b0": "sure here"}, steps=1, width=4, top_k=4, suffix_tokens=3
    ),
    "fit_guard": lambda one, _: guard(one),
    "guard.score": lambda one, _: GUARDS[id(one)].score("how do i kill"),
    "evaluate_guard": lambda one, _: sn.evaluate_guard(
        one, GUARDS[id(one)], *MANY, perturbations=(), random=1
    ),
    "GuardedModel": lambda one, _: sn.GuardedModel(one, GUARDS[id(one)]).generate(BAD, **SHORT),
    "tune": lambda one, _: sn.tune(
        one,
        neurons(one),
        BAD,
        harmless=GOOD,
        test_harmful=BAD,
        test_harmless=GOOD,
        text=None,
        max_new_tokens=3,
        epochs=1,
    ),
}
"""Every public entry point that runs a model, with two separate models of one shape."""


@pytest.fixture(scope="module")
def pair() -> tuple[LanguageModel, LanguageModel]:
    one, other = (LanguageModel(tiny_llama(seed, **TINY), tiny_tokenizer(CHAT_TEMPLATE)) for seed in (0, 1))
    GUARDS[id(one)] = guard(one)
    return one, other


GUARDS: dict[int, Any] = {}


@pytest.mark.parametrize("name", CALLS)
def test_a_verb_runs_its_models_in_evaluation_mode_and_puts_their_modes_back(pair, name):
    with left_training(*pair) as ran:
        CALLS[name](*pair)
    assert ran == []


def test_every_public_verb_that_runs_a_model_is_held_here():
    told = {name.split(",")[0].split(" ")[0] for name in CALLS}
    without_a_model = {"find_random", "find_weight_change", "find_weight_magnitude"}
    needs_a_mixture = {"find_routing"}  # in test_routing.py
    finders = {name for name in sn.__all__ if name.startswith("find_")}
    assert finders - without_a_model - needs_a_mixture <= told
    assert {
        "compare",
        "doctor",
        "evaluate",
        "evaluate_guard",
        "fit_guard",
        "gcg",
        "tune",
        "verify_deactivate",
        "verify_patch",
    } <= told


def test_a_donor_with_dropout_gives_what_it_gives_in_evaluation_mode(pair):
    one, other = pair
    expected = patched_logits(one, other)
    other.model.train()
    try:
        assert torch.equal(patched_logits(one, other), expected)
        assert other.model.training
    finally:
        other.model.eval()


def patched_logits(one: LanguageModel, other: LanguageModel) -> torch.Tensor:
    with sn.patched(one, other, NeuronSet.all(one.table)), torch.no_grad():
        return one.model(input_ids=torch.tensor([[4, 5, 6, 7]])).logits


@pytest.mark.parametrize("treatment", ["deactivated", "patched"])
def test_modes_are_put_back_after_an_exception(pair, treatment):
    one, other = pair

    def work() -> None:
        with (
            sn.deactivated(one, neurons(one))
            if treatment == "deactivated"
            else sn.patched(one, other, neurons(one))
        ):
            assert not any(module.training for module in one.model.modules())
            raise ZeroDivisionError

    with left_training(*pair), pytest.raises(ZeroDivisionError):
        work()


def test_an_organism_is_measured_in_evaluation_mode_and_put_back():
    from safety_neurons.organism.training import measure

    lm = sn.load(organism.spec("planted"))
    with left_training(lm) as ran:
        measure(lm.model, dataclasses.replace(organism.recipe("planted"), measured_prompts=1))
    assert ran == []
