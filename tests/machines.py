"""Two machines in one: namespaces of Linux, each with a name and a network of its own, and a wire between.

Nothing of them outlives the process that made them.
"""

import contextlib
import subprocess
from collections.abc import Iterator

ADDRESSES = ("10.213.77.1", "10.213.77.2")
"""Of the machines `machine-0` and `machine-1`, at the interface `WIRE`."""
WIRE = "between"


@contextlib.contextmanager
def two_machines() -> Iterator[list[int]]:
    """A process in each; none where machines cannot be made (they need Linux, `ip` and the superuser)."""
    with contextlib.ExitStack() as stack:
        try:
            machines = [_machine(number, stack) for number in range(len(ADDRESSES))]
            ends = [f"{WIRE} netns {machine}" for machine in machines]
            subprocess.run(["ip", *f"link add {ends[0]} type veth peer name {ends[1]}".split()], check=True)
            for machine, address in zip(machines, ADDRESSES, strict=True):
                for words in (f"address add {address}/24 dev {WIRE}", f"link set {WIRE} up"):
                    subprocess.run([*inside(machine), "ip", *words.split()], check=True)
        except (OSError, subprocess.CalledProcessError):
            machines = []
        yield machines


def inside(machine: int) -> list[str]:
    """The words that run a command on a machine."""
    return ["nsenter", "--target", str(machine), "--net", "--uts"]


def _machine(number: int, stack: contextlib.ExitStack) -> int:
    """A process in namespaces of its own, which ends when this one or the stack does."""
    start = (
        f"echo machine-{number} > /proc/sys/kernel/hostname && ip link set lo up && echo there && exec cat"
    )
    holder = stack.enter_context(
        subprocess.Popen(
            ["unshare", "--net", "--uts", "sh", "-c", start],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    )
    assert holder.stdout is not None
    if holder.stdout.readline() != b"there\n":
        raise OSError("no machine was made")
    return holder.pid
