"""A guard behind HTTP: added time to first token, and throughput under 64 clients.

    python benchmarks/guard_server.py proxy --repetitions 201
    python benchmarks/guard_server.py throughput --repetitions 5
    python benchmarks/guard_server.py long

`proxy` starts `safety-neurons guard serve` on the organism `natural/base` as a process of its own, with a
guard on 200 of its neurons, in front of an upstream (a third process) that answers at once. `throughput`
serves a random Llama with layers of a 1B model's shape in this process, so that the same model can be asked
for plain batched prefills in turns. `long` sends 32 prompts of one megabyte at once, which the server refuses
by their length, or tokenises where it is told to, and meanwhile asks for verdicts on short ones, one after
the other.
"""

import asyncio
import json
import os
import pathlib
import random
import time
from typing import Any

import httpx
import numpy as np
import torch

from guard_served import free_port, organism_guard, served, start_upstream
from paired import CLOCKS, Row, finish, median, parser


def main() -> None:
    """Measure one of the two, print and write the record."""
    options_parser = parser(__doc__ or "")
    options_parser.add_argument("what", choices=("proxy", "throughput", "long"))
    options_parser.add_argument("--clients", type=int, default=64)
    options_parser.add_argument("--tokens", type=int, default=256)
    options_parser.add_argument("--layers", type=int, default=2)
    options = options_parser.parse_args()
    load = os.getloadavg()[0]
    torch.set_num_threads(options.threads)
    rows, detail = {"proxy": proxy, "throughput": throughput, "long": long_prompts}[options.what](options)
    finish(f"guard_{options.what}", rows, options, detail, load)


def long_prompts(_: Any) -> tuple[list[Row], dict[str, Any]]:
    """What short requests wait, and how the server's memory grows, while many long prompts arrive at once."""
    guard = organism_guard()
    rows: list[Row] = []
    detail: dict[str, Any] = {}
    tokenised = ("--max-characters", "2000000", "--queue-bytes", str(1 << 26))
    for name, further in {"refused by length": (), "tokenised": tokenised}.items():
        port = free_port()
        with served(guard, port, *further) as process:
            found = asyncio.run(_beside_long(port, process.pid))
        alone, beside = (median([1000 * value for value in found[part]]) for part in ("alone", "beside"))
        rows += [
            Row(f"{name}: a short request alone", alone, unit="ms"),
            Row(f"{name}: beside 32 long ones", beside, unit="ms"),
        ]
        rows.append(Row(f"{name}: the slowest beside them", median([1000 * max(found["beside"])]), unit="ms"))
        rows.append(Row(f"{name}: memory, peak ÷ before", median([found["peak"] / found["before"]])))
        detail[name] = found
    return rows, detail


async def _beside_long(port: int, pid: int, count: int = 32) -> dict[str, Any]:
    url, word = f"http://127.0.0.1:{port}/classify", "water "
    body = json.dumps({"input": word * (1_000_000 // len(word))}).encode()
    kind = {"Content-Type": "application/json"}
    asked = {"input": "tell me about the tree"}
    async with httpx.AsyncClient(timeout=None) as client:

        async def short() -> float:
            started = time.perf_counter()
            assert (await client.post(url, json=asked)).status_code == 200
            return time.perf_counter() - started

        alone = [await short() for _ in range(50)][10:]
        before, started, statuses = _resident(pid, "VmRSS"), time.perf_counter(), []

        async def long() -> None:
            statuses.append((await client.post(url, content=body, headers=kind)).status_code)

        many = [asyncio.ensure_future(long()) for _ in range(count)]
        beside = []
        while not all(task.done() for task in many):
            beside.append(await short())
        await asyncio.gather(*many)
        seconds = time.perf_counter() - started
    counted = {str(status): statuses.count(status) for status in sorted(set(statuses))}
    told = {
        "alone": alone,
        "beside": beside,
        "before": before,
        "peak": _resident(pid, "VmHWM"),
        "after": _resident(pid, "VmRSS"),
    }
    return {**told, "seconds": seconds, "statuses": counted}


def _resident(pid: int, name: str) -> float:
    """MiB of a process."""
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def proxy(options: Any) -> tuple[list[Row], dict[str, Any]]:
    """The same streamed request to the upstream and through the proxy, in turns.

    The guard's one prefill is timed in the same turns.
    """
    guard = organism_guard()
    texts = [prompt.text for prompt in guard.bound.prompts("builtin:harmless-test")]
    safe = [text for text in texts if not guard.score(text).flagged]
    near, far = free_port(), free_port()
    upstream = start_upstream(far)
    added, direct, through, prefills = [], [], [], []
    spent = 0.0
    try:
        with (
            served(guard, near, "--upstream", f"http://127.0.0.1:{far}/v1") as process,
            httpx.Client() as client,
        ):
            for repetition in range(-20, options.repetitions):
                text = safe[repetition % len(safe)]
                ways = [(direct, far), (through, near)]
                seconds = {}
                for name, port in ways if repetition % 2 else ways[::-1]:
                    seconds[id(name)] = first_token(client, port, text)
                prefill = prefill_seconds(guard, text)
                if repetition == -1:
                    spent, own = processor_seconds(process.pid), time.process_time()
                    for _ in range(50):
                        prefill_seconds(guard, text)
                    alone = (time.process_time() - own) / 50
                if repetition >= 0:
                    direct.append(1000 * seconds[id(direct)])
                    through.append(1000 * seconds[id(through)])
                    prefills.append(1000 * prefill)
                    added.append(through[-1] - direct[-1] - prefills[-1])
            spent = (processor_seconds(process.pid) - spent) / options.repetitions
    finally:
        upstream.kill()
    rows = [
        Row(
            "time to first token through the proxy − the upstream alone − one prefill",
            median(added),
            5.0,
            "ms",
        ),
        Row("time to first token, the upstream alone", median(direct), None, "ms"),
        Row("time to first token, through the proxy", median(through), None, "ms"),
        Row("one prefill of the organism", median(prefills), None, "ms"),
        Row(
            "processor time of the proxy for a whole request − one prefill",
            median([1000 * (spent - alone)]),
            None,
            "ms",
        ),
    ]
    return rows, {"added_p95_ms": float(np.quantile(added, 0.95))}


def processor_seconds(pid: int) -> float:
    """Processor time that a process has used."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def first_token(client: httpx.Client, port: int, text: str) -> float:
    """Seconds to the first event of a streamed answer."""
    body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": text}], "user": "one"}
    start = time.perf_counter()
    with client.stream("POST", f"http://127.0.0.1:{port}/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        lines = answer.iter_lines()
        first = next(lines)
        seconds = time.perf_counter() - start
        assert "data: " in first
        for _ in lines:
            pass
    return seconds


def prefill_seconds(guard: Any, text: str) -> float:
    """Seconds of one plain forward pass over a prompt, its encoding included."""
    from safety_neurons.model.passes import run_batches

    start = time.perf_counter()
    run_batches(guard.bound, [guard.encode(text).ids], lambda _: None)
    return time.perf_counter() - start


def throughput(options: Any) -> tuple[list[Row], dict[str, Any]]:
    """Rounds in which every client asks for one verdict, in turns with the plain batched prefill of the same
    prompts.
    """
    from safety_neurons.guard.server import Limits, Settings, serve_guard
    from safety_neurons.guard.server.serving import Server, bound
    from safety_neurons.model.passes import run_batches

    guard = random_guard(options.layers, options.tokens)
    lm = guard.bound
    texts = words(options.clients, options.tokens)
    sequences = [guard.encode(text).ids for text in texts]
    expected = [verdict.p_unsafe for verdict in guard.score_batch(texts)]
    service = serve_guard(guard, Settings("m", limits=Limits(seconds=3600.0)))
    plain, through, elapsed, clock = [], [], [], CLOCKS[options.clock]

    async def rounds() -> None:
        sock = bound("127.0.0.1", 0)
        server = Server(service, sock)
        task = asyncio.ensure_future(server.serve_socket())
        while not server.started:
            await asyncio.sleep(0.01)
        address = f"http://127.0.0.1:{sock.getsockname()[1]}"
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=address, timeout=None, limits=limits) as client:
            for repetition in range(-1, options.repetitions):
                some = (
                    slice(None) if repetition >= 0 else slice(8)
                )  # a small round first, which is not counted
                began, start = time.perf_counter(), clock()
                await asyncio.to_thread(run_batches, lm, sequences[some], lambda _: None)
                between, middle = time.perf_counter(), clock()
                said = await asyncio.gather(
                    *(client.post("/v1/moderations", json={"input": text}) for text in texts[some])
                )
                ended, end = time.perf_counter(), clock()
                scores = [one.json()["results"][0]["guard"]["p_unsafe"] for one in said]
                assert np.allclose(scores, expected[some], atol=1e-4), "another verdict than the guard's own"
                if repetition >= 0:
                    plain.append(middle - start)
                    through.append(end - middle)
                    elapsed.append((between - began, ended - between))
        server.drain()
        await task

    asyncio.run(rounds())
    share = median([served_seconds / alone for served_seconds, alone in zip(through, plain, strict=True)])
    rows = [
        Row(
            f"{options.clients} clients through the server ÷ plain batched prefill, {options.tokens} tokens",
            share,
            1.25,
        ),
        Row(
            "prompts a second, plain batched prefill",
            median([len(texts) / seconds for seconds, _ in elapsed]),
            None,
            "/s",
        ),
        Row(
            "prompts a second, through the server",
            median([len(texts) / seconds for _, seconds in elapsed]),
            None,
            "/s",
        ),
    ]
    sizes = list(service.engine.counts.sizes)
    return rows, {
        "throughput_share": 1 / share.median,
        "batch_sizes": sizes,
        "seconds": {"plain": plain, "served": through},
        "wall_seconds": elapsed,
    }


def random_guard(layers: int, tokens: int) -> Any:
    """A guard on neurons of the last layer of a random Llama with the layers of a 1B model."""
    import tokenizers
    import transformers

    from safety_neurons.guard import Classifier, Guard, Pooling, bindings_of
    from safety_neurons.model import LanguageModel
    from safety_neurons.neurons import NeuronSet

    torch.manual_seed(0)
    shape = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
    }
    config = transformers.LlamaConfig(
        vocab_size=2000, num_hidden_layers=layers, max_position_embeddings=2 * tokens + 64, **shape
    )
    vocabulary = {"<unk>": 0, **{f"w{number}": number for number in range(1, 2000)}}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<unk>"
    )
    lm = LanguageModel(
        transformers.LlamaForCausalLM(config).eval(), tokenizer, template="none", name="random 1B layers"
    )
    neurons = NeuronSet({f"layers.{layers - 1}.down": range(1500)}, lm.table)
    weights = torch.randn(1500, generator=torch.Generator().manual_seed(0))
    classifier = Classifier(torch.zeros(1500), torch.ones(1500), weights, 0.0)
    return Guard(
        neurons, Pooling.of("last"), classifier, (), 0.5, "given", bindings_of(lm, neurons), model=lm
    )


def words(count: int, tokens: int) -> list[str]:
    """Texts of about so many tokens: between nine tenths and all of them."""
    generator = random.Random(0)
    return [
        " ".join(
            f"w{generator.randrange(1, 2000)}" for _ in range(generator.randint(tokens * 9 // 10, tokens))
        )
        for _ in range(count)
    ]


if __name__ == "__main__":
    main()
