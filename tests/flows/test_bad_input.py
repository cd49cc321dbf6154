"""Bad input gets a clear 4xx, and the stack answers the next request."""

import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.flows.headrace_up import HeadraceUp, eventually

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(autouse=True)
def next_request_is_answered(http: httpx.Client, model: str) -> Iterator[None]:
    yield
    answer = http.post(COMPLETIONS, json={"model": model, "prompt": "Hello", "max_tokens": 2})
    assert answer.status_code == 200
    assert http.get("/health/ready").status_code == 200


def assert_refused(answer: httpx.Response, status: int, *words: str) -> None:
    """An error in OpenAI's shape whose message has these words."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert [word for word in words if word not in error["message"]] == [], error["message"]


@pytest.mark.parametrize(
    ("path", "fields", "status", "words"),
    [
        (CHAT, {"model": "no-such-model"}, 404, ["no-such-model"]),
        (COMPLETIONS, {"model": "no-such-model"}, 404, ["no-such-model"]),
        (COMPLETIONS, {"model": None}, 400, ["model"]),
        (COMPLETIONS, {"prompt": ""}, 400, ["prompt", "empty"]),
        (COMPLETIONS, {"prompt": []}, 400, ["prompt", "empty"]),
        (COMPLETIONS, {"prompt": [[]]}, 400, ["prompt", "empty"]),
        (COMPLETIONS, {"prompt": ["fine", ""]}, 400, ["prompt", "empty"]),
        (COMPLETIONS, {"prompt": ["text", 1]}, 400, ["prompt"]),
        (COMPLETIONS, {"prompt": {"text": "x"}}, 400, ["prompt"]),
        (COMPLETIONS, {"prompt": [-1]}, 400, ["token id", "-1"]),
        (COMPLETIONS, {"prompt": [1, 10**9]}, 400, ["token id", "1000000000", "position 1"]),
        (COMPLETIONS, {"prompt": [2**70]}, 400, ["prompt"]),
        (COMPLETIONS, {"max_tokens": 0}, 400, ["max_tokens", "0"]),
        (COMPLETIONS, {"max_tokens": -1}, 400, ["max_tokens", "-1"]),
        (COMPLETIONS, {"max_tokens": 10**9}, 400, ["max_tokens", "1000000000", "context"]),
        (COMPLETIONS, {"max_tokens": "x"}, 400, ["max_tokens", "x"]),
        (COMPLETIONS, {"max_tokens": 1.5}, 400, ["max_tokens"]),
        (CHAT, {"max_tokens": 10**9}, 400, ["max_tokens", "1000000000", "context"]),
        (CHAT, {"max_completion_tokens": 0}, 400, ["max_completion_tokens"]),
        (COMPLETIONS, {"temperature": -0.1}, 400, ["temperature", "-0.1"]),
        (COMPLETIONS, {"temperature": "hot"}, 400, ["temperature"]),
        (COMPLETIONS, {"top_p": 0}, 400, ["top_p"]),
        (COMPLETIONS, {"n": 0}, 400, ["n "]),
        (COMPLETIONS, {"n": 10**6}, 400, ["n "]),
        (COMPLETIONS, {"stop": [""]}, 400, ["stop"]),
        (COMPLETIONS, {"stop": ["x"] * 17}, 400, ["stop", "16", "17"]),
        (COMPLETIONS, {"stop_token_ids": [10**8]}, 400, ["stop_token_ids"]),
        (COMPLETIONS, {"min_tokens": 9, "max_tokens": 8}, 400, ["min_tokens"]),
        (COMPLETIONS, {"priority": "urgent"}, 400, ["priority", "urgent"]),
        (COMPLETIONS, {"stream_options": {"include_usage": True}}, 400, ["stream_options"]),
        (CHAT, {"messages": []}, 400, ["messages"]),
        (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, 400, ["role", "wizard"]),
        (CHAT, {"messages": [{"role": "user"}]}, 400, ["content"]),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, ["image_url"]),
        (CHAT, {"messages": "Hello"}, 400, ["messages"]),
    ],
)
def test_a_bad_field_is_named(
    http: httpx.Client, model: str, path: str, fields: dict[str, Any], status: int, words: list[str]
) -> None:
    prompt = {"messages": HELLO} if path == CHAT else {"prompt": "Hello"}
    body = {"model": model, **prompt, "max_tokens": 2, **fields}
    assert_refused(http.post(path, json=body), status, *words)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "-1e999"])
def test_a_temperature_that_is_no_number(http: httpx.Client, model: str, number: str) -> None:
    body = f'{{"model": "{model}", "prompt": "Hello", "temperature": {number}}}'
    assert_refused(http.post(COMPLETIONS, content=body), 400)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"null", b"[]", b'"text"', b'{"model": "\xff\xfe"}', b"\x00\x01", b"[" * 100_000, b'{"model": 1}'],
    ids=["empty", "cut", "null", "list", "text", "utf-8", "binary", "deep", "type"],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_body_that_is_no_request(http: httpx.Client, path: str, body: bytes) -> None:
    assert_refused(http.post(path, content=body), 400)


def test_a_prompt_longer_than_the_context(http: httpx.Client, model: str) -> None:
    limit = http.get("/v1/models").json()["data"][0]["max_model_len"]
    body = {"model": model, "prompt": [100] * (limit + 1), "max_tokens": 1}
    assert_refused(http.post(COMPLETIONS, json=body), 400, str(limit + 1), str(limit))
    body = {"model": model, "messages": [{"role": "user", "content": "word " * (limit + 1)}]}
    assert_refused(http.post(CHAT, json=body), 400, str(limit))


def test_a_body_of_50_megabytes(http: httpx.Client, model: str) -> None:
    body = {"model": model, "prompt": "x" * 50_000_000}
    assert_refused(http.post(COMPLETIONS, json=body), 413)


def test_unknown_paths_and_methods(http: httpx.Client) -> None:
    assert http.get("/v1/nothing").status_code == 404
    assert http.get(COMPLETIONS).status_code == 405


def endless(model: str, **fields: object) -> dict[str, object]:
    """More tokens than a test waits for."""
    return {"model": model, "prompt": "Once upon a time", "max_tokens": 4000, "ignore_eos": True, **fields}


def assert_engine_becomes_idle(stack: HeadraceUp) -> None:
    def idle() -> bool:
        workers = stack.fleet().workers
        return all(worker.state.running_sequences + worker.state.waiting_sequences == 0 for worker in workers)

    eventually(idle, "the engine is idle again")


def test_a_client_that_leaves_a_stream_frees_the_engine(http: httpx.Client, stack: HeadraceUp, model: str) -> None:
    with http.stream("POST", COMPLETIONS, json=endless(model, stream=True)) as answer:
        next(answer.iter_lines())
    assert_engine_becomes_idle(stack)


def test_a_client_that_leaves_while_it_waits_frees_the_engine(stack: HeadraceUp, model: str) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{stack.http_url}{COMPLETIONS}", json=endless(model), timeout=httpx.Timeout(30, read=1))
    assert_engine_becomes_idle(stack)


def test_a_client_that_sends_half_a_request(stack: HeadraceUp) -> None:
    address = urlsplit(stack.http_url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
