"""The OpenAPI document, and the same as one page that loads nothing else."""

from html import escape
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from services.gateway.http.openapi import openapi_document

_LIMITS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to"}
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "code{font-size:.9em}table{border-collapse:collapse;width:100%}td{border-top:1px solid #ccc;padding:.2rem .5rem;"
    "vertical-align:top}h2{margin-top:2.5rem;font-size:1.1rem}"
)


def document_routes() -> list[Route]:
    """GET /openapi.json and /docs."""
    document = openapi_document()
    encoded, page = msgspec.json.encode(document), docs_page(document)

    async def show_document(_: Request) -> Response:
        return Response(encoded, media_type="application/json")

    async def show_page(_: Request) -> Response:
        return Response(page, media_type="text/html")

    return [Route("/openapi.json", show_document), Route("/docs", show_page)]


def docs_page(document: dict[str, Any]) -> str:
    """Every operation with its headers and the fields of its body."""
    info, schemas = document["info"], document["components"]["schemas"]
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{info['title']}</title><style>{_STYLE}</style>",
        f"<h1>{info['title']}</h1><p>{info['description']} The whole of it: <a href=/openapi.json>/openapi.json</a>.",
    ]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation['summary'])}")
            parts.append(_parameters(operation["parameters"]))
            if body := operation.get("requestBody"):
                parts.append(_fields(schemas[_name(body["content"]["application/json"]["schema"])]))
    return "\n".join(parts) + "</html>"


def _parameters(parameters: list[dict[str, Any]]) -> str:
    rows = [
        f"<tr><td><code>{escape(one['name'])}</code><td>{one['in']}<td>{_kind(one['schema'])}"
        f"<td>{escape(one.get('description', ''))}"
        for one in parameters
    ]
    return f"<table>{''.join(rows)}</table>"


def _fields(schema: dict[str, Any]) -> str:
    required = schema.get("required", ())
    rows = [
        f"<tr><td><code>{escape(name)}</code><td>{'required' if name in required else ''}<td>{_kind(field)}"
        f"<td>{escape(field.get('description', ''))}"
        for name, field in schema["properties"].items()
    ]
    return f"<table>{''.join(rows)}</table>"


def _kind(schema: dict[str, Any]) -> str:
    """A field's type in a few words."""
    if "$ref" in schema:
        return escape(_name(schema))
    if "enum" in schema:
        return escape(", ".join(str(value) for value in schema["enum"] if value is not None))
    if "anyOf" in schema:
        return " or ".join(_kind(option) for option in schema["anyOf"] if option.get("type") != "null")
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    limits = [f"{word} {schema[key]:g}" for key, word in _LIMITS.items() if key in schema]
    return escape(" ".join([schema.get("type", "any"), *limits]))


def _name(schema: dict[str, Any]) -> str:
    name: str = schema["$ref"].rpartition("/")[2]
    return name
