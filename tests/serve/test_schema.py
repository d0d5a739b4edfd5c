"""Requests that schemathesis makes from the OpenAPI description."""

from __future__ import annotations

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from stand_in_service import LONG, RunningServer

EXAMPLES = 25
SLOW = (HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large)
OPERATIONS = (
    ("POST", "/v1/images/generations"),
    ("POST", "/v1/images/edits"),
    ("GET", "/v1/models"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
)

#: A request that fits the description may still exceed the bundle: it is rejected, as described.
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]


@pytest.fixture(scope="module")
def description(demo_server: RunningServer) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(demo_server.url + "/openapi.json")


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        *((*post, GenerationMode.NEGATIVE) for post in OPERATIONS[:2]),
        *((*operation, GenerationMode.POSITIVE) for operation in OPERATIONS),
    ],
)
def test_answers_are_as_described(
    method: str, path: str, mode: GenerationMode, description: schemathesis.BaseSchema
) -> None:
    """No request, right or wrong, ends in 5xx or in an answer that is not described."""
    cases = description[path][method].as_strategy(generation_mode=mode)

    @seed(0)
    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=SLOW)
    @given(cases)
    def validate(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=CHECKS, timeout=LONG)

    validate()


def test_described_paths_and_answers(demo_server: RunningServer) -> None:
    """All paths but those of the page; answers to wrong bodies are 400, as OpenAI's, not FastAPI's 422."""
    described = httpx.get(demo_server.url + "/openapi.json").json()
    assert described["paths"].keys() == {path for _, path in OPERATIONS}
    answers = described["paths"]["/v1/images/generations"]["post"]["responses"]
    assert answers.keys() == {"200", "400", "401", "404", "408", "413", "500", "503", "504"}
    assert answers["200"]["content"].keys() == {"application/json", "image/png", "image/jpeg", "image/webp"}
