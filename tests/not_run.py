"""What a run of the suite left out, and how to run it: one line at the end."""

from collections import Counter
from collections.abc import Iterable

NEEDS = (
    (
        ("beside this checkout", "not at hand", "completions are not there"),
        "real data",
        "put the folder `shared` beside the checkout",
    ),
    (("chromium",), "a browser", "install chromium"),
    (("lm-evaluation-harness is not installed",), "lm-evaluation-harness", "pip install -e '.[evaluate]'"),
    (("inspect_ai is not installed",), "inspect_ai", "pip install -e '.[inspect]'"),
    (("network namespaces",), "two machines", "install iproute2 and run as root on Linux"),
    (("this entry point",), "a fresh installation", "make clean test"),
    (("could not import",), "development tools", "pip install -e '.[dev]'"),
)
"""Words in the reason of a skipped test, what it lacks, and how to get it."""


def not_run(reasons: Iterable[str]) -> str:
    """One line on the tests that were skipped for what the machine lacks, empty where there is none.

    Tests that can mean nothing on this machine (of another version of a library, of one that is absent) are
    not counted.
    """
    lacking: Counter[tuple[str, str]] = Counter()
    for reason in reasons:
        for words, what, how in NEEDS:
            if any(word in reason for word in words):
                lacking[what, how] += 1
    if not lacking:
        return ""
    parts = ", ".join(f"{count} for want of {what} ({how})" for (what, how), count in lacking.items())
    return f"not run: {sum(lacking.values())} tests: {parts}"
