"""docs/openapi.json is what the server does: each call is tried with what fits its description and what does not."""

import json
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from tests.frontend.fakes import FakeLink, front_of
from tests.serving import Server, infer_body

DESCRIPTION = json.loads((Path(__file__).parents[2] / "docs/openapi.json").read_text(encoding="utf-8"))
EXAMPLES = 12  # for each call
CHECKS = (
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
)


def of_this_server():
    """Return the description with names that the server of these tests knows, too."""
    described = json.loads(json.dumps(DESCRIPTION))
    parameters = described["components"]["parameters"]
    parameters["Model"]["schema"] = {"enum": ["served", "other"]}
    parameters["Version"]["schema"] = {"enum": ["1", "2"]}
    for path in described["paths"].values():
        for operation in path.values():
            if operation["operationId"].startswith("infer"):
                body = operation["requestBody"]["content"]["application/json"]
                body["example"] = infer_body([1, 2, 3, 4])
    return described


schema = schemathesis.openapi.from_dict(of_this_server())


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"), "--system-shared-memory")
    yield server
    assert server.stop() == 0


def test_what_is_served_is_described():
    served = {path: set(map(str.lower, route.handlers)) for path, route in front_of(FakeLink()).routes._routes.items()}
    described = {path: set(calls) for path, calls in DESCRIPTION["paths"].items()}
    infer = {path for path in described if path.endswith("/infer")}
    assert infer == {"/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer"}
    del served["/v2/"]  # the same as /v2
    assert served == {path: calls for path, calls in described.items() if path not in {*infer, "/metrics"}}


def test_an_answer_to_infer_is_as_described(server):
    operation = schema["/v2/models/{name}/infer"]["POST"]
    case = operation.Case(
        path_parameters={"name": "served"}, body=infer_body([1, 2, 3, 4]), media_type="application/json"
    )
    response = case.call(base_url=f"http://{server.address}")
    case.validate_response(response, checks=CHECKS)
    assert response.json()["outputs"][1]["data"] == [10]


@schema.parametrize()
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_calls_are_answered_as_described(case, server):
    case.call_and_validate(base_url=f"http://{server.address}", checks=CHECKS)
