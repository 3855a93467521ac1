"""Exact importance of attention neurons: what the output projection puts out when one row of q, k or v, or
one column of o, is zero.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from safety_neurons.model.attention import AttentionPlan, AttentionStates, NormChange, NormFormula

SAFE_CHANGE = 25.0
"""Changes of a logit up to this size cannot overflow the ratio form, in float32 either."""
FLOOR = -60.0
"""Logarithm of a probability that counts as none."""
CPU_CHUNK = 2**22
"""Bytes of a chunk of neurons that a processor's caches hold."""


@dataclass(frozen=True)
class LogitChange:
    """Changes of the logits of some heads, one per neuron, as products of small factors.

    The change of neuron c at query m, head r and key n is `left[c, m, r] · right[c, :, n]` for the heads in
    `own`, plus `along[c, m, n] · base[m, r, n]` and `uniform[c, m, n] · flat[m, r, n]` for all heads (axes of
    `along` and `uniform` may be 1).
    """

    left: Float[Tensor, "neuron token own term"]
    right: Float[Tensor, "neuron term token"]
    own: slice | None = None
    along: Float[Tensor, "neuron query one key"] | None = None
    base: Float[Tensor, "token head token"] | None = None
    uniform: Float[Tensor, "neuron query one key"] | None = None
    flat: Float[Tensor, "token head token"] | None = None

    def block(
        self, chunk: slice, rows: slice, width: int, start: Tensor | None = None
    ) -> Float[Tensor, "neuron token head key"]:
        """The changes of some neurons at some queries and the first `width` keys, added to `start` where it
        is given.
        """
        left, right = self.left[chunk, rows], self.right[chunk, :, :width]
        flat = left.flatten(1, 2)
        if self.base is None:
            single = (
                torch.bmm(flat, right) if start is None else torch.baddbmm(start.flatten(0, 1), flat, right)
            )
            return single.unflatten(1, left.shape[1:3])
        assert self.along is not None
        change = _cut(self.along[chunk], rows, width) * self.base[rows, :, :width]
        change[:, :, slice(None) if self.own is None else self.own] += torch.bmm(flat, right).unflatten(
            1, left.shape[1:3]
        )
        if self.uniform is not None and self.flat is not None:
            change += _cut(self.uniform[chunk], rows, width) * self.flat[rows, :, :width]
        return change if start is None else change + start

    def bound(self) -> float:
        """No change is larger than this."""
        total = (self.left.abs().amax((1, 2)) * self.right.abs().amax(2)).sum(1)
        for factor, base in ((self.along, self.base), (self.uniform, self.flat)):
            if factor is not None and base is not None:
                total = total + factor.abs().amax((1, 2, 3)) * base.abs().amax()
        return float(total.max())


@dataclass(frozen=True)
class Attended:
    """The heads that change, as they were.

    Attributes:
        logits: scaled logits before the soft-cap.
        log_probabilities: −∞ where a key is hidden.
        softcap: of the layer; None for none.
        sink: share of the attention that a sink takes; None where the layer has none.
    """

    logits: Float[Tensor, "token head token"]
    log_probabilities: Float[Tensor, "token head token"]
    softcap: float | None = None
    sink: Float[Tensor, "token head one"] | None = None

    @cached_property
    def probabilities(self) -> Float[Tensor, "token head token"]:
        """Exactly 0 where a key is hidden."""
        return self.log_probabilities.exp()

    @cached_property
    def floored(self) -> tuple[Float[Tensor, "token head token"], Float[Tensor, "token head token"]]:
        """Logarithms that are nowhere below `FLOOR`, where vectorised exponentials are several times slower,
        and their exponentials.
        """
        logarithms = self.log_probabilities.clamp(min=FLOOR)
        return logarithms, logarithms.exp()

    def difference(
        self, change: LogitChange, chunk: slice, rows: slice, width: int, safe: bool, general: bool = False
    ) -> Float[Tensor, "neuron token head key"]:
        """New minus old probabilities of a block.

        Exactly 0 where nothing changes or one key alone is seen.
        """
        sink = None if self.sink is None else self.sink[rows]
        still: Tensor | None = None
        if safe and self.softcap is None:
            before, old = (part[rows, :, :width] for part in self.floored)
            weights = change.block(chunk, rows, width, before).exp_()
        else:
            before, old = self.log_probabilities[rows, :, :width], self.probabilities[rows, :, :width]
            weights = self._step(change, chunk, rows, width)
            if general:  # the largest and the smallest are 0: a third of the time of `all` over a mask
                still = (weights.amax(-1, keepdim=True) == 0) & (weights.amin(-1, keepdim=True) == 0)
            weights = weights.add_(before)
            top = weights.amax(-1, keepdim=True)
            top = (top if sink is None else torch.maximum(top, sink.log())).clamp(
                min=torch.finfo(top.dtype).min
            )
            weights = weights.sub_(top).exp_()
            sink = None if sink is None else sink * (-top).exp()
        total, whole = weights.sum(-1, keepdim=True), old.sum(-1, keepdim=True)
        if sink is not None and self.sink is not None:
            total, whole = total + sink, whole + self.sink[rows]
        if (
            still is not None
        ):  # a row that does not change has no change at all, whatever its quotients round to
            return torch.where(still, 0.0, weights.mul_(whole / total).sub_(old))
        return torch.addcdiv(-old, weights, total / whole, out=weights)

    def _step(self, change: LogitChange, chunk: slice, rows: slice, width: int) -> Tensor:
        step = change.block(chunk, rows, width)
        if self.softcap is None:
            return step
        before = self.logits[rows, :, :width]
        return self.softcap * (torch.tanh((before + step) / self.softcap) - torch.tanh(before / self.softcap))


@dataclass(frozen=True)
class Gated:
    """Value states on their way out where a gate scales them query by query, so that no factor of the output
    projection can be drawn into them.

    Attributes:
        values: of the heads that change.
        gate: factors of each query's output.
        factor: R with Rᵀ R = Wᵀ W for the columns of these heads.
    """

    values: Float[Tensor, "head token dim"]
    gate: Float[Tensor, "token head dim"]
    factor: Float[Tensor, "rank head dim"]

    def __call__(
        self, moved: Float[Tensor, "neuron token head key"], rows: slice
    ) -> Float[Tensor, "pair rank"]:
        """What changed attention probabilities put out through the factor."""
        mixed = torch.einsum("cmhn,hnd->cmhd", moved, self.values[:, : moved.shape[-1]]) * self.gate[rows]
        return mixed.flatten(0, 1).flatten(1) @ self.factor.flatten(1).T


def squared_norms(
    attended: Attended,
    change: LogitChange,
    passed: Float[Tensor, "head token rank"] | Gated | None,
    budget: int,
    general: bool = False,
) -> Float[Tensor, " neuron"]:
    """‖Σ over heads of dP · passed‖² for every neuron; ‖dP‖² where `passed` is None.

    Args:
        attended: the heads that change.
        change: one change per neuron.
        passed: value states through a factor of the output projection, or what a gate scales before it.
        budget: bytes that a chunk of neurons may take.
        general: whether to use the form for any change without looking how large this one is.
    """
    n_tokens, n_heads = attended.logits.shape[:2]
    n_neurons = change.left.shape[0]
    safe = not general and change.bound() <= SAFE_CHANGE
    result = change.left.new_zeros(n_neurons)
    triangle = _triangle(passed) if isinstance(passed, Tensor) else None
    for rows, width in row_blocks(n_tokens):
        factor = None if triangle is None else _leading(triangle, width, n_heads)
        out = 2 * passed.factor.numel() if isinstance(passed, Gated) else 0
        size = (rows.stop - rows.start) * (n_heads * width * 4 + (out if factor is None else factor.shape[1]))
        step = chunk_size(size * result.element_size(), budget, result.device)
        for start in range(0, n_neurons, step):
            chunk = slice(start, min(start + step, n_neurons))
            moved = attended.difference(change, chunk, rows, width, safe, general)
            if isinstance(passed, Gated):
                moved = passed(moved, rows)
            elif factor is not None:
                moved = moved.reshape(-1, factor.shape[0]) @ factor
            result[chunk] += torch.linalg.vector_norm(moved.reshape(chunk.stop - start, -1), dim=1).square()
    return result


def _triangle(passed: Float[Tensor, "head token rank"]) -> Float[Tensor, "small token_head"]:
    """R with Rᵀ R = X Xᵀ for the rows X of `passed` in the order (token, head): its first columns serve the
    first tokens alone.
    """
    return torch.linalg.qr(passed.transpose(0, 1).flatten(0, 1).T, mode="r").R


def _leading(
    triangle: Float[Tensor, "small token_head"], width: int, n_heads: int
) -> Float[Tensor, "head_token rank"]:
    """The factor for the first `width` tokens, rows in the order (head, token)."""
    part = triangle[: width * n_heads, : width * n_heads].T
    return part.unflatten(0, (width, n_heads)).transpose(0, 1).flatten(0, 1)


def row_blocks(n_tokens: int) -> list[tuple[slice, int]]:
    """Blocks of queries, each with the number of keys that any of them sees."""
    count = max(1, min(8, n_tokens // 16))
    ends = [n_tokens * (number + 1) // count for number in range(count)]
    return [(slice(start, end), end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def chunk_size(bytes_per_neuron: int, budget: int, device: torch.device) -> int:
    """Neurons per chunk: as many as the budget holds, on a CPU not more than its caches like."""
    room = min(budget, CPU_CHUNK) if device.type == "cpu" else budget
    return max(1, room // max(1, bytes_per_neuron))


def _cut(factor: Tensor, rows: slice, width: int) -> Tensor:
    factor = factor if factor.shape[1] == 1 else factor[:, rows]
    return factor if factor.shape[3] == 1 else factor[..., :width]


class OutputFactors:
    """What importance needs of an o projection's weight: column norms, and small factors R with Rᵀ R = Wᵀ W.
    Computed once, on demand.
    """

    def __init__(
        self,
        weight: Float[Tensor, "out mixed"] | Callable[[], Float[Tensor, "out mixed"]],
        n_heads: int,
        n_kv_heads: int,
    ) -> None:
        """Keeps no copy of a weight that is given as a function.

        Args:
            weight: of the o projection, adapters included.
            n_heads: query heads.
            n_kv_heads: key-value heads.
        """
        self._given = weight
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads

    @property
    def _weight(self) -> Tensor:
        return self._given if isinstance(self._given, Tensor) else self._given()

    @cached_property
    def column_norms(self) -> Float[Tensor, " mixed"]:
        """Norm of each column."""
        return torch.linalg.vector_norm(self._weight, dim=0)

    @cached_property
    def of_groups(self) -> Float[Tensor, "group rank head dim"]:
        """One factor per key-value head, over the columns of its query heads."""
        return self._factor(self.n_kv_heads)

    @cached_property
    def of_all(self) -> Float[Tensor, "one rank head dim"]:
        """One factor over all columns."""
        return self._factor(1)

    @cached_property
    def of_heads(self) -> Float[Tensor, "head rank one dim"]:
        """One factor per query head."""
        flat = self.of_groups.transpose(1, 2).flatten(0, 1)
        return torch.linalg.qr(flat, mode="r").R.unsqueeze(2)

    @cached_property
    def value_gram(self) -> Float[Tensor, "group dim head head"]:
        """Inner products of the columns that one value row feeds."""
        parts = self._weight.unflatten(1, (self.n_kv_heads, self.n_heads // self.n_kv_heads, -1))
        return torch.einsum("ogrd,ogsd->gdrs", parts, parts)

    def _factor(self, n_parts: int) -> Tensor:
        parts = self._weight.unflatten(1, (n_parts, -1)).transpose(0, 1)
        triangle = torch.linalg.qr(parts, mode="r").R
        return triangle.unflatten(2, (self.n_heads // n_parts, -1))


@dataclass(frozen=True)
class AttentionScorer:
    """Importance of one prompt's attention neurons in one layer.

    Attributes:
        plan: the layer's formula.
        states: the prompt.
        factors: of the o projection.
        space: `output` or `probability` (q and k only).
        budget: bytes that one chunk of neurons may take.
        general: the form of the softmax's change that looks at no number, so that many prompts may be scored
            at once.
    """

    plan: AttentionPlan
    states: AttentionStates
    factors: OutputFactors
    space: str = "output"
    budget: int = 2**28
    general: bool = False

    def scores(self, site: str, delta: Tensor | None = None) -> Float[Tensor, " neuron"]:
        """Scores of `q`, `k`, `v` or `o`.

        `delta` (default: the activation itself) is `[token, head, dim]` and not used for `o`.
        """
        if site == "o":
            return self.output()
        score = {"q": self.query, "k": self.key, "v": self.value}[site]
        return score(getattr(self.states, site) if delta is None else delta).flatten()

    def output(self) -> Float[Tensor, " neuron"]:
        """‖column of what the o projection reads‖ · ‖change of its column‖."""
        return torch.linalg.vector_norm(self.states.mixed.flatten(1), dim=0) * self.factors.column_norms

    def value(self, delta: Float[Tensor, "token group dim"]) -> Float[Tensor, "group dim"]:
        """Rows of v: what each of the group's heads passes on, joined through the inner products of the
        columns it feeds.
        """
        probabilities = self.states.probabilities.unflatten(0, (delta.shape[1], -1))
        passed = torch.einsum("grmn,ngd->gdrm", probabilities, delta)
        if self.states.gate is not None:
            passed = passed * self.states.gate.unflatten(1, (delta.shape[1], -1)).permute(1, 3, 2, 0)
        squares = ((passed @ passed.transpose(2, 3)) * self.factors.value_gram).sum((2, 3))
        return squares.clamp(min=0).sqrt()

    def query(self, delta: Float[Tensor, "token head dim"]) -> Float[Tensor, "head dim"]:
        """Rows of q: the logits of one head change by two columns of its keys.

        Where a norm spans all heads, those of the others too.
        """
        norm = self.plan.q_norm
        moved = self._change(norm, self.states.q, delta)
        base, flat = self._query_bases(norm)
        scores = []
        for head in range(self.plan.n_heads):
            across = norm is not None and norm.across_heads
            heads = slice(0, self.plan.n_heads) if across else slice(head, head + 1)
            left = self._paired(moved.single[:, head] * self.plan.scale, own=True)[:, :, None]
            right = self._paired(self.states.key[:, head // self.states.group_size], own=False).movedim(1, 2)
            change = LogitChange(
                left.contiguous(),
                right.contiguous(),
                slice(head, head + 1) if across else None,
                along=None if moved.along is None else moved.along[:, head].T[:, :, None, None],
                base=None if base is None else base[:, heads],
                uniform=None if moved.uniform is None else moved.uniform[:, head].T[:, :, None, None],
                flat=None if flat is None else flat[:, heads],
            )
            scores.append(self._norms(change, heads, across))
        return torch.stack(scores)

    def key(self, delta: Float[Tensor, "token group dim"]) -> Float[Tensor, "group dim"]:
        """Rows of k: the logits of all query heads of the group change together.

        Where a norm spans all heads, those of the others too.
        """
        norm, size = self.plan.k_norm, self.states.group_size
        moved = self._change(norm, self.states.k, delta)
        base, flat = self._key_bases(norm)
        scores = []
        for group in range(self.plan.n_kv_heads):
            across = norm is not None and norm.across_heads
            mine = slice(group * size, (group + 1) * size)
            heads = slice(0, self.plan.n_heads) if across else mine
            query = self.states.query[:, mine].flatten(0, 1)
            change = LogitChange(
                self._paired(query, own=False).unflatten(1, (-1, size)).contiguous(),
                self._paired(moved.single[:, group], own=True).movedim(1, 2).contiguous(),
                mine if across else None,
                along=None if moved.along is None else moved.along[:, group].T[:, None, None],
                base=None if base is None else base[:, heads],
                uniform=None if moved.uniform is None else moved.uniform[:, group].T[:, None, None],
                flat=None if flat is None else flat[:, heads],
            )
            scores.append(self._norms(change, heads, across))
        return torch.stack(scores)

    def _norms(self, change: LogitChange, heads: slice, across: bool) -> Float[Tensor, " dim"]:
        states = self.states
        known = states.log_probabilities[heads].transpose(0, 1).contiguous()
        sink = None if self.plan.sinks is None else (1 - known.exp().sum(-1, keepdim=True)).clamp(min=0)
        attended = Attended(states.logits[heads].transpose(0, 1), known, self.plan.softcap, sink)
        passed = None
        if self.space == "output":
            passed = self._passed_of_all if across else self._passed(heads)
        return squared_norms(attended, change, passed, self.budget, self.general).clamp(min=0).sqrt()

    def _passed(self, heads: slice) -> Float[Tensor, "head token rank"] | Gated:
        """Value states through the factor of one head's or one group's columns."""
        states, factors = self.states, self.factors
        group = heads.start // states.group_size
        factor = (
            factors.of_heads[heads.start]
            if heads.stop - heads.start < states.group_size
            else factors.of_groups[group]
        )
        factor = factor.to(states.v)
        if states.gate is not None:
            values = states.v[:, group].expand(factor.shape[1], -1, -1)
            return Gated(values, states.gate[:, heads], factor)
        return torch.einsum("td,khd->htk", states.v[:, group], factor)

    @cached_property
    def _passed_of_all(self) -> Float[Tensor, "head token rank"] | Gated:
        """Value states through the factor of all columns."""
        values = self.states.v.repeat_interleave(self.states.group_size, 1)
        factor = self.factors.of_all[0].to(values)
        if self.states.gate is not None:
            return Gated(values.transpose(0, 1), self.states.gate, factor)
        return torch.einsum("thd,khd->htk", values, factor)

    def _paired(self, states: Float[Tensor, "token dim"], own: bool) -> Float[Tensor, "dim token term"]:
        """Per entry d the two numbers of the rotated logit: `own`, what of d stays and what crosses.

        Else the entries that they meet.
        """
        rotation = self.states.rotation
        if rotation is None:
            return states.T[:, :, None]
        if own:
            return torch.stack([states * rotation.keep, states * rotation.cross], -1).movedim(1, 0)
        return torch.stack([states, states[:, rotation.partner]], -1).movedim(1, 0)

    def _change(self, norm: NormFormula | None, raw: Tensor, delta: Tensor) -> NormChange:
        return NormChange(None, None, -delta) if norm is None else norm.change(raw, delta)

    def _query_bases(self, norm: NormFormula | None) -> tuple[Tensor | None, Tensor | None]:
        """Logits of the normed queries without the norm's bias, and of its weight alone, `[token, head,
        token]`.
        """
        if norm is None:
            return None, None
        states = self.states
        keys = states.key.repeat_interleave(states.group_size, 1)
        turned = [self._turned(states_of) * self.plan.scale for states_of in _norm_parts(norm, states.q)]
        logits = [torch.einsum("mhd,nhd->mhn", states_of, keys) for states_of in turned]
        return logits[0], logits[1] if norm.centred else None

    def _key_bases(self, norm: NormFormula | None) -> tuple[Tensor | None, Tensor | None]:
        if norm is None:
            return None, None
        states = self.states
        turned = [
            self._turned(part).repeat_interleave(states.group_size, 1) for part in _norm_parts(norm, states.k)
        ]
        logits = [torch.einsum("mhd,nhd->mhn", states.query, part) for part in turned]
        return logits[0], logits[1] if norm.centred else None

    def _turned(self, part: Tensor) -> Tensor:
        return part if self.states.rotation is None else self.states.rotation(part)


def _norm_parts(norm: NormFormula, raw: Tensor) -> tuple[Tensor, Tensor]:
    return norm.without_bias(raw), norm.weight.to(raw).expand_as(raw)


def scores_at_once(
    plan: AttentionPlan,
    states: Sequence[AttentionStates],
    factors: OutputFactors,
    sites: Sequence[str],
    space: str = "output",
    budget: int = 2**28,
) -> list[dict[str, Float[Tensor, " neuron"]]]:
    """Scores of several prompts of one length: the same closed forms, computed for all of them by every
    operation.

    A short prompt is little work for many operations; one by one, their calls cost more than what they
    compute.

    Args:
        plan: the layer's formula.
        states: the prompts, all with the same number of tokens.
        factors: of the o projection.
        sites: any of `q k v o`.
        space: as for `AttentionScorer`.
        budget: bytes that the chunks of all prompts together may take.
    """
    first = states[0]
    names = [
        entry.name
        for entry in fields(AttentionStates)
        if entry.name != "rotation" and getattr(first, entry.name) is not None
    ]
    turned = first.rotation
    given = {name: torch.stack([getattr(one, name) for one in states]) for name in names}
    if turned is not None:
        given |= {
            name: torch.stack([getattr(one.rotation, name) for one in states]) for name in ("keep", "cross")
        }

    room = (min(budget, 2 * CPU_CHUNK) if given["q"].device.type == "cpu" else budget) // len(states)

    def scored(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        rotation = None if turned is None else replace(turned, keep=tensors["keep"], cross=tensors["cross"])
        one = AttentionStates(rotation=rotation, **{name: tensors[name] for name in names})
        scorer = AttentionScorer(plan, one, factors, space, room, general=True)
        return tuple(scorer.scores(site) for site in sites)

    stacked = torch.vmap(scored)(given)
    return [
        {site: values[row] for site, values in zip(sites, stacked, strict=True)} for row in range(len(states))
    ]
