"""What several tests of guards share: a tiny model with a guard on random neurons of it, and an upstream."""

from collections.abc import Iterator
from typing import Any

import pytest
from guarded import tiny_guard, tiny_model

from safety_neurons.guard import Guard
from safety_neurons.model import LanguageModel


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model()


@pytest.fixture(scope="module")
def guard(model: LanguageModel) -> Guard:
    return tiny_guard(model)


@pytest.fixture(scope="module")
def upstream() -> Iterator[Any]:
    from server_tools import Upstream  # needs the extra `serve`

    server = Upstream()
    server.start()
    yield server
    server.die()
