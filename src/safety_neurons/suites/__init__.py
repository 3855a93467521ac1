"""Suites of prompts to evaluate on, and attacks on the models that answer them."""

from typing import Any

from safety_neurons.suites.attacks import ADAPTIVE, STATIC, AttackPrompt, Attacks, import_attacks
from safety_neurons.suites.rewording import ATTACKS, attack
from safety_neurons.suites.suite import Suite, SuiteCheck, catalogue, suite, verify

__all__ = [
    "ADAPTIVE",
    "ATTACKS",
    "STATIC",
    "AttackPrompt",
    "Attacks",
    "Suite",
    "SuiteCheck",
    "attack",
    "catalogue",
    "gcg",
    "import_attacks",
    "suite",
    "verify",
]


def __getattr__(name: str) -> Any:
    """`gcg` is imported when it is asked for: suites are read and attacks imported without torch."""
    if name != "gcg":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from safety_neurons.suites.gradient_search import gcg

    return gcg
