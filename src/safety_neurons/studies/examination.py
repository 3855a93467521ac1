"""Doctor: can numbers found on this model be trusted? Every check is an experiment on the model itself."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safety_neurons.arguments import well_typed
from safety_neurons.counting import numbered
from safety_neurons.detectors import find_importance
from safety_neurons.display import Displayed
from safety_neurons.errors import SafetyNeuronsError
from safety_neurons.interventions import patched
from safety_neurons.model import LanguageModel, batches, forward
from safety_neurons.model.hooks import around, editing, reading
from safety_neurons.model.sites import ExpertRows
from safety_neurons.neurons import NeuronSet, parse_key
from safety_neurons.prompt_lists import Prompts
from safety_neurons.results.records import CheckRecord, ExaminationRecord, Recorded

TEXTS = (
    "Name three fruits that grow on trees.",
    "Explain in one sentence why the sky looks blue on a clear day and red in the evening.",
    "Write a short note to a friend.",
)
_LOOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclasses.dataclass(frozen=True)
class Check(Recorded[CheckRecord]):
    """One experiment: what was measured and what is allowed."""

    check: str
    passed: bool | None
    """None where the check only informs, or does not apply."""
    measured: str | float
    allowed: str | float | None = None


@dataclasses.dataclass(frozen=True)
class Examination(Recorded[ExaminationRecord], Displayed):
    """All checks of one model."""

    verb = "doctor"

    model: str
    checks: tuple[Check, ...]

    ALSO = ("healthy",)

    @property
    def healthy(self) -> bool:
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks)


@well_typed
def doctor(
    model: LanguageModel, *, seed: int = 0, n_sampled: int = 3, progress: Callable[[str], None] | None = None
) -> Examination:
    """Coverage, identity, padding, batching, self-patch, exactness of importance, and the fixed cost of
    hooks, on this model.

    Args:
        model: any loaded causal language model.
        seed: of the sampled neurons.
        n_sampled: neurons per site whose importance is checked against brute force.
        progress: told the name of each check.

    An experiment that raises is a failed check with the error as its measurement, so that the others still
    run.
    """
    before = _state(model)
    experiments: list[tuple[str, Callable[[], Check]]] = [
        ("coverage", lambda: _coverage(model)),
        ("identity with hooks on", lambda: _identity(model)),
        ("padding and batching, logits", lambda: _padding(model)),
        ("padding and batching, completions", lambda: _batching(model)),
        ("self-patch", lambda: _self_patch(model, seed)),
        ("importance against brute force", lambda: _brute_force(model, seed, n_sampled)),
        ("nothing left behind", lambda: _nothing_left(model, before)),
        ("cost of hooks per token and layer", lambda: _cost(model)),
    ]
    checks = []
    for name, experiment in experiments:
        if progress is not None:
            progress(name)
        try:
            checks.append(dataclasses.replace(experiment(), check=name))
        except SafetyNeuronsError as error:
            checks.append(Check(name, False, f"{type(error).__name__}: {error}"))
    return Examination(model.name, tuple(checks))


def _coverage(model: LanguageModel) -> Check:
    coverage = model.anatomy.coverage()
    # What is left out is no fault of the sites that are there: it is said, and every other check is of these.
    measured = f"{coverage}; left out: {coverage.left_out}" if coverage.left_out else str(coverage)
    return Check("", coverage.complete or None, measured, "every site, 100 %")


def _sequences(model: LanguageModel) -> list[list[int]]:
    return [encoded.ids for encoded in model.encode(list(TEXTS))]


@torch.no_grad()
def _logits(model: LanguageModel, sequences: list[list[int]], size: int) -> list[Tensor]:
    rows: dict[int, Tensor] = {}
    with model.running():
        for batch in batches(sequences, size, pad_id=model.pad_id):
            logits = forward(model.model, batch.to(model.device), with_logits=True)
            assert logits is not None
            for number, (index, length) in enumerate(zip(batch.indices, batch.lengths, strict=True)):
                rows[index] = logits[number, :length].clone()
    return [rows[index] for index in range(len(sequences))]


def _identity(model: LanguageModel) -> Check:
    sequences = _sequences(model)
    plain = _logits(model, sequences, 1)
    with reading(model.anatomy, {key: lambda _: None for key in _keys(model)}) as firings:
        hooked = _logits(model, sequences, 1)
    same = all(torch.equal(a, b) for a, b in zip(plain, hooked, strict=True))
    return Check(
        "",
        same,
        f"{len(firings.counts)} sites read, logits {'bit-identical' if same else 'changed'}",
        "bit-identical",
    )


def _keys(model: LanguageModel) -> list[str]:
    """Every dense site, and each layer's experts as one."""
    keys = []
    for key in model.table.keys:
        parsed = parse_key(key)
        keys.append(
            key if parsed.expert is None else key.replace(f".experts.{parsed.expert}.", ".experts.*.")
        )
    return list(dict.fromkeys(keys))


def _padding(model: LanguageModel) -> Check:
    sequences = _sequences(model)
    alone, together = _logits(model, sequences, 1), _logits(model, sequences, len(sequences))
    spread = max(float(row.abs().max()) for row in alone)
    worst = max(float((a - b).abs().max()) for a, b in zip(alone, together, strict=True)) / max(spread, 1e-30)
    allowed = _LOOSE.get(model.dtype, 5e-2)
    return Check("", worst <= allowed, f"{worst:.1e} of the largest logit", f"{allowed:.0e}")


def _batching(model: LanguageModel) -> Check:
    together = model.complete(list(TEXTS), max_new_tokens=12, batch_size=len(TEXTS))
    alone = model.complete(list(TEXTS), max_new_tokens=12, batch_size=1)
    same = sum(a.token_ids == b.token_ids for a, b in zip(alone, together, strict=True))
    exact = model.dtype in (torch.float32, torch.float64)
    return Check(
        "",
        same == len(TEXTS) if exact else None,
        f"{same} of {len(TEXTS)} the same",
        "all" if exact else "informs only in 16 bit",
    )


def _self_patch(model: LanguageModel, seed: int) -> Check:
    everything = NeuronSet.all(model.table).items()
    steady = [(key, indices) for key, indices in everything if parse_key(key).expert is None]
    small = NeuronSet({key: indices[: max(1, len(indices) // 20)] for key, indices in steady}, model.table)
    members = small.random_like(seed)[0]
    plain = model.complete(list(TEXTS), max_new_tokens=12, batch_size=len(TEXTS))
    with patched(model, model, members):
        treated = model.complete(list(TEXTS), max_new_tokens=12, batch_size=len(TEXTS))
    same = sum(a.token_ids == b.token_ids for a, b in zip(plain, treated, strict=True))
    aside = "" if len(steady) == len(everything) else ", routed experts aside, which cannot be patched"
    told = (
        f"{numbered(len(members), 'neuron')} patched with themselves{aside}: {same} of {len(TEXTS)} "
        "completions the same"
    )
    return Check("", same == len(TEXTS), told, "all")


def _brute_force(model: LanguageModel, seed: int, n_sampled: int) -> Check:
    text = Prompts.from_list(TEXTS[1:2])
    found = find_importance(model, text, count=1, batch_size=1)
    generator = np.random.default_rng(seed)
    sequence = _sequences(model)[1:2]
    worst, sampled = 0.0, 0
    for key in _first_and_last_layer(found.scores.keys()):
        scores = found.scores[key]
        scale = float(scores.max()) or 1.0
        for index in generator.choice(len(scores), min(n_sampled, len(scores)), replace=False):
            worst = max(worst, abs(_ablated(model, sequence, key, int(index)) - float(scores[index])) / scale)
            sampled += 1
    allowed = max(1e-4, _LOOSE.get(model.dtype, 5e-2))
    return Check(
        "", worst <= allowed, f"{worst:.1e} of the site's largest, {sampled} neurons", f"{allowed:.0e}"
    )


def _first_and_last_layer(keys: list[str]) -> list[str]:
    layers = {parse_key(key).layer for key in keys}
    ends = {min(layers), max(layers)}
    return [key for key in keys if parse_key(key).layer in ends and (parse_key(key).expert or 0) < 2]


def _ablated(model: LanguageModel, sequence: list[list[int]], key: str, index: int) -> float:
    """Change of the sub-layer's output when one neuron is set to zero, by running the model twice."""

    def zeroed(activation: Any) -> Tensor:
        values = (activation.values if isinstance(activation, ExpertRows) else activation).clone()
        values[..., index] = 0
        return values

    plain = _sub_layer_output(model, sequence, key, contextlib.nullcontext())
    ablated = _sub_layer_output(model, sequence, key, editing(model.anatomy, {key: zeroed}))
    return float((plain - ablated).norm())


def _sub_layer_output(model: LanguageModel, sequence: list[list[int]], key: str, treatment: Any) -> Tensor:
    seen: list[Tensor] = []

    def keep(output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        seen.append(tensor.detach().double().clone())

    with treatment, around(_sub_layer(model, key), after=keep):
        _logits(model, sequence, 1)
    return seen[0]


def _sub_layer(model: LanguageModel, key: str) -> torch.nn.Module:
    parsed = parse_key(key)
    layer = model.anatomy.layers[parsed.layer]
    if parsed.expert is not None:
        assert layer.experts is not None
        return layer.experts.module
    if parsed.shared and layer.experts is not None:
        return layer.experts.block  # behind the gate that scales a shared expert's output, where there is one
    part = (
        layer.shared
        if parsed.shared
        else layer.attention
        if parsed.site in ("q", "k", "v", "o")
        else layer.mlp
    )
    assert part is not None
    return part.places["o" if parsed.site in ("q", "k", "v", "o") else "down"].module


def _state(model: LanguageModel) -> dict[str, int]:
    """What interventions touch: hooks, replaced methods, modules in training mode."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = list(model.model.modules())
    return {
        "hooks": sum(len(getattr(module, name)) for module in modules for name in names),
        "replaced methods": sum(
            callable(value) for module in modules for name, value in vars(module).items() if name == "forward"
        ),
        "modules in training mode": sum(module.training for module in modules),
    }


def _nothing_left(model: LanguageModel, before: dict[str, int]) -> Check:
    after = _state(model)
    changed = [f"{name} {before[name]} → {after[name]}" for name in before if before[name] != after[name]]
    return Check("", not changed, ", ".join(changed) or "hooks, methods and modes as before", "as before")


def _cost(model: LanguageModel) -> Check:
    layers = len(model.anatomy.layers)
    sequence = _sequences(model)[1:2]
    read = {key: lambda _: None for key in _keys(model)}
    plain, hooked = [], []
    for _ in range(5):
        plain.append(_seconds(lambda: _logits(model, sequence, 1)))
        with _entered(reading(model.anatomy, read)):
            hooked.append(_seconds(lambda: _logits(model, sequence, 1)))
    extra = 1e3 * (float(np.median(hooked)) - float(np.median(plain))) / layers
    tokens = len(sequence[0]) / float(np.median(plain))
    return Check(
        "",
        None,
        f"{max(extra, 0):.3f} ms a pass and layer with all sites read; plain forward {tokens:,.0f} tokens/s",
    )


@contextlib.contextmanager
def _entered(context: Any) -> Iterator[None]:
    with context:
        yield


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
