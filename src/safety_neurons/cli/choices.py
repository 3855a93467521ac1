"""What can be checked of a command line before anything is loaded: names, ranges, and files that must be there."""

from collections.abc import Mapping
from typing import Any

from safety_neurons.cli.options import listed
from safety_neurons.detectors.methods import by_name
from safety_neurons.errors import UsageError

CHOICES: dict[str, tuple[str, ...]] = {
    "positions": ("completion", "completion-predicting", "prompt", "prompt-last"),
}
"""Options that take one of a few names. The workers check them again; a test holds the two lists together."""


def check(options: Mapping[str, Any]) -> None:
    """Refuse what no model can make right.

    Raises:
        UsageError: the first such option, with what it may be.
    """
    for name, allowed in CHOICES.items():
        value = options.get(name)
        if value is not None and value not in allowed:
            raise UsageError(f"--{name.replace('_', '-')} {value!r} is unknown; expected one of {', '.join(allowed)}")
    check_places(options)
    if isinstance(options.get("top"), float) and not 0 < options["top"] <= 1:
        raise UsageError(f"--top {options['top']} is not a share; expected above 0 and at most 1 (0.05 for five per cent)")
    for name in listed(options.get("methods")) or ():
        by_name(name)


def check_places(options: Mapping[str, Any]) -> None:
    """Sites and the form of a layer range; whether a model has these layers is known later."""
    from safety_neurons.neurons import SITES
    from safety_neurons.neurons.table import check_sites, parse_layers

    if options.get("sites") is not None:
        wanted = listed(options["sites"]) or ()
        if not wanted:
            raise UsageError(f"--sites names no site; expected some of {', '.join(SITES)}")
        check_sites(wanted)
    if options.get("layers") is not None and ":" in str(options["layers"]):
        parse_layers(options["layers"], 10**6)
    elif options.get("layers") is not None and not str(options["layers"]).strip().lstrip("-").isdigit():
        raise UsageError(f"--layers {options['layers']!r} is not a range; expected A:B (B excluded) or one number")


def parse_sizes(text: str | None, option: str = "--sizes") -> list[float]:
    """`--sizes`, or another option, as sorted, distinct shares."""
    try:
        shares = sorted({float(part) for part in ("0.005,0.01,0.02,0.05,0.1,0.2" if text is None else text).split(",")})
    except ValueError:
        raise UsageError(f"{option} {text!r}: expected comma-separated shares such as 0.01,0.05") from None
    if not all(0 < share <= 1 for share in shares):
        raise UsageError(f"{option} {text!r}: expected shares above 0 and at most 1")
    return shares
