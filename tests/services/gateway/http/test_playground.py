"""How the playground's files are served."""

import pytest

from tests.services.gateway.keys_for_tests import make_key
from tests.services.gateway.stack import Stack


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/playground/app.js", "text/javascript; charset=utf-8"),
        ("/playground/style.css", "text/css; charset=utf-8"),
        ("/playground/icon.svg", "image/svg+xml; charset=utf-8"),
    ],
)
async def test_a_file_is_sent_once_and_then_only_when_it_has_changed(stack: Stack, path: str, media_type: str) -> None:
    await make_key(stack.redis)  # which this needs none of
    first = await stack.http.get(path)
    assert (first.status_code, first.headers["content-type"]) == (200, media_type)
    again = await stack.http.get(path, headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]


async def test_a_page_may_load_nothing_from_elsewhere_and_run_nothing_inline(stack: Stack) -> None:
    page = await stack.http.get("/")
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert page.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("name", ["nothing.js", "../config.py", "%2e%2e/config.py", "..%2fconfig.py"])
async def test_nothing_else_is_served(stack: Stack, name: str) -> None:
    assert (await stack.http.get(f"/playground/{name}")).status_code == 404
