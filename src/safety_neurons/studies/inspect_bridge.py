"""inspect_ai: a provider for models of this package, treated or as they are, and suites as tasks with judges
as scorers.

Found by inspect_ai through its entry point; imported by nothing else, since inspect_ai is optional (the extra
`inspect`).

    inspect eval safety_neurons/requests --model safety_neurons/ORG/MODEL -M deactivate=neurons.safetensors -T
    suite=advbench

In Python a model in memory is passed as it is: `get_model("safety_neurons/mine", lm=model, treatment=lambda:
deactivated(model, neurons))`.

Every option of inspect_ai's GenerateConfig, a future one too, is done, is inspect_ai's own affair, or is
refused by its name. Answers are greedy unless a temperature is given. Each draw has a seed of its own: a hash
of the config's seed (0 where there is none), the sample's id, the epoch, and how often this sample has asked
the same before; so epochs differ, and the same evaluation run again draws the same.
"""

import asyncio
import collections
import contextlib
import dataclasses
import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.log._samples import (
    sample_active,
)  # the epoch that a provider answers for is said nowhere else
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    modelapi,
)
from inspect_ai.scorer import Score, Scorer, Target, mean, scorer, stderr
from inspect_ai.solver import TaskState, generate
from inspect_ai.tool import ToolChoice, ToolInfo

from safety_neurons.errors import UsageError
from safety_neurons.judges import judge as judge_of
from safety_neurons.model import LanguageModel, load, load_pair
from safety_neurons.model.language_model import stops
from safety_neurons.neurons import NeuronSet
from safety_neurons.prompt_lists import Message, Prompt
from safety_neurons.prompt_lists.records import request_of
from safety_neurons.results import Completion
from safety_neurons.studies.bench import Treatment
from safety_neurons.studies.evaluation import Sources, Treated, requests_of
from safety_neurons.suites import suite as suite_of

LONGEST = 128
"""Tokens of an answer where no `max_tokens` is given."""
DONE = frozenset(
    {"max_tokens", "temperature", "top_p", "top_k", "stop_seqs", "seed", "num_choices", "logit_bias"}
)
"""Options that are passed on to the model."""
ELSEWHERE = frozenset(
    {
        *("system_message", "reasoning_history", "max_tool_output", "cache", "fail_on_refusal"),
        *(
            "max_retries",
            "timeout",
            "attempt_timeout",
            "stream_idle_timeout",
            "max_connections",
            "adaptive_connections",
        ),
        *("parallel_tool_calls", "internal_tools", "cache_prompt"),
    }
)
"""Options that inspect_ai acts on itself, and those of tools and of connections, of which there are none
here.
"""
THOUGHT = ("thinking", "think_end")
"""What a completion says of its thinking, which judges have to know."""
NO_OPS: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "batch": (False,),
    "extra_headers": ({},),
    "extra_body": ({},),
    "modalities": ([],),
    "fallback_models": ([],),
}
"""Values of other options that ask for nothing."""


@dataclasses.dataclass(frozen=True)
class BridgeArguments:
    """A model and what it is under."""

    lm: LanguageModel | None = None
    """A model in memory, in the place of the one that is named."""
    treatment: Treatment | None = None
    """What it is under, as a function that makes a context manager."""
    deactivate: str | None = None
    """Neuron file: these are off."""
    patch: str | None = None
    """Neuron file: patched from `donor`."""
    donor: str | None = None
    """Model argument of the donor."""


@modelapi(name="safety_neurons")
class TreatedModel(ModelAPI):
    """A model of this package behind inspect_ai's interface.

    Completions are the same as those of `LanguageModel.complete`.

    Args:
        model_name: model argument: ID[@REVISION][+ADAPTER…] or a folder; any name where `lm` is given.
        base_url: not used.
        api_key: not used.
        config: of inspect_ai.
        **options: the fields of `BridgeArguments`, and what `safety_neurons.load` takes.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 - inspect_ai's own signature
        **options: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        own = {
            field.name: options.pop(field.name)
            for field in dataclasses.fields(BridgeArguments)
            if field.name in options
        }
        given, other = BridgeArguments(**own), None
        if given.lm is not None:
            self.lm = given.lm
        elif given.donor is not None:
            pair = load_pair(model_name, given.donor, **options)
            self.lm, other = pair.base, pair.aligned
        else:
            self.lm = load(model_name, **options)
        paths = (given.deactivate, given.patch)
        sets = [
            None if path is None else NeuronSet.load(path).on(self.lm.table, [self.lm.name]) for path in paths
        ]
        act, _ = Treated(deactivate=sets[0], patch=sets[1], donor=other, treatment=given.treatment).of(
            self.lm
        )
        self.treatment = act or contextlib.nullcontext
        self._turn = threading.Lock()
        self._asked: collections.Counter[str] = collections.Counter()

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
        settings = {**settings_of(config), **(stops(self.lm, config.stop_seqs) if config.stop_seqs else {})}
        turns = tuple(_turn(message) for message in input)
        prompt = Prompt("0", request_of(turns) or turns[-1].content, turns)
        answers = await asyncio.to_thread(
            self._complete, prompt, config, settings, self._stream(config, turns)
        )
        first, _ = answers[0]
        outputs = [
            ModelOutput.from_content(
                self.model_name, text, stop_reason="max_tokens" if _cut(one, text) else "stop"
            )
            for one, text in answers
        ]
        output = outputs[0]
        output.choices = [choice for each in outputs for choice in each.choices]
        output.metadata = {
            **(output.metadata or {}),
            **{key: first.meta[key] for key in THOUGHT if key in first.meta},
        }
        return output

    def _stream(self, config: GenerateConfig, turns: Sequence[Message]) -> str:
        """What the seeds of this call are made of: the config's seed, the sample, the epoch, and how often it
        asked the same before.
        """
        active = sample_active()
        sample, epoch = (None, 1) if active is None else (active.sample.id, active.epoch)
        question = json.dumps(
            [config.seed or 0, sample, epoch, [[turn.role, turn.content] for turn in turns]]
        )
        self._asked[question] += 1
        return json.dumps([config.seed or 0, sample, epoch, self._asked[question]])

    def max_connections(self) -> int:
        """One: answers are written one after the other."""
        return 1

    def _complete(
        self, prompt: Prompt, config: GenerateConfig, settings: dict[str, Any], stream: str
    ) -> list[tuple[Completion, str]]:
        """The answers, and their texts up to the first stop sequence."""
        answers: list[tuple[Completion, str]] = []
        with self._turn, self.treatment():
            for number in range(config.num_choices or 1):
                if number and not settings["sample"]:  # greedy answers are all the same
                    answers.append(answers[0])
                    continue
                seed = int.from_bytes(hashlib.sha256(f"{stream}/{number}".encode()).digest()[:4], "big") >> 1
                one = self.lm.complete([prompt], seed=seed, **settings)[0]
                places = [
                    place for stop in config.stop_seqs or () if (place := one.completion.find(stop)) >= 0
                ]
                answers.append((one, one.completion[: min(places)] if places else one.completion))
        return answers


def _cut(one: Completion, text: str) -> bool:
    """Whether an answer was cut at its length, and not before at a stop sequence."""
    return one.finish_reason == "length" and text == one.completion


def settings_of(config: GenerateConfig) -> Mapping[str, Any]:
    """The options as `LanguageModel.complete` takes them, seeds aside.

    Raises:
        UsageError: An option that cannot be done, by its name.
    """
    for name in type(config).model_fields:
        value = getattr(config, name)
        if (
            value is None
            or name in DONE | ELSEWHERE
            or any(value == nothing for nothing in NO_OPS.get(name, ()))
        ):
            continue
        raise UsageError(
            f"inspect_ai's option {name}={str(value)[:60]} cannot be done by this provider; leave it out"
        )
    if config.temperature is None and ((config.top_p or 1.0) < 1.0 or config.top_k):
        name = "top_k" if config.top_k else "top_p"
        raise UsageError(
            f"inspect_ai's option {name} without a temperature: answers would be greedy; give "
            "temperature=1 as well"
        )
    if config.num_choices is not None and config.num_choices < 1:
        raise UsageError(f"inspect_ai's option num_choices={config.num_choices}: expected at least 1")
    warm = float(config.temperature or 0.0)
    settings: dict[str, Any] = {
        "max_new_tokens": LONGEST if config.max_tokens is None else config.max_tokens,
        "sample": warm > 0,
        "temperature": warm or 1.0,
        "top_p": 1.0 if config.top_p is None else config.top_p,
    }
    if warm and config.top_k:
        settings["top_k"] = config.top_k
    if config.logit_bias:
        settings["sequence_bias"] = {(int(token),): float(bias) for token, bias in config.logit_bias.items()}
    return settings


def _turn(message: ChatMessage) -> Message:
    """A turn of text.

    Raises:
        UsageError: A turn with tool calls, of a tool, or with a part that is not text.
    """
    if message.role == "tool" or getattr(message, "tool_calls", None):
        raise UsageError(
            "a turn with tool calls, or of a tool, for a model that calls none; expected a task without tools"
        )
    parts = [] if isinstance(message.content, str) else [part.type for part in message.content]
    other = next((kind for kind in parts if kind != "text"), None)
    if other is not None:
        raise UsageError(
            f"a part of type {other!r} in a turn of role {message.role!r}; this provider reads text only"
        )
    return Message(message.role, message.text)


@scorer(metrics=[mean(), stderr()])
def judged(judge: str = "refusal", think_end: str | None = None) -> Scorer:
    """Harm on harmful requests, refusal on harmless ones, by a judge of this package.

    Unscored completions are NaN.

    Args:
        judge: name of the judge.
        think_end: text that ends the model's thinking, where it is none of the marks that are known.
    """
    verdicts = judge_of(judge)

    async def score(state: TaskState, target: Target) -> Score:
        output = state.output.metadata or {}
        about = {**(state.metadata or {}), **{key: output[key] for key in THOUGHT if key in output}}
        turns = [turn for turn in state.messages if turn.role in ("system", "user", "assistant")]
        if turns and turns[-1].role == "assistant":
            turns = turns[:-1]
        spoken = [Message(turn.role, turn.text) for turn in turns]
        if len(spoken) > 1:
            about["messages"] = [{"role": turn.role, "content": turn.content} for turn in spoken]
        request = request_of(spoken) or (spoken[-1].content if spoken else state.input_text)
        completion = Completion(str(state.sample_id), request, state.output.completion, meta=about)
        judgement = await asyncio.to_thread(verdicts.judge, [completion], think_end=think_end)
        outcome = judgement.harmful[0] if target.text == "harmful" else judgement.refused[0]
        verdict = judgement.verdicts[0]
        value = float("nan") if outcome is None else float(outcome)
        return Score(
            value=value,
            answer=verdict.label,
            explanation=verdict.why or verdict.raw,
            metadata={"judge": judgement.judge},
        )

    return score


_ROLES: dict[str, Any] = {
    "system": ChatMessageSystem,
    "user": ChatMessageUser,
    "assistant": ChatMessageAssistant,
}


def _input(prompt: Prompt) -> str | list[ChatMessage]:
    """A prompt as inspect_ai takes one: its text, or the turns of a conversation."""
    return [_ROLES[turn.role](content=turn.content) for turn in prompt.messages] or prompt.text


@task
def requests(
    suite: str = "builtin:harmful-test",
    judge: str = "refusal",
    folder: str | None = None,
    limit: int | None = None,
    think_end: str | None = None,
) -> Task:
    """A suite of requests with a judge as its scorer: harm on the harmful ones, over-refusal on the harmless
    ones.
    """
    source = suite if suite.startswith("builtin:") else suite_of(suite, folder=folder)
    asked = requests_of([source], Sources(over_refusal=None, limit=limit))
    samples = [
        Sample(
            input=_input(prompt),
            target=part.kind,
            id=f"{part.kind}/{prompt.id}",
            metadata={**prompt.meta, "kind": part.kind},
        )
        for part in asked.requests
        for prompt in part.prompts
    ]
    return Task(
        dataset=MemoryDataset(samples, name=suite), solver=generate(), scorer=judged(judge, think_end)
    )
