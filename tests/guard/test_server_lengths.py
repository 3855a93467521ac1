"""Prompts that are too long: refused before they are tokenised, tokenised once, and never in the way of short
ones.
"""

import asyncio
import json
import threading

import httpx
import pytest
import tokenizers
from server_tools import PATIENT, Words, connected, running, service

from safety_neurons.guard.server import Engine, Limits, Problem
from safety_neurons.model.template import encode_text
from safety_neurons.prompt_lists import Prompt
from tiny import tiny_tokenizer
from waiting import until


@pytest.mark.parametrize("templated", [False, True])
@pytest.mark.parametrize("text", ["how do i bake bread", "<s>how do i", "x", " ", ""])
def test_reading_a_text_once_gives_what_reading_it_twice_gave(templated, text):
    for before, behind in (("", ""), ("<s>", ""), ("<s>", "</s>"), ("", "</s>"), ("<s> <s>", "")):
        tokenizer = tiny_tokenizer(adds_bos=False)
        added = [("<s>", 1), ("</s>", 2)]
        single = f"{before} $A {behind}".split()
        tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single, special_tokens=added
        )
        bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        full = list(tokenizer(text)["input_ids"])
        bos = tokenizer.bos_token_id
        if templated:
            full = [bos, *bare] if bos is not None and len(full) > len(bare) and full[0] == bos else bare
        if bos is not None and full[:2] == [bos, bos]:
            full = full[1:]
        assert encode_text(tokenizer, text, templated=templated) == full


def test_long_prompts_are_tokenised_one_a_turn_so_short_ones_pass_them():
    order = []

    class Slow(Words):
        def prepare(self, prompt):
            order.append(len(prompt.text))
            return super().prepare(prompt)

    judge, long = Slow(), "w " * 100_000

    async def work():
        engine = Engine(judge)
        engine.start()
        judge.hold.clear()
        first = asyncio.ensure_future(engine.verdicts([Prompt("0", "first")], 600))
        while not judge.reached.is_set():
            await asyncio.sleep(0.001)
        many = [asyncio.ensure_future(engine.verdicts([Prompt("l", long)], 600)) for _ in range(6)]
        await asyncio.sleep(0)
        short = asyncio.ensure_future(engine.verdicts([Prompt("s", "short")], 600))
        while engine.waiting < 7:
            await asyncio.sleep(0.001)
        judge.hold.set()
        await asyncio.gather(first, short, *many)
        assert await engine.close(600)

    asyncio.run(work())
    assert order == [5, len(long), 5, *[len(long)] * 5]
    assert [len(batch) for batch in judge.batches][:1] == [1]


def test_more_bytes_than_are_taken_at_once_get_429_and_free_their_place():
    judge = Words()
    served = service(judge, limits=Limits(**PATIENT, bytes_under_way=50_000))
    body = json.dumps({"input": "w " * 10_000})
    with running(served) as address:
        judge.hold.clear()
        found = []
        threads = [
            threading.Thread(
                target=lambda: found.append(
                    httpx.post(f"{address}/classify", json=json.loads(body), timeout=None)
                )
            )
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        until(lambda: served.asgi.bytes_under_way >= 2 * 20_000)
        said = httpx.post(f"{address}/classify", json=json.loads(body), timeout=None)
        assert (said.status_code, said.json()["error"]["code"]) == (429, "guard_busy")
        assert int(said.headers["retry-after"]) >= 1
        assert said.headers["connection"] == "close"
        assert httpx.get(f"{address}/healthz", timeout=None).status_code == 200
        judge.hold.set()
        for thread in threads:
            thread.join()
        assert [said.status_code for said in found] == [200, 200]
        with connected(address) as gone:  # leaves in the middle of its body
            head = b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            head += b"Content-Length: 40000\r\n\r\n"
            gone.sendall(head + b" " * 30_000)
            until(lambda: served.asgi.bytes_under_way >= 30_000)
        until(lambda: served.asgi.bytes_under_way == 0)
        assert httpx.post(f"{address}/classify", json=json.loads(body), timeout=None).status_code == 200


def test_an_engine_without_a_bound_takes_any_length_and_with_one_nothing_of_the_request():
    async def work(most):
        judge = Words()
        engine = Engine(judge, characters=most)
        engine.start()
        try:
            return len(await engine.verdicts([Prompt("0", "a"), Prompt("1", "w" * 50)], 600)), judge
        finally:
            assert engine.waiting == 0
            await engine.close(600)

    assert asyncio.run(work(None))[0] == 2
    assert asyncio.run(work(50))[0] == 2
    with pytest.raises(Problem, match="50 characters; expected at most 49"):
        asyncio.run(work(49))
