"""What the server's benchmarks run: an upstream that answers at once, and a guard on the organism behind the
command line's server.

python benchmarks/guard_served.py --port 8700 --seen seen.txt       # the upstream alone
"""

import argparse
import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np

QUIET = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def answer_forever(port: int, seen: pathlib.Path) -> None:
    """Answers chat completions at once with the name of the user who asks, and keeps a line for each in a
    file that outlives it.
    """
    import uvicorn

    kept = os.open(seen, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    async def app(_: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if not body:
            await reply(send, b"{}", b"application/json")
            return
        request = json.loads(body)
        text = request["user"]
        os.write(kept, f"{text}\n".encode())
        head = {"id": "chatcmpl-1", "created": 1, "model": request["model"]}
        if not request.get("stream"):
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            await reply(
                send,
                json.dumps({**head, "object": "chat.completion", "choices": [choice]}).encode(),
                b"application/json",
            )
            return
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-type", b"text/event-stream")],
            }
        )
        for delta, reason in [({"content": text}, None), ({}, "stop")]:
            chunk = {
                **head,
                "object": "chat.completion.chunk",
                "choices": [{"index": 0, "delta": delta, "finish_reason": reason}],
            }
            await send(
                {
                    "type": "http.response.body",
                    "body": b"data: " + json.dumps(chunk).encode() + b"\n\n",
                    "more_body": True,
                }
            )
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    uvicorn.run(
        app, host="127.0.0.1", port=port, log_config=None, log_level="critical", lifespan="off", ws="none"
    )


async def reply(send: Callable[[Any], Any], body: bytes, kind: bytes) -> None:
    """A whole answer."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
    await send({"type": "http.response.body", "body": body})


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def start_upstream(port: int, seen: str = os.devnull) -> subprocess.Popen[bytes]:
    """The upstream as a process; comes back when it answers."""
    process = subprocess.Popen([sys.executable, __file__, "--port", str(port), "--seen", seen], env=QUIET)
    wait_for(f"http://127.0.0.1:{port}/", process)
    return process


def wait_for(url: str, process: subprocess.Popen[Any]) -> None:
    """Waits until a server answers."""
    for _ in range(1200):
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url).status_code == 200:
                return
        assert process.poll() is None, f"{url}: the server ended"
        time.sleep(0.1)
    raise TimeoutError(url)


def organism_guard() -> Any:
    """A guard on 200 random neurons of the organism, bound."""
    from safety_neurons import organism
    from safety_neurons.guard import fit_guard
    from safety_neurons.neurons import NeuronSet

    lm = organism.load(organism.spec("natural/base"), offline=True)
    sizes = {key: size for key, size in lm.table.sizes.items() if key.endswith(".down")}
    generator = np.random.default_rng(0)
    neurons = NeuronSet(
        {key: generator.choice(size, 50, replace=False) for key, size in sizes.items()}, lm.table
    )
    return fit_guard(lm, neurons, lm.prompts("builtin:harmful"), lm.prompts("builtin:harmless"), fpr=0.05)


@contextlib.contextmanager
def served(guard: Any, port: int, *further: str) -> Iterator[subprocess.Popen[bytes]]:
    """The guard behind the command line's server, in front of an upstream."""
    with tempfile.TemporaryDirectory() as folder:
        guard.save(folder)
        words = [
            "-m",
            "safety_neurons",
            "guard",
            "serve",
            "--model",
            "organism:natural/base",
            "--guard",
            folder,
            "--offline",
            "--json",
        ]
        with open(pathlib.Path(folder) / "log", "wb") as log:
            process = subprocess.Popen(
                [sys.executable, *words, "--port", str(port), *further], env=QUIET, stdout=log, stderr=log
            )
            try:
                wait_for(f"http://127.0.0.1:{port}/readyz", process)
                yield process
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(60)


if __name__ == "__main__":
    options_parser = argparse.ArgumentParser(description="An upstream that answers at once.")
    options_parser.add_argument("--port", type=int, required=True)
    options_parser.add_argument("--seen", type=pathlib.Path, default=pathlib.Path(os.devnull))
    options = options_parser.parse_args()
    answer_forever(options.port, options.seen)
