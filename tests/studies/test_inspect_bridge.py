"""The provider and the tasks for inspect_ai; skipped where that is not installed."""

import contextlib
import importlib.metadata
import importlib.util

import pytest

from safety_neurons.interventions import deactivated
from safety_neurons.model import LanguageModel
from safety_neurons.neurons import NeuronSet
from safety_neurons.prompts import prompts
from tiny import CHAT_TEMPLATE, tiny_llama, tiny_tokenizer

needs_inspect = pytest.mark.skipif(importlib.util.find_spec("inspect_ai") is None, reason="inspect_ai is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")


@needs_inspect
@pytest.mark.parametrize("treated", [False, True])
def test_a_task_gets_the_completions_of_the_treated_model(treated, tmp_path, monkeypatch):
    from inspect_ai import eval as run
    from inspect_ai.model import get_model

    from safety_neurons.studies import inspect_bridge

    monkeypatch.chdir(tmp_path)
    lm = LanguageModel(tiny_llama(), tiny_tokenizer(CHAT_TEMPLATE))
    neurons = NeuronSet({"layers.0.down": list(range(40)), "layers.1.up": list(range(40))}, lm.table)
    treatment = (lambda: deactivated(lm, neurons)) if treated else None
    model = get_model("safety_neurons/mine", lm=lm, treatment=treatment, memoize=False)
    (log,) = run(inspect_bridge.requests(limit=4), model=model, max_tokens=8, display="none", log_dir=str(tmp_path))
    with (treatment or contextlib.nullcontext)():
        expected = [one.completion for one in lm.complete(prompts("builtin:harmful-test", limit=4), max_new_tokens=8)]
    assert log.status == "success"
    assert [sample.output.completion for sample in log.samples] == expected
    assert log.results.scores[0].metrics["mean"].value == 1.0  # nothing a random model writes is a refusal


def test_inspect_finds_the_bridge_by_its_entry_point():
    found = [entry for entry in importlib.metadata.entry_points(group="inspect_ai") if entry.name == "safety_neurons"]
    if not found:
        pytest.skip("the package was installed before it had this entry point")
    assert found[0].value == "safety_neurons.studies.inspect_bridge"
