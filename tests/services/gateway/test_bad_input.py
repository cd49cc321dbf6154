"""Bad input over HTTP: each a 4xx in OpenAI's shape that names the field, and the gateway goes on."""

import asyncio
import json

import grpc
import grpc.aio
import pytest

from headrace.v1.inference_pb2 import GenerateRequest
from tests.services.gateway.fakes import CONTEXT, MODEL
from tests.services.gateway.stack import TEXT, Stack, eventually, running_stack
from tests.services.gateway.tokenizers_for_tests import byte_level_tokenizer

VOCABULARY = byte_level_tokenizer().get_vocab_size()
USER = [{"role": "user", "content": "hi"}]

BAD_COMPLETIONS: list[tuple[dict[str, object], str | None, list[str]]] = [
    ({"prompt": ""}, "prompt", ["empty"]),
    ({"prompt": []}, "prompt", ["empty"]),
    ({"prompt": ["a", ""]}, "prompt", ["empty"]),
    ({"prompt": [[]]}, "prompt", ["empty"]),
    ({"prompt": ["a", 1]}, "prompt", ["mixes"]),
    ({"prompt": ["a"] * 129}, "prompt", ["129", "128"]),
    ({"prompt": [1] * CONTEXT}, "prompt", [str(CONTEXT), str(CONTEXT - 1)]),
    ({"prompt": "日" * CONTEXT}, "prompt", [str(CONTEXT)]),
    ({"prompt": [1, VOCABULARY]}, "prompt", [str(VOCABULARY), "position 1", str(VOCABULARY - 1)]),
    ({"prompt": [1, -1]}, "prompt", ["-1"]),
    ({"prompt": [1, 1.5]}, "prompt[1]", ["1.5"]),
    ({"prompt": [1, True]}, "prompt[1]", ["True"]),
    ({"prompt": 5}, "prompt", ["5"]),
    ({"max_tokens": 0}, "max_tokens", ["at least 1", "0"]),
    ({"max_tokens": -1}, "max_tokens", ["at least 1", "-1"]),
    ({"max_tokens": 10**9}, "max_tokens", ["1000000000", str(CONTEXT)]),
    ({"max_tokens": 10**400}, "max_tokens", ["30 digits"]),
    ({"max_tokens": "x"}, "max_tokens", ["int", "'x'"]),
    ({"max_tokens": True}, "max_tokens", ["int"]),
    ({"temperature": -0.1}, "temperature", ["between 0 and 2", "-0.1"]),
    ({"temperature": 2.5}, "temperature", ["2.5"]),
    ({"temperature": "hot"}, "temperature", ["hot"]),
    ({"top_p": 0}, "top_p", ["above 0"]),
    ({"top_p": 1.1}, "top_p", ["1.1"]),
    ({"top_k": -2}, "top_k", ["-2"]),
    ({"top_k": 2**40}, "top_k", [str(2**40)]),
    ({"min_p": 2}, "min_p", ["2"]),
    ({"seed": 2**64}, "seed", [str(2**64)]),
    ({"presence_penalty": 3}, "presence_penalty", ["3"]),
    ({"frequency_penalty": -3}, "frequency_penalty", ["-3"]),
    ({"repetition_penalty": 0}, "repetition_penalty", ["above 0"]),
    ({"n": 0}, "n", ["between 1 and 16"]),
    ({"n": 17}, "n", ["17"]),
    ({"stop": ["x"] * 17}, "stop", ["16", "17"]),
    ({"stop": ""}, "stop", ["1 to"]),
    ({"stop": [5]}, "stop[0]", ["5"]),
    ({"stop_token_ids": [VOCABULARY]}, "stop_token_ids", [str(VOCABULARY)]),
    ({"min_tokens": 30, "max_tokens": 20}, "min_tokens", ["30", "20"]),
    ({"priority": "urgent"}, "priority", ["urgent"]),
    ({"cache_salt": "x" * 300}, "cache_salt", ["256"]),
    ({"stream_options": {"include_usage": True}}, "stream_options", ["stream"]),
    ({"logprobs": 6}, "logprobs", ["between 0 and 5", "6"]),
    ({"logprobs": -1}, "logprobs", ["-1"]),
    ({"logprobs": True}, "logprobs", ["bool"]),
    ({"echo": True, "logprobs": 0}, "echo", ["logprobs", "exclude"]),
    ({"echo": "yes"}, "echo", ["bool"]),
    ({"user": 5}, "user", ["str"]),
    ({"suffix": "end"}, "suffix", ["not supported"]),
    ({"best_of": 3}, "best_of", ["not supported"]),
    ({"logit_bias": {"5": 101}}, "logit_bias", ["between -100 and 100", "101", "token id 5"]),
    ({"logit_bias": {"five": 1}}, "logit_bias", ["int"]),
    ({"logit_bias": {"5": "much"}}, "logit_bias", ["float", "much"]),
    ({"logit_bias": {str(VOCABULARY): 1}}, "logit_bias", [str(VOCABULARY)]),
    ({"logit_bias": {"-1": 1}}, "logit_bias", ["-1"]),
    ({"logit_bias": dict.fromkeys(range(301), 1)}, "logit_bias", ["300", "301"]),
]
BAD_CHATS: list[tuple[dict[str, object], str, list[str]]] = [
    ({"messages": []}, "messages", ["empty"]),
    ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role", ["wizard", "assistant"]),
    ({"messages": [{"role": "user"}]}, "messages[0].content", ["text"]),
    ({"messages": [{"content": "hi"}]}, "messages[0]", ["role"]),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", ["5"]),
    (
        {"messages": [{"role": "assistant", "content": "hi", "tool_calls": [{"id": "1"}]}]},
        "messages[0].tool_calls",
        ["not supported"],
    ),
    (
        {"messages": [{"role": "assistant", "content": "hi", "function_call": {"name": "f"}}]},
        "messages[0].function_call",
        ["not supported"],
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages[0].content[0].text", ["5"]),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content",
        ["image_url"],
    ),
    ({"messages": [{"role": "assistant", "content": "hi"}]}, "messages", ["the user speaks first"]),
    ({"messages": USER * 50}, "messages", [str(CONTEXT)]),
    ({"messages": USER, "max_completion_tokens": 0}, "max_completion_tokens", ["at least 1"]),
    ({"messages": USER, "tools": [{"type": "function"}]}, "tools", ["not supported"]),
    ({"messages": USER, "tool_choice": "required"}, "tool_choice", ["not supported"]),
    ({"messages": USER, "response_format": {"type": "json_object"}}, "response_format", ["not supported"]),
    ({"messages": USER, "logprobs": 2}, "logprobs", ["bool"]),
    ({"messages": USER, "logprobs": True, "top_logprobs": 21}, "top_logprobs", ["between 0 and 20"]),
    ({"messages": USER, "top_logprobs": 2}, "top_logprobs", ["logprobs to be true"]),
    ({"messages": USER, "functions": [{}]}, "functions", ["not supported"]),
    ({"messages": USER, "audio": {}}, "audio", ["not supported"]),
]
BROKEN_BODIES = [
    b"",
    b"{",
    b"[1]",
    b"null",
    b'{"model":"m"}',
    b'{"model":"m","prompt":"x","temperature":NaN}',
    b'{"model":"m","prompt":"x","temperature":1e999}',
    b'{"model":"m","prompt":"\xff"}',
    b'{"model":"m","prompt":"\\ud800"}',
    b'{"model":"m","prompt":"\\ud800x"}',
    b'{"model":"m","prompt":"x","user":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
]


async def test_bad_completions(stack: Stack) -> None:
    for fields, param, needles in BAD_COMPLETIONS:
        response = await stack.complete(**{"prompt": "hi", **fields})  # type: ignore[arg-type]
        assert response.status_code == 400, (fields, response.text)
        error = response.json()["error"]
        assert error["param"] == param, (fields, error)
        assert error["type"] == "invalid_request_error"
        assert all(needle in error["message"] for needle in needles), (fields, error)
    assert (await stack.complete()).status_code == 200
    assert len(stack.scheduler.jobs) == 1, "nothing bad reached the queue"


async def test_bad_chats(stack: Stack) -> None:
    for fields, param, needles in BAD_CHATS:
        response = await stack.http.post("/v1/chat/completions", json={"model": MODEL, **fields})
        assert response.status_code == 400, (fields, response.text)
        error = response.json()["error"]
        assert error["param"] == param, (fields, error)
        assert all(needle in error["message"] for needle in needles), (fields, error)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_bodies_that_are_no_request(stack: Stack, path: str) -> None:
    for body in BROKEN_BODIES:
        response = await stack.http.post(path, content=body)
        assert response.status_code == 400, (body[:50], response.text)
        assert response.json()["error"]["message"]
    assert (await stack.complete()).status_code == 200


async def test_neutral_values_of_unsupported_fields_are_fine(stack: Stack) -> None:
    fields = {"logprobs": None, "echo": False, "suffix": "", "best_of": 1, "logit_bias": {}, "priority": -1}
    assert (await stack.complete(**fields)).status_code == 200
    chat = {"model": MODEL, "messages": USER, "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}}
    assert (await stack.http.post("/v1/chat/completions", json=chat)).status_code == 200


async def test_the_content_type_does_not_matter(stack: Stack) -> None:
    body = json.dumps({"model": MODEL, "prompt": "hi", "max_tokens": 100}).encode()
    response = await stack.http.post("/v1/completions", content=body, headers={"content-type": "text/plain"})
    assert response.json()["choices"][0]["text"] == TEXT


async def test_unknown_model_path_and_method(stack: Stack) -> None:
    response = await stack.complete(model="gpt-9")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "gpt-9" in response.json()["error"]["message"]
    assert (await stack.http.get("/v1/models/gpt-9")).json()["error"]["code"] == "model_not_found"
    assert (await stack.http.get("/v1/nothing")).status_code == 404
    assert "error" in (await stack.http.get("/v1/nothing")).json()
    for method, path, allowed in (("GET", "/v1/completions", {"POST"}), ("POST", "/v1/models", {"GET", "HEAD"})):
        refused = await stack.http.request(method, path)
        assert refused.status_code == 405
        assert set(refused.headers["allow"].split(", ")) == allowed
        assert method in refused.json()["error"]["message"]


async def test_context_length_has_openais_code(stack: Stack) -> None:
    error = (await stack.complete([1] * (CONTEXT + 5))).json()["error"]
    assert error["code"] == "context_length_exceeded"
    error = (await stack.complete([1] * 200, max_tokens=57)).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "57" in error["message"] and "200" in error["message"] and "56" in error["message"]
    assert (await stack.complete([1] * 200, max_tokens=56)).status_code == 200
    assert (await stack.complete([1] * (CONTEXT - 1), max_tokens=1)).status_code == 200


async def test_huge_bodies_are_refused(stack: Stack) -> None:
    body = json.dumps({"model": MODEL, "prompt": "x" * 50_000_000}).encode()
    response = await stack.http.post("/v1/completions", content=body)
    assert response.status_code == 413
    assert str(4 * 1024 * 1024) in response.json()["error"]["message"]

    async def chunks():  # type: ignore[no-untyped-def]
        for begin in range(0, len(body), 1_000_000):
            yield body[begin : begin + 1_000_000]

    response = await stack.http.post("/v1/completions", content=chunks())
    assert response.status_code == 413
    assert (await stack.complete()).status_code == 200


async def test_bad_timeouts(stack: Stack) -> None:
    body = {"model": MODEL, "prompt": "hi"}
    for value in ("0", "-5", "soon", "1e3"):
        response = await stack.http.post("/v1/completions", json=body, headers={"x-request-timeout-ms": value})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "x-request-timeout-ms"


async def begin_body(stack: Stack) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection on which a body has begun to arrive."""
    host, port = stack.base_url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
    await writer.drain()
    return reader, writer


async def test_a_body_that_does_not_arrive(redis_url: str) -> None:
    async with running_stack(redis_url, read_timeout_s=0.1) as stack:
        reader, writer = await begin_body(stack)
        answer = await asyncio.wait_for(reader.read(), 10)
        assert answer.startswith(b"HTTP/1.1 408 ") and b"0.1 seconds" in answer
        writer.close()


async def test_a_body_that_arrives_counts_as_a_request(redis_url: str) -> None:
    async with running_stack(redis_url, max_requests=1) as stack:
        _reader, writer = await begin_body(stack)

        async def full() -> bool:
            return (await stack.complete()).status_code == 429

        await eventually(full)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await anext(aiter(stack.inference.Generate(GenerateRequest(model=MODEL))))
        assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        writer.close()

        async def free() -> bool:
            return not await full()

        await eventually(free)


async def test_a_client_that_leaves_in_the_middle_of_its_body(stack: Stack) -> None:
    _reader, writer = await begin_body(stack)
    writer.close()
    await writer.wait_closed()

    async def counted() -> bool:
        return stack.sample("headrace_http_requests_total", route="/v1/completions", status="499") == 1

    await eventually(counted)
    assert (await stack.complete()).status_code == 200
