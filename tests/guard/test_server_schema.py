"""Whatever fits the OpenAPI document, and much that does not, is answered without a 5xx, in the shapes the
document names.
"""

import os

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from server_tools import TOKEN, running, service

EXAMPLES = int(os.environ.get("SERVER_EXAMPLES", "4"))
"""For each route and kind; `SERVER_EXAMPLES=500 pytest tests/guard/test_server_schema.py` is the larger
run.
"""

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def address():
    with running(service(token=TOKEN)) as address:
        yield address


@pytest.fixture(scope="module")
def document(address):
    return httpx.get(f"{address}/openapi.json", headers={"X-Api-Key": TOKEN}).json()


@pytest.fixture(scope="module")
def operations(document):
    return schemathesis.openapi.from_dict(document)


ROUTES = (
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/moderations"),
    ("POST", "/classify"),
    ("POST", "/beta/litellm_basic_guardrail_api"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("GET", "/metrics"),
    ("GET", "/readyz"),
)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_no_request_is_a_server_error(operations, address, method, path, mode):
    operation = operations[path][method]
    if mode is GenerationMode.NEGATIVE and method == "GET" and "{" not in path:
        return  # nothing that could be wrong

    @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=mode))
    def ask(case):
        response = case.call(base_url=address, headers={"Authorization": f"Bearer {TOKEN}"})
        case.validate_response(response, checks=CHECKS)

    ask()


def test_the_document_names_every_route_its_shapes_and_the_token(document):
    posts = {path for path, operations in document["paths"].items() if "post" in operations}
    assert posts == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/moderations",
        "/classify",
        "/beta/litellm_basic_guardrail_api",
    }
    assert document["security"] == [{"token": []}]
    for path in posts:
        reference = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"][
            "$ref"
        ]
        assert reference.rpartition("/")[2] in document["components"]["schemas"]
    assert {"Turn", "Part", "ErrorAnswer", "ModerationAnswer"} <= set(document["components"]["schemas"])
