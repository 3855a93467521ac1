"""Ranks: several processes that do one run together, each its share of the batches, all with equal results.

Every process runs the whole program. Only batches are shared out: each is fed by one process, and what came
of it is handed to all, in the order in which one process would have made it. So all go on from the same
numbers, which are those of one process, bit for bit; what is no batch (plans, selections, rules) is done by
all, and rank 0 alone writes and prints. What one process raises in its share, all raise at the same place.
"""

import contextlib
import dataclasses
import datetime
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed

from safety_neurons.errors import EndedError, RunError, SafetyNeuronsError, UsageError

T = TypeVar("T")
PATIENCE = 60.0
"""Seconds in which all processes have to be there."""
_HEARD = 0.5
"""Seconds after which a process that waits for others looks whether it was told to end."""
_LONGEST = datetime.timedelta(days=30)
"""A batch may take as long as it takes: that a process is gone shows in its connection, not in the time."""
_AWHILE = 5.0
"""Seconds in which a process gets to where the others are."""
_FAILED = "safety-neurons/failed"


@dataclasses.dataclass
class Job:
    """The processes of one run, and which of them this is."""

    rank: int
    size: int
    store: Any
    """What the processes share beside their connections: a `torch.distributed` store."""
    places: list[tuple[int, str]]
    """Process id and host of every rank."""
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
        RunError: not all of them come within a minute.
    """
    global _job
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    patience = datetime.timedelta(seconds=PATIENCE)
    try:
        store, _, _ = next(torch.distributed.rendezvous("env://", rank, size, timeout=patience))
        keys = [f"safety-neurons/{number}" for number in range(size)]
        store.set(keys[rank], f"{os.getpid()} {socket.gethostname()}")
        store.wait(keys, patience)
        places = [store.get(key).decode().partition(" ") for key in keys]
        torch.distributed.init_process_group(
            "gloo", store=store, rank=rank, world_size=size, timeout=patience
        )
        torch.distributed.distributed_c10d._set_pg_timeout(_LONGEST)
    except (RuntimeError, ValueError, OSError) as error:
        raise RunError(
            f"process {rank} of {size} did not meet the others within {PATIENCE:.0f} seconds "
            f"({' '.join(str(error).split())[:120]}); expected all of them to run the same command: start "
            "it by torchrun or accelerate launch"
        ) from None
    _job = Job(rank, size, store, [(int(pid), host) for pid, _, host in places])


def leave() -> None:
    """Part from the others; nothing to do where there are none."""
    global _job
    if _job is None:
        return
    with contextlib.suppress(RuntimeError):
        keys = [f"safety-neurons/left/{number}" for number in range(_job.size)]
        _job.store.set(keys[_job.rank], "")
        if _job.rank == 0 and gone() is None:  # What they share may go with rank 0.
            _job.store.wait(keys, datetime.timedelta(seconds=_AWHILE))
    _job = None
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
    with contextlib.suppress(RuntimeError):
        until = time.monotonic() + (_AWHILE if _job.rank else 0.0)
        while time.monotonic() < until and not _job.store.check([_FAILED]):
            time.sleep(0.05)
        return bool(_job.store.compare_set(_FAILED, "", str(_job.rank)).decode() != str(_job.rank))
    return _job.rank > 1  # The store went with rank 0.


def gone() -> str | None:
    """The first of the processes that has ended, in words; None where none of this machine has."""
    for number, (pid, host) in enumerate(_job.places if _job is not None else ()):
        if host == socket.gethostname() and not _lives(pid):
            return f"process {number} of {len(_job.places) if _job else 0} (pid {pid} on {host})"
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


def _exchanged(value: Any, what: str) -> list[Any]:
    """The values of all processes, by rank.

    The wait is in a thread beside, so that this process still hears when it is told to end.
    """
    job = _job
    assert job is not None
    job.step += 1
    received: list[Any] = [None] * job.size
    problem: list[BaseException] = []

    def exchange() -> None:
        try:
            torch.distributed.all_gather_object(received, (job.step, what, value))
        except Exception as error:
            problem.append(error)

    job.waits = threading.Thread(target=exchange, daemon=True)
    job.waits.start()
    while job.waits.is_alive():
        job.waits.join(_HEARD)
    if problem:
        ended = gone() or f"another process ({' '.join(str(problem[0]).split())[:120]})"
        raise EndedError(f"{ended} has ended")
    here = (job.step, what)
    elsewhere = next(((step, text) for step, text, _ in received if (step, text) != here), None)
    if elsewhere is not None:
        raise RunError(
            f"the processes are at different places ({here} and {elsewhere}); expected the same command, "
            "files and versions on all machines"
        )
    return [content for _, _, content in received]
