"""Ceilings: the most that patching or parameters of some sites can restore, and what to call it where a part restores more."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from safety_neurons.errors import MismatchError, UnsupportedModelError
from safety_neurons.model import LanguageModel
from safety_neurons.model.adapters import is_adapted
from safety_neurons.neurons import NeuronSet, parse_key
from safety_neurons.results import Effect
from safety_neurons.studies.arms import Arm, Bench
from safety_neurons.tuning import merged_base, repair
from safety_neurons.tuning.protect import entries_of

CEILING, ALL_PATCHED = "ceiling", "all neurons of the sites patched"
BY_PARAMETERS = "ceiling by parameters"


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """All neurons of some sites, in all layers, by activations and by parameters.

    Attributes:
        patched: with all activations of the donor.
        effect: its causal effect.
        parameters: with all parameters of the donor at the sites; None where that cannot be done.
        parameters_effect: its causal effect; undefined where there is none, with the reason.
        called: `ceiling`, or what to call it where a part of the neurons restores more.
        why: why it is no ceiling then.
    """

    patched: Arm
    effect: Effect
    parameters: Arm | None
    parameters_effect: Effect
    called: str = CEILING
    why: str | None = None

    def record(self) -> dict[str, Any]:
        """As JSON values, by the names that results have."""
        return {
            "ceiling_called": self.called,
            "ceiling_why": self.why,
            "ceiling_by_parameters": self.parameters.record() if self.parameters else None,
            "ceiling_by_parameters_effect": self.parameters_effect.to_json(),
        }


@contextlib.contextmanager
def with_parameters(base: LanguageModel, donor: LanguageModel, neurons: NeuronSet) -> Iterator[None]:
    """The donor's rows, columns and bias entries of the neurons in the base model for a block; then every bit is back.

    Raises:
        MismatchError: two architectures, or quantised weights.
        UnsupportedModelError: weights that cannot be written.

    Source: none; what a patch of activations leaves behind are the columns that read them.
    """
    kept = [(entries, entries.read()) for entries in entries_of(base, neurons)]
    try:
        repair(base, donor, neurons)
        yield
    finally:
        for entries, values in kept:
            entries.write(values)


def by_parameters(
    bench: Bench, base: LanguageModel, donor: LanguageModel, everything: NeuronSet, effect: Callable[[Arm], Effect], measure: str
) -> tuple[Arm | None, Effect]:
    """The arm with the donor's parameters at all the sites, and its effect; adapters are merged in copies, the models stay as they are."""
    try:
        plain, other = (merged_base(model) if is_adapted(model.model) else model for model in (base, donor))
        arm = bench.measure(plain, BY_PARAMETERS, lambda: with_parameters(plain, other, everything.on(plain.table)))
    except (UnsupportedModelError, MismatchError) as error:
        return None, Effect(None, None, None, 0, 0, f"the parameters cannot be exchanged: {error}", measure)
    return arm, effect(arm)


def named(patched: Arm, effect: Effect, parts: Sequence[Effect], parameters: tuple[Arm | None, Effect], differ: bool) -> Ceiling:
    """The ceiling with the word it deserves.

    Args:
        patched: all neurons of the sites patched.
        effect: what that restores.
        parts: what parts of the neurons restore.
        parameters: the arm by parameters, and its effect.
        differ: whether the models differ in `o` or `down` columns.
    """
    best = max((part.value for part in parts if part.value is not None), default=None)
    if effect.value is None or best is None or best <= effect.value:
        return Ceiling(patched, effect, *parameters)
    why = f"a part of the neurons restores more ({best:.2f}) than all neurons of the sites ({effect.value:.2f}), which is no ceiling then"
    if differ:
        why += ": the two models differ in their o or down columns, which do not travel with activations, so that all of the donor's "
        why += "activations meet columns that were not made for them"
    return Ceiling(patched, effect, *parameters, ALL_PATCHED, why)


def columns_differ(base: LanguageModel, donor: LanguageModel) -> bool:
    """Whether the two models compute with other `o` or `down` columns somewhere."""
    for key in base.table.keys:
        if parse_key(key).site in ("o", "down") and key in base.anatomy.places:
            found = []
            for model in (base, donor):
                with model.active():
                    place = model.anatomy.place(key)
                    found.append(place.weight() if not place.projection.quantised else None)
            if found[0] is None or found[1] is None:
                continue
            if not bool((found[0] == found[1].to(found[0])).all()):
                return True
    return False
