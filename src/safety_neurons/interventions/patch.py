"""Patch neurons: overwrite their activations while the model runs, with another model's or with constants."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from safety_neurons.errors import MismatchError, UsageError
from safety_neurons.interventions import constants, rows
from safety_neurons.interventions.stacked import StackedPass, can_stack, stacked_forwards
from safety_neurons.interventions.targets import Subject, dense_only, indices
from safety_neurons.interventions.twin_pass import TwinPass
from safety_neurons.model.hooks import around, editing, with_forwards
from safety_neurons.model.modes import evaluating
from safety_neurons.neurons import NeuronSet


@contextlib.contextmanager
def patched(
    base: Any,
    aligned: Any,
    neurons: NeuronSet | Mapping[str, Any],
    *,
    mode: str = "donor",
    alpha: float = 1.0,
    values: Any = None,
    seed: int = 0,
) -> Iterator[Any]:
    """Overwrites activations of `base` inside a ``with`` block, at every position of every pass.

    With ``mode="donor"`` this is dynamic activation patching: the donor reads the text that the patched model writes (prompt and every
    token emitted so far, padding included), and the chosen activations of `base` are overwritten with the donor's. Each keeps its own
    history in its own key-value cache; the donor is never patched. Greedy search, sampling, beam search, assisted decoding, streaming,
    stopping criteria, logits processors and teacher-forced passes all go through it, by `LanguageModel.complete` or by
    ``base.model.generate``. Two views of one model (adapters on one base) run as one batch of twice the rows. Both models are in
    evaluation mode meanwhile.

    Source: Chen et al., arXiv 2406.14144, algorithm 1 (dynamic activation patching).
    Differs: sampling and beams are guided too; a decoding mode that cannot be followed raises instead of going on unguided; one doubled
        batch instead of two models where the two share their base.

    Args:
        base: The model to patch: a `LanguageModel` or a Hugging Face model.
        aligned: The donor; not used (and may be None) by the other modes. The same object as `base` patches it with itself.
        neurons: Which activations. An empty set leaves `base` as it is, bit for bit.
        mode: `donor`, `mean` (set to `values`), `zero`, `noise` (add `alpha` × `values` × a standard normal draw), or `scale` (the
            neuron's own activation times `alpha`).
        alpha: The factor of `noise` and `scale`.
        values: Means or standard deviations: one number, or per key a vector (one per neuron of the site, or per chosen neuron).
        seed: Seed of the noise.

    Yields:
        The patched model, as passed in.

    Raises:
        MismatchError: The two models differ in their sites or their vocabulary.
        ForeignModelError: The neurons were found on another architecture.
        UnsupportedModelError: A key that is not active at every token (a routed expert).
        UsageError: A mode or values that do not fit; or `base` is being patched already.
        DecodeError: While running: a cache or decoding mode that the donor cannot follow.
    """
    subject = Subject.of(base)
    chosen = indices(subject.anatomy, neurons)
    dense_only(chosen, subject.anatomy, "patching")
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(subject.model))
        stack.enter_context(rows.active(subject))
        if mode != "donor":
            stack.enter_context(editing(subject.anatomy, constants.editors(subject, chosen, mode, alpha, values, seed)))
        else:
            donor = _donor(subject, aligned)
            if chosen:
                _follow(stack, subject, donor, chosen)
        yield base


def _donor(subject: Subject, aligned: Any) -> Subject:
    if aligned is None:
        raise UsageError("mode 'donor' needs the model that gives its activations; pass it as `aligned`, or choose another mode")
    donor = Subject.of(aligned)
    if donor.anatomy.table.sizes != subject.anatomy.table.sizes:
        raise MismatchError(
            f"base has {subject.anatomy.table.n_neurons} neurons in {len(subject.anatomy.table.keys)} matrices, the donor "
            f"{donor.anatomy.table.n_neurons} in {len(donor.anatomy.table.keys)}; pass two models of one architecture"
        )
    own, other = (getattr(getattr(one.body, "config", None), "vocab_size", None) for one in (subject, donor))
    if own != other:
        raise MismatchError(f"base has a vocabulary of {own} tokens and the donor of {other}; pass two models with one tokenizer")
    readers = [getattr(one.view, "tokenizer", None) for one in (subject, donor)]
    if None not in readers and readers[0] is not readers[1]:
        ours, theirs = (reader.get_vocab() for reader in readers if reader is not None)
        differing = sorted(word for word in ours.keys() | theirs.keys() if ours.get(word) != theirs.get(word))
        if differing:
            raise MismatchError(
                f"base and donor read text with tokenizers of which {len(differing)} tokens differ, {differing[0]!r} among them, and are "
                "fed the same ids; pass two models with one tokenizer"
            )
    return donor


def _follow(stack: contextlib.ExitStack, base: Subject, donor: Subject, chosen: dict[str, Any]) -> None:
    """Puts the donor, in evaluation mode as the base model is, beside every pass of the base model until the stack closes."""
    stack.enter_context(evaluating(donor.model))
    running: StackedPass | TwinPass
    if can_stack(base, donor):
        running = StackedPass(base, donor, chosen)
        stack.enter_context(with_forwards(stacked_forwards(base, donor)))
    else:
        running = TwinPass(base, donor, chosen)
        if not running.shared:
            stack.enter_context(donor.active())
            stack.enter_context(editing(donor.anatomy, running.recorders()))
    rows.start(base.body, running)
    stack.callback(rows.stop, base.body)
    stack.callback(running.follower.release)
    stack.enter_context(editing(base.anatomy, running.editors()))
    stack.enter_context(around(base.body, before=running.before, after=running.after))
