"""Several processes that do one command together (`torchrun`, `accelerate launch`): which speaks, where each
keeps what the run's folder holds, and how they end.

Rank 0 writes the folder and prints. The others work on a copy of what the folder held at the start, in a
temporary folder of their own, so that no rule of a study has to know of them, and no file is read while
another process writes it.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from safety_neurons.errors import RunError, UsageError

TOGETHER = frozenset(
    {"find", "verify", "compare", "evaluate", "analyze", "guard fit", "guard evaluate", "tune"}
)
"""Verbs, or groups of verbs, whose batches several processes share."""
_OWN: list[Any] = []
"""This process's standard output and error, while nothing may be said on them."""
_PLACES: dict[str, str] = {}
"""Temporary folders to remove, with the folder of rank 0 that each stands for."""
_PLACE = "safety-neurons-"
_ASIDE = ".aside"
"""Marks such a folder: nothing else is ever removed, whatever it is called."""


def launched() -> int:
    """Processes that a launcher started for this command; 1 without one."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if "RANK" in os.environ and size.isdigit() else 1


def hush() -> None:
    """Say nothing in any process but rank 0, until `speaks`."""
    if launched() > 1 and os.environ["RANK"] != "0":
        _OWN[:] = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - to the end


def meet(words: str, device_map: str | None = None) -> None:
    """Join the other processes, where there are some, for a verb that they can share.

    Raises:
        UsageError: a verb that one process does alone, or a device map that takes all GPUs.
        RunError: the others do not come.
    """
    if launched() == 1:
        return
    if not {words, words.split()[0]} & TOGETHER:
        raise UsageError(
            f"{words} is done by one process, and {launched()} were started; expected it without torchrun or "
            f"accelerate launch: safety-neurons {words}"
        )
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        raise UsageError(
            f"--device-map {device_map} spreads one model over all GPUs, and {launched()} processes would do "
            "so; expected one process, or none of it: each takes the GPU of its own number"
        )
    from safety_neurons.model import ranks

    signal.signal(signal.SIGTERM, _told_to_end)
    ranks.join()


def _told_to_end(*_: object) -> None:
    """What a launcher sends when another process has died: end as if interrupted, so that work is kept."""
    ending()
    raise KeyboardInterrupt


def ending() -> None:
    """From here on no word to end changes anything: what is kept and said at the end is. Launchers send
    theirs after a terminal has sent its own.
    """
    if signal.getsignal(signal.SIGTERM) is _told_to_end:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with contextlib.suppress(ValueError):  # Only the main thread may.
            signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def heeding() -> Iterator[None]:
    """Interruptions are heard again after a block, as before it, also where it came to its `ending`."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if before is signal.default_int_handler:
            with contextlib.suppress(ValueError):
                signal.signal(signal.SIGINT, before)


def _ranks() -> Any:
    """The module of ranks, where the processes have met."""
    module = sys.modules.get("safety_neurons.model.ranks")
    return module if module is not None and module.joined() else None


def speaks() -> bool:
    """Whether this process says why the command ends; the first that fails does, and rank 0 before others."""
    if launched() == 1:
        return True
    ranks = _ranks()
    if ranks is None and os.environ["RANK"] != "0":
        time.sleep(5)  # A launcher ends the others as soon as one has: rank 0 is to have said why by then.
        return False
    if ranks is not None and ranks.silent():
        return False
    if _OWN:
        sys.stdout, sys.stderr = _OWN
    return True


def gone() -> str | None:
    """The process that has ended without a word, in words; None where there is none."""
    ranks = _ranks()
    return None if ranks is None else ranks.gone()


def part(exit_code: int = 0) -> None:
    """Part from the others at the end of a command."""
    while _PLACES:
        shutil.rmtree(_PLACES.popitem()[0], ignore_errors=True)
    ranks = _ranks()
    if ranks is not None and ranks.waiting():  # A thread that waits for the others may do so for ever.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    if ranks is not None:
        ranks.leave()


def place_of(folder: pathlib.Path) -> str:
    """The folder of the run in rank 0, as it was named there."""
    return _PLACES.get(str(folder), str(folder))


def folder(opened: Callable[[pathlib.Path, bool], Any], out: Callable[[], pathlib.Path]) -> Any:
    """The run's folder: rank 0's own, and for others one in which lies what that held.

    Args:
        opened: opens the run in a folder; as another process's copy of it, or as rank 0 does.
        out: the folder of the run.

    Raises:
        RunError: another machine holds the run in a folder of its own, from which rank 0 cannot go on, or
            has other files or another version.
    """
    ranks, own = _ranks(), out()
    if ranks is None:
        return opened(own, False)
    from safety_neurons.results.run import RECORD

    here, runs = socket.gethostname(), []
    held = ranks.gathered(lambda: ((own / RECORD).is_file(), here), "the run's folder")
    holding = next((host for there, host in held if there), None)
    if holding is not None and not held[0][0]:
        raise RunError(
            f"{str(own)!r} holds a run on {holding} and none on {held[0][1]}, where rank 0 writes; expected "
            f"one folder that all machines share, or rank 0 on {holding} (torchrun --node_rank 0 there, and "
            "--master_addr on all), or another --out"
        )

    def first() -> tuple[str, dict[str, bytes]]:
        runs.append(opened(own, False))
        return str(runs[0].folder), _content(runs[0])

    named, files = ranks.once(first)

    def others() -> None:
        if not runs:
            runs.append(_copied(opened, named, files))

    try:
        ranks.gathered(others, "the run")
    except BaseException:
        for run in runs:
            run.abandon()
        raise
    return runs[0]


def _copied(opened: Callable[[pathlib.Path, bool], Any], named: str, files: dict[str, bytes]) -> Any:
    """The run in a temporary folder, from the files of rank 0's."""
    from safety_neurons.results.run import Lock

    _remove_left()
    place = pathlib.Path(tempfile.mkdtemp(prefix=_PLACE))
    _PLACES[str(place)] = named
    lock = Lock(place)
    lock.take()  # Before it is marked: what is marked and has no holder is removed.
    (place / _ASIDE).touch()
    for name, content in files.items():
        file = place / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    try:
        run = opened(place, True)
    except RunError as error:
        what = str(error).replace(str(place), named).partition("; ")[0]
        raise RunError(
            f"rank 0 and process {os.environ['RANK']} on {socket.gethostname()} are given different things "
            f"({what}); expected the same command, files and version on all machines"
        ) from None
    lock.release()
    return run


def _remove_left() -> None:
    """Remove the temporary folders that killed processes left."""
    from safety_neurons.results.run import Lock

    for left in pathlib.Path(tempfile.gettempdir()).glob(f"{_PLACE}*"):
        lock = Lock(left)
        with contextlib.suppress(RunError, OSError):  # A process works in it, or it has just gone.
            if (left / _ASIDE).is_file():
                lock.take()
                if not lock.notes:
                    shutil.rmtree(left, ignore_errors=True)
                lock.release()


def _content(run: Any) -> dict[str, bytes]:
    """By name the files from which a run goes on; of a finished one the record, and its other files empty."""
    from safety_neurons.results.run import ANSWERED_BY, CACHED, CONTINUED, RECORD

    root = run.folder
    parts = [
        path for pattern in ("checkpoints/*.safetensors", f"{CACHED}/*.json") for path in root.glob(pattern)
    ]
    names = {*run.record["files"], *CONTINUED, ANSWERED_BY, *(str(path.relative_to(root)) for path in parts)}
    there = [root / name for name in sorted(names) if (root / name).is_file()]
    files = {str(path.relative_to(root)): b"" if run.finished else path.read_bytes() for path in there}
    return {**files, RECORD: (root / RECORD).read_bytes()}
