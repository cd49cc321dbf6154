"""API keys on the whole stack with two gateways: made by the command, used by clients, exceeded, revoked."""

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import openai
import pytest

from headrace.v1.inference_pb2 import GenerateRequest, TokenIds
from headrace.v1.inference_pb2_grpc import InferenceStub
from headrace.v1.sampling_pb2 import Stopping
from services.common.api_keys import new_key, visible_part
from tests.flows.conftest import WORKER_OPTIONS
from tests.flows.headrace_up import HeadraceUp, eventually
from tests.flows.keyed_stack import MODEL, PROMPT, KeyedStack
from tests.flows.node_program import install, run


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, default_model: Path) -> Iterator[KeyedStack]:
    up = HeadraceUp(tmp_path_factory.mktemp("keys"), *WORKER_OPTIONS, "--gateways", "2")
    try:
        up.wait_ready()
        yield KeyedStack(up)
    finally:
        up.kill()


def test_a_limit_is_one_over_two_gateways_and_a_revoked_key_ends(stack: KeyedStack) -> None:
    key = stack.keys("create", "ci", "--requests-per-minute", "4")["key"]
    for number in range(4):
        stack.complete(key, gateway=1 + number % 2)
    for gateway in (1, 2):
        with pytest.raises(openai.RateLimitError) as caught:
            stack.complete(key, gateway)
        assert caught.value.code == "rate_limit_exceeded"
        assert caught.value.response.headers["x-ratelimit-remaining-requests"] == "0"
        assert 0 < int(caught.value.response.headers["retry-after"]) <= 61
        eventually(lambda gateway=gateway: stack.is_refused("none", gateway), "everybody needs a key")  # type: ignore[misc]
    stack.up.run("keys", "revoke", "ci")
    for gateway in (1, 2):
        eventually(lambda gateway=gateway: stack.is_refused(key, gateway), "a revoked key ends", timeout_s=2.0)  # type: ignore[misc]


def test_a_rotated_key_works_and_the_old_one_does_not(stack: KeyedStack) -> None:
    old = stack.keys("create", "rotated")["key"]
    stack.complete(old)
    new = stack.keys("rotate", "rotated")["key"]
    eventually(lambda: stack.is_refused(old, 1), "the old one ends", timeout_s=2.0)
    assert stack.complete(new) == len(PROMPT) + 4


def test_openais_node_client(stack: KeyedStack, tmp_path: Path) -> None:
    client = install(Path(__file__).parent / "node_openai", tmp_path)
    key = stack.keys("create", "node", "--requests-per-minute", "2")["key"]
    answer = json.loads(run(client, stack.base_url(1), key, MODEL, "3"))
    assert (len(answer["texts"]), answer["remaining"]) == (2, ["1", "0"])
    assert answer["refusal"] == {"name": "RateLimitError", "status": 429, "code": "rate_limit_exceeded"}
    stack.up.run("keys", "revoke", "node")
    eventually(lambda: stack.is_refused(key, 1), "a revoked key ends")
    answer = json.loads(run(client, stack.base_url(1), key, MODEL, "1"))
    assert answer["refusal"] == {"name": "AuthenticationError", "status": 401, "code": "invalid_api_key"}


def test_a_grpc_client_with_a_key(stack: KeyedStack) -> None:
    key = stack.keys("create", "grpc", "--tokens-per-minute", "20")["key"]
    request = GenerateRequest(model=MODEL, token_ids=TokenIds(ids=PROMPT), stopping=Stopping(max_tokens=15))
    with grpc.insecure_channel(stack.up.grpc_address) as channel:
        inference = InferenceStub(channel)
        for wanted, metadata in (
            (grpc.StatusCode.OK, (("authorization", f"Bearer {key}"),)),
            (grpc.StatusCode.RESOURCE_EXHAUSTED, (("x-api-key", key),)),
            (grpc.StatusCode.UNAUTHENTICATED, (("x-api-key", new_key(visible_part(key) or "")),)),
        ):
            call = inference.Generate(request, metadata=metadata, timeout=120)
            with contextlib.suppress(grpc.RpcError):
                list(call)
            assert call.code() == wanted


def test_a_killed_gateway_pays_for_all_it_had_reserved(stack: KeyedStack) -> None:
    key = stack.keys("create", "killed", "--tokens-per-minute", "2000", "--concurrent", "2")["key"]
    used = stack.complete(key)
    with stack.client(key, gateway=2) as client:
        stream = client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=500, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        os.kill(stack.up.pid_of("gateway-2"), signal.SIGKILL)

    def charged() -> bool:
        use = stack.keys("show", "killed")["use"]
        whole = {"used": used + len(PROMPT) + 500, "held": 0, "limit": 2000}
        return use == {"tokens_per_minute": whole, "concurrent": {"used": 0, "held": 0, "limit": 2}}

    eventually(charged, "the lease runs out, and all of it counts as used", timeout_s=60)
