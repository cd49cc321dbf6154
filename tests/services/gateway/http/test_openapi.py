"""The document says what the routes do."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest
from google.protobuf.descriptor import Descriptor

from headrace.v1 import inference_pb2
from services.gateway import timings, validation
from services.gateway.config import GatewaySettings
from services.gateway.http import openapi
from services.gateway.http.app import HttpApp
from services.gateway.http.openai_requests import UNSUPPORTED
from services.gateway.http.openai_types import (
    ChatBody,
    ChatMessage,
    CommonBody,
    CompletionBody,
    ContentPart,
    StreamOptions,
)
from services.gateway.http.openapi import OPERATIONS, UNSUPPORTED_FIELDS, openapi_document
from services.gateway.http.tokenize_api import DetokenizeBody, TokenizeBody
from tests.services.gateway.fakes import MODEL
from tests.services.gateway.stack import Stack

DOCUMENT = openapi_document()
SCHEMAS = DOCUMENT["components"]["schemas"]
HTTP_FOLDER = Path(openapi.__file__).parent
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


def rows(title: str) -> dict[str, tuple[str, str]]:
    """The fields of a section's table, with the two things that are said of them."""
    cells = [[cell.strip() for cell in row.split(" |")] for row in section(title).splitlines() if row.startswith("| `")]
    return {field: (verdict, text) for names, verdict, text, *_ in cells for field in re.findall("`([^`]+)`", names)}


def listed(title: str) -> dict[str, str]:
    return {field: verdict for field, (verdict, _) in rows(title).items()}


def told(ranges: Mapping[str, validation.Range]) -> dict[str, str]:
    return {field: limits.told_to(limits.low) for field, limits in ranges.items()}


# By heading: the struct whose fields stand there, and the one whose fields stand elsewhere.
STRUCTS: dict[str, tuple[type[msgspec.Struct], type[msgspec.Struct] | None]] = {
    "Both completions": (CommonBody, None),
    "stream_options": (StreamOptions, None),
    "POST /v1/completions": (CompletionBody, CommonBody),
    "POST /v1/chat/completions": (ChatBody, CommonBody),
    "A message of a chat or of /tokenize": (ChatMessage, None),
    "A part of a message": (ContentPart, None),
    "POST /tokenize": (TokenizeBody, None),
    "POST /detokenize": (DetokenizeBody, None),
}
# What is said of a field's limits, over HTTP and gRPC alike.
LIMITS = told(validation.RANGES) | {
    "seed": "a number of 64 bits",
    "n": f"1 to {GatewaySettings.model_fields['max_choices'].default} choices",
    "logit_bias": f"at most {validation.MAX_BIASED_TOKENS} token ids, each between -100 and 100",
    "stop": f"up to {validation.MAX_STOP_STRINGS} strings of up to {validation.MAX_STOP_CHARACTERS:,} characters",
    "stop_token_ids": f"up to {validation.MAX_STOP_TOKEN_IDS}",
    "cache_salt": f"up to {validation.MAX_CACHE_SALT_CHARACTERS} characters",
}


@pytest.mark.parametrize("title", STRUCTS)
def test_the_page_on_the_api_has_every_field_and_whether_it_is_refused(title: str) -> None:
    body, common = STRUCTS[title]
    fields = {*body.__struct_fields__} - {*(common.__struct_fields__ if common else ())}
    refused = fields & UNSUPPORTED_FIELDS.get(body.__name__, {}).keys()
    assert listed(title) == {field: "refused" if field in refused else "supported" for field in fields}


def test_no_struct_of_a_body_is_left_out() -> None:
    bodies = [operation.body for operation in OPERATIONS if operation.body]
    assert msgspec.json.schema_components(bodies)[1].keys() == {
        struct.__name__ for struct, _ in STRUCTS.values() if struct is not CommonBody
    }


@pytest.mark.parametrize(
    ("title", "others"),
    [
        ("Both completions", {}),
        ("POST /v1/completions", told(validation.COMPLETION_RANGES)),
        ("POST /v1/chat/completions", {"logprobs": "true or false"}),
    ],
)
def test_the_page_on_the_api_has_every_range(title: str, others: dict[str, str]) -> None:
    limits = {**LIMITS, **others}
    for field, (_, text) in rows(title).items():
        assert limits.get(field, "") in text, field


def test_the_page_on_the_api_has_every_header() -> None:
    parts = [operation for methods in DOCUMENT["paths"].values() for operation in methods.values()]
    read = {one["name"] for part in parts for one in part["parameters"] if one["in"] == "header"}
    sent = {name for part in parts for answer in part["responses"].values() for name in answer["headers"]}
    assert listed("Headers, and metadata over gRPC").keys() == read | {"authorization", "x-api-key", "accept"}
    assert listed("Headers of answers").keys() == sent


def test_every_header_that_is_read_is_listed() -> None:
    """HTTP's own and browsers' are no part of the API."""
    http = "".join(file.read_text() for file in HTTP_FOLDER.glob("*.py"))
    read = {*re.findall(r"""header(?:s\.get)?\(b?"([a-z-]+)\"""", http), timings.HEADER}
    table = listed("Headers, and metadata over gRPC")
    assert read - {"content-length", "host", "origin", "access-control-request-headers"} == table.keys()
    grpc = (HTTP_FOLDER.parent / "inference_servicer.py").read_text()
    read = {*re.findall(r"""\.get\("([a-z-]+)\"""", grpc), timings.HEADER}
    assert read == {name for name, of in table.items() if "gRPC" in of}


def test_the_page_on_the_api_has_every_route_and_every_field_of_grpc() -> None:
    routes = set(re.findall("`(GET|POST) (/[^`]*)`", section("Routes without a body")))
    routes |= {("POST", path) for path in re.findall("### POST (.*)", PAGE)}
    assert routes == {(method.upper(), path) for path, methods in DOCUMENT["paths"].items() for method in methods}
    methods = inference_pb2.DESCRIPTOR.services_by_name["Inference"].methods
    table = fields_of("headrace.v1.Inference")
    assert table == {method.name: {field.name for field in method.input_type.fields} for method in methods}
    within = {message for method in methods for message in messages_in(method.input_type)}
    table = fields_of("Messages of headrace.v1.Inference")
    assert table == {message.name: {field.name for field in message.fields} for message in within}
    for field, text in re.findall(r"`([a-z_]+)` \| supported \| (.*) \|", section("Messages of headrace.v1.Inference")):
        assert LIMITS.get(field, "") in text, field


def fields_of(title: str) -> dict[str, set[str]]:
    """The fields of each method or message of a section's table; only a first row names it."""
    found: dict[str, set[str]] = {}
    for name, fields in re.findall(r"^\| (?:`(\w+)` )?\|([^|]*)\| supported", section(title), re.MULTILINE):
        if name:
            found[name] = set()
        found[[*found][-1]] |= {*re.findall("`([a-z_]+)`", fields)}
    return found


def messages_in(message: Descriptor) -> set[Descriptor]:
    """Those that stand in the fields of a message, and in theirs."""
    inner = {field.message_type for field in message.fields if field.message_type}
    inner = {one for one in inner if not one.GetOptions().map_entry}
    return inner.union(*(messages_in(one) for one in inner))


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
