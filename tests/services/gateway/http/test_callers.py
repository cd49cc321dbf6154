"""Pages in browsers, and who they may be without a key."""

import pytest

from services.gateway.http.callers import is_local
from tests.services.gateway.fakes import MODEL
from tests.services.gateway.keys_for_tests import make_key
from tests.services.gateway.stack import Stack, running_stack

EVIL = "http://evil.example:8000"
BODY = {"model": MODEL, "prompt": "hello", "max_tokens": 3}


async def status(stack: Stack, path: str = "/v1/completions", **headers: str) -> int:
    if path == "/v1/models":
        return (await stack.http.get(path, headers=headers)).status_code
    return (await stack.http.post(path, json=BODY, headers=headers)).status_code


async def test_a_page_that_somebody_visits_cannot_call_without_a_key(redis_url: str) -> None:
    async with running_stack(redis_url) as stack:
        refused = await stack.http.post("/v1/completions", json=BODY, headers={"origin": EVIL})
        assert refused.status_code == 403
        assert refused.json()["error"]["message"] == (
            f"A page of {EVIL} may not call without a key: cors_origins does not name it."
        )
        for path in ("/v1/chat/completions", "/tokenize", "/v1/answers/x/cancel"):
            assert await status(stack, path, origin=EVIL) == 403, path
        assert await status(stack, origin="null") == 403, "a file, or a frame in a sandbox"
        assert not stack.workers[0].starts


async def test_nor_under_a_name_that_it_lets_point_here(redis_url: str) -> None:
    async with running_stack(redis_url) as stack:
        assert await status(stack, origin=EVIL, host="evil.example:8000") == 403
        assert await status(stack, "/v1/models", host="evil.example:8000") == 403, "a GET has no origin"
        assert not stack.workers[0].starts


async def test_the_gateways_own_page_and_callers_that_are_no_browser_may(redis_url: str) -> None:
    async with running_stack(redis_url) as stack:
        own = stack.http.base_url
        assert await status(stack, origin=f"http://{own.host}:{own.port}") == 200
        assert await status(stack, origin="http://localhost:8000", host="localhost:8000") == 200
        assert await status(stack, origin="http://localhost:8000", host="localhost") == 200, "as nginx passes it on"
        assert await status(stack, origin="http://other:8000", host="localhost") == 403
        assert await status(stack, "/v1/models", host="localhost:8000") == 200


async def test_a_gateway_for_others_is_called_by_any_name(redis_url: str) -> None:
    async with running_stack(redis_url, host="0.0.0.0", allow_anonymous=True) as stack:
        assert await status(stack, "/v1/models", host="llm.example.com") == 200
        assert await status(stack, origin="https://llm.example.com", host="llm.example.com") == 403


async def test_with_a_key_a_page_may_be_any(redis_url: str) -> None:
    async with running_stack(redis_url) as stack:
        key = await make_key(stack.redis)
        assert await status(stack, origin=EVIL, host="evil.example:8000", **key.headers) == 200


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("[::1]", True),
        ("192.168.1.7", True),
        ("LOCALHOST:8000", True),
        ("gateway:8000", True),
        ("mill.local", True),
        ("app.localhost:3000", True),
        ("evil.example", False),
        ("evil.example.:8000", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("[evil]", False),
        ("", False),
        (":8000", False),
    ],
)
def test_names_that_mean_nothing_elsewhere(host: str, local: bool) -> None:
    assert is_local(host) is local
