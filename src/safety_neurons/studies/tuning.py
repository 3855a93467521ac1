"""tune: train a set of neurons to refuse, watched by a judge on held-out prompts, and measured before and after on prompts of neither.

1. A part of the data is held out for the check; harmless prompts without an answer get the model's own.
2. The untouched model is measured on harmful, harmless and general text.
3. The set's rows and columns are trained; the state that refuses most without refusing harmless prompts is kept.
4. The same is measured with the kept state, and differences are paired over prompts.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safety_neurons.judges import judge_refusal
from safety_neurons.model import LanguageModel
from safety_neurons.neurons import NeuronSet
from safety_neurons.prompts import Prompts
from safety_neurons.prompts.readers import Source
from safety_neurons.results import Checkpoint, Completion, Completions, Difference, paired_difference
from safety_neurons.studies.arms import Arm, Bench
from safety_neurons.tuning import Status, StopCheck, Tuned, beside
from safety_neurons.tuning import tune as train
from safety_neurons.tuning.data import read, split, with_own_answers

HELD_OUT, MOST_HELD_OUT, LEAST_HELD_OUT = 0.2, 32, 4
"""Share of the prompts that the check looks at, at most and at least so many of each kind."""
Progress = Callable[[str, Status | None], None]
"""Told the name of the stage at work, and while training where it is."""


@dataclasses.dataclass(frozen=True)
class Tuning:
    """A tuned set of neurons, and what that did to the model."""

    tuned: Tuned
    before: Arm
    """The untouched model."""
    after: Arm
    """With the delta."""
    change: Difference
    """Paired difference of refusals of harmful requests, after minus before."""
    harmless_change: Difference
    """The same of harmless requests: over-refusal."""
    n_parameters: int
    """Of the whole model."""
    held_out: Mapping[str, int]
    """Prompts of each kind that the check looked at."""
    overlap: Mapping[str, int]
    """Prompts measured on that were learnt."""
    notes: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """As JSON values, with the keys of the design but the paths."""
        tuned = self.tuned
        rates = list(tuned.learning_rates.values())
        return {
            "n_neurons": len(tuned.neurons),
            "trained_parameters": tuned.delta.n_parameters,
            "share_of_parameters": tuned.delta.n_parameters / self.n_parameters,
            "frozen_unchanged": tuned.frozen_unchanged,
            "steps": tuned.steps,
            "planned_steps": tuned.planned,
            "kept_step": tuned.kept,
            "stopped": tuned.stopped,
            "examples": dict(tuned.examples),
            "held_out": dict(self.held_out),
            "learning_rate": {"lowest": min(rates), "highest": max(rates)},
            "before": self.before.record(),
            "after": self.after.record(),
            "change": dataclasses.asdict(self.change),
            "harmless_change": dataclasses.asdict(self.harmless_change),
            "overlap_with_training_prompts": dict(self.overlap),
            "history": [dataclasses.asdict(step) for step in tuned.history],
            "checks": [check.record() for check in ([tuned.before] if tuned.before else []) + list(tuned.checks)],
            "notes": list(self.notes),
        }


def tune(
    model: LanguageModel,
    neurons: NeuronSet,
    dataset: Source = "builtin:refusals",
    *,
    harmless: Source | None = "builtin:harmless",
    mix: float = 1.0,
    protect: NeuronSet | None = None,
    test_harmful: Source = "builtin:harmful-test",
    test_harmless: Source = "builtin:harmless-test",
    text: Source | None = "builtin:general-test",
    check: bool = True,
    check_every: int | None = None,
    tolerance: float = 0.05,
    max_divergence: float | None = None,
    max_new_tokens: int = 64,
    folder: pathlib.Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **training: Any,
) -> Tuning:
    """Tune only these neurons so that the model refuses harmful requests, and say what that did.

    Args:
        model: base or instruct model; it comes back untouched.
        neurons: what is trained.
        dataset: harmful requests with refusals.
        harmless: harmless requests; those without an answer get the model's own greedy one, unless that refuses. None for none.
        mix: harmless examples for each harmful one.
        protect: neurons that stay as they are, taken out of the set.
        test_harmful: harmful requests to measure on.
        test_harmless: harmless requests to measure on.
        text: general text to measure perplexity on; None for none.
        check: look at held-out prompts while training, stop early, keep the best state.
        check_every: steps between two checks; a tenth of all steps by default.
        tolerance: share of the held-out harmless prompts that may be refused beyond what the untouched model refuses.
        max_divergence: largest KL per token on held-out harmless prompts; None for no limit.
        max_new_tokens: length of an answer that is judged, and of an answer of the model's own that is learnt.
        folder: where completions and checkpoints are kept; a killed call goes on from there.
        seed: of everything that is random.
        progress: told where it is.
        **training: further arguments of `safety_neurons.tuning.tune`: `learning_rate`, `epochs`, `max_steps`, `batch_size`, …

    Raises:
        what `safety_neurons.tuning.tune` raises.

    Source: Zhao et al., ICLR 2025, section 4 (SN-Tune).
    Differs: held-out checks and early stopping, rates with intervals by a named judge, measured on prompts that were not learnt.
    """
    tell = progress or (lambda stage, status: None)
    notes: list[str] = []
    batch_size = training.get("batch_size", "auto")
    data, others = read(dataset, model), None if harmless is None or not mix else read(harmless, model)
    tests = [read(source, model) for source in (test_harmful, test_harmless)]
    learnt, others, watch = data, others, None
    if check:
        learnt, others, held = _held_out(model, data, others, seed, notes)
        if held is not None:
            watch = StopCheck(*held, _refused, check_every, tolerance=tolerance, max_divergence=max_divergence, batch_size=batch_size)
    if others is not None:
        tell("harmless answers", None)
        others = _answered(model, others, max_new_tokens, folder, batch_size, notes)
    bench = Bench(
        *tests,
        None if text is None else read(text, model),
        max_new_tokens,
        batch_size,
        seed,
        None if folder is None else folder / "completions.jsonl",
        lambda arm: tell(f"measure {arm}", None),
    )
    before = bench.measure(model, "untreated")
    tuned = train(
        model,
        neurons,
        learnt,
        harmless=others,
        mix=mix,
        protect=protect,
        check=watch,
        checkpoint=None if folder is None else Checkpoint(folder / "checkpoints" / "tune.safetensors"),
        seed=seed,
        progress=lambda status: tell("train", status),
        **training,
    )
    after = bench.measure(model, "tuned", lambda: beside(model, tuned.delta))
    bench.finish()
    held = {"harmful": len(watch.harmful) if watch else 0, "harmless": len(watch.harmless) if watch else 0}
    return Tuning(
        tuned,
        before,
        after,
        paired_difference(after.harmful, before.harmful, seed=seed),
        paired_difference(after.harmless, before.harmless, seed=seed),
        model.table.n_parameters,
        held,
        {"harmful": tests[0].overlap(learnt), "harmless": tests[1].overlap(others) if others is not None else 0},
        tuple(dict.fromkeys([*notes, *tuned.notes, *bench.notes])),
    )


def _held_out(
    model: LanguageModel, data: Prompts, harmless: Prompts | None, seed: int, notes: list[str]
) -> tuple[Prompts, Prompts | None, tuple[Prompts, Prompts] | None]:
    """What is learnt of the data and of the harmless prompts, and what the check looks at; all is learnt where there is too little."""
    learnt, harmful = split(data, HELD_OUT, MOST_HELD_OUT, seed)
    source = harmless if harmless is not None else read("builtin:harmless", model)
    others, friendly = split(source, HELD_OUT, MOST_HELD_OUT, seed)
    if min(len(harmful), len(friendly)) < LEAST_HELD_OUT:
        notes.append(
            f"{len(data)} harmful and {len(source)} harmless prompts are too few to hold some out: there was no check while training, "
            "and the last state was kept"
        )
        return data, harmless, None
    return learnt, others if harmless is not None else None, (harmful, friendly)


def _answered(
    model: LanguageModel, harmless: Prompts, max_new_tokens: int, folder: pathlib.Path | None, batch_size: Any, notes: list[str]
) -> Prompts:
    """Harmless prompts with answers; the model's own are kept in the folder and used again, and not learnt where they refuse."""
    file = None if folder is None else folder / "harmless-answers.jsonl"
    done = Completions.load(file) if file is not None and file.is_file() and file.stat().st_size else None

    def keep(completion: Completion) -> None:
        if file is not None:
            Completions([completion]).append(file)

    def usable(completions: Completions) -> list[bool]:
        return [refused is False for refused in _refused(completions)]

    return with_own_answers(
        harmless, model, max_new_tokens=max_new_tokens, batch_size=batch_size, keep=usable, done=done, answered=keep, notes=notes
    )


def _refused(completions: Completions) -> Sequence[bool | None]:
    return judge_refusal(completions).refused
