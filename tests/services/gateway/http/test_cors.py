"""What browsers are told, on every route."""

from collections.abc import AsyncIterator

import httpx
import pytest

from services.common.config import ConfigError, parse
from services.gateway.config import GatewaySettings
from tests.services.gateway.fakes import MODEL
from tests.services.gateway.keys_for_tests import make_key
from tests.services.gateway.stack import Stack, running_stack

PAGE = "https://chat.example.com"
ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/answers/x", "/nowhere")


@pytest.fixture
async def open_stack(redis_url: str) -> AsyncIterator[Stack]:
    async with running_stack(redis_url, cors_origins=[PAGE, "http://localhost:3000"]) as stack:
        yield stack


def preflight(origin: str, method: str = "POST") -> dict[str, str]:
    asked = "authorization, content-type, x-stainless-lang"
    return {
        "origin": origin,
        "access-control-request-method": method,
        "access-control-request-headers": asked,
    }


async def ask(stack: Stack, origin: str | None, **fields: object) -> httpx.Response:
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 100, **fields}
    headers = {"origin": origin} if origin else {}
    return await stack.http.post("/v1/completions", json=body, headers=headers)


@pytest.mark.parametrize("route", ROUTES)
async def test_a_page_that_is_named_may_ask_and_another_may_not(open_stack: Stack, route: str) -> None:
    allowed = await open_stack.http.options(route, headers=preflight(PAGE))
    assert (allowed.status_code, allowed.content) == (204, b"")
    assert allowed.headers["access-control-allow-origin"] == PAGE
    assert allowed.headers["access-control-allow-methods"] == "GET, POST"
    assert allowed.headers["access-control-allow-headers"] == "authorization, content-type, x-stainless-lang"
    assert "access-control-allow-credentials" not in allowed.headers

    refused = await open_stack.http.options(route, headers=preflight("https://evil.example"))
    assert refused.status_code == 403
    assert "cors_origins" in refused.json()["error"]["message"]
    assert "access-control-allow-origin" not in refused.headers


@pytest.mark.parametrize("stream", [True, False])
async def test_answers_can_be_read_by_pages_that_are_named(open_stack: Stack, stream: bool) -> None:
    answer = await ask(open_stack, PAGE, stream=stream)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, PAGE)
    assert "x-request-id" in answer.headers["access-control-expose-headers"].split(", ")
    assert answer.headers["vary"] == "origin"
    for origin, status in (("https://evil.example", 403), (None, 200)):
        answer = await ask(open_stack, origin, stream=stream)
        assert (answer.status_code, answer.headers["vary"]) == (status, "origin")
        assert "access-control-allow-origin" not in answer.headers


async def test_refusals_can_be_read_with_what_they_say_of_limits(open_stack: Stack) -> None:
    key = await make_key(open_stack.redis, requests_per_minute=1, tokens_per_minute=1000)
    headers = {**key.headers, "origin": PAGE}
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 100}
    answers = [await open_stack.http.post("/v1/completions", json=body, headers=headers) for _ in range(2)]
    answers.append(await open_stack.http.post("/v1/completions", content=b"{", headers={"origin": PAGE}))
    answers.append(await open_stack.http.get("/nowhere", headers={"origin": PAGE}))
    assert [answer.status_code for answer in answers] == [200, 429, 400, 404]
    assert {answer.headers["access-control-allow-origin"] for answer in answers} == {PAGE}
    limits = {name for name in answers[1].headers if name.startswith("x-ratelimit-") or name == "retry-after"}
    assert len(limits) == 7
    assert limits <= set(answers[1].headers["access-control-expose-headers"].split(", "))


async def test_any_origin(redis_url: str) -> None:
    async with running_stack(redis_url, cors_origins=["*"]) as stack:
        allowed = await stack.http.options("/v1/models", headers=preflight("https://a.example", "GET"))
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (204, "*")
        assert (await ask(stack, "https://b.example")).headers["access-control-allow-origin"] == "*"


async def test_by_default_no_page_may(stack: Stack) -> None:
    for route in ROUTES:
        asked = await stack.http.options(route, headers=preflight(PAGE))
        assert asked.status_code in (404, 405)
        assert not any(name.startswith("access-control") for name in asked.headers)
    assert "access-control-allow-origin" not in (await ask(stack, PAGE)).headers


def test_origins_are_comma_separated_and_checked() -> None:
    named = {"HEADRACE_GATEWAY_CORS_ORIGINS": "https://a.example, http://localhost:3000"}
    assert parse(GatewaySettings, "gateway", named).cors_origins == ("https://a.example", "http://localhost:3000")
    for bad in ("https://a.example/", "a.example", "https://a.example/path", "https://a b"):
        with pytest.raises(ConfigError, match=r"HEADRACE_GATEWAY_CORS_ORIGINS: Value error, '.*' is not an origin"):
            parse(GatewaySettings, "gateway", {"HEADRACE_GATEWAY_CORS_ORIGINS": bad})
