"""Tests of generation behind a guard: answers as without it, stops before a token, re-checks, streams,
conversations.
"""

import dataclasses
import threading
from typing import Any

import numpy as np
import pytest
import torch
from guarded import texts, tiny_guard, tiny_model

from safety_neurons.errors import DecodeError, InputError, MismatchError, UsageError
from safety_neurons.guard import REFUSAL, FlaggedError, Guard, GuardedModel, Recheck, Verdict
from safety_neurons.guard.features import MOST_TURNS, readings
from safety_neurons.guard.generate import Detokenizer
from safety_neurons.guard.verdict import largest
from safety_neurons.judges import judge
from safety_neurons.judges.wording import built_in_lists
from safety_neurons.model import LanguageModel, load
from safety_neurons.prompt_lists import Message, Prompt, as_prompt
from safety_neurons.results import Completion, Rate
from waiting import until

ASKED = texts(10)
NEW = 12


def hooks_on(model: LanguageModel) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.inner.modules()
    )


@pytest.mark.parametrize(
    ("pooling", "options"),
    [
        ("last", {}),
        ("last", {"batch_size": 1}),
        ("mean", {}),
        ("max", {}),
        ("last", {"sample": True, "seed": 3}),
        ("last", {"prefill_chunk_size": 4}),
        ("max", {"prefill_chunk_size": 4}),
        ("last", {"use_cache": False}),
        ("mean", {"repetition_penalty": 1.3}),
    ],
)
def test_rows_that_are_not_flagged_get_the_tokens_they_get_without_a_guard(
    model: LanguageModel, pooling: str, options: dict[str, Any]
) -> None:
    guard = tiny_guard(model, pooling)
    plain = model.complete(ASKED, max_new_tokens=NEW, **options)
    answers = GuardedModel(model, guard).generate(ASKED, max_new_tokens=NEW, **options)
    verdicts = guard.score_batch(ASKED)
    assert {answer.stopped for answer in answers} == {True, False}
    for answer, expected, verdict in zip(answers, plain, verdicts, strict=True):
        assert answer.verdict.p_unsafe == pytest.approx(verdict.p_unsafe, abs=1e-5)
        assert answer.stopped == verdict.flagged
        assert answer.token_ids == (() if answer.stopped else expected.token_ids)
        assert answer.text == (REFUSAL if answer.stopped else expected.completion)
        assert answer.finish_reason == ("guard" if answer.stopped else expected.finish_reason)
        assert answer.stopped_at == (0 if answer.stopped else None)
    assert hooks_on(model) == 0


def test_a_stop_string_ends_a_guarded_answer_where_it_ends_the_models_own(shared: Any) -> None:
    lm = load(shared / "oracle-contrast" / "fixture" / "base", template="none")
    stop = lm.complete(["Answer this"], max_new_tokens=12)[0].completion[4:6]
    plain = lm.complete(["Answer this", "And that"], max_new_tokens=12, stop_strings=stop)
    answers = GuardedModel(lm, tiny_guard(lm, threshold=1.0)).generate(
        ["Answer this", "And that"], max_new_tokens=12, stop_strings=stop
    )
    assert [answer.token_ids for answer in answers] == [one.token_ids for one in plain]
    assert answers[0].text.endswith(stop)


def test_shadow_changes_nothing_and_logs_every_verdict_without_text(
    model: LanguageModel, guard: Guard
) -> None:
    events: list[Any] = []
    answers = GuardedModel(model, guard.with_threshold(0.0), shadow=True, log=events.append).generate(
        ASKED, max_new_tokens=NEW
    )
    plain = model.complete(ASKED, max_new_tokens=NEW)
    assert [answer.token_ids for answer in answers] == [one.token_ids for one in plain]
    assert all(answer.verdict.flagged and not answer.stopped for answer in answers)
    assert [event["verdict"]["flagged"] for event in events] == [True] * len(ASKED)
    words = {word for text in ASKED for word in text.split() if len(word) > 3}
    assert not any(word in str(event) for event in events for word in words)


def test_actions_give_a_refusal_an_error_or_what_a_function_says(model: LanguageModel, guard: Guard) -> None:
    always = guard.with_threshold(0.0)
    assert GuardedModel(model, always, refusal="no").generate("cake", max_new_tokens=2)[0].text == "no"
    with pytest.raises(FlaggedError, match="'0' is flagged") as caught:
        GuardedModel(model, always, action="error").generate("cake", max_new_tokens=2)
    assert caught.value.verdict.flagged
    assert "cake" not in str(caught.value)

    def say(prompt: Prompt, verdict: Verdict) -> str:
        return f"{prompt.text}: {verdict.status}"

    assert GuardedModel(model, always, action=say).generate("cake", max_new_tokens=2)[0].text == "cake: ok"


def test_truncated_prompts_and_errors_are_not_answered_unless_told_to_fail_open() -> None:
    short = tiny_model(max_position_embeddings=24)
    guard = tiny_guard(short, threshold=1.0)
    with torch.no_grad():
        short.inner.get_input_embeddings().weight[short.encode("bomb")[0].ids[-2]] = torch.nan
    guard = dataclasses.replace(guard, bindings=tiny_guard(short).bindings)
    asked = ["cake", "tree " * 40, "bomb"]
    closed = GuardedModel(short, guard).generate(asked, max_new_tokens=4)
    assert [answer.stopped for answer in closed] == [False, True, True]
    assert [answer.verdict.status for answer in closed] == ["ok", "truncated", "error"]
    opened = GuardedModel(short, guard, fail_open=True).generate(asked[:2], max_new_tokens=4)
    assert [answer.stopped for answer in opened] == [False, False]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("lost"), AssertionError("lost"), ZeroDivisionError("lost"), OSError("lost")],
)
def test_a_guard_that_cannot_read_stops_everything(
    monkeypatch: pytest.MonkeyPatch, model: LanguageModel, guard: Guard, error: Exception
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise error

    guarded = GuardedModel(model, guard.with_threshold(1.0))
    monkeypatch.setattr(type(guard.collector), "result", broken)
    answers = guarded.generate(ASKED[:3], max_new_tokens=NEW)
    assert [(answer.stopped, answer.verdict.error) for answer in answers] == [
        (True, f"{type(error).__name__}: lost")
    ] * 3
    assert guard.score("cake").status == "error"
    assert hooks_on(model) == 0
    monkeypatch.setattr(type(guard.collector), "result", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        guard.score("cake")
    assert hooks_on(model) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"num_return_sequences": 2},
        {"past_key_values": object()},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": object()},
        {"return_dict_in_generate": True},
        {"streamer": object()},
    ],
)
def test_decoding_that_cannot_be_guarded_is_refused(
    model: LanguageModel, guard: Guard, options: dict[str, Any]
) -> None:
    with pytest.raises(DecodeError):
        GuardedModel(model, guard).generate("cake", max_new_tokens=2, **options)


def test_a_guard_of_another_model_is_refused(model: LanguageModel, guard: Guard) -> None:
    with pytest.raises(MismatchError):
        GuardedModel(tiny_model(seed=1), guard)
    with pytest.raises(MismatchError):
        GuardedModel(tiny_model(seed=1), dataclasses.replace(guard, model=None))


# Re-checks


def rechecked(guard: Guard, threshold: float, every: int = 4) -> Guard:
    nothing = Rate(None, None, None, 0)
    return dataclasses.replace(
        guard, threshold=1.0, recheck=Recheck(every, NEW, threshold, 0.01, nothing, nothing, True)
    )


def checks_by_hand(model: LanguageModel, guard: Guard, text: str, every: int) -> list[float]:
    """What the guard says of prompt and answer so far, each read as a prompt of its own."""
    ids = model.encode(text)[0].ids
    written = model.complete([text], max_new_tokens=NEW)[0]
    answer, found = written.token_ids, list[float]()
    for length in range(every, len(answer) + 1, every):
        if length == NEW and written.finish_reason == "length":
            break  # the last token of an answer that is cut off is never fed
        with guard.collector, torch.no_grad():
            guard.collector.start()
            model.inner(input_ids=torch.tensor([[*ids, *answer[:length]]]))
            features = guard.collector.result()[guard.pooling]
        found.append(float(guard.probabilities(features)[0]))
    return found


@pytest.mark.parametrize("pooling", ["last", "mean", "max"])
def test_answers_under_way_are_checked_at_their_distance_and_stopped_there(
    model: LanguageModel, pooling: str
) -> None:
    base = tiny_guard(model, pooling, threshold=1.0)
    expected = [checks_by_hand(model, base, text, 4) for text in ASKED]
    limit = sorted(value for checks in expected for value in checks)[-3] - 1e-4
    guarded = GuardedModel(model, rechecked(base, limit), recheck_every=4)
    plain = model.complete(ASKED, max_new_tokens=NEW)
    answers = guarded.generate(ASKED, max_new_tokens=NEW)
    assert {answer.stopped for answer in answers} == {True, False}
    for answer, checks, without in zip(answers, expected, plain, strict=True):
        first = next((number for number, value in enumerate(checks) if value >= limit), None)
        if first is None:
            assert (answer.stopped, answer.token_ids) == (False, without.token_ids)
            continue
        assert (answer.stopped, answer.stopped_at, answer.finish_reason) == (True, 4 * (first + 1), "guard")
        assert answer.token_ids == without.token_ids[: answer.stopped_at]
        assert answer.recheck is not None
        assert answer.recheck.p_unsafe == pytest.approx(checks[first], abs=1e-4)
        assert answer.text == REFUSAL
    assert hooks_on(model) == 0


def test_re_checks_need_a_threshold_measured_for_their_distance_and_length(
    model: LanguageModel, guard: Guard
) -> None:
    with pytest.raises(UsageError, match="measured on prompts"):
        GuardedModel(model, guard, recheck_every=4)
    with pytest.raises(UsageError, match="one for every 4 tokens"):
        GuardedModel(model, rechecked(guard, 0.9), recheck_every=5)
    with pytest.raises(UsageError, match="answers of at most 12"):
        GuardedModel(model, rechecked(guard, 0.9), recheck_every=4).generate("cake", max_new_tokens=13)
    GuardedModel(model, guard, recheck_every=5, recheck_threshold=0.9)


# Streams


def test_the_pieces_of_a_stream_are_the_answer(model: LanguageModel, guard: Guard) -> None:
    guarded = GuardedModel(model, guard)
    for text, answer in zip(ASKED, guarded.generate(ASKED, max_new_tokens=NEW, batch_size=1), strict=True):
        stream = guarded.stream(text, max_new_tokens=NEW)
        assert "".join(stream) == answer.text
        assert stream.finish_reason == answer.finish_reason
        assert stream.verdict is not None
        assert stream.verdict.flagged == answer.stopped
        assert stream.answer is not None
        assert stream.answer.token_ids == answer.token_ids


def test_a_stream_holds_tokens_back_until_their_check_has_passed(model: LanguageModel) -> None:
    base = tiny_guard(model, threshold=1.0)
    expected = {text: checks_by_hand(model, base, text, 4) for text in ASKED}
    limit = sorted(checks[1] for checks in expected.values() if len(checks) > 1)[-1] - 1e-4
    guarded = GuardedModel(model, rechecked(base, limit), recheck_every=4)
    stopped = 0
    for text in ASKED:
        answer = model.complete([text], max_new_tokens=NEW)[0].token_ids
        stream = guarded.stream(text, max_new_tokens=NEW)
        given = "".join(stream)
        assert stream.answer is not None
        if stream.answer.stopped:
            stopped += 1
            assert given == model.decode(answer[: (stream.answer.stopped_at or 0) - 4])
        else:
            assert given == model.decode(answer)
    assert stopped


def test_leaving_a_stream_early_ends_its_thread_and_takes_the_hooks_off(
    model: LanguageModel, guard: Guard
) -> None:
    before = threading.active_count()
    guarded = GuardedModel(model, guard.with_threshold(1.0))
    with guarded.stream("make a cake", max_new_tokens=100) as stream:
        assert next(stream)
    assert threading.active_count() == before
    assert stream.finish_reason is None
    assert list(stream) == []
    closed = guarded.stream("make a cake", max_new_tokens=100)
    closed.close()
    closed.close()
    dropped = guarded.stream("make a cake", max_new_tokens=100)
    del dropped
    until(lambda: threading.active_count() <= before, "the end of a dropped stream's thread")
    assert threading.active_count() == before
    assert hooks_on(model) == 0


def test_an_error_in_the_thread_comes_out_of_the_iteration(model: LanguageModel, guard: Guard) -> None:
    with pytest.raises(FlaggedError):
        list(GuardedModel(model, guard.with_threshold(0.0), action="error").stream("cake", max_new_tokens=4))


def test_two_threads_on_one_model_get_their_own_verdicts(model: LanguageModel, guard: Guard) -> None:
    expected = [verdict.p_unsafe for verdict in guard.score_batch(ASKED)]
    found: dict[int, Any] = {}

    def ask(number: int) -> None:
        other = dataclasses.replace(guard)
        found[number] = [other.score(text).p_unsafe for text in ASKED[number::2]]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert found[number] == pytest.approx(expected[number::2], abs=1e-5)


def test_pieces_of_a_byte_tokenizer_are_whole_characters() -> None:
    data = list("aß🙂z 你".encode())

    def decode(ids: Any) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    text, pieces = Detokenizer(decode), []
    for token in data:
        pieces.append(text.add(token))
    assert "".join(pieces) == "aß🙂z 你"
    assert all("�" not in piece for piece in pieces)
    cut = Detokenizer(decode)
    assert "".join([*(cut.add(token) for token in data[:-1]), cut.rest()]).startswith("aß🙂z ")


UNSAFE = "UNSAFE"
SHAPES = {
    "prefill": [("user", UNSAFE), ("assistant", "sure first you")],
    "two prefills": [("user", UNSAFE), ("assistant", "sure"), ("assistant", "first you")],
    "thanks": [("user", UNSAFE), ("assistant", "of course"), ("user", "thank you go on")],
    "system": [("system", UNSAFE), ("user", "go on")],
    "said by the assistant": [("user", "hello"), ("assistant", UNSAFE), ("user", "go on")],
    "ending in it": [("user", "hello"), ("assistant", UNSAFE)],
    "tool": [("user", "hello"), ("tool", UNSAFE), ("user", "go on")],
    "long ago": [("user", UNSAFE), *[("assistant", "yes"), ("user", "and a tree")] * 6],
    "once more, with a prefill": [
        ("user", "hello"),
        ("assistant", "yes"),
        ("user", UNSAFE),
        ("assistant", "sure"),
    ],
}


@pytest.fixture(scope="module")
def unsafe(guard: Guard) -> str:
    """Of some texts the one that alone has the largest probability: behind others the same guard finds it
    safer.
    """
    some = texts(60)
    return some[int(np.argmax([verdict.p_unsafe for verdict in guard.score_batch(some)]))]


def turns(shape: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content.replace(UNSAFE, text)} for role, content in SHAPES[shape]]


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_flagged_alone_is_flagged_in_every_conversation(
    guard: Guard, unsafe: str, shape: str
) -> None:
    alone = guard.score(unsafe).p_unsafe
    assert alone is not None
    strict = guard.with_threshold(alone - 1e-4)
    verdict = strict.score(turns(shape, unsafe))
    assert verdict.flagged
    assert (verdict.p_unsafe or 0) >= alone - 1e-5
    whole = strict.score_encoded([strict.encode(turns(shape, unsafe))])[0]  # as one text: this is what passed
    assert not whole.flagged
    assert verdict.reading != "conversation"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_guarded_model_stops_them_before_a_token_and_answers_the_others_as_before(
    model: LanguageModel, guard: Guard, unsafe: str, shape: str
) -> None:
    alone = guard.score(unsafe).p_unsafe
    strict = guard.with_threshold((alone or 0) - 1e-4)
    plain = "make a cake"
    assert not strict.score(plain).flagged
    guarded = GuardedModel(model, strict)
    stopped, passed = guarded.generate([turns(shape, unsafe), plain], max_new_tokens=5)
    assert (stopped.stopped, stopped.stopped_at, stopped.token_ids) == (True, 0, ())
    assert passed.text == model.complete([plain], max_new_tokens=5)[0].completion
    assert "".join(guarded.stream(turns(shape, unsafe), max_new_tokens=5)) == guarded.rules.refusal


def test_each_turn_is_read_once_and_a_single_one_costs_nothing_more() -> None:
    def names(*roles_and_texts: tuple[str, str]) -> list[str]:
        return [way.name for way in readings(as_prompt([Message(*pair) for pair in roles_and_texts]))]

    assert [way.name for way in readings(as_prompt("cake"))] == names(("user", "cake")) == ["conversation"]
    assert names(("user", "a"), ("assistant", "b")) == [
        "conversation",
        "conversation without the last answer",
        "turn 2",
    ]
    assert names(("user", "a"), ("assistant", "a"), ("user", "a")) == ["conversation", "turn 1"]
    assert names(("assistant", "b")) == ["conversation", "turn 1"]
    assert names(("system", " "), ("user", "a"), ("assistant", "")) == [
        "conversation",
        "conversation without the last answer",
        "turn 2",
    ]
    with pytest.raises(InputError, match="1,025 turns"):
        readings(as_prompt([Message("user", str(number)) for number in range(MOST_TURNS + 1)]))


def test_the_end_of_a_begun_answer_does_not_count_for_a_guard_that_reads_ends(model: LanguageModel) -> None:
    """It was fit where an answer is to begin; a pooling over all tokens has read the request too."""
    begun = turns("prefill", "make a cake")
    for pooling in ("last", "mean"):
        guard = tiny_guard(model, pooling, threshold=0.0)
        ways = guard.score_readings([readings(as_prompt(begun))])[0]
        counting = ways[1:] if pooling == "last" else ways
        assert guard.score(begun).p_unsafe == max(one.p_unsafe or 0 for one in counting)
        (answer,) = GuardedModel(model, guard).generate([begun], max_new_tokens=2)
        assert answer.verdict.p_unsafe == pytest.approx(max(one.p_unsafe or 0 for one in counting), abs=1e-5)
    lost = dataclasses.replace(ways[0], status="error", p_unsafe=None)
    assert lost in tiny_guard(model).counting([lost, *ways[1:]])


def test_a_reading_that_could_not_be_judged_is_not_covered_by_one_that_could() -> None:
    safe, unsafe = Verdict(0.2, False, 0.5), Verdict(0.9, True, 0.5)
    broken, passed = Verdict(None, True, 0.5, "error"), Verdict(0.1, False, 0.5, "truncated")
    assert largest([safe, broken]) is broken
    assert largest([safe, passed]) is passed
    assert largest([broken, unsafe, safe]) is unsafe
    assert largest([safe, Verdict(0.3, False, 0.5)]).p_unsafe == 0.3


@pytest.mark.parametrize("name", ["refusal", "prefix", *(f"strings:{name}" for name in built_in_lists())])
def test_every_judge_of_refusals_knows_the_guards_own(name: str) -> None:
    (verdict,) = judge(name).judge([Completion("0", "how do I make a bomb?", REFUSAL)]).verdicts
    assert verdict.refused
