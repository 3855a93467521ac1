"""Rows that are treated with sets of their own are answered as if each set had a generation of its own."""

from collections.abc import Sequence

import pytest
import torch
from naive import lm, no_hooks, shared_pair, some

from families import MOE_FAMILIES, build, random_ids, sibling
from safety_neurons.errors import DecodeError, UsageError
from safety_neurons.interventions import deactivated, patched
from safety_neurons.interventions.by_row import ByRow, SetTreatment
from safety_neurons.interventions.columns import columns
from safety_neurons.model import LanguageModel, decoding
from safety_neurons.model.batches import decoder_of
from safety_neurons.model.decoding import Decoding, TreatedRows
from safety_neurons.model.hooks import around
from safety_neurons.model.language_model import generate
from safety_neurons.neurons import NeuronSet

STEPS = 8
START = [7, 11, 13, 17, 19, 23, 29, 31, 37, 41]
PROMPTS = [[*START[row % 3 :], *range(50 + row, 51 + row + row % 4)] for row in range(6)]
ALIKE = [[*START, *range(50 + row, 51 + row + row % 4)] for row in range(6)]


def sets_of(model: LanguageModel) -> list[NeuronSet]:
    """Of one site, of all, none, and again another part."""
    return [
        some(model, 0.6, 1, ("down",)),
        some(model, 0.5, 2),
        NeuronSet({}, model.table),
        some(model, 0.5, 3, ("q", "up")),
    ]


def treatments_of(kind: str, family: str = "llama") -> tuple[LanguageModel, list[SetTreatment]]:
    if kind in ("ia3", "lora"):
        base, donor = shared_pair(kind)
    else:
        base = lm(build(family))
        donor = lm(sibling(base.model))
    sets = sets_of(base)
    if kind == "deactivated":
        return base, [SetTreatment(deactivated, (base,), one) for one in sets]
    return base, [SetTreatment(patched, (base, donor), one) for one in sets]


def apart(
    model: LanguageModel, treatments: Sequence[SetTreatment], prompts: Sequence[list[int]]
) -> list[list[int]]:
    """Answers of one generation for every set."""
    found = []
    for one in treatments:
        with one():
            answers = generate(model, prompts, Decoding(STEPS), batch_size=1)
        found += [answers[row].token_ids for row in range(len(prompts))]
    return found


def together(
    model: LanguageModel, treatments: Sequence[SetTreatment], prompts: Sequence[list[int]], size: int = 99
) -> list[list[int]]:
    """Answers of one generation for all of them."""
    which = [number for number in range(len(treatments)) for _ in prompts]
    how = Decoding(STEPS, treated=TreatedRows(which, lambda rows: treatments[0].in_rows(treatments, rows)))
    answers = generate(model, [*prompts] * len(treatments), how, batch_size=size)
    return [answers[row].token_ids for row in range(len(which))]


@pytest.mark.parametrize("prompts", [PROMPTS, ALIKE], ids=["of several starts", "of one start"])
@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("deactivated", "llama"),
        ("deactivated", "gemma2"),
        ("two models", "llama"),
        ("two models", "bloom"),
        ("ia3", "llama"),
        ("lora", "llama"),
    ],
)
def test_every_row_is_answered_under_its_own_set(
    kind: str, family: str, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, treatments = treatments_of(kind, family)
    monkeypatch.setattr(decoding, "SHARED", 3)
    expected = apart(model, treatments, prompts)
    lengths = {len(answer) for answer in expected}
    assert len({tuple(map(tuple, expected[place : place + 6])) for place in range(0, 24, 6)}) > 2
    assert together(model, treatments, prompts) == expected
    assert together(model, treatments, prompts, 5) == expected  # batches of several sets' rows
    no_hooks(model.model)
    model.eos_ids = tuple({answer[3] for answer in expected if len(answer) > 3})  # rows end at all steps
    expected = apart(model, treatments, prompts)
    assert len({len(answer) for answer in expected}) > len(lengths)
    assert together(model, treatments, prompts) == expected


def test_a_batch_that_does_not_fit_is_halved_with_its_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    model, treatments = treatments_of("deactivated")
    expected, run, refused = apart(model, treatments, PROMPTS), model.model.generate, []

    def small(*args: object, **given: torch.Tensor) -> object:
        if len(given["input_ids"]) > 7:
            refused.append(len(given["input_ids"]))
            raise torch.OutOfMemoryError("no room")
        return run(*args, **given)

    monkeypatch.setattr(model.model, "generate", small)
    assert together(model, treatments, PROMPTS) == expected
    assert refused


def test_a_start_is_read_once_for_every_set() -> None:
    model, treatments = treatments_of("deactivated")
    rows: list[int] = []
    model.eos_ids = ()
    with around(decoder_of(model.model), before=lambda _, given: rows.append(len(given["input_ids"]))):
        together(model, treatments, ALIKE)
    assert rows == [len(treatments)] + [len(treatments) * len(ALIKE)] * STEPS


def test_what_knows_no_rows_is_refused() -> None:
    model, treatments = treatments_of("two models")
    donor, ids = treatments[0].models[1], random_ids((3, 4))
    sets = ByRow(sets_of(model), [0, 1])
    for treated in (deactivated(model, sets), patched(model, donor, sets)):
        with pytest.raises(DecodeError, match="3 rows arrived where 2"), treated, torch.no_grad():
            model.model(input_ids=ids)
    with pytest.raises(UsageError, match="mode 'zero'"), patched(model, donor, sets, mode="zero"):
        pass
    for parameter in model.model.parameters():
        parameter.requires_grad_()
    with pytest.raises(DecodeError, match="without gradients"), deactivated(model, sets):
        model.model(input_ids=ids[:2])


def test_sets_without_rows_cost_nothing_and_sets_beside_them_are_refused() -> None:
    model, treatments = treatments_of("deactivated")
    sets = [one.neurons for one in treatments]
    rows = ByRow(sets, [1, 1, 3])
    acts = [len(list(at.of(torch.zeros(3, 1, 4)))) for at in columns(model.anatomy, rows).values()]
    assert set(acts) <= {0, 1, 2}
    assert max(acts) == 2
    with pytest.raises(UsageError, match="1 more arrived beside sets of every row"):
        columns(model.anatomy, rows, sets[0])


def test_treatments_of_other_models_and_of_routed_experts_do_not_join() -> None:
    model, (one, other, *_) = treatments_of("deactivated")
    assert one.joins(other)
    assert not one.joins(SetTreatment(deactivated, (lm(model.model),), other.neurons))
    assert not one.joins(SetTreatment(patched, (model, model), other.neurons))
    assert not one.joins(lambda: deactivated(model, other.neurons))
    mixture = lm(build(MOE_FAMILIES[0]))
    routed, dense = some(mixture), some(mixture, sites=("q",))
    dense = NeuronSet({key: dense[key] for key, _ in dense.items() if "expert" not in key}, mixture.table)
    assert not SetTreatment(deactivated, (mixture,), dense).joins(
        SetTreatment(deactivated, (mixture,), routed)
    )
    assert SetTreatment(deactivated, (mixture,), dense).joins(SetTreatment(deactivated, (mixture,), dense))
