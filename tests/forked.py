"""A part of a test in a process of its own, which is forked: it has imported everything already, and what
this process has changed for a test holds there too.
"""

import os
import warnings
from collections.abc import Callable


def forked(work: Callable[[], object]) -> str:
    """What the work gives in another process, as text; an error in place of it as its type and text."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Other threads of a test's process hold no lock.
        child = os.fork()
    if not child:
        try:
            said = str(work())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said
