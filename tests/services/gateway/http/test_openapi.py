"""The document says what the routes do."""

import json
import re
from pathlib import Path

import pytest

from headrace.v1 import inference_pb2
from services.gateway.http.app import HttpApp
from services.gateway.http.openai_requests import UNSUPPORTED
from services.gateway.http.openai_types import ChatBody, CommonBody, CompletionBody
from services.gateway.http.openapi import openapi_document
from services.gateway.http.tokenize_api import DetokenizeBody, TokenizeBody
from tests.services.gateway.fakes import MODEL
from tests.services.gateway.stack import Stack

DOCUMENT = openapi_document()
SCHEMAS = DOCUMENT["components"]["schemas"]
PAGE = (Path(__file__).parents[4] / "docs" / "api.md").read_text()


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


def section(title: str) -> str:
    """What the page on the API says below a heading."""
    return PAGE.partition(f"### {title}\n")[2].partition("\n#")[0]


def listed(title: str) -> dict[str, str]:
    """The fields of a section's table, with what is said of them."""
    rows = [row.split("|")[1:4] for row in section(title).splitlines() if row.startswith("| `")]
    return {field: verdict.strip() for names, verdict, _ in rows for field in re.findall("`([^`]+)`", names)}


@pytest.mark.parametrize(
    ("title", "body", "common"),
    [
        ("Both completions", CommonBody, None),
        ("POST /v1/completions", CompletionBody, CommonBody),
        ("POST /v1/chat/completions", ChatBody, CommonBody),
        ("POST /tokenize", TokenizeBody, None),
        ("POST /detokenize", DetokenizeBody, None),
    ],
)
def test_the_page_on_the_api_has_every_field_and_whether_it_is_refused(
    title: str, body: type, common: type | None
) -> None:
    others = common.__struct_fields__ if common else ()  # type: ignore[attr-defined]
    fields = set(body.__struct_fields__) - set(others)  # type: ignore[attr-defined]
    refused = fields & ({*UNSUPPORTED, "add_generation_prompt"})
    assert listed(title) == {field: "refused" if field in refused else "supported" for field in fields}


def test_the_page_on_the_api_has_every_route_and_every_field_of_grpc() -> None:
    told = set(re.findall("`(GET|POST) (/[^`]*)`", section("Routes without a body")))
    told |= {("POST", path) for path in re.findall("### POST (.*)", PAGE)}
    assert told == {(method.upper(), path) for path, methods in DOCUMENT["paths"].items() for method in methods}
    table = section("headrace.v1.Inference")
    for method in inference_pb2.DESCRIPTOR.services_by_name["Inference"].methods:
        rows = table.partition(f"| `{method.name}` |")[2].partition("\n| `")[0]
        assert set(re.findall("`([a-z_]+)`", rows)) == {field.name for field in method.input_type.fields}, method.name


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
