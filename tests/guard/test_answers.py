"""Tests of the classifier for answers: where answers are read, what it is fit on, its file, what it stops."""

from pathlib import Path

import numpy as np
import pytest
import torch
from guarded import some_neurons, texts, tiny_guard, tiny_model

from safety_neurons.errors import InputError, UsageError
from safety_neurons.guard import (
    AnswerTokens,
    Guard,
    GuardedModel,
    Pooling,
    answers_in,
    answers_written,
    fit_answers,
    fit_guard,
    read_features,
)
from safety_neurons.guard.answers import checks_of
from safety_neurons.guard.features import Pool
from safety_neurons.model import LanguageModel
from safety_neurons.prompt_lists import Prompt, Prompts
from safety_neurons.studies.guard_data import given, own_answers
from tiny import CHAT_TEMPLATE, tiny_llama, tiny_tokenizer

ASKED = texts(60, seed=5)
NEW = 12


def pooled(values: np.ndarray, pooling: Pooling, weights: np.ndarray | None = None) -> np.ndarray:
    """A pooling over the tokens of one text, written out."""
    if pooling.kind == "last":
        return values[-1]
    if pooling.kind == "mean" or (pooling.kind == "max" and len(values) < pooling.window):
        return values.mean(0)
    if pooling.kind == "max":
        starts = range(len(values) - pooling.window + 1)
        return np.max([values[start : start + pooling.window].mean(0) for start in starts], 0)
    assert weights is not None
    last = values[-pooling.window :]
    order = sorted(range(len(last)), key=lambda place: -float(last[place] @ weights))
    return last[order[min(pooling.agree, len(last)) - 1]]


def answers_to(model: LanguageModel) -> list[AnswerTokens]:
    """The model's answers to what is asked."""
    prompts = Prompts([Prompt(str(number), text) for number, text in enumerate(ASKED)])
    return answers_written(model, prompts, model.complete(prompts, max_new_tokens=NEW))


@pytest.fixture(scope="module")
def guard(model: LanguageModel) -> Guard:
    """A guard with a classifier for answers, on answers of the model that were labelled by chance."""
    written = answers_to(model)
    return fit_answers(
        tiny_guard(model, threshold=1.0), written[:30], written[30:], every=4, max_new_tokens=NEW, fpr=0.3
    )


@pytest.mark.parametrize("left", [False, True])
def test_tokens_that_agree_are_those_of_the_definition(left: bool) -> None:
    """A batch with padding, in passes of any length, against each row by itself."""
    random = np.random.default_rng(0)
    lengths, pooling = (9, 3, 1, 6), Pooling("agree", 4, 3)
    weights = random.normal(size=5).astype(np.float32)
    rows = [random.normal(size=(length, 5)).astype(np.float32) for length in lengths]
    values, real = np.full((4, 9, 5), np.nan, np.float32), np.zeros((4, 9), bool)
    for row, own in enumerate(rows):
        place = slice(9 - len(own), None) if left else slice(len(own))
        values[row, place], real[row, place] = own, True
    for cuts in ([], [2], [1, 2, 3, 7]):
        pool = Pool(pooling, torch.from_numpy(weights))
        for start, end in zip([0, *cuts], [*cuts, 9], strict=True):
            pool.add(torch.from_numpy(values[:, start:end]), torch.from_numpy(real[:, start:end]))
        expected = [pooled(own, pooling, weights) for own in rows]
        assert np.array_equal(pool.result().numpy(), np.stack(expected))
    rows[1][1, 0] = np.nan
    pool = Pool(pooling, torch.from_numpy(weights))
    pool.add(torch.from_numpy(rows[1][None]), None)
    assert pool.result().isnan().all()


def test_a_score_by_agreement_reaches_a_threshold_where_so_many_tokens_do(model: LanguageModel) -> None:
    unsafe = [f"make the bomb {text}" for text in texts(20, seed=1, longest=4)]
    safe = [f"make the cake {text}" for text in texts(20, seed=2, longest=4)]
    fitted = fit_guard(
        model, some_neurons(model), unsafe, safe, pooling="agree", window=5, agree=2, other=None, seed=3
    )
    assert fitted.pooling == Pooling("agree", 5, 2)
    plain = tiny_guard(model)
    assert plain.neurons == fitted.neurons
    for text in (*unsafe[:4], *safe[:4], "cake"):
        ids = model.encode(text)[0].ids
        tokens = [
            read_features(model, text, fitted.neurons).values[0]
            if length == len(ids)
            else _at(model, plain, ids, length)
            for length in range(max(1, len(ids) - 4), len(ids) + 1)
        ]
        scores = sorted(fitted.classifier.scores(torch.from_numpy(np.stack(tokens))).tolist())
        chance = fitted.classifier.chances(torch.tensor([scores[-2]], dtype=torch.float64))[0]
        assert fitted.score(text, top=0).p_unsafe == pytest.approx(float(chance), abs=1e-5)


def _at(model: LanguageModel, guard: Guard, ids: list[int], length: int) -> np.ndarray:
    """Activations of the neurons of a guard that reads the last token, from a pass that ends there."""
    with guard.collector, torch.no_grad():
        guard.collector.start()
        model.inner(input_ids=torch.tensor([ids[:length]]))
        return next(iter(guard.collector.result().values()))[0].numpy()


@pytest.fixture(scope="module")
def read(model: LanguageModel) -> tuple[list[AnswerTokens], list[list[np.ndarray]]]:
    """Answers, and what is read at every token of the first twelve."""
    written, guard, rows = answers_to(model), tiny_guard(model), []
    for one in written[:12]:
        ids, n_read = [*one.question, *one.token_ids], len(one.token_ids) - (not one.finished)
        lengths = range(len(one.question) + 1, len(one.question) + n_read + 1)
        rows.append([_at(model, guard, ids, length) for length in lengths])
    return written, rows


def test_an_answer_is_read_every_few_tokens_behind_a_thought_and_at_its_end() -> None:
    answer = AnswerTokens(Prompt("a", "b"), (1, 2), tuple(range(10)))
    assert checks_of(answer, 4, 64) == (4, 8, 10)
    assert checks_of(answer, 4, 8) == (4, 8)
    assert checks_of(answer, 4, 64, frozenset({5})) == (4, 6, 8, 10)
    cut = AnswerTokens(Prompt("a", "b"), (1, 2), tuple(range(8)), finished=False)
    assert checks_of(cut, 4, 8) == (4, 7)  # the last token of what was cut off is fed to no model
    assert checks_of(AnswerTokens(Prompt("a", "b"), (1,), ()), 4, 8) == ()


@pytest.mark.parametrize("pooling", ["last", "mean", "max", "agree"])
def test_a_guarded_model_stops_an_answer_where_its_classifier_says_so_by_hand(
    model: LanguageModel, read: tuple[list[AnswerTokens], list[list[np.ndarray]]], pooling: str
) -> None:
    written, rows = read
    base = tiny_guard(model, threshold=1.0)
    guard = fit_answers(
        base, written[:30], written[30:], every=4, max_new_tokens=NEW, fpr=0.3, pooling=pooling
    )
    answers = guard.answers
    assert answers is not None
    assert answers.pooling.kind == pooling
    assert answers.neurons == base.neurons
    expected = []
    for values in rows:
        direction = answers.classifier.direction.numpy()
        expected.append(
            {
                length: float(
                    answers.probabilities(
                        torch.from_numpy(pooled(np.stack(values[:length]), answers.pooling, direction))[None]
                    )[0]
                )
                for length in range(4, len(values) + 1, 4)
            }
        )
    limit = float(np.median([max(checks.values()) for checks in expected if checks]))
    guarded = GuardedModel(model, guard, recheck_every=4, recheck_threshold=limit - 1e-6)
    stopped = 0
    for one, checks, answer in zip(
        written, expected, guarded.generate(ASKED[:12], max_new_tokens=NEW), strict=False
    ):
        first = next((length for length, chance in checks.items() if chance >= limit - 1e-6), None)
        assert answer.stopped_at == first
        assert answer.token_ids == one.token_ids[: first if first else len(one.token_ids)]
        stopped += answer.stopped
        if first:
            assert answer.recheck is not None
            assert answer.recheck.p_unsafe == pytest.approx(checks[first], abs=1e-5)
    assert 0 < stopped < 12


def test_the_threshold_is_set_on_the_largest_check_of_each_safe_answer(guard: Guard) -> None:
    recheck = guard.recheck
    assert recheck is not None
    assert guard.answers is not None
    assert (recheck.every, recheck.max_new_tokens, recheck.own) == (4, NEW, True)
    kept = guard.answers.reference["probabilities"]["safe"]
    flagged = sum(chance >= recheck.threshold for chance in kept)
    assert recheck.fpr.value == pytest.approx(flagged / len(kept))
    assert (flagged + 1) / (len(kept) + 1) <= 0.3 < (flagged + 2) / (len(kept) + 1)
    assert not recheck.supported
    assert "safe answers" in recheck.why


def test_what_the_checks_stop_is_as_sure_as_there_are_groups(model: LanguageModel) -> None:
    prompts = Prompts([Prompt(str(n), text, group=str(n // 3)) for n, text in enumerate(ASKED)])
    written = answers_written(model, prompts, model.complete(prompts, max_new_tokens=NEW))
    half = len(written) // 6 * 3
    found = fit_answers(
        tiny_guard(model), written[:half], written[half:], every=4, max_new_tokens=NEW, fpr=0.3
    )
    assert found.recheck is not None
    assert found.answers is not None
    (point,) = (one for one in found.answers.operating_points if one.fpr_target == 0.3)
    for rate, known in ((found.recheck.fpr, point.fpr), (found.recheck.tpr, point.tpr)):
        assert (rate.value, rate.low, rate.high) == pytest.approx((known.value, known.low, known.high))


def test_words_that_give_an_answer_away_are_learnt_from_records(model: LanguageModel) -> None:
    """A planted truth: unsafe answers speak of a bomb."""
    prompts = {
        word: Prompts(
            [
                Prompt(f"{word}{number}", text, answer=f"{word} {word} {more} {word} {text} {word}")
                for number, (text, more) in enumerate(zip(texts(40, seed=7), texts(40, seed=8), strict=True))
            ]
        )
        for word in ("bomb", "cake")
    }
    unsafe, safe = answers_in(model, prompts["bomb"]), answers_in(model, prompts["cake"])
    guard = fit_answers(tiny_guard(model), unsafe, safe, every=4, max_new_tokens=32, fpr=0.05)
    assert guard.recheck is not None
    assert guard.recheck.auroc is not None
    assert (guard.recheck.auroc.value or 0) > 0.9
    assert guard.answers is not None
    split = guard.answers.report["split"]
    assert all(part["unsafe"] == part["safe"] for part in split.values())


def test_the_file_keeps_the_classifier_for_answers(
    guard: Guard, model: LanguageModel, tmp_path: Path
) -> None:
    guard.save(tmp_path / "guard")
    again = Guard.load(tmp_path / "guard", model)
    assert again.sha256 == guard.sha256
    assert again.recheck == guard.recheck
    assert again.answers is not None
    assert again.answers.pooling == guard.answers.pooling  # type: ignore[union-attr]
    asked = {"max_new_tokens": NEW}
    ours, theirs = (
        GuardedModel(model, one, recheck_every=4).generate(ASKED[:6], **asked) for one in (guard, again)
    )
    assert [one.token_ids for one in ours] == [one.token_ids for one in theirs]
    other = fit_like(guard, tiny_model(seed=1))
    other.save(tmp_path / "other")
    inside = tmp_path / "guard" / "answers"
    inside.rename(tmp_path / "set aside")
    assert guard.answers is not None
    for answers, refused in (
        (guard.answers.with_threshold(0.123), "not as Guard.save wrote it"),
        (other.answers, "answers of another guard"),
    ):
        assert answers is not None
        answers.save(inside)
        with pytest.raises(InputError, match=refused):
            Guard.load(tmp_path / "guard")


def fit_like(guard: Guard, model: LanguageModel) -> Guard:
    """A guard with a classifier for answers on another model."""
    written = answers_to(model)
    return fit_answers(tiny_guard(model), written[:30], written[30:], every=4, max_new_tokens=NEW)


def test_an_answer_is_checked_where_its_thought_ends() -> None:
    """`</think>` is one token of this vocabulary; the model is made to write it."""
    tokenizer = tiny_tokenizer(CHAT_TEMPLATE)
    tokenizer.add_tokens(["</think>"])
    network = tiny_llama()
    network.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model = LanguageModel(network, tokenizer, name="thinking")
    end = tokenizer.convert_tokens_to_ids("</think>")
    assert model.thought_end_ids == {end}
    written = answers_to(model)
    guard = fit_answers(
        tiny_guard(model, threshold=1.0), written[:30], written[30:], every=8, max_new_tokens=NEW
    )

    def think(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The third token that is written is the end of a thought."""
        if ids.shape[1] == start + 2:
            scores[:] = -torch.inf
            scores[:, end] = 0
        return scores

    start = len(model.encode(ASKED[0])[0].ids)
    seen: list[float | None] = []
    guarded = GuardedModel(
        model,
        guard,
        recheck_every=8,
        recheck_threshold=0.0,
        log=lambda event: seen.append(event["stopped_at"]),
    )
    (answer,) = guarded.generate([ASKED[0]], max_new_tokens=NEW, logits_processor=[think])
    assert answer.stopped_at == 3
    assert seen == [3]


def test_answers_of_the_model_are_told_apart_by_a_judge(model: LanguageModel) -> None:
    data = given(
        Prompts([Prompt(f"u{n}", text) for n, text in enumerate(ASKED[:6])]),
        Prompts([Prompt(f"s{n}", text) for n, text in enumerate(ASKED[6:10])]),
    )
    found = own_answers(model, data, "refusal", max_new_tokens=NEW)
    assert len(found.unsafe) + len(found.safe) == 10
    assert {one.prompt.id for one in found.unsafe} <= {f"u{n}" for n in range(6)}


def test_what_cannot_be_fit_is_one_line(model: LanguageModel, guard: Guard) -> None:
    some = [AnswerTokens(Prompt(str(number), "x"), (1, 2), (3, 4, number % 20)) for number in range(30)]
    with pytest.raises(UsageError, match="no longer than the answer"):
        fit_answers(guard, some, some, every=9, max_new_tokens=8)
    with pytest.raises(InputError, match="at least 10"):
        fit_answers(guard, some[:5], some[5:], every=2, max_new_tokens=8)
    with pytest.raises(InputError, match="none of 1 records has an answer"):
        answers_in(model, Prompts([Prompt("a", "b")], "list"))
