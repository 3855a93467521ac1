"""The local model behind its own guard: a real tiny model, a real guard on it, a real client."""

import concurrent.futures
import dataclasses
import json
import signal
import sys

import httpx
import openai
import pytest
import torch
from server_tools import running

from forked import Forked
from safety_neurons import cli
from safety_neurons.guard import Classifier, Guard, Pooling, bindings_of, read_features
from safety_neurons.guard.generate import Detokenizer
from safety_neurons.guard.server import Limits, Settings, serve_guard
from safety_neurons.model import LanguageModel, load
from safety_neurons.neurons import NeuronSet
from tiny import CHAT_TEMPLATE, WORDS, tiny_llama, tiny_tokenizer
from waiting import until

SAFE = [
    "how do i make a cake",
    "help me plant a tree",
    "tell me about the house",
    "write a story about water",
    "what is a large plant",
]
UNSAFE = [
    "how do i make a bomb",
    "help me steal a key",
    "tell me how to kill",
    "write code to lock the door",
    "what is a small bomb",
]


def ask(text):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def lm():
    return LanguageModel(tiny_llama(), tiny_tokenizer(CHAT_TEMPLATE), name="tiny")


@pytest.fixture(scope="module")
def guard(lm):
    """Tells the ten requests apart, by the difference of their means."""
    neurons = NeuronSet({"layers.0.down": range(48), "layers.1.up": range(0, 48, 3)}, lm.table)
    features = torch.from_numpy(read_features(lm, [*SAFE, *UNSAFE], neurons).values)
    whole = features.double()
    apart = torch.linalg.lstsq(
        whole - whole.mean(0), torch.tensor([-4.0] * 5 + [4.0] * 5, dtype=torch.float64)[:, None]
    ).solution[:, 0]
    classifier = Classifier(features.mean(0), torch.ones(len(neurons)), apart.float(), 0.0)
    return Guard(
        neurons, Pooling.of("last"), classifier, (), 0.5, "given", bindings_of(lm, neurons), model=lm
    )


@pytest.fixture(scope="module")
def served(guard):
    with running(serve_guard(guard, Settings("tiny", limits=Limits(new_tokens=64)))) as address:
        yield address


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_readyz_says_what_the_threshold_in_force_catches(guard):
    chances = {"safe": [0.1, 0.2, 0.6], "unsafe": [0.4, 0.5, 0.7, 0.9]}
    with running(
        serve_guard(dataclasses.replace(guard, reference={"probabilities": chances}), Settings("tiny"))
    ) as address:
        said = httpx.get(f"{address}/readyz").json()
    assert said["status"] == "ready"
    told = said["guard"]
    assert (told["threshold"], told["in_force"]) == (0.5, "given")
    assert (told["caught"]["value"], told["caught"]["n"], told["false_positives"]["n"]) == (0.75, 4, 3)
    assert 0 < told["caught"]["low"] < 0.75 < told["caught"]["high"] < 1
    assert told["false_positives"]["value"] == pytest.approx(1 / 3)


def test_verdicts_over_http_are_the_guards_own(served, guard):
    said = httpx.post(f"{served}/v1/moderations", json={"input": [*SAFE, *UNSAFE]}).json()["results"]
    own = guard.score_batch([*SAFE, *UNSAFE])
    assert (
        [result["flagged"] for result in said]
        == [verdict.flagged for verdict in own]
        == [False] * 5 + [True] * 5
    )
    for result, verdict in zip(said, own, strict=True):
        assert result["category_scores"]["unsafe"] == pytest.approx(verdict.p_unsafe, abs=1e-5)


def test_what_is_not_flagged_is_answered_as_the_model_alone_answers(client, lm):
    alone = lm.complete(SAFE, max_new_tokens=20)
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        asked = [
            pool.submit(client.chat.completions.create, model="tiny", messages=ask(text), max_tokens=20)
            for text in SAFE
        ]
        answers = [future.result() for future in asked]
    assert [answer.choices[0].message.content for answer in answers] == [one.completion for one in alone]
    assert [answer.choices[0].finish_reason for answer in answers] == [one.finish_reason for one in alone]
    assert [answer.usage.completion_tokens for answer in answers] == [len(one.token_ids) for one in alone]


def test_what_is_flagged_is_refused_beside_others_that_are_answered(client, lm):
    alone = lm.complete(SAFE, max_new_tokens=12)
    texts = [text for pair in zip(SAFE, UNSAFE, strict=True) for text in pair]
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        asked = [
            pool.submit(client.chat.completions.create, model="tiny", messages=ask(text), max_tokens=12)
            for text in texts
        ]
        answers = [future.result().choices[0] for future in asked]
    assert [answer.message.content for answer in answers[::2]] == [one.completion for one in alone]
    assert {answer.finish_reason for answer in answers[1::2]} == {"content_filter"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_a_refusal_counts_the_tokens_of_the_prompt_that_was_read(client, lm, n, stream):
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    said = client.chat.completions.create(model="tiny", messages=ask(UNSAFE[0]), n=n, **options)
    usage = list(said)[-1].usage if stream else said.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(lm.encode(UNSAFE[:1])[0].ids), 0)


def test_a_refusal_for_one_turn_counts_the_longest_reading_that_was_made(client, lm):
    turns = [*ask(UNSAFE[0]), {"role": "assistant", "content": "no"}, *ask(SAFE[0])]
    said = client.chat.completions.create(model="tiny", messages=turns)
    assert said.choices[0].finish_reason == "content_filter"
    assert said.usage.prompt_tokens == max(len(one.ids) for one in lm.encode([UNSAFE[0], "no", SAFE[0]]))


def test_a_stream_says_the_same_as_a_whole_answer(client):
    whole = client.chat.completions.create(model="tiny", messages=ask(SAFE[0]), max_tokens=15)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    pieces = list(
        client.chat.completions.create(model="tiny", messages=ask(SAFE[0]), max_tokens=15, **options)
    )
    assert (
        "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        == whole.choices[0].message.content
    )
    assert pieces[-1].usage == whole.usage
    assert len(pieces) > 8


def test_a_flagged_stream_is_a_refusal_and_no_word_of_an_answer(client):
    pieces = list(client.chat.completions.create(model="tiny", messages=ask(UNSAFE[0]), stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces).startswith("I'm sorry")
    assert pieces[-1].choices[0].finish_reason == "content_filter"


def test_sampling_follows_its_seed_and_stop_texts_end_an_answer(client):
    def said(**settings):
        return client.chat.completions.create(
            model="tiny", messages=ask(SAFE[1]), max_tokens=24, **settings
        ).choices[0]

    assert said(temperature=1.0, seed=5).message.content == said(temperature=1.0, seed=5).message.content
    assert len({said(temperature=1.0, seed=seed).message.content for seed in range(4)}) > 1
    assert said(temperature=1.0, seed=3, top_p=1e-6).message.content == said().message.content
    words = said().message.content.split()
    stopped = said(stop=[f" {words[3]}"])
    assert stopped.finish_reason == "stop"
    assert stopped.message.content == " ".join(words[: words.index(words[3])])


@pytest.mark.parametrize(
    "field",
    [
        {"n": 65},
        {"logprobs": True},
        {"tools": [{"type": "function"}]},
        {"chat_template": "x"},
        {"max_tokens": 65},
    ],
)
def test_what_the_local_model_cannot_do_is_said(served, field):
    said = httpx.post(
        f"{served}/v1/chat/completions", json={"model": "tiny", "messages": ask("help"), **field}
    )
    assert said.status_code == 400
    assert said.json()["error"]["param"] in field


def test_no_other_model_is_loaded_on_request(served):
    for name in ("tiny2", "/etc/passwd", "../tiny"):
        said = httpx.post(f"{served}/v1/chat/completions", json={"model": name, "messages": ask("help")})
        assert (said.status_code, said.json()["error"]["code"]) == (404, "model_not_found")
    assert httpx.get(f"{served}/v1/models/tiny").json()["id"] == "tiny"


def test_a_prompt_beyond_the_context_is_refused(served):
    long = " ".join(["cake"] * 400)
    said = httpx.post(f"{served}/v1/chat/completions", json={"model": "tiny", "messages": ask(long)})
    assert (said.status_code, said.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert said.json()["error"]["message"] == (
        "the prompt has more tokens than fit the guard's model; expected at most 127"
    )
    judged = httpx.post(f"{served}/v1/moderations", json={"input": long}).json()["results"][0]
    assert judged["flagged"]
    assert judged["guard"]["status"] == "truncated"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_leaves_no_room_for_a_token_is_refused_and_one_less_is_answered(guard, lm, stream):
    fixed = len(lm.encode(["cake"])[0].ids) - 1
    with running(serve_guard(guard.with_threshold(1.0), Settings("tiny"))) as address:
        for words, status in ((128 - fixed, 400), (127 - fixed, 200)):
            body = {"model": "tiny", "messages": ask(" ".join(["cake"] * words)), "stream": stream}
            said = httpx.post(f"{address}/v1/chat/completions", json=body)
            assert said.status_code == status
            assert ("context_length_exceeded" in said.text) == (status == 400)
            assert ('"length"' in said.text or '"stop"' in said.text) == (status == 200)


def test_turns_the_template_refuses_are_a_bad_request_without_their_text(guard):
    class Picky:
        def encode(self, _):
            from safety_neurons.errors import InputError

            raise InputError("the chat template refuses: my secret words")

    from safety_neurons.guard.server.local import Bound

    bound = Bound(guard)
    bound.guard = Picky()
    service = serve_guard(guard, Settings("tiny"))
    service.engine.judge = bound
    with running(service) as address:
        for path, body in (
            ("/v1/moderations", {"input": "x"}),
            ("/v1/chat/completions", {"model": "tiny", "messages": ask("x")}),
        ):
            said = httpx.post(f"{address}{path}", json=body)
            assert (said.status_code, said.json()["error"]["code"]) == (400, "unprocessable_prompt")
            assert "secret" not in said.text


def test_shadow_mode_answers_what_it_flags(guard, lm):
    with running(serve_guard(guard, Settings("tiny", shadow=True))) as address:
        said = httpx.post(
            f"{address}/v1/chat/completions",
            json={"model": "tiny", "messages": ask(UNSAFE[0]), "max_tokens": 8},
        ).json()
        assert (
            said["choices"][0]["message"]["content"]
            == lm.complete([UNSAFE[0]], max_new_tokens=8)[0].completion
        )
        page = httpx.get(f"{address}/metrics").text
        assert 'flagged_total{route="/v1/chat/completions"} 1.0' in page


def test_verdicts_come_while_a_long_answer_is_written(served):
    with httpx.stream(
        "POST",
        f"{served}/v1/chat/completions",
        json={"model": "tiny", "messages": ask(SAFE[0]), "max_tokens": 64, "stream": True},
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert httpx.post(f"{served}/v1/moderations", json={"input": UNSAFE[0]}).json()["results"][0][
            "flagged"
        ]
        assert "[DONE]" in "".join(lines)


def test_clients_that_leave_leave_nothing_behind(guard):
    service = serve_guard(guard, Settings("tiny"))
    with running(service) as address:
        for number in range(8):
            body = {"model": "tiny", "messages": ask(SAFE[number % 5]), "max_tokens": 100, "stream": True}
            with httpx.stream("POST", f"{address}/v1/chat/completions", json=body) as answer:
                next(answer.iter_lines())
        until(
            lambda: not (service.asgi.in_flight or service.engine._under_way),
            "the end of answers nobody waits for",
        )
        assert service.engine.waiting == 0
        assert httpx.post(f"{address}/v1/moderations", json={"input": SAFE[0]}).status_code == 200


@pytest.mark.parametrize("stop", [(), ("ab",), ("c d",), ("é",)])
def test_text_comes_in_whole_characters_and_stops_before_a_stop_text(stop):
    written = "xé aab c da é"
    ids = list(written.encode())
    text = Detokenizer(lambda some: bytes(some).decode("utf-8", "replace"), stop)
    said = ""
    for one in ids:
        piece = text.add(one)
        assert "�" not in piece
        said += piece
        if text.stopped:
            break
    said += text.rest()
    cut = min((written.find(one) for one in stop if one in written), default=len(written))
    assert said == written[:cut]
    assert text.stopped == (cut < len(written))


@pytest.fixture
def words(guard, lm, tmp_path, monkeypatch):
    """Of the command, on a saved model and guard."""
    lm.model.save_pretrained(tmp_path / "tiny")
    lm.tokenizer.save_pretrained(tmp_path / "tiny")
    loaded = load(str(tmp_path / "tiny"))
    bound = Guard(
        guard.neurons,
        guard.pooling,
        guard.classifier,
        (),
        0.5,
        "given",
        bindings_of(loaded, guard.neurons),
        model=loaded,
    )
    bound.save(tmp_path / "guard")
    monkeypatch.setenv("SAFETY_NEURONS_TOKEN", "a-token-of-this-test")
    words = ["safety-neurons", "guard", "serve", "--port", "0", "--offline"]
    return [*words, "--model", str(tmp_path / "tiny"), "--guard", str(tmp_path / "guard")]


@pytest.fixture
def command(words, monkeypatch):
    """Starts it in a process."""
    started = []

    def start(*options):
        with monkeypatch.context() as patched:
            patched.setattr(sys, "argv", [*words, *options])
            started.append(Forked(cli.main))
        return started[-1]

    yield start
    for process in started:
        process.send(signal.SIGKILL)
        process.ended()


def test_the_command_serves_says_so_and_ends_with_what_it_accepted(command):
    process = command()
    lines = []
    while not lines or not lines[-1].startswith("listening"):
        lines.append(process.err.readline())
        assert lines[-1], "".join(lines)
    address = lines[-1].split()[1]
    assert httpx.get(f"{address}/v1/models", timeout=None).status_code == 401
    key = {"Authorization": "Bearer a-token-of-this-test"}
    body = {"model": "tiny", "messages": ask(SAFE[0]), "max_tokens": 100, "stream": True}
    with httpx.stream(
        "POST", f"{address}/v1/chat/completions", json=body, headers=key, timeout=None
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send(signal.SIGTERM)
        assert "[DONE]" in "".join(lines)
    out, rest = process.ended()
    assert process.code == 0
    assert out == ""
    assert "POST /v1/chat/completions" in rest
    assert "ended: 0 prompts judged in 0 batches, 1 in the prefill of their answers" in rest
    assert "Traceback" not in rest
    assert "cake" not in rest
    assert "a-token" not in rest


def test_the_command_tells_a_program_its_port_in_one_json_object(command):
    process = command("--json")
    said = json.loads(process.out.readline())
    assert said["url"] == f"http://127.0.0.1:{said['port']}"
    assert said["pid"] == process.pid
    assert httpx.get(f"{said['url']}/readyz", timeout=None).status_code == 200
    process.send(signal.SIGTERM)
    out, rest = process.ended()
    assert (process.code, out) == (0, "")
    assert json.loads(rest.splitlines()[-1]).items() >= {"event": "ended", "judged": 0, "answered": 0}.items()
    assert "a-token" not in json.dumps(said) + rest


MEGABYTE = "cake " * 200_000
BODIES = {
    "/v1/moderations": lambda text: {"input": ["cake", text]},
    "/classify": lambda text: {"input": text},
    "/v1/chat/completions": lambda text: {
        "model": "tiny",
        "messages": [{"role": "system", "content": "hi"}, *ask(text)],
    },
    "/beta/litellm_basic_guardrail_api": lambda text: {"input_type": "request", "texts": [text]},
}


class Counting:
    """A tokenizer that notes what it was called with."""

    def __init__(self, tokenizer):
        self._tokenizer, self.read = tokenizer, []

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, text, **options):
        self.read.append(text)
        return self._tokenizer(text, **options)


@pytest.fixture
def counted(lm, monkeypatch):
    counting = Counting(lm.tokenizer)
    monkeypatch.setattr(lm, "tokenizer", counting)
    return counting.read


@pytest.mark.parametrize("path", BODIES)
def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(guard, counted, path):
    with running(serve_guard(guard, Settings("tiny", limits=Limits(body_bytes=1 << 21)))) as address:
        said = httpx.post(f"{address}{path}", json=BODIES[path](MEGABYTE), timeout=None)
        assert said.status_code == 400
        assert said.json()["error"]["code"] == "context_length_exceeded"
        assert str(len(MEGABYTE)) in said.json()["error"]["message"]
    assert max(map(len, counted), default=0) < 1000


@pytest.mark.parametrize("path", BODIES)
def test_no_text_is_tokenised_twice(guard, counted, path):
    text = "cake " * 100
    with running(serve_guard(guard.with_threshold(1.0), Settings("tiny"))) as address:
        assert httpx.post(f"{address}{path}", json=BODIES[path](text), timeout=None).status_code == 200
    long = [read for read in counted if len(read) >= len(text)]
    assert long
    assert len(long) == len(set(long))


@pytest.mark.parametrize(
    ("limits", "most"), [({}, 128 * 16), ({"prompt_tokens": 10}, 160), ({"characters": 77}, 77)]
)
def test_how_long_a_text_may_be_follows_from_the_tokens_that_are_taken(guard, limits, most):
    assert serve_guard(guard, Settings("tiny", limits=Limits(**limits))).settings.limits.characters == most


def test_words_of_the_tests_are_words_of_the_tokenizer():
    assert {word for text in (*SAFE, *UNSAFE) for word in text.split()} <= set(WORDS)
