"""Connections that send nothing, too slowly or too much, and clients that read no answer: none keeps others
from being served.
"""

import contextlib
import json
import os
import resource
import signal
import sys
import threading
import time

import httpx
import pytest
from server_tools import TOKEN, Words, connected, raw, running, service

from forked import Forked
from safety_neurons.errors import UsageError
from safety_neurons.guard.server import Limits
from safety_neurons.guard.server.serving import Connection, bounded
from waiting import HANG, until

KEY = f"X-Api-Key: {TOKEN}\r\n".encode()
HEAD = b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
NEVER = 1e6


def closed(connection):
    """What came until the server closed the connection."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def served(address, path="/healthz"):
    return httpx.get(f"{address}{path}", timeout=None).status_code == 200


@pytest.fixture(scope="module")
def impatient():
    limits = Limits(header_seconds=0.2, idle_seconds=NEVER, write_seconds=NEVER, body_seconds=0.2)
    with running(service(token=TOKEN, limits=limits)) as address:
        yield address


HALVES = {
    "nothing": b"",
    "half a request line": b"POST /class",
    "half the headers": HEAD,
    "half a header": HEAD + b"X-Long: aaa",
    "line breaks before a request": b"\r\n",
    "half a body": HEAD + KEY + b'Content-Length: 100\r\n\r\n{"in',
    "half a chunk": HEAD + KEY + b'Transfer-Encoding: chunked\r\n\r\n10\r\n{"in',
    "half a body without the token": HEAD + b'Content-Length: 100\r\n\r\n{"in',
    "half a body where none is read": b"POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
    "a request and half of another": b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /hea",
}


@pytest.mark.parametrize("sent", HALVES.values(), ids=HALVES)
def test_half_a_request_is_not_waited_for(impatient, sent):
    with connected(impatient) as connection:
        connection.sendall(sent)
        closed(connection)
    assert served(impatient)


@pytest.mark.parametrize("sent", HALVES.values(), ids=HALVES)
def test_a_byte_now_and_then_puts_nothing_off(impatient, sent):
    with connected(impatient) as connection:
        connection.sendall(sent)
        ended = threading.Event()

        def drip():
            with contextlib.suppress(OSError):
                while not ended.wait(0.02):
                    connection.sendall(b"\n" if sent in (b"", b"\r\n") else b"a")

        thread = threading.Thread(target=drip)
        thread.start()
        closed(connection)
        ended.set()
        thread.join()
    assert served(impatient)


def test_a_connection_is_kept_between_requests_for_a_while_and_no_longer():
    with (
        running(service(limits=Limits(header_seconds=NEVER, idle_seconds=0.2))) as address,
        connected(address) as connection,
    ):
        for _ in range(2):
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
            while b'"ok"}' not in connection.recv(65536):
                pass
        assert closed(connection) == b""


def test_while_a_request_is_answered_its_connection_is_not_overdue(monkeypatch):
    now, judge = [0.0], Words()
    monkeypatch.setattr(Connection, "clock", staticmethod(lambda: now[0]))
    looked = []
    look = Connection.close_if_overdue
    monkeypatch.setattr(Connection, "close_if_overdue", lambda self: (look(self), looked.append(self)))
    with running(service(judge, limits=Limits(seconds=HANG))) as address:
        judge.hold.clear()
        found = []
        thread = threading.Thread(
            target=lambda: found.append(httpx.post(f"{address}/classify", json={"input": "x"}, timeout=None))
        )
        thread.start()
        until(judge.reached.is_set)
        now[0] += 1e5
        seen = len(looked)
        until(lambda: len(looked) > seen + 2)
        judge.hold.set()
        thread.join()
    assert found[0].status_code == 200


def test_a_client_that_reads_no_answer_is_left():
    served_by = service(limits=Limits(write_seconds=0.2, header_seconds=NEVER, idle_seconds=NEVER))

    async def long(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(100):
            await send({"type": "http.response.body", "body": b"x" * (1 << 20), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    with running(served_by) as address:
        served_by.asgi.app = long
        with connected(address) as connection:
            connection.sendall(HEAD + b"Content-Length: 0\r\n\r\n")
            until(lambda: served_by.asgi.in_flight == 1)
            until(lambda: served_by.asgi.in_flight == 0, "the end of an answer that nobody reads")


@pytest.mark.parametrize("sent", [b"", b"GET /health"])
def test_at_the_cap_the_one_idle_for_longest_leaves(sent):
    limits = Limits(connections=3, header_seconds=NEVER, idle_seconds=NEVER)
    with running(service(limits=limits)) as address, contextlib.ExitStack() as stack:
        held = []
        for _ in range(3):
            held.append(stack.enter_context(connected(address)))
            held[-1].sendall(sent)
        assert served(address)
        assert closed(held[0]) == b""
        held[2].sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"[len(sent) :])
        assert held[2].recv(15) == b"HTTP/1.1 200 OK"


def test_at_the_cap_with_nobody_idle_the_newest_is_told_so():
    judge = Words()
    busy = service(judge, limits=Limits(connections=2, seconds=HANG))
    with running(busy) as address:
        judge.hold.clear()
        found = []
        threads = [
            threading.Thread(
                target=lambda: found.append(
                    httpx.post(f"{address}/classify", json={"input": "x"}, timeout=None)
                )
            )
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        until(lambda: busy.asgi.in_flight == 2)
        said = raw(address, b"")
        assert said.startswith(b"HTTP/1.1 503 ")
        assert b'"too_many_connections"' in said
        judge.hold.set()
        for thread in threads:
            thread.join()
    assert [said.status_code for said in found] == [200, 200]


def test_what_is_no_http_is_told_so_in_the_one_shape(impatient):
    head, _, body = raw(impatient, b"nonsense\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_more_connections_than_descriptors_are_refused():
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    with pytest.raises(UsageError, match="ulimit -n"):
        bounded(Limits(connections=soft), upstream=False)
    assert bounded(Limits(), upstream=True).most < bounded(Limits(), upstream=False).most or soft > 12_000


def few():
    """Serves with 256 descriptors until it is interrupted."""
    os.closerange(3, 1 << 16)  # of this process, whose servers are not forked with it
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    with (
        contextlib.suppress(KeyboardInterrupt),
        running(service(limits=Limits(header_seconds=1e6, idle_seconds=1e6))) as address,
    ):
        sys.stdout.write(f"{address}\n")
        while True:
            time.sleep(0.01)


def test_500_idle_connections_leave_a_server_with_256_descriptors_answering():
    process = Forked(few)
    try:
        address = process.out.readline().strip()
        with contextlib.ExitStack() as stack:
            for number in range(500):
                stack.enter_context(connected(address)).sendall(b"GET /hea" if number % 2 else b"")
            for _ in range(3):
                assert served(address)
    finally:
        process.send(signal.SIGINT)
        _, said = process.ended()
    assert (process.code, said) == (0, "")
