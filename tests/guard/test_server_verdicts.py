"""Routes that give verdicts, asked as the products around them ask."""

import math
import pathlib
import re

import httpx
import openai
import pytest
from server_tools import TOKEN, running, service

from safety_neurons.guard.server.door import Drift, drifts_of, population_stability

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs" / "serve.md"


@pytest.fixture(scope="module")
def address():
    with running(service(token=TOKEN)) as address:
        yield address


@pytest.fixture(scope="module")
def asked(address):
    with httpx.Client(base_url=address, headers={"X-Api-Key": TOKEN}) as client:
        yield lambda path, body: client.post(path, json=body)


@pytest.mark.parametrize(
    ("given", "flagged"),
    [
        ("bread", [False]),
        ("an attack", [True]),
        (["bread", "attack", "more bread"], [False, True, False]),
        ([{"type": "text", "text": "an"}, {"type": "text", "text": "attack"}], [True]),
        (
            [
                {"role": "user", "content": "hello"},
                {"role": "assistant", "content": "hi"},
                {"role": "user", "content": "attack"},
            ],
            [True],
        ),
        ([{"role": "user", "content": "hello"}], [False]),
    ],
)
def test_the_openai_client_reads_moderations_of_every_kind_of_input(address, given, flagged):
    with openai.OpenAI(base_url=f"{address}/v1", api_key=TOKEN, max_retries=0) as client:
        said = client.moderations.create(input=given)
    assert [result.flagged for result in said.results] == flagged
    assert said.model == "tiny"


@pytest.mark.parametrize(
    ("text", "status"), [("nan", "error"), ("poison", "error"), ("endless", "truncated")]
)
def test_what_the_guard_could_not_judge_is_flagged_on_every_route(asked, text, status):
    result = asked("/v1/moderations", {"input": text}).json()["results"][0]
    assert result["flagged"]
    assert result["guard"]["status"] == status
    assert asked("/classify", {"input": text, "model": "m"}).json()["data"][0]["label"] == "unsafe"
    said = asked("/beta/litellm_basic_guardrail_api", {"texts": [text], "input_type": "request"}).json()
    assert said["action"] == "BLOCKED"


def nemo(record):
    """Label and score as NeMo Guardrails' engine `vllm` takes them from an answer of `/classify`."""
    return [(item["label"], max(item["probs"])) for item in record["data"]]


def test_nemo_guardrails_blocks_what_is_flagged_whatever_the_threshold_of_the_guard(asked):
    for text, blocked in (("bread", False), ("attack", True), ("endless", True), ("poison", True)):
        found = nemo(asked("/classify", {"model": "safety-neurons", "input": text}).json())
        assert any(label in ("unsafe",) and score >= 0.5 for label, score in found) == blocked


def litellm(texts, turns=None, **further):
    """What LiteLLM sends a generic guardrail."""
    plain = {
        "litellm_call_id": "call-1",
        "litellm_trace_id": None,
        "texts": texts,
        "images": None,
        "tools": None,
        "tool_calls": None,
    }
    data = {"user_api_key_hash": "abc", "user_api_key_alias": None, "user_api_key_spend": 0.0}
    extra = {
        "request_data": data,
        "structured_messages": turns,
        "additional_provider_specific_params": {},
        "input_type": "request",
    }
    return {**plain, **extra, "model": "gpt-4", **further}


@pytest.mark.parametrize(
    ("body", "action"),
    [
        (litellm(["bread"]), "NONE"),
        (litellm(["bread", "attack"]), "BLOCKED"),
        (litellm([]), "BLOCKED"),
        (
            litellm(
                ["bread"], [{"role": "system", "content": "be kind"}, {"role": "user", "content": "attack"}]
            ),
            "BLOCKED",
        ),
        (
            litellm(
                ["bread"],
                tools=[{"type": "function", "function": {"name": "f", "description": "an attack ,"}}],
            ),
            "BLOCKED",
        ),
        (litellm(["bread"], images=["data:image/png;base64,AAAA"]), "BLOCKED"),
        (
            litellm(["x"], [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
            "BLOCKED",
        ),
    ],
)
def test_litellm_is_told_what_to_do(asked, body, action):
    said = asked("/beta/litellm_basic_guardrail_api", body)
    assert said.status_code == 200
    assert said.json()["action"] == action
    assert (said.json()["blocked_reason"] is None) == (action == "NONE")


def test_litellm_is_told_that_answers_are_not_read(asked):
    said = asked("/beta/litellm_basic_guardrail_api", litellm(["bread"], input_type="response"))
    assert (said.status_code, said.json()["error"]["code"]) == (400, "unsupported_input_type")


def test_shadow_mode_says_what_it_would_have_flagged():
    with running(service(shadow=True)) as address:
        result = httpx.post(f"{address}/v1/moderations", json={"input": "attack"}).json()["results"][0]
        assert (result["flagged"], result["guard"]["would_flag"]) == (False, True)
        assert nemo(httpx.post(f"{address}/classify", json={"input": "attack"}).json())[0][0] == "safe"
        said = httpx.post(
            f"{address}/beta/litellm_basic_guardrail_api", json=litellm(["attack"], images=["x"])
        )
        assert said.json()["action"] == "NONE"


def test_scores_and_drift_are_counted():
    with running(service()) as address:
        for _ in range(3):
            httpx.post(f"{address}/v1/moderations", json={"input": ["bread"] * 40})
        page = httpx.get(f"{address}/metrics").text
        assert "safety_neurons_guard_score_count 120.0" in page
        assert 'safety_neurons_guard_score_bucket{le="0.1"} 120.0' in page
        index = float(re.search(r'drift_psi\{of="score"\} (\S+)', page)[1])
        assert index == pytest.approx(population_stability([120, 0, 0, 0], [90, 5, 5, 0]))
        httpx.post(f"{address}/v1/moderations", json={"input": ["attack"] * 60})
        page = httpx.get(f"{address}/metrics").text
        assert float(re.search(r'drift_psi\{of="score"\} (\S+)', page)[1]) > 1


def test_the_stability_index_is_zero_for_like_symmetric_and_known_for_a_shift():
    assert population_stability([10, 20, 70], [1, 2, 7]) == pytest.approx(0)
    assert population_stability([3, 7], [7, 3]) == pytest.approx(2 * 0.4 * math.log(7 / 3))
    assert population_stability([3, 7], [7, 3]) == pytest.approx(population_stability([7, 3], [3, 7]))
    assert math.isfinite(population_stability([10, 0], [0, 10]))


def test_drift_remembers_a_window_and_needs_a_hundred_values():
    drift = Drift([0.5], [50, 50], window=200)
    for number in range(99):
        drift.add(number % 2)
    assert math.isnan(drift.index)
    for number in range(101):
        drift.add(number % 2)
    assert drift.index == pytest.approx(0, abs=1e-3)
    for _ in range(200):
        drift.add(0.9)
    assert drift.index == pytest.approx(population_stability([0, 200], [50, 50]))
    assert math.isnan(Drift([0.5], [0, 0]).index)


def test_a_guards_reference_gives_three_comparisons():
    reference = {
        "p_unsafe": {"edges": [0, 0.25, 0.5, 0.75, 1], "safe": [9, 1, 0, 0], "unsafe": [0, 0, 2, 8]},
        "distance": {"edges": [0.9, 1.1], "counts": [5, 5, 5]},
    }
    drifts = drifts_of(reference)
    assert set(drifts) == {"score", "score_of_safe", "distance"}
    for _ in range(100):
        drifts["score"].add(0.1)
        drifts["score_of_safe"].add(0.1)
    assert drifts["score"].index > drifts["score_of_safe"].index
    assert drifts_of({}) == {}


def test_the_documented_configurations_name_what_is_served(address):
    import yaml

    blocks = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    litellm_config, nemo_config = (yaml.safe_load(block) for block in blocks)
    guardrail = litellm_config["guardrails"][0]["litellm_params"]
    assert guardrail["guardrail"] == "generic_guardrail_api"
    assert guardrail["mode"] in ("pre_call", "during_call")
    assert guardrail["unreachable_fallback"] == "fail_closed"
    path = guardrail["api_base"].removeprefix("http://127.0.0.1:8600") + "/beta/litellm_basic_guardrail_api"
    assert (
        httpx.post(f"{address}{path}", json=litellm(["attack"]), headers={"x-api-key": TOKEN}).json()[
            "action"
        ]
        == "BLOCKED"
    )
    classifier = nemo_config["rails"]["config"]["hf_classifier"]["safety_neurons"]
    assert classifier["engine"] == "vllm"
    path = classifier["base_url"].removeprefix("http://127.0.0.1:8600") + "/classify"
    said = httpx.post(
        f"{address}{path}",
        json={"model": classifier["model"], "input": "attack"},
        headers={"Authorization": f"Bearer {TOKEN}"},
    )
    assert any(
        label in classifier["blocked_labels"] and score >= classifier["threshold"]
        for label, score in nemo(said.json())
    )
    assert nemo_config["rails"]["input"]["flows"] == [
        'hf classifier check input $classifier="safety_neurons"'
    ]
