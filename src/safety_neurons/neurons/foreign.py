"""Neuron files of other projects, read without running anything that is in them, and names of neurons in
other tools.
"""

import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from safety_neurons.counting import numbered
from safety_neurons.errors import ForeignModelError, NeuronError
from safety_neurons.neurons.scores import Scores, kept_share
from safety_neurons.neurons.sets import NeuronSet
from safety_neurons.neurons.table import SITES, Provenance, SiteTable, parse_key

SN_TUNE_LINES = ("up", "down", "q", "k", "v")
"""Which site each line of an SN-Tune file is of."""
LARGEST_TEXT = 2**26
"""Characters of a text file that are read."""
KV = ("rows", "heads", "published")
_TOKEN = re.compile(
    r"\s*(?:(?:np\.|numpy\.)?u?int(?:8|16|32|64)\(\s*(0|[1-9][0-9]{0,8})\s*\)|(0|[1-9][0-9]{0,8})(?![0-9])|(set\(\s*\))|([{}\[\]:,]))"
)
_PROJECTION = re.compile(
    r"(?:^|\.)layers\.(\d{1,6})\.(?:self_attn|mlp)\.(q|k|v|o|gate|up|down|gate_up)_proj(?:\.weight)?$"
)
_OTHER_PARTS = (
    "vision",
    "visual",
    "image",
    "audio",
    "speech",
    "encoder",
    "mtp",
    "draft",
    "talker",
    "code2wav",
)
"""In the names of what has layers and is not the decoder: it sees, hears, drafts or speaks."""


# SN-Tune


def read_sn_tune(path: str | pathlib.Path, table: SiteTable, *, kv: str = "heads") -> NeuronSet:
    """The five printed dictionaries (up, down, q, k, v: layer to set of indices) of a public SN-Tune file.

    Args:
        path: the text file.
        table: of the model it was found on.
        kv: what the indices of `k` and `v` count. `heads`: features over the query heads, as the public
            detector writes them; each becomes the row that its head reads. `published`: the same, but mapped
            as the public trainer does (index // group), which is the right row for 1 index in (group × head
            size). `rows`: rows already. Without grouped heads all three are the same.

    Raises:
        ForeignModelError: an index or layer that the model does not have.
        NeuronError: the file is not of this form.
    """
    if kv not in KV:
        raise NeuronError(f"kv {kv!r} is unknown; expected one of {', '.join(KV)}")
    lines = [line for line in _text(path).splitlines() if line.strip()]
    if len(lines) != len(SN_TUNE_LINES):
        raise NeuronError(
            f"{str(path)!r} has {len(lines)} lines, expected five printed dictionaries: "
            f"{', '.join(SN_TUNE_LINES)}"
        )
    members: dict[str, list[int]] = {}
    for site, line in zip(SN_TUNE_LINES, lines, strict=True):
        for layer, indices in _Printed(line, f"line of {site} in {str(path)!r}").mapping().items():
            key = f"layers.{layer}.{site}"
            if indices:
                members[key] = [_row(index, site, layer, table, kv) for index in indices]
    return _checked(members, table, "sn-tune", path, {"kv": kv})


def _row(index: int, site: str, layer: int, table: SiteTable, kv: str) -> int:
    """The row of a key-value projection that an index over query heads means."""
    keys = (f"layers.{layer}.q", f"layers.{layer}.{site}")
    if site not in ("k", "v") or kv == "rows" or any(key not in table for key in keys):
        return index
    queries, values = (table[key] for key in keys)
    group = queries.n_heads // max(values.n_heads, 1)
    if index >= queries.size:
        raise ForeignModelError(
            f"{keys[1]} has an index {index} over {queries.size} query features; it was found on another "
            "model"
        )
    if kv == "published":
        return index // group
    head, feature = divmod(index, values.head_dim)
    return head // group * values.head_dim + feature


class _Printed:
    """A printed dictionary of sets, read by its grammar."""

    def __init__(self, text: str, name: str) -> None:
        self.name, self.place = name, 0
        self.tokens = list(self._split(text.strip()))

    def _split(self, text: str) -> Any:
        position = 0
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise NeuronError(
                    f"{self.name}: {text[position : position + 20]!r} is not a number, a bracket or a "
                    "comma; nothing was read"
                )
            wrapped, plain, empty, sign = match.groups()
            yield int(wrapped or plain) if wrapped or plain else "set()" if empty else sign
            position = match.end()

    def mapping(self) -> dict[int, list[int]]:
        """Layer to indices; the text must end there."""
        indices_of: dict[int, list[int]] = {}
        self._take("{")
        while self._peek() != "}":
            layer = self._number()
            self._take(":")
            if layer in indices_of:
                raise NeuronError(f"{self.name}: layer {layer} appears twice")
            indices_of[layer] = self._indices()
            self._comma("}")
        self._take("}")
        if self.place != len(self.tokens):
            raise NeuronError(f"{self.name}: there is more behind the dictionary; expected its end")
        return indices_of

    def _indices(self) -> list[int]:
        if self._peek() == "set()":
            self.place += 1
            return []
        opening = self._peek()
        closing = {"{": "}", "[": "]"}.get(str(opening))
        if closing is None:
            raise NeuronError(f"{self.name}: {opening!r} where a set of indices was expected")
        self.place += 1
        indices: list[int] = []
        while self._peek() != closing:
            indices.append(self._number())
            self._comma(closing)
        self.place += 1
        if len(indices) > 2 and set(indices) <= {0, 1}:
            raise NeuronError(
                f"{self.name}: {len(indices)} numbers that are all 0 or 1, as a mask has; expected indices: "
                "store the places of the ones"
            )
        return indices

    def _peek(self) -> int | str:
        if self.place >= len(self.tokens):
            raise NeuronError(f"{self.name}: the text ends in the middle")
        token: int | str = self.tokens[self.place]
        return token

    def _take(self, sign: str) -> None:
        if self._peek() != sign:
            raise NeuronError(f"{self.name}: {self._peek()!r} where {sign!r} was expected")
        self.place += 1

    def _comma(self, closing: str) -> None:
        """A comma, or the end of what is listed."""
        if self._peek() != closing:
            self._take(",")

    def _number(self) -> int:
        token = self._peek()
        if not isinstance(token, int):
            raise NeuronError(f"{self.name}: {token!r} where a number was expected")
        self.place += 1
        return token


# Tuples of change scores


def change_scores(content: Any, table: SiteTable, path: str | pathlib.Path = "") -> Scores:
    """Scores of `down` from the public contrast code's tuple (change scores by layer, ranks, means and
    deviations).

    Raises:
        ForeignModelError: more or fewer layers than the model has, or other sizes.
        NeuronError: the content is not such a tuple, or its ranks are not those of its scores.
    """
    if (
        not isinstance(content, list | tuple)
        or len(content) < 2
        or not all(isinstance(part, np.ndarray) for part in content[:2])
    ):
        raise NeuronError(
            f"{str(path)!r} is not a tuple of change scores and ranks; expected what the public contrast "
            "code saves"
        )
    values, ranks = content[0], content[1]
    if values.ndim != 2 or ranks.ndim != 2 or ranks.shape[1] != 2 or ranks.dtype.kind not in "iu":
        raise NeuronError(
            f"{str(path)!r} holds arrays of shape {values.shape} and {ranks.shape}; expected [layer, "
            "neuron] and [rank, 2]"
        )
    if len(ranks) and (ranks.min() < 0 or (ranks.max(0) >= values.shape).any()):
        raise NeuronError(f"{str(path)!r}: a rank points outside its scores; the file is damaged")
    ordered = values[ranks[:, 0], ranks[:, 1]]
    if (np.diff(ordered.astype(np.float64)) > 1e-6 * max(float(np.abs(values).max(initial=0)), 1e-30)).any():
        raise NeuronError(f"{str(path)!r}: its ranks do not go down its scores; the file is damaged")
    if len(values) < table.n_layers:
        raise ForeignModelError(
            f"{str(path)!r} has change scores of {numbered(len(values), 'layer')}, and the model has "
            f"{table.n_layers}; it is another model's, or of some layers that it does not name"
        )
    keys = {f"layers.{layer}.down": row for layer, row in enumerate(values)}
    return _scores(keys, table, "contrast", path, {"sites": ["down"]})


# Probe weights


def probe_scores(content: Any, table: SiteTable, path: str | pathlib.Path = "") -> Scores:
    """Signed |z-scores| of the probe weights (module name to one weight per neuron) that NeuroStrike
    publishes.

    Gate and up of a fused projection are told apart by their halves; modules that are no decoder layer's are
    left out.

    Raises:
        ForeignModelError: other sizes than the model's.
        NeuronError: the content is no such mapping.
    """
    if not isinstance(content, Mapping) or not content:
        raise NeuronError(f"{str(path)!r} is not a mapping of module names to probe weights")
    by_key: dict[str, np.ndarray] = {}
    left = []
    for name, weights in content.items():
        match = _projection(name)
        if match is None:
            left.append(name)
            continue
        values = _vector(weights, name, path)
        spread = values.std()
        scores = np.sign(values) * np.abs((values - values.mean()) / (spread if spread > 0 else 1.0))
        layer, site = match.groups()
        parts = {"gate_up": ("gate", "up")}.get(site, (site,))
        if len(scores) % len(parts) or any(f"layers.{layer}.{part}" in by_key for part in parts):
            raise NeuronError(
                f"{str(path)!r}: {name[:80]!r} has {len(scores)} weights, or its projection comes twice; "
                "the file is damaged"
            )
        by_key |= {
            f"layers.{layer}.{part}": half
            for part, half in zip(parts, np.split(scores, len(parts)), strict=True)
        }
    if not by_key:
        raise NeuronError(
            f"{str(path)!r} names no projection of a decoder layer (first: {str(next(iter(content)))[:60]!r})"
        )
    sites = sorted({parse_key(key).site for key in by_key}, key=SITES.index)
    scores = _scores(by_key, table, "probe-weights", path, {"sites": sites})
    scores.notes = _left_out(left, by_key, table)
    return scores


def _projection(name: Any) -> re.Match[str] | None:
    """The layer and projection of a decoder in a module's name; None for a module of another kind."""
    if not isinstance(name, str) or any(word in name for word in _OTHER_PARTS):
        return None
    return _PROJECTION.search(name)


def _left_out(names: Sequence[Any], by_key: Mapping[str, Any], table: SiteTable) -> tuple[str, ...]:
    """A line on what was not taken of a file, and on layers that it does not name."""
    layers = len({parse_key(key).layer for key in by_key})
    shown = ", ".join(map(str, names))[:60]
    lines = (
        (names, f"left out {numbered(len(names), 'tensor')} of other kinds ({shown})"),
        (layers < table.n_layers, f"the file names {numbered(layers, 'layer')} of {table.n_layers}"),
    )
    return tuple(line for said, line in lines if said)


def _vector(weights: Any, name: str, path: str | pathlib.Path) -> np.ndarray:
    """One number a neuron; lists of lists, which a small file can nest without end, are not looked into."""
    flat = isinstance(weights, list | tuple) and all(
        isinstance(one, int | float | np.number) for one in weights
    )
    if (
        not (flat or (isinstance(weights, np.ndarray) and weights.dtype.kind in "biuf"))
        or np.size(weights) == 0
    ):
        raise NeuronError(
            f"{str(path)!r} holds {type(weights).__name__} for {name[:80]!r}; expected one weight a neuron"
        )
    try:
        values = np.asarray(weights, dtype=np.float64).ravel()
    except OverflowError:
        raise NeuronError(f"{str(path)!r} holds a number for {name[:80]!r} that no float can hold") from None
    if len(values) > 2 and len(np.unique(values)) == 2:
        raise NeuronError(
            f"{str(path)!r} holds two numbers alone for {name[:80]!r}, as a mask does; expected one weight a "
            "neuron"
        )
    return values


# Importances or masks of weights


def weight_scores(
    safety: Mapping[str, np.ndarray],
    utility: Mapping[str, np.ndarray] | None,
    table: SiteTable,
    *,
    shares: tuple[float, float] = (0.05, 0.05),
    path: str | pathlib.Path = "",
) -> Scores:
    """Scores of rows and columns from importances of single weights, or from masks of them, by name of the
    projection.

    Args:
        safety: `[out, in]` per projection (`model.layers.3.mlp.up_proj`); numbers, or a mask (bools, or 0 and
            one other number alone), which is taken as it is.
        utility: the same on other text, whose largest are taken away; None for none.
        table: of the model.
        shares: of the weights of a matrix that count as important for safety and for utility.
        path: for messages.

    Raises:
        ForeignModelError: other sizes than the model's.
        NeuronError: a projection is not a matrix, comes twice, holds NaN, or is missing in `utility`; or its
            numbers do not tell which are the largest.
    """
    by_key: dict[str, np.ndarray] = {}
    left = [name for name in utility or {} if name not in safety]
    marked: list[float] = []
    for name, values in safety.items():
        match = _projection(name)
        if match is None or match[2] == "gate_up":
            left.append(name)
            continue
        key = f"layers.{match[1]}.{match[2]}"
        other = None if utility is None else utility.get(name)
        if values.ndim != 2 or (utility is not None and (other is None or other.shape != values.shape)):
            raise NeuronError(
                f"{name} in {str(path)!r}: expected one matrix [out, in] in each of the two, found "
                f"{values.shape}"
            )
        if key in by_key:
            raise NeuronError(f"{str(path)!r} has two matrices for {key}; expected one each")
        if not all(np.isfinite(one).all() for one in (values, other) if one is not None):
            raise NeuronError(f"{str(path)!r} holds NaN or infinity for {name[:80]!r}")
        flip = match[2] in ("o", "down")
        values, other = values.T if flip else values, other.T if flip and other is not None else other
        if key in table and values.shape != (table[key].size, table[key].weights_per_neuron):
            shape = (table[key].size, table[key].weights_per_neuron)[:: -1 if flip else 1]
            raise ForeignModelError(
                f"{str(path)!r} has a matrix of {safety[name].shape} for {name[:80]!r}, and the model's is "
                f"{shape} ([out, in]); it is another model's, or transposed"
            )
        if other is not None and not other.any():
            other = None  # Of nothing but zeros, mask or numbers, nothing is taken away.
        masks = [_as_mask(one, name) for one in (values, other) if one is not None]
        if len({mask is None for mask in masks}) > 1 and values.any():
            raise NeuronError(
                f"{name[:80]!r} is a mask in one of the files and numbers in the other; expected either"
            )
        if masks[0] is not None:
            marked.append(float(masks[0].mean()))
            by_key[key] = (masks[0] if other is None else masks[0] & (other == 0)).mean(1)
        else:
            _check_told_apart(values, shares[0], name)
            by_key[key] = kept_share(values, other, len(values), *shares)
    if not by_key:
        raise NeuronError(f"{str(path)!r} names no projection of a decoder layer")
    scores = _scores(by_key, table, "weights", path, {"safety": shares[0], "utility": shares[1]})
    scores.notes = _left_out(left, by_key, table)
    if marked and np.mean(marked) > 0.5:
        scores.notes += (
            f"the mask marks {np.mean(marked):.0%} of the weights; if it marks those that are not safety's, "
            "invert it",
        )
    return scores


def _as_mask(values: np.ndarray, name: str) -> np.ndarray | None:
    """Which weights a matrix of 0 and one other number marks; None for one of numbers.

    Raises:
        NeuronError: one number everywhere, or two and none of them 0, which may mean either.
    """
    least, most = values.min(), values.max()
    if not np.isin(values, (least, most)).all():
        return None
    if least == most != 0 and most != 1:
        raise NeuronError(
            f"{name[:80]!r} holds {most:.4g} everywhere; expected numbers that differ, or a mask"
        )
    if least != 0 and most != 0 and least != most:
        raise NeuronError(
            f"{name[:80]!r} holds {least:.4g} and {most:.4g} alone, as a mask does; expected 0 and 1"
        )
    return np.asarray(values != 0)


def _check_told_apart(values: np.ndarray, share: float, name: str) -> None:
    """Refuses numbers of which so many are equal at the cut that their order in the file would choose."""
    count = max(1, round(share * values.size))
    cut = np.partition(values.ravel(), values.size - count)[values.size - count]
    equal = int((values == cut).sum())
    if equal > 2 * count and cut > values.min():
        raise NeuronError(
            f"{name[:80]!r} holds {cut:.4g} {equal:,} times, and the {share:.2%} that count are {count:,}; "
            "expected numbers that tell weights apart, or a mask"
        )


# Names in other tools


def transformer_lens_names(neurons: NeuronSet, table: SiteTable | None = None) -> dict[str, list[Any]]:
    """The same neurons by TransformerLens hook: indices of a feed-forward hook, `[head, feature]` pairs of an
    attention hook.

    Raises:
        NeuronError: experts, or no table to tell heads by.
    """
    known = table if table is not None else neurons.table
    if known is None:
        raise NeuronError(
            "heads are told by the model's matrices, and this set has no site table; give --model"
        )
    hooks = {
        "q": "attn.hook_q",
        "k": "attn.hook_k",
        "v": "attn.hook_v",
        "o": "attn.hook_z",
        "down": "mlp.hook_post",
    }
    names: dict[str, list[Any]] = {}
    for key, indices in neurons.items():
        layer, expert, shared, site = parse_key(key)
        if expert is not None or shared:
            raise NeuronError(
                f"{key} is an expert's, for which TransformerLens has no one name; leave experts out"
            )
        gated = f"layers.{layer}.gate" in known
        hook = hooks.get(site) or ("mlp.hook_pre_linear" if site == "up" and gated else "mlp.hook_pre")
        size = known[key].head_dim
        pairs = (
            [[int(index) // size, int(index) % size] for index in indices]
            if site in ("q", "k", "v", "o")
            else indices.tolist()
        )
        names[f"blocks.{layer}.{hook}"] = pairs
    return names


# Shared


def _text(path: str | pathlib.Path) -> str:
    try:
        with pathlib.Path(path).open(encoding="utf-8-sig") as stream:
            text = stream.read(LARGEST_TEXT + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise NeuronError(f"cannot read {str(path)!r} ({str(error)[:80]}); expected a text file") from error
    if len(text) > LARGEST_TEXT:
        raise NeuronError(
            f"{str(path)!r} has more than {LARGEST_TEXT:,} characters; no neuron file is that long"
        )
    return text


def _has_0(indices: Sequence[int]) -> bool:
    return 0 in indices


def _counted_from_1(keys: Iterable[str], table: SiteTable) -> str:
    """What to add of layers that begin at 1 and end one behind the last."""
    layers = [parse_key(key).layer for key in keys]
    return ", or counts layers from 1" if min(layers) == 1 and max(layers) == table.n_layers else ""


def _checked(
    members: Mapping[str, Sequence[int]],
    table: SiteTable,
    method: str,
    path: str | pathlib.Path,
    config: Mapping[str, Any],
) -> NeuronSet:
    for key, indices in members.items():
        if key not in table or max(indices) >= table[key].size:
            has = f"{table[key].size} neurons" if key in table else "no such matrix"
            by_one = (
                key in table and max(indices) == table[key].size and not any(map(_has_0, members.values()))
            )
            hint = ", or counts indices from 1" if by_one else _counted_from_1(members, table)
            raise ForeignModelError(
                f"{str(path)!r} has index {max(indices)} of {key}, and the model has {has}; it is "
                f"another model's{hint}"
            )
    origin = Provenance(
        kind="neurons",
        method=method,
        model_fingerprint=table.fingerprint,
        config={**config, "imported": pathlib.Path(path).name},
    )
    return NeuronSet(
        {key: np.array(sorted(set(indices)), np.int64) for key, indices in members.items()}, table, origin
    )


def _scores(
    values: Mapping[str, np.ndarray],
    table: SiteTable,
    method: str,
    path: str | pathlib.Path,
    config: Mapping[str, Any],
) -> Scores:
    for key, row in values.items():
        if key not in table or table[key].size != len(row):
            has = f"{table[key].size} neurons" if key in table else "no such matrix"
            raise ForeignModelError(
                f"{str(path)!r} has {len(row)} scores of {key}, and the model has {has}; it is another "
                f"model's{_counted_from_1(values, table)}"
            )
        if not np.isfinite(row).all():
            raise NeuronError(f"{str(path)!r} holds NaN or infinity for {key}")
    origin = Provenance(
        kind="scores",
        method=method,
        model_fingerprint=table.fingerprint,
        config={**config, "imported": pathlib.Path(path).name},
    )
    return Scores({key: np.asarray(row, np.float32) for key, row in values.items()}, table, origin)
