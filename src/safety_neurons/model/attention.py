"""The formula of a layer's attention, decided by proof.

From what is captured in one forward (outputs of the q, k, v projections, input of the o projection, arguments
of the attention module) the plan recomputes everything between: normed and rotated states, logits,
probabilities, attention output. Candidates for each part come from what the module holds (norms, cos and sin,
scale, soft-cap, sinks, ALiBi); the one whose recomputed `o` input equals the captured one is kept. No model
name is looked at. A norm on queries or keys is a formula as well: what it does to a head, and what removing
one entry of the head does to the result.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from safety_neurons.errors import UnsupportedModelError


@dataclass(frozen=True)
class NormChange:
    """How the normed state moves when raw entry d of a head moves by −δ: α · (normed − bias) + ω · weight + β
    · e_d, per token and d.
    """

    along: Float[Tensor, "token head dim"] | None
    """α: the rescaling of what was there; None where there is no norm."""
    uniform: Float[Tensor, "token head dim"] | None
    """ω: what the moved mean adds along the norm's weight; None unless the norm subtracts a mean."""
    single: Float[Tensor, "token head dim"]
    """β: the entry itself."""


@dataclass(frozen=True)
class NormFormula:
    """A root-mean-square or layer norm over each head, or over all heads together."""

    weight: Float[Tensor, "head dim"]
    bias: Float[Tensor, "head dim"] | None
    eps: float
    centred: bool
    across_heads: bool

    def _moments(self, raw: Float[Tensor, "token head dim"]) -> tuple[Tensor, Tensor]:
        """Mean (0 when not centred) and mean square about it plus eps, per token and head (one head where the
        norm spans all).
        """
        axes = (-2, -1) if self.across_heads else (-1,)
        mean = raw.mean(axes, keepdim=True) if self.centred else torch.zeros_like(raw[..., :1, :1])
        return mean, (raw - mean).square().mean(axes, keepdim=True) + self.eps

    def without_bias(self, raw: Float[Tensor, "token head dim"]) -> Float[Tensor, "token head dim"]:
        """The normed state before the norm's bias is added."""
        mean, square = self._moments(raw)
        return (raw - mean) * square.rsqrt() * self.weight.to(raw)

    def __call__(self, raw: Float[Tensor, "token head dim"]) -> Float[Tensor, "token head dim"]:
        """The normed state."""
        normed = self.without_bias(raw)
        return normed if self.bias is None else normed + self.bias.to(raw)

    def held(self, raw: Float[Tensor, "token head dim"]) -> Float[Tensor, "token head dim"]:
        """The normed state as a linear map of the raw one: no gradient flows through its scale."""
        mean, square = self._moments(raw)
        normed = (raw - mean) * square.rsqrt().detach() * self.weight.to(raw)
        return normed if self.bias is None else normed + self.bias.to(raw)

    def change(
        self, raw: Float[Tensor, "token head dim"], delta: Float[Tensor, "token head dim"]
    ) -> NormChange:
        """What taking `delta` off one raw entry does, for every entry on its own."""
        mean, square = self._moments(raw)
        size = raw.shape[-1] * (raw.shape[-2] if self.across_heads else 1)
        moved = (delta.square() - 2 * (raw - mean) * delta) / size
        if self.centred:
            moved = moved - (delta / size).square()
        after = square + moved
        ratio = (square / after).sqrt()
        step = ratio * delta * square.rsqrt()
        return NormChange(
            along=-moved / after / (ratio + 1),
            uniform=step / size if self.centred else None,
            single=-step * self.weight.to(raw),
        )


def norm_candidates(module: nn.Module, n_heads: int, head_dim: int) -> Iterator[NormFormula]:
    """Formulas that agree with the module on random input, most likely first.

    None when it is no norm of that many heads.
    """
    weight, bias, eps = _parameters(module)
    if eps is None:
        return
    shape = (n_heads, head_dim)
    across = weight is not None and weight.numel() == n_heads * head_dim and n_heads > 1 and weight.ndim == 1
    base = torch.ones(shape) if weight is None else _per_head(weight, shape)
    if base is None:
        return
    shift = None if bias is None else _per_head(bias, shape)
    for scale in (base, base + 1):
        for centred in (False, True):
            formula = NormFormula(scale, shift, eps, centred, across)
            if _agrees(module, formula, shape):
                yield formula


def _parameters(module: nn.Module) -> tuple[Tensor | None, Tensor | None, float | None]:
    """Weight, bias and eps of a norm, those of a list of norms (one per head) stacked."""
    weights = [value.detach() for name, value in module.named_parameters() if name.endswith("weight")]
    biases = [value.detach() for name, value in module.named_parameters() if name.endswith("bias")]
    eps = next(
        (
            float(value)
            for part in module.modules()
            for name in ("variance_epsilon", "eps", "epsilon")
            if (value := getattr(part, name, None))
        ),
        None,
    )
    join = lambda parts: None if not parts else parts[0] if len(parts) == 1 else torch.stack(parts)  # noqa: E731
    return join(weights), join(biases), eps


def _per_head(values: Tensor, shape: tuple[int, int]) -> Tensor | None:
    if values.numel() == shape[0] * shape[1]:
        return values.reshape(shape)
    return values.expand(shape) if values.shape == shape[1:] else None


def _agrees(module: nn.Module, formula: NormFormula, shape: tuple[int, int]) -> bool:
    parameter = next(module.parameters(), formula.weight)
    noise = torch.randn((5, *shape), generator=torch.Generator().manual_seed(0)).to(parameter)
    expected = formula(noise if noise.dtype is torch.float64 else noise.float())
    for layout in ((5, -1),) if formula.across_heads else ((5, *shape), (1, shape[0], 5, shape[1])):
        fed = noise.transpose(0, 1)[None] if len(layout) == 4 else noise.reshape(layout)
        try:
            with torch.no_grad():
                got = module(fed)
        except (RuntimeError, ValueError, IndexError):
            continue
        if got.numel() != expected.numel():
            continue
        got = got[0].transpose(0, 1) if len(layout) == 4 else got.reshape(expected.shape)
        tolerance = 1e-4 if parameter.dtype in (torch.float32, torch.float64) else 5e-2
        if bool(((got.to(expected) - expected).abs().max() <= tolerance * expected.abs().max()).item()):
            return True
    return False


HIDDEN_LOGIT = -1e4
"""An additive mask at or below this hides the key."""

_SCALES = ("scaling", "scale", "inv_norm_factor", "softmax_scale", "scaling_factor", "scale_attn")

_SOFTCAPS = ("attn_logit_softcapping", "logit_softcapping", "softcap", "attn_logit_softcap")


@dataclass(frozen=True)
class AttentionCapture:
    """What one forward of one layer showed, for a whole batch."""

    q: Float[Tensor, "batch token query"]
    """Output of the q projection, bias included."""
    k: Float[Tensor, "batch token key"]
    """Output of the k projection."""
    v: Float[Tensor, "batch token value"]
    """Output of the v projection."""
    o: Float[Tensor, "batch token mixed"]
    """Input of the o projection."""
    arguments: Mapping[str, Any]
    """Arguments of the attention module's forward, by name."""
    gate: Float[Tensor, "batch token mixed"] | None = None
    """Output gate before its sigmoid, where the query projection puts out one."""


@dataclass(frozen=True)
class Rotation:
    """A rotary embedding as a map of single entries: entry d of a raw state goes to `keep[d]` of d and
    `cross[d]` of `partner[d]`.
    """

    keep: Float[Tensor, "token dim"]
    cross: Float[Tensor, "token dim"]
    partner: Int[Tensor, " dim"]

    def __call__(self, states: Float[Tensor, "token head dim"]) -> Float[Tensor, "token head dim"]:
        """The rotated states."""
        return states * self.keep[:, None] + (states * self.cross[:, None])[..., self.partner]


@dataclass(frozen=True)
class AttentionStates:
    """One prompt in one layer, recomputed; T tokens, H query heads, G key-value heads of `dim` entries."""

    q: Float[Tensor, "token head dim"]
    """Raw query states (what the projection put out)."""
    k: Float[Tensor, "token group dim"]
    """Raw key states."""
    v: Float[Tensor, "token group dim"]
    """Value states."""
    query: Float[Tensor, "token head dim"]
    """Normed and rotated query states, times the scale of the logits."""
    key: Float[Tensor, "token group dim"]
    """Normed and rotated key states."""
    rotation: Rotation | None
    logits: Float[Tensor, "head token token"]
    """Scaled logits before soft-cap, ALiBi and mask."""
    log_probabilities: Float[Tensor, "head token token"]
    """−∞ where a key is hidden."""
    probabilities: Float[Tensor, "head token token"]
    """Rows sum to 1 less what a sink takes; exactly 0 where a key is hidden."""
    mixed: Float[Tensor, "token head dim"]
    """What goes into the o projection."""
    gate: Float[Tensor, "token head dim"] | None = None
    """Factors of the attention output on its way into the o projection; None where there are none."""

    @property
    def n_tokens(self) -> int:
        """Tokens of the prompt."""
        return self.q.shape[0]

    @property
    def group_size(self) -> int:
        """Query heads of one key-value head."""
        return self.q.shape[1] // self.k.shape[1]


@dataclass(frozen=True)
class AttentionPlan:
    """The formula of one layer's attention."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float
    rotary: str
    """`none`, `half` (entry d turns with d + half) or `interleaved` (entry 2d with 2d + 1)."""
    repeats: bool = False
    """Whether the cosines given name each pair of entries twice.

    Told on the probe, since those of one token at place 0 are all alike.
    """
    q_norm: NormFormula | None = None
    k_norm: NormFormula | None = None
    softcap: float | None = None
    sinks: Float[Tensor, " head"] | None = None
    alibi: float = 0.0
    """Factor of the `alibi` argument in the logits."""
    window: int | None = None
    """Keys that a query sees where the captured mask does not say it."""
    embed_positions: Float[Tensor, "position rotary"] | None = None
    """Table of sin and cos that the module holds itself."""
    error: float = 0.0
    """Largest deviation of the proof, relative to the largest entry."""

    def capped(self, logits: Tensor) -> Tensor:
        """The logits after the soft-cap."""
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def rotation(self, arguments: Mapping[str, Any], row: int, length: int, like: Tensor) -> Rotation | None:
        """The rotary embedding of one prompt; None where the layer has none."""
        if self.rotary == "none":
            return None
        tables = _cos_sin(arguments, self.embed_positions, row, length)
        if tables is None:
            return None
        cos, sin = (part.to(like) for part in tables)
        return _rotation(cos, sin, self.rotary, self.head_dim, self.repeats)

    def states(self, capture: AttentionCapture, row: int, length: int) -> AttentionStates:
        """Everything between the projections for one prompt, in float64 for a float64 model and in float32
        otherwise.
        """
        like = _working(capture.q)
        raw = [_heads(part[row, :length].to(like), heads) for part, heads in self._parts(capture)]
        rotation = self.rotation(capture.arguments, row, length, like)
        states = self._states(raw, rotation, capture.arguments, row)
        if capture.gate is None:
            return states
        gate = _heads(capture.gate[row, :length].to(like), self.n_heads).sigmoid()
        return replace(states, mixed=states.mixed * gate, gate=gate)

    def _parts(self, capture: AttentionCapture) -> tuple[tuple[Tensor, int], ...]:
        return (capture.q, self.n_heads), (capture.k, self.n_kv_heads), (capture.v, self.n_kv_heads)

    def _states(
        self, raw: list[Tensor], rotation: Rotation | None, arguments: Mapping[str, Any], row: int
    ) -> AttentionStates:
        q, k, v = raw
        query = (q if self.q_norm is None else self.q_norm(q)) * self.scale
        key = k if self.k_norm is None else self.k_norm(k)
        if rotation is not None:
            query, key = rotation(query), rotation(key)
        repeat = self.n_heads // self.n_kv_heads
        logits = torch.einsum("mgrd,ngd->grmn", query.unflatten(1, (-1, repeat)), key).flatten(0, 1)
        log_probabilities = self.log_probabilities(logits, arguments, row)
        probabilities = log_probabilities.exp()
        mixed = torch.einsum("grmn,ngd->mgrd", probabilities.unflatten(0, (-1, repeat)), v).flatten(1, 2)
        return AttentionStates(q, k, v, query, key, rotation, logits, log_probabilities, probabilities, mixed)

    def log_probabilities(
        self, logits: Float[Tensor, "head token token"], arguments: Mapping[str, Any], row: int
    ) -> Float[Tensor, "head token token"]:
        """Logarithms of the attention probabilities from scaled logits: soft-cap, ALiBi, mask, sinks.

        −∞ where a key is hidden.
        """
        visible, bias = self.bias(arguments, row, logits)
        values = self.capped(logits)
        if bias is not None:
            values = values + bias
        values = values.masked_fill(~visible, -torch.inf)
        total = values.logsumexp(-1, keepdim=True)
        if self.sinks is not None:
            total = torch.logaddexp(total, self.sinks.to(values)[:, None, None])
        return values - total.clamp(min=torch.finfo(values.dtype).min)

    def bias(
        self, arguments: Mapping[str, Any], row: int, logits: Tensor
    ) -> tuple[Bool[Tensor, "..."], Tensor | None]:
        """Which keys each query sees, and what is added to the logits (None for nothing)."""
        length = logits.shape[-1]
        mask, bias = arguments.get("attention_mask"), None
        if isinstance(mask, Tensor) and mask.ndim == 4:
            mask = mask[row if mask.shape[0] > 1 else 0, :, :length, :length]
            if mask.dtype is torch.bool:
                visible = mask
            else:
                visible = mask > HIDDEN_LOGIT
                shift = mask.to(logits).masked_fill(~visible, 0.0)
                bias = shift if bool(shift.any()) else None
        else:
            visible = _causal(length, self.window, logits.device)
        if self.alibi:
            slopes = arguments["alibi"]
            slopes = slopes.reshape(-1, self.n_heads, 1, slopes.shape[-1])
            added = self.alibi * slopes[row if slopes.shape[0] > 1 else 0, :, :, :length].to(logits)
            bias = added if bias is None else bias + added
        return visible, bias

    def deviation(self, states: AttentionStates, capture: AttentionCapture, row: int) -> float:
        """Largest difference between recomputed and captured `o` input, relative to the largest entry."""
        captured = capture.o[row, : states.n_tokens].to(states.mixed)
        difference = (states.mixed.flatten(1) - captured).abs().max() / captured.abs().max().clamp(min=1e-30)
        return float(difference) if bool(torch.isfinite(difference)) else float("inf")


def tolerance(dtype: torch.dtype) -> float:
    """How far recomputed and captured activations of a type may be apart, relative to the largest entry."""
    return 5e-4 if dtype in (torch.float32, torch.float64) else 6e-2


def prove_attention(
    module: nn.Module,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    capture: AttentionCapture,
    name: str = "attention",
) -> AttentionPlan:
    """The plan of an attention module whose recomputed `o` input equals the captured one.

    Args:
        module: the attention module.
        n_heads: query heads.
        n_kv_heads: key-value heads.
        head_dim: entries of a head.
        capture: a probe pass; its first row is used, and must be several different tokens without padding.
        name: of the layer, for the error.

    Raises:
        UnsupportedModelError: no candidate reproduces the captured input of the o projection.
    """
    if capture.o.shape[-1] != n_heads * head_dim or n_heads % n_kv_heads:
        raise UnsupportedModelError(
            f"{name}: q, k, v are unsupported: the o projection reads {capture.o.shape[-1]} features, "
            f"{n_heads} heads of {head_dim} were expected; leave q, k and v out with --sites"
        )
    best: AttentionPlan | None = None
    enough = 1e-5 if capture.q.dtype in (torch.float32, torch.float64) else 0.0
    for plan in _candidates(module, AttentionPlan(n_heads, n_kv_heads, head_dim, 1.0, "none"), capture):
        error = plan.deviation(plan.states(capture, 0, capture.q.shape[1]), capture, 0)
        if best is None or error < best.error:
            best = replace(plan, error=error)
        if error < enough:
            break
    if best is None or best.error > tolerance(capture.q.dtype):
        error = float("inf") if best is None else best.error
        raise UnsupportedModelError(
            f"{name}: q, k, v are unsupported: no known attention formula gives what the o projection "
            f"reads (best of rotary, norm, scale, soft-cap, sink and ALiBi forms is {error:.1e} off); "
            "leave q, k and v out with --sites"
        )
    return best


def _candidates(
    module: nn.Module, plain: AttentionPlan, capture: AttentionCapture
) -> Iterator[AttentionPlan]:
    """Plans from what the module holds; parts that are present are tried before their absence."""
    arguments = capture.arguments
    table = getattr(module, "embed_positions", None)
    plain = replace(plain, embed_positions=table if isinstance(table, Tensor) and table.ndim == 2 else None)
    turning = _cos_sin(arguments, plain.embed_positions, 0, capture.q.shape[1])
    rotary = ("half", "interleaved", "none") if turning is not None else ("none",)
    repeats = {style: turning is not None and _repeats(turning[0], style) for style in rotary}
    sinks = getattr(module, "sinks", None)
    scales = _scales(module, plain.head_dim)
    choices = itertools.product(
        _norm_pairs(module, plain),
        _present(_number(module, _SOFTCAPS)),
        _present(sinks.detach() if isinstance(sinks, Tensor) else None),
        _windows(module, arguments),
        _alibi_factors(arguments, scales),
        rotary,
        scales,
    )
    for (q_norm, k_norm), softcap, sink, window, alibi, style, scale in choices:
        yield replace(
            plain,
            q_norm=q_norm,
            k_norm=k_norm,
            softcap=softcap,
            sinks=sink,
            window=window,
            alibi=alibi,
            rotary=style,
            repeats=repeats[style],
            scale=scale,
        )


def _present(value: Any) -> tuple[Any, ...]:
    return (None,) if value is None else (value, None)


def _number(module: nn.Module, names: tuple[str, ...]) -> float | None:
    for holder in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int | float) and not isinstance(value, bool):
                return float(value)
    return None


def _scales(module: nn.Module, head_dim: int) -> list[float]:
    scales: list[float] = []
    for name in _SCALES:
        value = getattr(module, name, None)
        value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            scales += [float(value), 1.0 / float(value)]
    if getattr(
        module, "scale_attn_by_inverse_layer_idx", False
    ):  # eager GPT-2 of transformers 4 divides outside `scaling`
        scales.append(head_dim**-0.5 / (int(getattr(module, "layer_idx", 0)) + 1))
    scales += [head_dim**-0.5, 1.0]
    return list(dict.fromkeys(scales))


def _windows(module: nn.Module, arguments: Mapping[str, Any]) -> tuple[int | None, ...]:
    mask = arguments.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 4:
        return (None,)
    config = getattr(module, "config", None)
    values = [getattr(holder, "sliding_window", None) for holder in (module, config)]
    windows = tuple(
        dict.fromkeys(value for value in values if isinstance(value, int) and not isinstance(value, bool))
    )
    kernel = "flash" in str(getattr(config, "_attn_implementation", ""))
    return (*windows, None) if kernel and hasattr(module, "sliding_window") else (None, *windows)


def _alibi_factors(arguments: Mapping[str, Any], scales: list[float]) -> tuple[float, ...]:
    return (0.0, 1.0, *scales) if isinstance(arguments.get("alibi"), Tensor) else (0.0,)


def _norm_pairs(
    module: nn.Module, plain: AttentionPlan
) -> list[tuple[NormFormula | None, NormFormula | None]]:
    """Pairs of formulas for the norms that the module holds, and none at all last."""
    norms: dict[str, list[NormFormula]] = {"q": [], "k": []}
    for name, child in module.named_children():
        if "norm" in name.lower() and name[0] in norms:
            heads = plain.n_heads if name[0] == "q" else plain.n_kv_heads
            norms[name[0]] += norm_candidates(child, heads, plain.head_dim)
    return [*itertools.product(norms["q"], norms["k"]), (None, None)]


def _working(captured: Tensor) -> Tensor:
    """An empty tensor of the type and device to compute in."""
    dtype = torch.float64 if captured.dtype is torch.float64 else torch.float32
    return torch.empty(0, dtype=dtype, device=captured.device)


def _heads(flat: Float[Tensor, "token feature"], n_heads: int) -> Float[Tensor, "token head dim"]:
    return flat.unflatten(-1, (n_heads, -1))


def _causal(length: int, window: int | None, device: torch.device) -> Bool[Tensor, "token token"]:
    place = torch.arange(length, device=device)
    distance = place[:, None] - place[None, :]
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def _cos_sin(
    arguments: Mapping[str, Any], table: Tensor | None, row: int, length: int
) -> tuple[Tensor, Tensor] | None:
    """Cos and sin of one prompt, `[token, rotary entries]`, all entries or one of each pair."""
    given = arguments.get("position_embeddings")
    if (
        isinstance(given, tuple | list)
        and len(given) == 2
        and all(isinstance(part, Tensor) for part in given)
    ):
        cos, sin = given
        if not bool(cos[..., 0, :].any()):  # The first token is not turned: what is zero there are the sines.
            cos, sin = sin, cos
        if cos.ndim == 3:
            row = row if cos.shape[0] > 1 else 0
            return cos[row, :length], sin[row, :length]
        return (cos[:length], sin[:length]) if cos.ndim == 2 else None
    if table is not None and isinstance(places := arguments.get("position_ids"), Tensor):
        places = places[row if places.shape[0] > 1 else 0, :length]
        sin, cos = table.to(places.device)[places].chunk(2, -1)
        return cos, sin
    return None


def _repeats(cos: Tensor, style: str) -> bool:
    """Whether cosines name each pair of entries twice, in the order of a style."""
    given = cos.shape[-1]
    if given % 2 or style == "none":
        return False
    halves = (cos[:, : given // 2], cos[:, given // 2 :]) if style == "half" else (cos[:, ::2], cos[:, 1::2])
    return bool((halves[0] == halves[1]).all())


def _rotation(cos: Tensor, sin: Tensor, style: str, head_dim: int, repeats: bool) -> Rotation:
    """The map of single entries; entries beyond the rotary ones stay as they are."""
    given = cos.shape[-1]
    device = cos.device
    turning = min(given if repeats else 2 * given, head_dim)
    half = turning // 2
    place = torch.arange(turning, device=device)
    if style == "half":
        pair, first, partner = place % half, place < half, (place + half) % turning
        if repeats:
            cos, sin = cos[:, :half], sin[:, :half]
    else:
        pair, first, partner = place // 2, place % 2 == 0, place ^ 1
        if repeats:
            cos, sin = cos[:, ::2], sin[:, ::2]
    cos, sin = cos[:, pair], sin[:, pair]
    rest = head_dim - turning
    keep = torch.cat([cos, cos.new_ones(len(cos), rest)], -1)
    cross = torch.cat([torch.where(first, sin, -sin), sin.new_zeros(len(sin), rest)], -1)
    return Rotation(keep, cross, torch.cat([partner, torch.arange(turning, head_dim, device=device)]))
