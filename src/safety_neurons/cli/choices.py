"""What can be checked of a command line before anything is loaded: names, ranges, and files that must be there."""

import pathlib
from collections.abc import Mapping
from typing import Any, Literal

from safety_neurons import strict_json
from safety_neurons.cli.options import Common, listed
from safety_neurons.errors import UsageError

CHOICES: dict[str, tuple[str, ...]] = {
    "positions": ("completion", "completion-predicting", "prompt", "prompt-last"),
    "generate_with": ("base", "aligned"),
    "compare": ("swap", "swap-attribution", "absolute", "relative", "same-input"),
    "space": ("output", "probability"),
    "at": ("path", "base"),
    "move": ("auto", "activations", "parameters"),
    "aim": ("refusal", "odds"),
    "dtype": ("auto", "float32", "float64", "bfloat16", "float16"),
}
"""Options that take one of a few names. The workers check them again; a test holds the two lists together."""

METHODS = (
    "mask",
    "importance",
    "importance-contrast",
    "swap-attribution",
    "contrast",
    "attribution",
    "attribution-patching",
    "snip",
    "wanda",
    "refusal-direction",
    "probe-weights",
    "weight-change",
    "weight-magnitude",
    "activation-magnitude",
)
TEMPLATES = ("auto", "none", "tulu")
SELECTION = ("top", "count", "top_per_matrix", "threshold", "agreement")
RULES = SELECTION[:4]


def check(options: Mapping[str, Any], common: Common) -> None:
    """Refuse what no model can make right.

    Raises:
        UsageError: the first such option, with what it may be.
    """
    for name, allowed in CHOICES.items():
        value = getattr(common, name) if name == "dtype" else options.get(name)
        named = name == "at" and "cards" in options  # Of analyze vocabulary, where it names neurons.
        if value is not None and value not in allowed and not named:
            raise UsageError(f"--{name.replace('_', '-')} {value!r} is unknown; expected one of {', '.join(allowed)}")
    check_common(common)
    check_places(options)
    if "top_per_matrix" in options:
        check_selection(options)
    elif isinstance(options.get("top"), float) and not 0 < options["top"] <= 1:
        raise UsageError(f"--top {options['top']} is not a share; expected above 0 and at most 1 (0.05 for five per cent)")
    unknown = [name for name in listed(options.get("methods")) or () if name not in METHODS]
    if unknown:
        raise UsageError(f"unknown method {unknown[0]!r}; expected some of {', '.join(METHODS)}")


def check_common(common: Common) -> None:
    """Seed, batch size, template and its arguments."""
    if common.seed < 0:
        raise UsageError(f"--seed {common.seed} is negative; expected 0 or more")
    batch_size(common.batch_size)
    parse_object("--template-args", common.template_args)
    if common.template not in TEMPLATES and not pathlib.Path(common.template).expanduser().is_file():
        raise UsageError(f"--template {common.template!r} is no file; expected {', '.join(TEMPLATES)} or the path of a Jinja template")


def check_places(options: Mapping[str, Any]) -> None:
    """Sites and the form of a layer range; whether a model has these layers is known later."""
    from safety_neurons.neurons import SITES
    from safety_neurons.neurons.keys import check_sites, parse_layers

    if options.get("sites") is not None:
        wanted = listed(options["sites"]) or ()
        if not wanted:
            raise UsageError(f"--sites names no site; expected some of {', '.join(SITES)}")
        check_sites(wanted)
    if options.get("layers") is not None and ":" in str(options["layers"]):
        parse_layers(options["layers"], 10**6)
    elif options.get("layers") is not None and not str(options["layers"]).strip().lstrip("-").isdigit():
        raise UsageError(f"--layers {options['layers']!r} is not a range; expected A:B (B excluded) or one number")


def check_selection(options: Mapping[str, Any]) -> None:
    """At most one of the four rules, each in its range."""
    given = [name for name in RULES if options[name] is not None]
    if len(given) > 1:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UsageError(f"{names} given together; expected one rule: --top, --count, --top-per-matrix or --threshold")
    from safety_neurons.neurons import Selection

    Selection.of(**{name: options[name] for name in SELECTION}, default_top=1)


def batch_size(text: str) -> int | Literal["auto"]:
    """`auto`, or a positive number."""
    if text == "auto":
        return "auto"
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise UsageError(f"--batch-size {text}: expected auto or a number of at least 1")
    return int(text)


def parse_sizes(text: str | None, option: str = "--sizes") -> list[float]:
    """`--sizes`, or another option, as sorted, distinct shares."""
    try:
        shares = sorted({float(part) for part in ("0.005,0.01,0.02,0.05,0.1,0.2" if text is None else text).split(",")})
    except ValueError:
        raise UsageError(f"{option} {text!r}: expected comma-separated shares such as 0.01,0.05") from None
    if not all(0 < share <= 1 for share in shares):
        raise UsageError(f"{option} {text!r}: expected shares above 0 and at most 1")
    return shares


def parse_object(option: str, text: str | None) -> dict[str, Any] | None:
    """An option that holds a JSON object."""
    if text is None:
        return None
    try:
        value = strict_json.loads(text)
    except ValueError as error:
        raise UsageError(f"{option} {text[:200]!r} is not JSON ({str(error)[:100]}); expected an object such as {{}}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{option} {text!r} is a {type(value).__name__}, expected a JSON object such as {{}}")
    return value
