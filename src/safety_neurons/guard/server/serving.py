"""Running a server: it listens, says so, and when told to end finishes what it accepted before it does."""

import asyncio
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from safety_neurons.errors import RunError
from safety_neurons.guard.server.app import Service
from safety_neurons.guard.server.connections import bounded, close_overdue

_TICK = 0.02
_LISTEN = 1024


class Server(uvicorn.Server):
    """uvicorn that drains: at the first signal new requests get 503 and accepted ones are finished; a second one ends it at once.

    Args:
        service: What is served.
        sock: Bound; listened on.
        started: Called once requests are taken.

    Raises:
        UsageError: More connections than the process may have.
    """

    def __init__(self, service: Service, sock: socket.socket, started: Callable[[], None] = lambda: None) -> None:
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
                # So many are accepted at once before the first of them can be counted, let alone closed: of that there are a few rounds.
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
        """Drains where the engine has failed: what waited was told, the process ends, and what watches over it starts another."""
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
            done = self._until is not None and (self.service.asgi.in_flight == 0 or time.monotonic() > self._until)
            self.should_exit = self.should_exit or done


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens at an address.

    Raises:
        RunError: The address is taken, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named, or asyncio leaves Nagle's delay on: 40 ms an answer
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(f"cannot listen on {host} port {port} ({reason}); choose another --port or --host") from None
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
        raise RunError(f"the guard's engine failed ({type(failed).__name__}), so the server ended; start it again") from failed


def address(sock: socket.socket) -> str:
    """Where a bound socket can be reached."""
    host, port = sock.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
