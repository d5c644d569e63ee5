"""The OpenAPI document: it describes every route, and what the server does is what it says."""

from __future__ import annotations

import re
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from helexa_engine.testing.fake_engine import FakeEngine
from helexa_server import openapi
from helexa_server.app import ROUTES
from helexa_server.errors import STATUS

from .answer_scripts import tool_answer
from .live import Serve

CONFORMANCE = [status_code_conformance, content_type_conformance, response_schema_conformance]
#: Operations with what is sent to them; a route without a body takes nothing that could be wrong.
SENT = [
    pytest.param(operation, mode, id=f"{operation.method} {operation.path}-{mode.value}")
    for operation in openapi.OPERATIONS
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    if (operation.body is not None or mode is GenerationMode.POSITIVE) and operation.media_types != (openapi.EVENTS,)
]


def test_every_route_is_described() -> None:
    served = {
        (method.lower(), re.sub(r":\w+}", "}", route.path))
        for route in ROUTES
        if route.path != "/openapi.json"
        for method in (route.methods or set()) - {"HEAD"}
    }
    document = openapi.document()["paths"]
    assert served == {(method, path) for path, methods in document.items() for method in methods}
    assert all(operation.summary for operation in openapi.OPERATIONS)


def test_every_status_is_described_somewhere() -> None:
    described = {
        int(status)
        for methods in openapi.document()["paths"].values()
        for operation in methods.values()
        for status in operation["responses"]
    }
    assert set(STATUS.values()) - described == {405}, "405 is what other methods of a path answer"


def test_nothing_is_answered_with_402() -> None:
    """contracts.md 3: who is out of budget gets 429; clients take 402 for the end of a subscription."""
    assert 402 not in STATUS.values()


def test_it_is_served(serve: Serve) -> None:
    with serve(FakeEngine([])).http() as http:
        got = http.get("/openapi.json")
    assert got.status_code == 200 and got.json() == openapi.document()
    body = got.json()["components"]["schemas"]["MessagesBody"]
    assert body["required"] == ["messages"] and body["properties"]["messages"]["items"]["$ref"].endswith("Message")


@pytest.mark.parametrize(("operation", "mode"), SENT)
def test_nothing_sent_brings_an_undescribed_status_or_a_fault(
    serve: Serve, operation: openapi.Operation, mode: GenerationMode
) -> None:
    """Issue 6, proof: schemathesis over the OpenAPI document finds no 5xx and no undocumented status."""
    url = serve(FakeEngine(tool_answer())).url
    described: Any = schemathesis.openapi.from_dict(openapi.document())[operation.path][operation.method]
    checks = CONFORMANCE if 501 in operation.failures else [*CONFORMANCE, not_a_server_error]

    @settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=described.as_strategy(generation_mode=mode))
    def hold(case: Any) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body.pop("model", None)  # else almost every body asks for a model that is not there
        case.validate_response(case.call(base_url=url), checks=checks)

    hold()
