"""Answers over HTTP: re-checked while they are written, and judged whole for LiteLLM."""

from typing import Any

import httpx
import openai
import pytest
from guarded import texts, tiny_guard, tiny_model
from server_tools import PATIENT, running

from safety_neurons.errors import UsageError
from safety_neurons.guard import (
    AnswerTokens,
    Guard,
    GuardedModel,
    answers_written,
    fit_answers,
    score_answers,
)
from safety_neurons.guard.server import Limits, Settings, serve_guard
from safety_neurons.model import LanguageModel
from safety_neurons.prompt_lists import Prompt, Prompts

ASKED, NEW = texts(40, seed=5), 12


@pytest.fixture(scope="module")
def guard(model: LanguageModel) -> Guard:
    """Stops about a third of the model's answers."""
    prompts = Prompts([Prompt(str(number), text) for number, text in enumerate(ASKED)])
    written = answers_written(model, prompts, model.complete(prompts, max_new_tokens=NEW))
    base = tiny_guard(model, threshold=1.0)
    return fit_answers(base, written[:20], written[20:], every=4, max_new_tokens=NEW, fpr=0.3)


@pytest.fixture(scope="module")
def served(guard: Guard) -> str:
    settings = Settings("tiny", recheck_every=4, limits=Limits(new_tokens=64))
    with running(serve_guard(guard, settings)) as address:
        yield address


def test_an_answer_is_stopped_where_a_guarded_model_stops_it(
    served: str, guard: Guard, model: LanguageModel
) -> None:
    guarded, reasons = GuardedModel(model, guard, recheck_every=4), set[str]()
    with openai.OpenAI(base_url=f"{served}/v1", api_key="none", max_retries=0) as client:
        for text in ASKED[:8]:
            turns = [{"role": "user", "content": text}]
            whole = client.chat.completions.create(model="tiny", messages=turns, max_tokens=NEW)
            pieces = client.chat.completions.create(model="tiny", messages=turns, max_tokens=NEW, stream=True)
            seen = [chunk.choices[0] for chunk in pieces if chunk.choices]
            with guarded.stream(text, max_new_tokens=NEW) as stream:
                expected = "".join(stream)
                reason = "content_filter" if stream.finish_reason == "guard" else stream.finish_reason
            assert whole.choices[0].message.content == expected
            assert whole.choices[0].finish_reason == reason
            assert "".join(choice.delta.content or "" for choice in seen) == expected
            assert seen[-1].finish_reason == reason
            reasons.add(str(reason))
    assert "content_filter" in reasons
    assert len(reasons) > 1


@pytest.mark.parametrize("shadow", [False, True])
def test_answers_that_a_check_flags_are_counted_and_logged(guard: Guard, shadow: bool) -> None:
    events, stopped, route = list[Any](), list[int](), "/v1/chat/completions"
    settings = Settings("tiny", recheck_every=4, shadow=shadow, limits=Limits(new_tokens=64, **PATIENT))
    with running(serve_guard(guard, settings, events.append)) as address:
        for text in ASKED[:8]:
            asked = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": NEW}
            whole = httpx.post(f"{address}{route}", json={**asked, "n": 2}).json()
            streamed = httpx.post(f"{address}{route}", json={**asked, "stream": True}).text
            stopped += [
                sum(choice["finish_reason"] == "content_filter" for choice in whole["choices"]),
                streamed.count('"content_filter"'),
            ]
        page = httpx.get(f"{address}/metrics").text
    logged = [event["flagged_answers"] for event in events if event["route"] == route]
    assert f'flagged_answers_total{{route="{route}"}} {float(sum(logged))}' in page
    assert logged[::2] == [2 * one for one in logged[1::2]]
    assert 0 < sum(logged[1::2]) < 8
    assert stopped == ([0] * 16 if shadow else logged)


def test_longer_answers_than_the_checks_were_measured_on_are_refused(served: str) -> None:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "cake"}], "max_tokens": NEW + 1}
    said = httpx.post(f"{served}/v1/chat/completions", json=asked)
    assert (said.status_code, said.json()["error"]["code"]) == (400, "too_many_tokens")


def test_whole_answers_are_judged_for_post_call(served: str, guard: Guard, model: LanguageModel) -> None:
    decided = set()
    for text in ASKED[:10]:
        turns = [{"role": "user", "content": "make a cake"}]
        asked = {"input_type": "response", "texts": ["cake", text], "structured_messages": turns}
        said = httpx.post(f"{served}/beta/litellm_basic_guardrail_api", json=asked).json()
        prompt = Prompt("0", "make a cake")
        answers = []
        for answer in ("cake", text):
            question, ids, _ = model.encode_answer(prompt, answer)
            answers.append(AnswerTokens(prompt, tuple(question), tuple(ids)))
        flagged = any(verdict.flagged for verdict in score_answers(guard, answers))
        assert said["action"] == ("BLOCKED" if flagged else "NONE")
        decided.add(said["action"])
        if flagged:
            assert "answer" in said["blocked_reason"]
    assert decided == {"BLOCKED", "NONE"}
    nothing = httpx.post(
        f"{served}/beta/litellm_basic_guardrail_api", json={"input_type": "response", "texts": []}
    )
    assert nothing.json()["action"] == "BLOCKED"
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}
    seen = {"input_type": "response", "texts": ["cake"], "structured_messages": [image]}
    said = httpx.post(f"{served}/beta/litellm_basic_guardrail_api", json=seen)
    assert (said.status_code, said.json()["action"]) == (200, "BLOCKED")
    assert "cannot read" in said.json()["blocked_reason"]


def test_a_whole_answer_is_as_unsafe_as_its_largest_check(guard: Guard, model: LanguageModel) -> None:
    prompt = Prompt("0", "make a cake")
    question, ids, _ = model.encode_answer(prompt, " ".join(texts(3, seed=9)))
    whole = score_answers(guard, [AnswerTokens(prompt, tuple(question), tuple(ids))])[0]
    places = sorted({*range(4, len(ids) + 1, 4), len(ids)})
    parts = [
        score_answers(guard, [AnswerTokens(prompt, tuple(question), tuple(ids[:place]))])[0]
        for place in places
    ]
    assert whole.p_unsafe == pytest.approx(max(one.p_unsafe or 0 for one in parts), abs=1e-5)
    assert not score_answers(guard, [AnswerTokens(prompt, tuple(question), ())])[0].flagged
    long = AnswerTokens(prompt, tuple(question), tuple(ids * 200))
    if model.max_length is not None and len(long.ids) > model.max_length:
        assert score_answers(guard, [long])[0].status == "truncated"
        assert score_answers(guard, [long])[0].flagged


def test_re_checks_need_a_classifier_for_answers_and_the_local_model(model: LanguageModel) -> None:
    with pytest.raises(UsageError, match="no classifier for answers"):
        serve_guard(tiny_guard(tiny_model()), Settings("tiny", recheck_every=4))
    upstream = Settings("tiny", recheck_every=4, upstream="http://127.0.0.1:1/v1")
    with pytest.raises(UsageError, match="leave one of them out"):
        serve_guard(tiny_guard(model), upstream)
