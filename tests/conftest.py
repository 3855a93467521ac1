"""Fixtures of the whole suite.

The suite runs offline, on CPU, with nothing but the package and its test tools.
"""

import gc
import os
import pathlib
from collections.abc import Iterator

import hypothesis
import pytest

import type_checking
from not_run import not_run

type_checking.install()

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# peft imports bitsandbytes, which loads torch's compiler for functions that no test needs compiled: four
# seconds of every process.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

# The same examples on every machine, no files left behind, and no failure because a machine is busy.
hypothesis.settings.register_profile("suite", max_examples=30, deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("suite")


QUICK = ("results", "analysis", "display", "neurons", "prompt_lists")
"""Folders of tests without a model."""


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of real data and recorded reference results beside the checkout.

    The test is skipped where it is absent.
    """
    folder = pathlib.Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("the folder of real data is not beside this checkout")
    return folder


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """No file of a test has to outlive a power failure.

    Waiting for the disk at each takes tens of seconds of a run.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda descriptor: None)
        yield


def pytest_runtest_setup() -> None:
    """What a test before checked is no excuse for another."""
    type_checking.begin_test()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick files come last, so that at the end no worker waits long for another."""
    items.sort(key=lambda item: QUICK.index(item.path.parent.name) if item.path.parent.name in QUICK else -1)


def pytest_collection_finish() -> None:
    """Leave what importing made to itself: it stays to the end, and every search for garbage that looks at
    all of it takes a second. Search less often than usual for what tests leave, which is little.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say in one line what was not run, and how to run it."""
    skipped = terminalreporter.stats.get("skipped", [])
    if line := not_run(str(report.longrepr[2]) for report in skipped if isinstance(report.longrepr, tuple)):
        terminalreporter.write_line(line)
