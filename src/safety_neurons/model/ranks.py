"""Ranks: several processes that do one run together, each its share of the batches, all with equal results.

Every process runs the whole program. Only batches are shared out: each is fed by one process, and what came
of it is handed to all, in the order in which one process would have made it. So all go on from the same
numbers, which are those of one process, bit for bit; what is no batch (plans, selections, rules) is done by
all, and rank 0 alone writes and prints. What one process raises in its share, all raise at the same place.
"""

import contextlib
import dataclasses
import datetime
import ipaddress
import json
import math
import os
import pathlib
import re
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed

from safety_neurons import strict_json
from safety_neurons.errors import EndedError, RunError, SafetyNeuronsError, UsageError

T = TypeVar("T")
PATIENCE = 60.0
"""Seconds in which all processes have to be there."""
SILENCE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}
"""When the operating system ends a connection to a machine that does not answer: after half a minute."""
_HEARD = 0.5
"""Seconds after which a process that waits for others looks whether it was told to end."""
_LONGEST = datetime.timedelta(days=30)
"""A batch may take as long as it takes: that a process is gone shows in its connection, not in the time."""
_AWHILE = 5.0
"""Seconds in which a process gets to where the others are."""
_FAILED = "safety-neurons/failed"


class Running(NamedTuple):
    """Where a process runs."""

    pid: int
    host: str
    machine: str
    """Tells machines apart, which may have the same name, and containers, which count processes anew."""
    address: str
    """At which gloo lets the others connect; empty where the user chose the network interface."""


@dataclasses.dataclass
class Job:
    """The processes of one run, and which of them this is."""

    rank: int
    size: int
    store: Any = None
    """What the processes share beside their connections: a `torch.distributed` store, once it is reached."""
    places: list[Running] = dataclasses.field(default_factory=list)
    """Of every rank, once all are there."""
    step: int = 0
    """Exchanges so far."""
    waits: threading.Thread | None = None
    """Waits for the others."""
    in_share: bool = False
    """Whether this process is at work in its share, where nothing is shared out again."""


_job: Job | None = None


def join() -> None:
    """Meet the other processes of the job that the environment names (`torchrun`, `accelerate launch`, or
    RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT).

    Raises:
        RunError: not all of them come within a minute, or one waits where others cannot reach it.
    """
    global _job
    _job = Job(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    problem = _beside(_meet, PATIENCE)
    if problem is None:
        return
    if not isinstance(problem, (RuntimeError, ValueError, OSError)):
        raise problem
    raise RunError(
        f"process {_job.rank} of {_job.size} did not meet the others within {PATIENCE:.0f} seconds "
        f"({_words(problem)}); expected all of them to run the same command: start it "
        "by torchrun or accelerate launch, on several machines with GLOO_SOCKET_IFNAME set to the network "
        "interface between them"
    )


def _meet() -> None:
    job = _job
    assert job is not None
    until, patience = time.monotonic() + PATIENCE, datetime.timedelta(seconds=PATIENCE)
    # Two connections: whoever asks by one waits while another thread asks by the same.
    job.store, store = (
        next(torch.distributed.rendezvous("env://", job.rank, job.size, timeout=patience))[0]
        for _ in range(2)
    )
    _end_silent_connections()  # Who gives up meeting a machine that is cut off asks it for a last word.
    keys = [f"safety-neurons/{number}" for number in range(job.size)]
    job.store.set(keys[job.rank], json.dumps(_place()))
    # No longer than `join` looks on: it asks by the same connection for who has the first word.
    job.store.wait(keys, datetime.timedelta(seconds=max(_HEARD, until - time.monotonic())))
    job.places = [Running(*strict_json.loads(job.store.get(key).decode())) for key in keys]
    for number, place in enumerate(job.places):
        at = place.address
        if at and _elsewhere(place.machine) and ipaddress.ip_address(at).is_loopback:
            raise RunError(
                f"process {number} of {job.size} would wait for the others at {at}, which the name of its "
                f"machine ({place.host}) stands for and no other machine reaches; set GLOO_SOCKET_IFNAME on "
                "every machine to its network interface towards the others (`ip -brief address` lists them)"
            )
    torch.distributed.init_process_group(
        "gloo", store=store, rank=job.rank, world_size=job.size, timeout=patience
    )
    torch.distributed.distributed_c10d._set_pg_timeout(_LONGEST)
    _end_silent_connections()


def _place() -> Running:
    """Where this process runs, and waits for others."""
    try:
        machine = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        machine += "".join(os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "net"))
    except OSError:
        machine = socket.gethostname()
    address = "" if os.environ.get("GLOO_SOCKET_IFNAME") else _address()
    return Running(os.getpid(), socket.gethostname(), machine, address)


def _address() -> str:
    """What the name of this machine stands for here, as gloo takes it: the first that can be listened at."""
    with contextlib.suppress(OSError):
        for family, kind, _, _, place in socket.getaddrinfo(socket.gethostname(), 0, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
                probe.bind(place)
                return str(place[0])
    return "127.0.0.1"


def _elsewhere(machine: str) -> list[str]:
    """The names of the other machines of the job."""
    places = _job.places if _job is not None else []
    return sorted({place.host for place in places if place.machine != machine})


def _end_silent_connections() -> None:
    """Let the operating system end the connections of this process to machines that no longer answer: those
    who wait for what comes by them set no limit, and a machine that is cut off says nothing.
    """
    for descriptor in map(int, os.listdir("/dev/fd")):
        with contextlib.suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            with socket.socket(fileno=os.dup(descriptor)) as connection:
                if connection.type == socket.SOCK_STREAM and connection.family != socket.AF_UNIX:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                    for name, value in SILENCE.items():
                        if hasattr(socket, name):
                            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def leave() -> None:
    """Part from the others; nothing to do where there are none."""
    global _job
    if _job is None:
        return
    with contextlib.suppress(RuntimeError):
        if _job.store is not None:
            keys = [f"safety-neurons/left/{number}" for number in range(_job.size)]
            _job.store.set(keys[_job.rank], "")
            if _job.rank == 0 and gone() is None:  # What they share may go with rank 0.
                _job.store.wait(keys, datetime.timedelta(seconds=_AWHILE))
    _job = None
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def joined() -> bool:
    """Whether this process has met others."""
    return _job is not None


def waiting() -> bool:
    """Whether a thread of this process waits for others."""
    return _job is not None and _job.waits is not None and _job.waits.is_alive()


def count() -> int:
    """Processes that share batches out; 1 inside a process's share."""
    return 1 if _job is None or _job.in_share else _job.size


def rank() -> int:
    """Which of the processes this is; 0 where there are no others."""
    return 0 if _job is None else _job.rank


def fastest() -> torch.device:
    """The device that this process takes where none is named: the GPU of its own number on its machine."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if _job is None:
        return torch.device("cuda")
    local = int(os.environ.get("LOCAL_RANK", _job.rank))
    if local >= torch.cuda.device_count():
        raise UsageError(
            f"process {_job.rank} is number {local} on its machine, which has {torch.cuda.device_count()} "
            "GPUs; expected one GPU a process: start fewer processes, or name one with --device"
        )
    return torch.device("cuda", local)


def shared(numbers: Sequence[int], work: Callable[[int], T]) -> Iterator[T]:
    """What `work` gives for every number, in their order, each worked out by one of the processes.

    Args:
        numbers: the same in every process.
        work: leaves nothing behind: whatever is to stay is in what it returns, on the host.

    Raises:
        RunError: another process is gone, or is somewhere else. Whatever `work` raises in any process.
    """
    size = count()
    if size == 1:
        for number in numbers:
            yield work(number)
        return
    for start in range(0, len(numbers), size):
        turn = numbers[start : start + size]
        mine = _attempt(lambda: work(turn[rank()])) if rank() < len(turn) else None  # noqa: B023
        for outcome in _exchanged(mine, f"{turn[0]} of {len(numbers)}")[: len(turn)]:
            yield _given(outcome)


def told(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as another process can take it: on the host where there are others."""
    return tensor.cpu() if joined() else tensor


def once(compute: Callable[[], T]) -> T:
    """What `compute` gives in rank 0, which alone calls it, told to all."""
    if count() == 1:
        return compute()
    return _given(_exchanged(_attempt(compute) if rank() == 0 else None, "once")[0])


def silent() -> bool:
    """Whether another process says why the job ends, so that this one says nothing.

    Rank 0 has the first word: what all run into is said by it.
    """
    if _job is None:
        return False
    until = time.monotonic() + (_AWHILE if _job.rank else 0.0)
    with contextlib.suppress(RuntimeError):
        if _job.store is not None:
            while time.monotonic() < until and not _job.store.check([_FAILED]):
                time.sleep(0.05)
            return bool(_job.store.compare_set(_FAILED, "", str(_job.rank)).decode() != str(_job.rank))
    time.sleep(max(0.0, until - time.monotonic()))
    # The store is out of reach, on another machine or gone with rank 0: one of each machine says so.
    return _job.rank > 1 and os.environ.get("LOCAL_RANK") != "0"


def gone() -> str | None:
    """The first of the processes that has ended, in words; None where none of this machine has."""
    places = _job.places if _job is not None else []
    here = places[_job.rank].machine if _job is not None and places else ""
    for number, place in enumerate(places):
        if place.machine == here and not _lives(place.pid):
            return f"process {number} of {len(places)} (pid {place.pid} on {place.host})"
    return None


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stream:
            return stream.read().rpartition(")")[2].split()[0] != "Z"  # Dead, and not yet fetched.
    except ProcessLookupError:
        return False
    except OSError:
        return True


@dataclasses.dataclass(frozen=True)
class _Raised:
    """What ended a process's share, as all raise it again."""

    kind: type[Exception]
    message: str


def _attempt(work: Callable[[], T]) -> tuple[T] | _Raised:
    """What `work` gives; nothing is shared out inside it."""
    assert _job is not None
    _job.in_share = True
    try:
        return (work(),)
    except SafetyNeuronsError as error:
        return _Raised(type(error), str(error.args[0]) if error.args else "")
    except Exception as error:
        return _Raised(RuntimeError, f"{type(error).__name__} in process {_job.rank}: {error}")
    finally:
        _job.in_share = False


def _given(outcome: Any) -> Any:
    if isinstance(outcome, _Raised):
        raise outcome.kind(outcome.message)
    return outcome[0]


def gathered(compute: Callable[[], T], what: str) -> list[T]:
    """What `compute` gives in every process, by rank, told to all; what it raises in one, all raise."""
    if count() == 1:
        return [compute()]
    return [_given(outcome) for outcome in _exchanged(_attempt(compute), what)]


def _exchanged(value: Any, what: str) -> list[Any]:
    job = _job
    assert job is not None
    job.step += 1
    received: list[Any] = [None] * job.size
    problem = _beside(lambda: torch.distributed.all_gather_object(received, (job.step, what, value)))
    if problem is not None:
        others = " or ".join(_elsewhere(job.places[job.rank].machine))
        another = f"another process, or the connection to {others}," if others else "another process"
        lost = f"{another} has ended ({_words(problem)})"
        raise EndedError(lost if gone() is None else f"{gone()} has ended")
    here = (job.step, what)
    elsewhere = next(((step, text) for step, text, _ in received if (step, text) != here), None)
    if elsewhere is not None:
        raise RunError(
            f"the processes are at different places ({here} and {elsewhere}); expected the same command, "
            "files and versions on all machines"
        )
    return [content for _, _, content in received]


def _words(problem: Exception) -> str:
    """What went wrong: the first sentence, without the lines of torch's and gloo's sources where it did."""
    return re.sub(r"\[\S+:\d+\] ", "", " ".join(str(problem).split())).split(". ")[0][:120]


def _beside(work: Callable[[], object], seconds: float = math.inf) -> Exception | None:
    """What `work` raises in a thread, so that this process still hears when it is told to end."""
    job = _job
    assert job is not None
    problem: list[Exception] = []

    def attempt() -> None:
        try:
            work()
        except Exception as error:
            problem.append(error)

    job.waits = threading.Thread(target=attempt, daemon=True)
    job.waits.start()
    until = time.monotonic() + seconds
    while job.waits.is_alive():
        if time.monotonic() >= until:
            return TimeoutError("not all of them have come")
        job.waits.join(_HEARD)
    return problem[0] if problem else None
