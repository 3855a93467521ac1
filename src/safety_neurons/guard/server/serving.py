"""Run a server: listen, bound its connections in number and time, and drain it when it is told to end.

uvicorn knows one time-out, of idle connections, and every byte that arrives puts it off. Here a connection is
looked at now and then: how long is it in the state that it is in, and is that longer than it may be? While a
request is answered nothing is counted: the door bounds how long its body may take, and the engine and the
upstream how long the answer may.
"""

import asyncio
import signal
import socket
import time
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from safety_neurons.errors import RunError, UsageError
from safety_neurons.guard.server.app import Service
from safety_neurons.guard.server.door import Limits
from safety_neurons.guard.server.shapes import Problem

_OWN_FILES = 64
"""Descriptors of a process that are no connections: libraries, a model's files, the event loop."""
_MOST = 4096


class Connection(H11Protocol):
    """A connection that says when it is overdue."""

    limits: Limits
    most: int
    clock: Callable[[], float] = staticmethod(time.monotonic)
    _state, _since, _unsent = "head", 0.0, 0

    def connection_made(self, transport: Any) -> None:
        """Takes a connection in; where there are too many, the one that has been idle for longest leaves, or
        else this one.
        """
        super().connection_made(transport)
        self._since = self.clock()
        if len(self.connections) <= self.most:
            return
        idle = [
            one
            for one in self.connections
            if isinstance(one, Connection) and not one.answering and not one.transport.is_closing()
        ]
        oldest = min((one for one in idle if one is not self), key=lambda one: one._since, default=None)
        if oldest is not None:
            oldest.transport.abort()
        elif sum(not one.transport.is_closing() for one in self.connections) > self.most:
            self._refuse(
                Problem(503, "too many connections", "too_many_connections", headers={"Retry-After": "1"})
            )

    @property
    def answering(self) -> bool:
        """Whether a request is under way."""
        return self.cycle is not None and not self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        """Reads on."""
        super().data_received(data)
        self.look()

    def on_response_complete(self) -> None:
        """Waits for the next request, from now on."""
        self._state = ""
        super().on_response_complete()
        self.look()

    def look(self) -> None:
        """Notes since when the connection is in its state.

        Whatever arrives meanwhile does not put that off.
        """
        state = self._now()
        if state != self._state:
            self._state, self._since = state, self.clock()

    def _now(self) -> str:
        if self.transport.is_closing() or self.flow.write_paused:
            return "writing"
        if self.answering:
            return "answering"
        at_rest = (
            self.cycle is not None and self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]
        )
        return "idle" if at_rest else "head"

    def close_if_overdue(self) -> None:
        """Closes the connection where it is in its state for too long."""
        self.look()
        if self._state == "writing":
            unsent = self.transport.get_write_buffer_size()
            if unsent < self._unsent:
                self._since = self.clock()  # slow, but it reads
            self._unsent = unsent
        limit = {
            "head": self.limits.header_seconds,
            "idle": self.limits.idle_seconds,
            "writing": self.limits.write_seconds,
        }
        if self.clock() - self._since > limit.get(self._state, float("inf")):
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP in the shape of every other error."""
        self._refuse(Problem(400, msg, "invalid_http"))

    def _refuse(self, problem: Problem) -> None:
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(problem.body)),
            "Connection": "close",
            **problem.headers,
        }
        response = h11.Response(
            status_code=problem.status, headers=[(name, value) for name, value in headers.items()]
        )
        for event in (response, h11.Data(data=problem.body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def bounded(limits: Limits, *, upstream: bool) -> type[Connection]:
    """The class of a server's connections.

    Args:
        limits: How long, and how many; where the latter is open, what the process's limit of descriptors
            leaves room for.
        upstream: Whether every request may need a second connection.

    Raises:
        UsageError: More connections than the process may have.
    """
    room = descriptors()
    fit = max(1, (room - _OWN_FILES) // (3 if upstream else 2)) if room is not None else _MOST
    if limits.connections is not None and limits.connections > fit:
        raise UsageError(
            f"{limits.connections} connections; expected at most {fit}, or more descriptors (ulimit -n, "
            f"now {room})"
        )
    return type(
        "BoundConnection", (Connection,), {"limits": limits, "most": limits.connections or min(fit, _MOST)}
    )


def descriptors() -> int | None:
    """How many files and sockets this process may have open; None where there is no limit."""
    try:
        import resource
    except ModuleNotFoundError:  # a system without such limits
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def close_overdue(connections: Iterable[Any]) -> None:
    """Closes those of a server's connections that are overdue."""
    for connection in list(connections):
        if isinstance(connection, Connection):
            connection.close_if_overdue()


_TICK = 0.02
_LISTEN = 1024


class Server(uvicorn.Server):
    """uvicorn that drains: at the first signal new requests get 503 and accepted ones are finished.

    A second one ends it at once.

    Args:
        service: What is served.
        sock: Bound; listened on.
        started: Called once requests are taken.

    Raises:
        UsageError: More connections than the process may have.
    """

    def __init__(
        self, service: Service, sock: socket.socket, started: Callable[[], None] = lambda: None
    ) -> None:
        limits = service.settings.limits
        connection = bounded(limits, upstream=service.upstream is not None)
        super().__init__(
            uvicorn.Config(
                service.asgi,
                lifespan="on",
                log_config=None,
                log_level="critical",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                ws="none",
                http=connection,
                # So many are accepted at once before the first of them can be counted, let alone closed: of
                # that there are a few rounds.
                backlog=max(8, min(128, connection.most // 6)),
                timeout_keep_alive=int(limits.idle_seconds) + 1,
                timeout_graceful_shutdown=int(limits.drain_seconds) + 1,
            )
        )
        self.service, self._sock, self._tell_started = service, sock, started
        self._until: float | None = None

    async def serve_socket(self) -> None:
        """Serves until told to end."""
        await self.serve(sockets=[self._sock])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to listen."""
        await super().startup(sockets)
        self._sock.listen(_LISTEN)  # how many may wait to be accepted is another number
        self._tell_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - a signal handler's arguments
        """The first signal drains, the second one ends."""
        if self._until is not None:
            self.should_exit = self.force_exit = True
        self.drain()

    def drain(self) -> None:
        """Refuses new requests from now on and ends once the accepted ones are answered."""
        if self._until is None:
            self._until = time.monotonic() + self.service.settings.limits.drain_seconds
        self.service.asgi.closing = True

    def watch(self) -> None:
        """Drains where the engine has failed: what waited was told, the process ends, and what watches over
        it starts another.
        """
        if self.service.engine.failed is not None:
            self.drain()

    async def main_loop(self) -> None:
        """Runs until drained."""
        counter = 0
        while not await self.on_tick(counter):
            counter += 1
            await asyncio.sleep(_TICK if self._until is not None else 0.1)
            self.watch()
            if counter % 5 == 0:
                close_overdue(self.server_state.connections)
            done = self._until is not None and (
                self.service.asgi.in_flight == 0 or time.monotonic() > self._until
            )
            self.should_exit = self.should_exit or done


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens at an address.

    Raises:
        RunError: The address is taken, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(
        family, socket.SOCK_STREAM, socket.IPPROTO_TCP
    )  # named, or asyncio leaves Nagle's delay on: 40 ms an answer
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(
            f"cannot listen on {host} port {port} ({reason}); choose another --port or --host"
        ) from None
    return sock


def run(service: Service, sock: socket.socket, started: Callable[[], None] = lambda: None) -> None:
    """Serves until SIGINT or SIGTERM, then drains.

    Raises:
        RunError: The engine's thread failed; what was asked has been told.
    """
    server = Server(service, sock, started)
    handlers = {sig: signal.getsignal(sig) for sig in (signal.SIGINT, signal.SIGTERM)}
    try:
        asyncio.run(server.serve_socket())
    finally:
        for sig, handler in handlers.items():
            signal.signal(sig, handler)
    failed = service.engine.failed
    if failed is not None:
        raise RunError(
            f"the guard's engine failed ({type(failed).__name__}), so the server ended; start it again"
        ) from failed


def address(sock: socket.socket) -> str:
    """Where a bound socket can be reached."""
    host, port = sock.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
