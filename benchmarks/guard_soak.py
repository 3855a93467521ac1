"""Soak: mixed requests to a guard's server under load, with clients that leave and an upstream that is killed
and started again twice.

    python benchmarks/guard_soak.py --requests 10000

Every verdict is compared with the guard's own in this process; every conversation has a user of its own,
whose name the upstream answers with and writes down, so an answer that is another's, is lost or comes twice
is seen. Server and upstream are processes of their own.
"""

import asyncio
import contextlib
import json
import os
import pathlib
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

from guard_served import free_port, organism_guard, served, start_upstream
from paired import Median, Row, finish, parser

CHAT = "/v1/chat/completions"


def main() -> None:
    """Run, print and write the record."""
    options_parser = parser(__doc__ or "")
    options_parser.add_argument("--requests", type=int, default=10_000)
    options_parser.add_argument("--clients", type=int, default=32)
    options = options_parser.parse_args()
    load = os.getloadavg()[0]
    rows, detail = soak(options)
    finish("guard_soak", rows, options, detail, load)


@dataclass(frozen=True)
class Place:
    """Where the parts of a soak are: ports of the proxy and the upstream, what the upstream keeps, the
    proxy's process.
    """

    near: int
    far: int
    seen: str
    pid: int


@dataclass
class Tally:
    """What clients saw."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    answered: Counter[str] = field(default_factory=Counter)

    def check(self, fine: bool, what: str) -> None:
        """Notes what should not have been."""
        if not fine:
            self.wrong.append(what)


def soak(options: Any) -> tuple[list[Row], dict[str, Any]]:
    """Mixed requests; every answer is compared with what the guard says in this process, and with what the
    upstream was asked.
    """
    guard = organism_guard()
    texts = [
        p.text for name in ("harmful-test", "harmless-test") for p in guard.bound.prompts(f"builtin:{name}")
    ][:400]
    known = {text: guard.score(text) for text in texts}
    near, far = free_port(), free_port()
    tally, memory = Tally(), list[float]()
    with (
        tempfile.NamedTemporaryFile("r") as kept,
        served(guard, near, "--upstream", f"http://127.0.0.1:{far}/v1", "--queue", "64") as process,
    ):
        started = time.perf_counter()
        asyncio.run(storm(options, Place(near, far, kept.name, process.pid), known, tally, memory))
        seconds = time.perf_counter() - started
        page = httpx.get(f"http://127.0.0.1:{near}/metrics").text
        seen = Counter(kept.read().split())
    doubled = sum(count > 1 for count in seen.values())
    lost = sum(name not in seen for name in tally.answered)
    settled, last = memory[len(memory) // 5], memory[-1]
    in_flight = next(line for line in page.splitlines() if line.startswith("safety_neurons_guard_waiting"))
    tally.check(in_flight.endswith(" 0.0"), f"still waiting: {in_flight}")
    rows = [
        Row("wrong verdicts, answers or errors", exactly(len(tally.wrong)), 0.0, "of all"),
        Row("requests the upstream got twice", exactly(doubled), 0.0, "of all"),
        Row("answers the upstream was never asked for", exactly(lost), 0.0, "of all"),
        Row("memory at the end ÷ memory after a fifth of the requests", exactly(last / settled), 1.05),
        Row("requests a second", exactly(options.requests / seconds), None, "/s"),
    ]
    detail = {
        "outcomes": dict(tally.outcomes),
        "wrong": tally.wrong[:20],
        "memory_mib": memory[:: max(1, len(memory) // 50)],
    }
    return rows, detail


def exactly(value: float) -> Median:
    """A number that is counted, not drawn."""
    return Median(float(value), float(value), float(value), 1)


async def storm(options: Any, place: Place, known: Any, tally: Tally, memory: list[float]) -> None:
    """All requests, while the upstream is killed and started again twice."""
    numbers = iter(range(options.requests))
    upstream = start_upstream(place.far, place.seen)
    done = 0

    async def client(index: int) -> None:
        nonlocal done
        generator = random.Random(index)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{place.near}", timeout=60) as session:
            for number in numbers:
                await one_request(session, number, generator, known, tally)
                done += 1
                if done % 100 == 0:
                    memory.append(resident(place.pid))

    async def weather() -> None:
        nonlocal upstream
        for share in (0.3, 0.6):
            while done < share * options.requests:
                await asyncio.sleep(0.05)
            upstream.kill()
            upstream.wait()
            while done < (share + 0.03) * options.requests:
                await asyncio.sleep(0.05)
            upstream = await asyncio.to_thread(start_upstream, place.far, place.seen)

    changes = asyncio.ensure_future(weather())
    try:
        await asyncio.gather(*(client(index) for index in range(options.clients)))
        await changes
    finally:
        upstream.kill()


async def one_request(
    session: httpx.AsyncClient, number: int, generator: random.Random, known: Any, tally: Tally
) -> None:
    """One request of a kind that is drawn, and what is wrong with its answer."""
    text = generator.choice(list(known))
    unsafe = known[text].flagged
    kind = generator.choice(
        (
            "chat",
            "stream",
            "chat",
            "stream",
            "moderation",
            "list",
            "classify",
            "guardrail",
            "leaves",
            "malformed",
        )
    )
    try:
        if kind in ("chat", "stream", "leaves"):
            await chat(session, kind, number, text, unsafe, tally)
        elif kind == "malformed":
            said = await session.post(
                CHAT, content=b'{"messages": [', headers={"content-type": "application/json"}
            )
            tally.check(said.status_code == 400, f"malformed: {said.status_code}")
        else:
            await verdict(session, kind, text, known, generator, tally)
        tally.outcomes[kind] += 1
    except httpx.HTTPError as error:
        tally.check(False, f"{kind}: {type(error).__name__} {error}")


async def verdict(
    session: httpx.AsyncClient, kind: str, text: str, known: Any, generator: random.Random, tally: Tally
) -> None:
    """A verdict, compared with the guard's own."""
    texts = (
        [text] if kind != "list" else [generator.choice(list(known)) for _ in range(generator.randint(1, 8))]
    )
    path, body = {
        "moderation": ("/v1/moderations", {"input": text}),
        "list": ("/v1/moderations", {"input": texts}),
        "classify": ("/classify", {"input": text, "model": "m"}),
        "guardrail": ("/beta/litellm_basic_guardrail_api", {"texts": [text], "input_type": "request"}),
    }[kind]
    said = await session.post(path, json=body)
    if said.status_code == 429:
        tally.outcomes["429"] += 1
        tally.check(int(said.headers["retry-after"]) >= 1, "429 without Retry-After")
        return
    tally.check(said.status_code == 200, f"{kind}: {said.status_code} {said.text[:100]}")
    if said.status_code != 200:
        return
    record = said.json()
    if kind == "guardrail":
        tally.check((record["action"] == "BLOCKED") == known[text].flagged, f"{kind}: {text}")
        return
    results = record["results"] if "results" in record else record["data"]
    tally.check(len(results) == len(texts), f"{kind}: {len(results)} of {len(texts)} verdicts")
    for one, result in zip(texts, results, strict=False):
        flagged = result["flagged"] if "flagged" in result else result["label"] == "unsafe"
        near = abs(result["guard"]["p_unsafe"] - known[one].p_unsafe) < 1e-3
        tally.check(flagged == known[one].flagged and near, f"{kind}: {one} {result}")


async def chat(
    session: httpx.AsyncClient, kind: str, number: int, text: str, unsafe: bool, tally: Tally
) -> None:
    """A conversation of a user who asks once, whose name the upstream answers with: every answer can be told
    from every other.
    """
    stream = kind == "stream"
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": text}],
        "stream": stream,
        "user": f"user-{number}",
    }
    if kind == "leaves":
        with contextlib.suppress(httpx.ReadTimeout):
            await session.post(
                CHAT,
                json=body,
                timeout=httpx.Timeout(60, read=random.Random(number).choice((0.001, 0.004, 0.02))),
            )
        return
    said = await session.post(CHAT, json=body)
    if said.status_code in (429, 502, 503):
        tally.outcomes[str(said.status_code)] += 1
        tally.check(
            not unsafe or said.status_code == 429, f"{kind}: {said.status_code} for a flagged conversation"
        )
        tally.check(
            set(said.json()["error"]) == {"message", "type", "param", "code"}, f"{kind}: {said.text[:100]}"
        )
        return
    tally.check(said.status_code == 200, f"{kind}: {said.status_code} {said.text[:100]}")
    answer, reason = whole_of(said.text) if stream else parts_of(said.json()["choices"][0])
    if reason == "error":
        tally.outcomes["broken off"] += 1
        return
    tally.check((reason == "content_filter") == unsafe, f"{kind}: {reason} for {text}")
    tally.check(unsafe or answer == body["user"], f"{kind}: another answer")
    if not unsafe:
        tally.answered[answer] += 1


def parts_of(choice: Any) -> tuple[str, str]:
    """Text and reason of a whole answer."""
    return choice["message"]["content"], choice["finish_reason"]


def whole_of(text: str) -> tuple[str, str]:
    """Text and reason of a streamed answer; the reason `error` where it ends in one."""
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    records = [json.loads(event) for event in events if event != "[DONE]"]
    if any("error" in record for record in records) or events[-1] != "[DONE]":
        return "", "error"
    choices = [record["choices"][0] for record in records if record["choices"]]
    said = "".join(choice["delta"].get("content") or "" for choice in choices)
    return said, [choice["finish_reason"] for choice in choices][-1]


def resident(pid: int) -> float:
    """Memory of a process in MiB."""
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return float("nan")


if __name__ == "__main__":
    main()
