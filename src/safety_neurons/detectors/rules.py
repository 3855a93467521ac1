"""Which neurons a method searches and which it keeps: the options that methods share.

Nothing here imports torch or numpy.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from safety_neurons.declarations import Declaration, Positive, listed
from safety_neurons.errors import UsageError

RULES = ("top", "count", "top_per_matrix", "threshold")


@dataclasses.dataclass(frozen=True)
class Sized(Declaration):
    """How many neurons are kept."""

    PANEL: ClassVar[str | None] = "Which neurons are kept"
    DEFAULT_TOP: ClassVar[float] = 0.05

    top: float | int | None = None
    """Keep this fraction of the neurons searched."""
    count: Positive | None = None
    """Keep this many neurons."""

    @property
    def selection(self) -> Any:
        """The rule as a `neurons.Selection`; by default the method's own share.

        Raises:
            UsageError: two rules together, or one out of its range.
        """
        from safety_neurons.neurons import Selection

        given = {
            name: value
            for name, value in self.values().items()
            if name in (*RULES, "agreement") and value is not None
        }
        return Selection.of(**given, default_top=self.DEFAULT_TOP)

    def check(self) -> None:
        """Also that one rule is given at most."""
        super().check()
        rules = {one.flag: getattr(self, one.name) for one in self.options() if one.name in RULES}
        given = [flag for flag, value in rules.items() if value is not None]
        if len(given) > 1:
            *first, last = rules
            raise UsageError(
                f"{' and '.join(given)} given together; expected one rule: {', '.join(first)} or {last}"
            )
        _ = self.selection


@dataclasses.dataclass(frozen=True)
class Ranked(Sized):
    """Every rule that acts on the scores."""

    PANEL: ClassVar[str | None] = Sized.PANEL

    top_per_matrix: Positive | None = None
    """Keep this many of every matrix."""
    threshold: float | int | None = None
    """Keep scores of at least this."""


@dataclasses.dataclass(frozen=True)
class Voted(Ranked):
    """Every rule, and agreement among prompts."""

    PANEL: ClassVar[str | None] = Sized.PANEL

    agreement: float | int | None = None
    """Choose on every prompt and keep what this share of prompts chose."""


@dataclasses.dataclass(frozen=True)
class AtSites(Declaration):
    """At which sites neurons are searched."""

    PANEL: ClassVar[str | None] = Sized.PANEL

    sites: str | Sequence[str] | None = None
    """Comma-separated sites: q,k,v,o,gate,up,down."""

    def check(self) -> None:
        """Also that there are such sites."""
        from safety_neurons.neurons import SITES, check_sites

        super().check()
        wanted = listed(self.sites)
        if wanted is not None and not wanted:
            raise UsageError(f"--sites names no site; expected some of {', '.join(SITES)}")
        check_sites(wanted or ())


@dataclasses.dataclass(frozen=True)
class Searched(AtSites):
    """At which sites of which layers."""

    PANEL: ClassVar[str | None] = Sized.PANEL

    layers: str | range | None = None
    """Layers A:B, B excluded."""

    def check(self) -> None:
        """Also the form of a layer range; whether a model has these layers is known later."""
        from safety_neurons.neurons import parse_layers

        super().check()
        if isinstance(self.layers, str) and ":" in self.layers:
            parse_layers(self.layers, 10**6)
        elif isinstance(self.layers, str) and not self.layers.strip().lstrip("-").isdigit():
            raise UsageError(
                f"--layers {self.layers!r} is not a range; expected A:B (B excluded) or one number"
            )


@dataclasses.dataclass(frozen=True)
class WholeParts(Ranked):
    """Scores of parts that hold many neurons: whole parts are kept unless a rule for neurons is given."""

    PANEL: ClassVar[str | None] = Sized.PANEL
    PART: ClassVar[str]
    """What a part is called; the option with its plural says how many are kept."""

    @property
    def wanted(self) -> int | None:
        """How many whole parts are kept; None without a word."""
        wanted: int | None = getattr(self, f"{self.PART}s")
        return wanted

    def check(self) -> None:
        """Also that no rule for neurons stands beside a number of parts."""
        super().check()
        rules = [
            one.flag for one in self.options() if one.name in RULES and getattr(self, one.name) is not None
        ]
        if rules and self.wanted is not None:
            raise UsageError(f"--{self.PART}s and {rules[0]} given together; expected one rule")
