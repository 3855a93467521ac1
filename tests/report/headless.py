"""A real browser without a window, where one is installed."""

import html
import os
import pathlib
import re
import shutil
import subprocess
import tempfile

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--no-first-run",
)


def browser() -> str:
    """The path of a Chromium; the test is skipped where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no chromium is installed")
    return found


def run(page: pathlib.Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Opens a page and returns what the browser printed."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        words = [browser(), *FLAGS, f"--user-data-dir={profile}", *flags, page.resolve().as_uri()]
        environment = {**os.environ, "HOME": profile}
        return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, env=environment)


def document(page: pathlib.Path, *flags: str) -> str:
    """The document after its scripts have run, as HTML."""
    finished = run(page, "--dump-dom", "--virtual-time-budget=4000", *flags)
    assert finished.returncode == 0, finished.stderr[-2000:]
    return finished.stdout


def console(page: pathlib.Path) -> list[str]:
    """What the page's console says: errors of scripts, blocked sources."""
    finished = run(page, "--enable-logging=stderr", "--v=0", "--dump-dom", "--virtual-time-budget=4000")
    return [html.unescape(line) for line in finished.stderr.splitlines() if re.search(r":CONSOLE", line)]
