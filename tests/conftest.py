"""Fixtures of the whole suite. The suite runs offline, on CPU, with nothing but the package and its test tools."""

import os
import pathlib

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of real data and recorded reference results beside the checkout; the test is skipped where it is absent."""
    folder = pathlib.Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("the folder of real data is not beside this checkout")
    return folder
