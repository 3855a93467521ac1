"""The provider and the tasks for inspect_ai; skipped where that is not installed."""

import asyncio
import contextlib
import importlib.metadata
import importlib.util

import pytest

from safety_neurons.interventions import deactivated
from safety_neurons.model import LanguageModel
from safety_neurons.neurons import NeuronSet
from safety_neurons.prompt_lists import prompts
from tiny import CHAT_TEMPLATE, tiny_llama, tiny_tokenizer

needs_inspect = pytest.mark.skipif(
    importlib.util.find_spec("inspect_ai") is None, reason="inspect_ai is not installed"
)
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
    (log,) = run(
        inspect_bridge.requests(limit=4), model=model, max_tokens=8, display="none", log_dir=str(tmp_path)
    )
    with (treatment or contextlib.nullcontext)():
        expected = [
            one.completion for one in lm.complete(prompts("builtin:harmful-test", limit=4), max_new_tokens=8)
        ]
    assert log.status == "success"
    assert [sample.output.completion for sample in log.samples] == expected
    assert log.results.scores[0].metrics["mean"].value == 1.0  # nothing a random model writes is a refusal


@pytest.fixture
def api():
    from inspect_ai.model import GenerateConfig

    from safety_neurons.studies import inspect_bridge

    lm = LanguageModel(tiny_llama(), tiny_tokenizer(CHAT_TEMPLATE))
    model = inspect_bridge.TreatedModel("mine", lm=lm)

    def ask(messages=None, tools=(), **options):
        from inspect_ai.model import ChatMessageUser

        asked = messages or [ChatMessageUser(content="Hello there")]
        return asyncio.run(
            model.generate(asked, list(tools), "none", GenerateConfig(**{"max_tokens": 12, **options}))
        )

    ask.lm = lm
    return ask


REFUSED = {
    "best_of": 2,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "logprobs": True,
    "top_logprobs": 2,
    "prompt_logprobs": 1,
    "verbosity": "low",
    "effort": "low",
    "reasoning_effort": "low",
    "reasoning_tokens": 10,
    "reasoning_summary": "auto",
    "extra_headers": {"a": "b"},
    "extra_body": {"a": 1},
    "batch": True,
}


@needs_inspect
def test_every_option_of_inspect_is_done_or_its_own_affair_or_refused_by_name(api):
    from inspect_ai.model import GenerateConfig

    from safety_neurons.errors import UsageError
    from safety_neurons.studies.inspect_bridge import DONE, ELSEWHERE, settings_of

    fields = set(GenerateConfig.model_fields)
    for name in sorted(fields - DONE - ELSEWHERE):  # a field of a later version too, whatever its type
        config = GenerateConfig.model_construct(**{name: object()})
        with pytest.raises(UsageError, match=rf"option {name}="):
            settings_of(config)
    for name, value in REFUSED.items():
        if name in fields:
            with pytest.raises(UsageError, match=rf"option {name}="):
                api(**{name: value})
    assert {"seed", "num_choices", "stop_seqs", "temperature", "max_tokens"} <= DONE


@needs_inspect
@pytest.mark.parametrize(
    "options",
    [{"frequency_penalty": 0}, {"logprobs": False}, {"num_choices": 1}, {"temperature": 0, "top_p": 0.9}],
)
def test_options_that_ask_for_nothing_change_nothing(api, options):
    assert api(**options).completion == api().completion


@needs_inspect
def test_draws_differ_between_calls_and_choices_and_come_again_in_a_new_model(api):
    first, second = api(temperature=1.0), api(temperature=1.0)
    several = api(temperature=1.0, num_choices=3, seed=5)
    assert first.completion != second.completion
    assert len({choice.message.text for choice in several.choices}) == 3
    assert len({choice.message.text for choice in api(num_choices=3).choices}) == 1


@needs_inspect
def test_epochs_draw_differently_and_an_evaluation_run_again_draws_the_same(tmp_path, monkeypatch):
    from inspect_ai import eval as run
    from inspect_ai.model import get_model

    from safety_neurons.studies import inspect_bridge

    monkeypatch.chdir(tmp_path)
    lm = LanguageModel(tiny_llama(), tiny_tokenizer(CHAT_TEMPLATE))

    def drawn():
        model = get_model("safety_neurons/mine", lm=lm, memoize=False)
        task = inspect_bridge.requests(limit=2)
        (log,) = run(
            task, model=model, max_tokens=8, temperature=1.0, epochs=3, display="none", log_dir=str(tmp_path)
        )
        return {(sample.id, sample.epoch): sample.output.completion for sample in log.samples}

    once, again = drawn(), drawn()
    assert len(once) == 6
    assert len(set(once.values())) == 6
    assert once == again


@needs_inspect
def test_a_stop_sequence_ends_the_answer_and_is_not_in_it(api):
    whole = api().completion
    stop = whole[len(whole) // 2 :][:2]
    output = api(stop_seqs=["\x00", stop])
    assert (output.completion, output.stop_reason) == (whole[: whole.index(stop)], "stop")


@needs_inspect
def test_a_bias_makes_a_token_certain(api):
    token = 40
    assert api(logit_bias={token: 100.0}, max_tokens=3).completion == api.lm.decode([token] * 3)


@needs_inspect
def test_what_is_no_text_and_top_p_without_a_temperature_are_refused(api):
    from inspect_ai.model import ChatMessageTool, ChatMessageUser, ContentImage, ContentText

    from safety_neurons.errors import UsageError

    image = ChatMessageUser(
        content=[ContentText(text="see"), ContentImage(image="data:image/png;base64,AA==")]
    )
    with pytest.raises(UsageError, match="'image'"):
        api([image])
    with pytest.raises(UsageError, match="tool"):
        api([ChatMessageUser(content="a"), ChatMessageTool(content="b", tool_call_id="1")])
    with pytest.raises(UsageError, match="tools"):
        api(tools=[object()])
    with pytest.raises(UsageError, match="temperature"):
        api(top_p=0.5)


@needs_inspect
def test_system_and_earlier_turns_are_fed_as_the_model_takes_them(api):
    from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser

    from safety_neurons.prompt_lists import Message, Prompt

    turns = [("system", "be nice"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    kinds = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}
    expected = api.lm.complete(
        [Prompt("0", "c", tuple(Message(*turn) for turn in turns))], max_new_tokens=12
    )[0].completion
    assert api([kinds[role](content=text) for role, text in turns]).completion == expected


def test_inspect_finds_the_bridge_by_its_entry_point():
    found = [
        entry
        for entry in importlib.metadata.entry_points(group="inspect_ai")
        if entry.name == "safety_neurons"
    ]
    if not found:
        pytest.skip("the package was installed before it had this entry point")
    assert found[0].value == "safety_neurons.studies.inspect_bridge"
