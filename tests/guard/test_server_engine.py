import asyncio
import threading

import pytest
from server_tools import Said, Words

from safety_neurons.guard.server import Engine, Problem
from safety_neurons.prompt_lists import Prompt
from waiting import HANG


def prompts(*texts):
    return [Prompt(str(number), text) for number, text in enumerate(texts)]


def run(judge, work, **options):
    """Runs a coroutine function with a started engine, and closes it."""

    async def inside():
        engine = Engine(judge, **options)
        engine.start()
        try:
            async with asyncio.timeout(HANG):
                return await work(engine)
        finally:
            judge.hold.set()
            assert await engine.close(HANG)

    return asyncio.run(inside())


async def started(engine, judge, text="first"):
    """One prompt that keeps the model busy until the judge lets go."""
    judge.hold.clear()
    task = asyncio.ensure_future(engine.verdicts(prompts(text), HANG))
    await happened(lambda: engine.judge.reached.is_set() and not engine.waiting)
    return task


async def happened(what):
    """Waits for an event, and never for an amount of time."""
    async with asyncio.timeout(HANG):
        while not what():
            await asyncio.sleep(0.001)


def test_every_request_gets_its_own_verdicts_in_order_whatever_was_judged_together():
    texts = [
        [
            f"{'attack' if (request * place) % 3 == 1 else 'bread'} {request} {place}"
            for place in range(request % 5 + 1)
        ]
        for request in range(60)
    ]

    async def work(engine):
        return await asyncio.gather(*(engine.verdicts(prompts(*some), HANG) for some in texts))

    judge = Words()
    found = run(judge, work, batch=7, waiting=1000)
    assert [[said.flagged for said in some] for some in found] == [
        ["attack" in text for text in some] for some in texts
    ]
    fed = sorted(" ".join(ids) for batch in judge.batches for ids in batch)
    assert fed == sorted(text for some in texts for text in some)  # each exactly once


def test_what_waits_while_the_model_is_busy_is_judged_together():
    judge = Words()

    async def work(engine):
        first = await started(engine, judge)
        others = [
            asyncio.ensure_future(engine.verdicts(prompts(f"bread {number}"), HANG)) for number in range(6)
        ]
        await happened(lambda: engine.waiting == 6)
        judge.hold.set()
        await asyncio.gather(first, *others)

    run(judge, work, batch=4)
    assert [len(batch) for batch in judge.batches] == [1, 4, 2]


def test_batches_hold_prompts_of_like_length_within_the_budget_and_the_oldest_goes_first():
    judge = Words()

    async def work(engine):
        first = await started(engine, judge)
        sizes = [10, 100, 11, 98, 9, 2]
        others = [
            asyncio.ensure_future(engine.verdicts(prompts(" ".join(["w"] * size)), HANG)) for size in sizes
        ]
        await happened(lambda: engine.waiting == len(sizes))
        judge.hold.set()
        await asyncio.gather(first, *others)

    run(judge, work, batch=3, batch_tokens=200)
    assert [sorted(map(len, batch)) for batch in judge.batches[1:]] == [[9, 10, 11], [98, 100], [2]]


def test_a_prompt_longer_than_the_budget_is_judged_alone():
    async def work(engine):
        return await engine.verdicts(prompts(" ".join(["w"] * 500), "w"), HANG)

    judge = Words()
    assert len(run(judge, work, batch_tokens=100)) == 2
    assert [len(batch) for batch in judge.batches] == [1, 1]


def test_a_full_queue_is_429_and_takes_nothing_of_the_request():
    judge = Words()

    async def work(engine):
        first = await started(engine, judge)
        second = asyncio.ensure_future(engine.verdicts(prompts("a", "b"), HANG))
        await happened(lambda: engine.waiting == 2)
        with pytest.raises(Problem) as refused:
            await engine.verdicts(prompts("c", "d"), HANG)
        assert refused.value.status == 429
        assert int(refused.value.headers["Retry-After"]) >= 1
        assert engine.waiting == 2
        third = asyncio.ensure_future(engine.verdicts(prompts("e"), HANG))
        await happened(lambda: engine.waiting == 3)
        judge.hold.set()
        await asyncio.gather(first, second, third)

    run(judge, work, waiting=3)
    assert sorted(ids[0] for batch in judge.batches for ids in batch) == ["a", "b", "e", "first"]


def test_a_request_that_is_given_up_frees_its_place_and_is_never_judged():
    judge = Words()

    async def work(engine):
        first = await started(engine, judge)
        gone = asyncio.ensure_future(engine.verdicts(prompts("gone", "gone too"), HANG))
        late = asyncio.ensure_future(engine.verdicts(prompts("late"), 0.05))
        await happened(lambda: engine.waiting == 3)
        gone.cancel()
        with pytest.raises(TimeoutError):
            await late
        judge.hold.set()
        await first
        await happened(lambda: engine.waiting == 0)  # The engine's thread drops them when it comes to them.
        said = await engine.verdicts(prompts("after"), HANG)
        assert engine.waiting == 0
        assert engine.counts.dropped == 3
        return said

    assert len(run(judge, work, waiting=3)) == 1
    assert [ids[0] for batch in judge.batches for ids in batch] == ["first", "after"]


def test_a_prompt_that_fails_takes_no_other_with_it():
    async def work(engine):
        return await asyncio.gather(
            *(engine.verdicts(prompts(text), HANG) for text in ("bread", "poison", "attack", "unaskable"))
        )

    bread, poison, attack, unaskable = run(Words(), work)
    assert not bread[0].flagged
    assert attack[0].flagged
    assert isinstance(poison[0], RuntimeError)
    assert isinstance(unaskable[0], Exception)


def test_too_few_verdicts_are_an_error_and_never_another_prompts_verdict():
    class Short(Words):
        def score(self, prepared):
            return super().score(prepared)[1:]

    async def work(engine):
        return await engine.verdicts(prompts("attack", "bread"), HANG)

    assert all(isinstance(said, RuntimeError) for said in run(Short(), work))


def test_closing_finishes_what_was_accepted_and_refuses_what_comes():
    judge = Words()

    async def work(engine):
        first = await started(engine, judge)
        second = asyncio.ensure_future(engine.verdicts(prompts("attack"), HANG))
        await happened(lambda: engine.waiting == 1)
        closing = asyncio.ensure_future(engine.close(HANG))
        await happened(lambda: not engine.alive)
        with pytest.raises(Problem) as refused:
            await engine.verdicts(prompts("late"), HANG)
        assert refused.value.status == 503
        judge.hold.set()
        assert await closing
        return await first, await second

    first, second = run(judge, work)
    assert isinstance(first[0], Said)
    assert second[0].flagged


def test_closing_says_when_the_model_takes_too_long():
    judge = Words()

    async def work(engine):
        first = await started(engine, judge)
        assert not await engine.close(0.05)
        judge.hold.set()
        await first

    run(judge, work)


class Letters:
    """Writes the letters of a prompt, one a step, and checks that it is alone on its thread."""

    def __init__(self):
        self.threads = set()
        self.steps = 0

    def fits(self, job, others):
        return "broken" not in {" ".join(one.fed.ids) for one in (job, *others)}

    def start(self, jobs):
        word = [" ".join(job.fed.ids) for job in jobs]
        for place in range(max(map(len, word))):
            self.threads.add(threading.get_ident())
            self.steps += 1
            for job, text in zip(jobs, word, strict=True):
                if text == "broken" and place == 2:
                    raise RuntimeError("the model")
                if place < len(text) and not job.given_up:
                    job.tell(text[place])
            yield


def test_answers_are_written_between_verdicts_and_a_broken_group_ends_alone():
    writer, long = Letters(), "x" * 3000
    written_when_judged = []

    class Looking(Words):
        def score(self, prepared):
            written_when_judged.append(writer.steps)
            return super().score(prepared)

    async def work(engine):
        said = {text: [] for text in ("one word", "another", "broken", long)}
        for text, heard in said.items():
            engine.answer(prompts(text)[0], None, heard.append)
        verdicts = await engine.verdicts(prompts("attack"), HANG)
        await happened(lambda: len(said[long]) == len(long))
        return said, verdicts

    said, verdicts = _answered(Looking(), writer, work)
    assert verdicts[0].flagged
    assert written_when_judged[0] < len(long)
    assert "".join(said["one word"]) == "one word"
    assert "".join(said["another"]) == "another"
    assert said["broken"][:2] == ["b", "r"]
    assert isinstance(said["broken"][2], RuntimeError)
    assert len(writer.threads) == 1


def _answered(judge, writer, work):
    async def inside():
        engine = Engine(judge, writer, batch=8)
        engine.start()
        async with asyncio.timeout(HANG):
            found = await work(engine)
        assert await engine.close(HANG)
        return found

    return asyncio.run(inside())


def test_an_answer_nobody_waits_for_is_never_begun():
    begun = []

    class Counting(Letters):
        def start(self, jobs):
            begun.extend(jobs)
            return super().start(jobs)

    judge = Words()

    async def inside():
        engine = Engine(judge, Counting())
        engine.start()
        first = await started(engine, judge)
        job = engine.answer(prompts("gone")[0], None, lambda _: None)
        job.given_up = True
        judge.hold.set()
        await first
        assert await engine.close(HANG)

    asyncio.run(inside())
    assert not begun
