"""Lock: one process at a time writes in a folder, and the next one is told which."""

import contextlib
import os
import pathlib
import socket

from filelock import FileLock, Timeout

from safety_neurons.errors import InputError, RunError
from safety_neurons.results.files import now, read_json, write_json

_LOCK, _HOLDER = ".lock", ".lock.json"


class Lock:
    """A lock of the operating system, which ends with its process however that ends; who holds it is written beside it.

    Within one process it may be taken again: a process does not stand in its own way.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        """Names the lock; nothing is taken yet."""
        self.folder = folder
        self._held: FileLock | None = None

    def take(self) -> None:
        """Takes the lock without waiting.

        Raises:
            RunError: another process holds it, or the folder is not writable.
        """
        place = self.folder.resolve() / _LOCK
        lock = FileLock(place, timeout=0, thread_local=False, is_singleton=True)
        try:
            lock.acquire()
        except Timeout:
            raise RunError(
                f"{str(self.folder)!r} is in use by {self._holder()}; wait until it has ended, or choose another --out"
            ) from None
        except OSError as error:
            raise RunError(f"cannot write in {str(self.folder)!r} ({error.strerror or error}); choose a writable --out") from error
        self._held = lock
        if lock.lock_counter == 1:
            write_json(place.with_name(_HOLDER), {"pid": os.getpid(), "host": socket.gethostname(), "since": now()})

    def release(self) -> None:
        """Gives the lock back, where it is held; the last to do so leaves nothing of it in the folder."""
        lock, self._held = self._held, None
        if lock is None:
            return
        if lock.lock_counter == 1:  # While it is held, so that nobody's but our own is removed.
            for name in (_HOLDER, _LOCK):
                with contextlib.suppress(OSError):
                    (pathlib.Path(lock.lock_file).parent / name).unlink()
        lock.release()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.release()

    def _holder(self) -> str:
        try:
            found = read_json(self.folder / _HOLDER)
            return f"process {int(found['pid'])} on {str(found['host'])[:60]} since {str(found['since'])[:30]}"
        except (InputError, LookupError, TypeError, ValueError):
            return "another process"
