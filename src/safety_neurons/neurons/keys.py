"""Keys: the names of matrices, `layers.{i}.{site}` and their expert forms, and the one order they are listed in."""

import functools
import re
from collections.abc import Iterable
from typing import NamedTuple

from safety_neurons.errors import NeuronError, UsageError

ATTENTION_SITES = ("q", "k", "v", "o")
MLP_SITES = ("gate", "up", "down")
SITES = ATTENTION_SITES + MLP_SITES
OUTPUT_SITES = ("q", "k", "v", "gate", "up")
"""Sites whose neurons are output features (rows of the weight)."""
INPUT_SITES = ("o", "down")
"""Sites whose neurons are input features (columns of the weight)."""

_NUMBER = r"(0|[1-9][0-9]{0,8})"
_PATTERN = re.compile(rf"layers\.{_NUMBER}\.(?:experts\.{_NUMBER}\.|(shared_expert)\.)?(q|k|v|o|gate|up|down)")


class Key(NamedTuple):
    """One matrix: the site of a layer, of one of its experts, or of its shared expert."""

    layer: int
    expert: int | None
    shared: bool
    site: str

    def __str__(self) -> str:
        if self.shared:
            return f"layers.{self.layer}.shared_expert.{self.site}"
        if self.expert is not None:
            return f"layers.{self.layer}.experts.{self.expert}.{self.site}"
        return f"layers.{self.layer}.{self.site}"

    @property
    def block(self) -> str:
        """The part of the key before the site: the sub-layer whose matrices share units."""
        return str(self).rpartition(".")[0]

    @property
    def order(self) -> tuple[int, int, int, int]:
        """Where the key stands among keys: layer, site, then dense before experts by number before the shared expert."""
        kind = 2 if self.shared else 1 if self.expert is not None else 0
        return (self.layer, SITES.index(self.site), kind, self.expert or 0)


@functools.lru_cache(maxsize=1 << 17)
def parse_key(key: str) -> Key:
    """The parts of a key such as `layers.3.down`, `layers.3.experts.7.up` or `layers.3.shared_expert.gate`.

    Raises:
        NeuronError: the text is not a key.
    """
    match = _PATTERN.fullmatch(key)
    if match is None:
        raise NeuronError(
            f"unknown key {key[:80]!r}; expected layers.N.SITE (also layers.N.experts.E.SITE or layers.N.shared_expert.SITE)"
            f" with SITE one of {' '.join(SITES)}"
        )
    layer, expert, shared, site = match.groups()
    if (expert or shared) and site in ATTENTION_SITES:
        raise NeuronError(f"unknown key {key!r}: an expert has no {site} site; expected one of {' '.join(MLP_SITES)} there")
    return Key(int(layer), None if expert is None else int(expert), shared is not None, site)


def sort_keys(keys: Iterable[str]) -> list[str]:
    """The keys in the order by which ties are broken: layer, site, then dense before experts by number before the shared expert."""
    return sorted(keys, key=lambda key: parse_key(key).order)


def check_sites(sites: Iterable[str]) -> tuple[str, ...]:
    """The sites in their own order, each once.

    Raises:
        UsageError: a name is not a site.
    """
    wanted = [sites] if isinstance(sites, str) else list(sites)
    unknown = [site for site in wanted if site not in SITES]
    if unknown:
        raise UsageError(f"unknown site {unknown[0]!r}; expected some of {' '.join(SITES)}")
    return tuple(site for site in SITES if site in wanted)


def parse_layers(layers: "range | str | int | Iterable[int] | None", n_layers: int) -> tuple[int, ...]:
    """The layer numbers that `layers` means in a model of `n_layers` layers.

    Args:
        layers: `None` for all, a range or list of numbers, one number, or text: `A:B` (B excluded, either end may be left out,
            negative numbers count from the end) or `A`.
        n_layers: layers of the model.

    Raises:
        UsageError: the text is not a range, or a layer is outside the model.
    """
    if layers is None:
        return tuple(range(n_layers))
    if isinstance(layers, str):
        return _layers_of_text(layers, n_layers)
    wanted = sorted({layers} if isinstance(layers, int) else set(layers))
    outside = [layer for layer in wanted if not 0 <= layer < n_layers]
    if outside:
        raise UsageError(f"layer {outside[0]} asked, but the layers are 0 to {n_layers - 1}; give layers inside that range")
    return tuple(wanted)


def _layers_of_text(text: str, n_layers: int) -> tuple[int, ...]:
    match = re.fullmatch(r"\s*(-?\d+)?\s*(:)?\s*(-?\d+)?\s*", text)
    if match is None or (match[2] is None and (match[1] is None or match[3] is not None)):
        raise UsageError(f"layers {text!r} is not a range; expected A:B (B excluded) or one number")
    if match[2] is None:
        number = int(match[1])
        return parse_layers(number + n_layers if number < 0 else number, n_layers)
    chosen = tuple(range(n_layers))[slice(*(None if end is None else int(end) for end in (match[1], match[3])))]
    if not chosen:
        raise UsageError(f"layers {text!r} selects none of the layers 0 to {n_layers - 1}; widen the range")
    return chosen
