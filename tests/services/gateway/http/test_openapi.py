"""The document says what the routes do."""

import json
import re
from pathlib import Path

import pytest

from services.gateway.http.app import HttpApp
from services.gateway.http.openai_requests import UNSUPPORTED
from services.gateway.http.openai_types import ChatBody, CompletionBody
from services.gateway.http.openapi import openapi_document
from services.gateway.http.tokenize_api import DetokenizeBody, TokenizeBody
from tests.services.gateway.fakes import MODEL
from tests.services.gateway.stack import Stack

DOCUMENT = openapi_document()
SCHEMAS = DOCUMENT["components"]["schemas"]


def test_every_route_is_described(stack: Stack) -> None:
    app: HttpApp = stack.gateway._http._server.config.app  # type: ignore[assignment]
    routes = {(path, "post") for path in app._post_routes}
    for route in app._rest.routes:
        methods = route.methods - {"HEAD"}  # type: ignore[attr-defined]
        routes |= {(route.path.replace(":path", ""), method.lower()) for method in methods}  # type: ignore[attr-defined]
    assert routes == {(path, method) for path, methods in DOCUMENT["paths"].items() for method in methods}


def test_every_reference_leads_somewhere() -> None:
    for name in re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(DOCUMENT)):
        assert name in SCHEMAS


@pytest.mark.parametrize("body", [ChatBody, CompletionBody])
def test_fields_have_their_ranges_and_refusals(body: type) -> None:
    fields = SCHEMAS[body.__name__]["properties"]
    assert fields.keys() == set(body.__struct_fields__)  # type: ignore[attr-defined]
    assert fields["temperature"]["anyOf"][0] == {"type": "number", "minimum": 0, "maximum": 2}
    assert fields["top_p"]["anyOf"][0] == {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
    assert fields["max_tokens"]["anyOf"][0] == {"type": "integer", "minimum": 1}
    refused = {field for field, schema in fields.items() if schema.get("description") == "Not supported yet."}
    assert refused == fields.keys() & UNSUPPORTED.keys() != set()


@pytest.mark.parametrize("body", [ChatBody, CompletionBody, TokenizeBody, DetokenizeBody])
def test_the_page_on_the_api_names_every_field(body: type) -> None:
    page = (Path(__file__).parents[4] / "docs" / "api.md").read_text()
    assert [field for field in body.__struct_fields__ if f"`{field}`" not in page] == []  # type: ignore[attr-defined]
    refusals = page.partition("## What is refused")[2]
    assert [field for field in UNSUPPORTED if f"`{field}`" not in refusals] == []


async def test_both_are_served_without_a_key_and_load_nothing(stack: Stack) -> None:
    served = await stack.http.get("/openapi.json")
    assert served.json() == json.loads(json.dumps(DOCUMENT))
    page = (await stack.http.get("/docs")).text
    assert "POST /v1/chat/completions" in page and "top_logprobs" in page
    assert not re.search(r"src=|https?://|@import", page)
    answer = (await stack.complete()).json()
    [described] = [name for name in SCHEMAS if name.startswith("CompletionResponse") and "Chat" not in name]
    assert answer.keys() == SCHEMAS[described]["properties"].keys()
    assert (await stack.http.get(f"/v1/models/{MODEL}")).json().keys() == SCHEMAS["ModelObject"]["properties"].keys()
