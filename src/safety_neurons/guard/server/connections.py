"""Connections: one that sends nothing, half a request or a byte now and then, or reads no answer, is closed; and there are never too many.

uvicorn knows one time-out, of idle connections, and every byte that arrives puts it off. Here a connection is looked at now and then: how
long is it in the state that it is in, and is that longer than it may be? While a request is answered nothing is counted: the door bounds
how long its body may take, and the engine and the upstream how long the answer may.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from safety_neurons.errors import UsageError
from safety_neurons.guard.server.problems import Problem
from safety_neurons.guard.server.settings import Limits

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
        """Takes a connection in; where there are too many, the one that has been idle for longest leaves, or else this one."""
        super().connection_made(transport)
        self._since = self.clock()
        if len(self.connections) <= self.most:
            return
        idle = [one for one in self.connections if isinstance(one, Connection) and not one.answering and not one.transport.is_closing()]
        oldest = min((one for one in idle if one is not self), key=lambda one: one._since, default=None)
        if oldest is not None:
            oldest.transport.abort()
        elif sum(not one.transport.is_closing() for one in self.connections) > self.most:
            self._refuse(Problem(503, "too many connections", "too_many_connections", headers={"Retry-After": "1"}))

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
        """Notes since when the connection is in its state; whatever arrives meanwhile does not put that off."""
        state = self._now()
        if state != self._state:
            self._state, self._since = state, self.clock()

    def _now(self) -> str:
        if self.transport.is_closing() or self.flow.write_paused:
            return "writing"
        if self.answering:
            return "answering"
        at_rest = self.cycle is not None and self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]
        return "idle" if at_rest else "head"

    def close_if_overdue(self) -> None:
        """Closes the connection where it is in its state for too long."""
        self.look()
        if self._state == "writing":
            unsent = self.transport.get_write_buffer_size()
            if unsent < self._unsent:
                self._since = self.clock()  # slow, but it reads
            self._unsent = unsent
        limit = {"head": self.limits.header_seconds, "idle": self.limits.idle_seconds, "writing": self.limits.write_seconds}
        if self.clock() - self._since > limit.get(self._state, float("inf")):
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP in the shape of every other error."""
        self._refuse(Problem(400, msg, "invalid_http"))

    def _refuse(self, problem: Problem) -> None:
        headers = {"Content-Type": "application/json", "Content-Length": str(len(problem.body)), "Connection": "close", **problem.headers}
        response = h11.Response(status_code=problem.status, headers=[(name, value) for name, value in headers.items()])
        for event in (response, h11.Data(data=problem.body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def bounded(limits: Limits, *, upstream: bool) -> type[Connection]:
    """The class of a server's connections.

    Args:
        limits: How long, and how many; where the latter is open, what the process's limit of descriptors leaves room for.
        upstream: Whether every request may need a second connection.

    Raises:
        UsageError: More connections than the process may have.
    """
    room = descriptors()
    fit = max(1, (room - _OWN_FILES) // (3 if upstream else 2)) if room is not None else _MOST
    if limits.connections is not None and limits.connections > fit:
        raise UsageError(f"{limits.connections} connections; expected at most {fit}, or more descriptors (ulimit -n, now {room})")
    return type("BoundConnection", (Connection,), {"limits": limits, "most": limits.connections or min(fit, _MOST)})


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
