"""inspect_ai: a provider for models of this package, treated or as they are, and suites as tasks with judges as scorers.

Found by inspect_ai through its entry point; imported by nothing else, since inspect_ai is optional (the extra `inspect`).

    inspect eval safety_neurons/requests --model safety_neurons/ORG/MODEL -M deactivate=neurons.safetensors -T suite=advbench

In Python a model in memory is passed as it is: `get_model("safety_neurons/mine", lm=model, treatment=lambda: deactivated(model, neurons))`.
"""

import asyncio
import contextlib
import threading
from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessage, GenerateConfig, ModelAPI, ModelOutput, modelapi
from inspect_ai.scorer import Score, Scorer, Target, mean, scorer, stderr
from inspect_ai.solver import TaskState, generate
from inspect_ai.tool import ToolChoice, ToolInfo

from safety_neurons.errors import UsageError
from safety_neurons.judges import judge as judge_of
from safety_neurons.model import LanguageModel, load, load_pair
from safety_neurons.neurons import NeuronSet
from safety_neurons.prompts import Message, Prompt
from safety_neurons.results import Completion
from safety_neurons.studies.answering import Treatment
from safety_neurons.studies.evaluation_bench import treatment_of
from safety_neurons.studies.requests import requests_of
from safety_neurons.suites import suite as suite_of

LONGEST = 128


@modelapi(name="safety_neurons")
class TreatedModel(ModelAPI):
    """A model of this package behind inspect_ai's interface; completions are the same as those of `LanguageModel.complete`.

    Args:
        model_name: model argument: ID[@REVISION][+ADAPTER…] or a folder; any name where `lm` is given.
        base_url: not used.
        api_key: not used.
        config: of inspect_ai.
        lm: a model in memory.
        treatment: what it is under, as a function that makes a context manager.
        deactivate: neuron file: these are off.
        patch: neuron file: patched from `donor`.
        donor: model argument of the donor.
        **loading: as `safety_neurons.load` takes them.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 - inspect_ai's own signature
        *,
        lm: LanguageModel | None = None,
        treatment: Treatment | None = None,
        deactivate: str | None = None,
        patch: str | None = None,
        donor: str | None = None,
        **loading: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        other: LanguageModel | None = None
        if lm is not None:
            self.lm = lm
        elif donor is not None:
            pair = load_pair(model_name, donor, **loading)
            self.lm, other = pair.base, pair.aligned
        else:
            self.lm = load(model_name, **loading)
        sets = [None if path is None else NeuronSet.load(path).on(self.lm.table, [self.lm.name]) for path in (deactivate, patch)]
        self.applied = treatment_of(self.lm, sets[0], sets[1], other, treatment)
        self._turn = threading.Lock()

    async def generate(
        self,
        input: list[ChatMessage],
        tools: list[ToolInfo],
        tool_choice: ToolChoice,  # noqa: ARG002 - inspect_ai's own signature
        config: GenerateConfig,
    ) -> ModelOutput:
        """One answer to a conversation, one at a time: a treatment is a state of the model."""
        if tools:
            raise UsageError(f"{len(tools)} tools for a model that calls none; expected a task without tools")
        turns = tuple(Message(turn.role, turn.text) for turn in input)
        prompt = Prompt("0", turns[-1].content, turns)
        completion = await asyncio.to_thread(self._complete, prompt, config)
        reason: Any = {"length": "max_tokens", "failed": "unknown"}.get(completion.finish_reason, "stop")
        return ModelOutput.from_content(self.model_name, completion.completion, stop_reason=reason)

    def max_connections(self) -> int:
        """One: answers are written one after the other."""
        return 1

    def _complete(self, prompt: Prompt, config: GenerateConfig) -> Completion:
        warm = float(config.temperature or 0.0)
        with self._turn, (self.applied.act or contextlib.nullcontext)():
            return self.lm.complete(
                [prompt],
                max_new_tokens=config.max_tokens or LONGEST,
                sample=warm > 0,
                temperature=warm or 1.0,
                top_p=config.top_p or 1.0,
                seed=config.seed or 0,
            )[0]


@scorer(metrics=[mean(), stderr()])
def judged(judge: str = "refusal") -> Scorer:
    """Harm on harmful requests, refusal on harmless ones, by a judge of this package; unscored completions are NaN."""
    verdicts = judge_of(judge)

    async def score(state: TaskState, target: Target) -> Score:
        about = dict(state.metadata or {})
        completion = Completion(str(state.sample_id), state.input_text, state.output.completion, meta=about)
        judgement = await asyncio.to_thread(verdicts.judge, [completion])
        said = judgement.harmful[0] if target.text == "harmful" else judgement.refused[0]
        verdict = judgement.verdicts[0]
        value = float("nan") if said is None else float(said)
        return Score(value=value, answer=verdict.label, explanation=verdict.why or verdict.raw, metadata={"judge": judgement.judge})

    return score


@task
def requests(suite: str = "builtin:harmful-test", judge: str = "refusal", folder: str | None = None, limit: int | None = None) -> Task:
    """A suite of requests with a judge as its scorer: harm on the harmful ones, over-refusal on the harmless ones."""
    source = suite if suite.startswith("builtin:") else suite_of(suite, folder=folder)
    asked = requests_of([source], None, limit=limit)
    samples = [
        Sample(input=prompt.text, target=part.kind, id=f"{part.kind}/{prompt.id}", metadata={**prompt.meta, "kind": part.kind})
        for part in asked.requests
        for prompt in part.prompts
    ]
    return Task(dataset=MemoryDataset(samples, name=suite), solver=generate(), scorer=judged(judge))
