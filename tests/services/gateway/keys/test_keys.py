"""Who may call: keys in Redis, over HTTP and gRPC."""

import logging
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

import grpc.aio
import openai
import pytest

from headrace.v1.inference_pb2 import (
    CancelRequest,
    GenerateRequest,
    ListModelsRequest,
    ResumeRequest,
    TokenizeRequest,
)
from headrace.v1.sampling_pb2 import PRIORITY_HIGH, PRIORITY_LOW, PRIORITY_NORMAL
from services.common.api_keys import digest, new_id, new_key
from services.common.redis.client import RedisClient
from services.common.redis.key_store import KeyStore
from services.gateway.config import GatewaySettings
from services.gateway.errors import InvalidKey
from services.gateway.keys.key_file import KeyFile
from services.gateway.keys.keys import Keys, credential_of, is_loopback
from tests.services.gateway.fakes import MODEL
from tests.services.gateway.keys_for_tests import make_key
from tests.services.gateway.stack import TEXT, Stack, eventually, running_stack


async def refused(stack: Stack, headers: Mapping[str, str]) -> bool:
    return (await stack.http.get("/v1/models", headers=headers)).status_code == 401


async def test_without_keys_nobody_needs_one(stack: Stack) -> None:
    assert (await stack.complete()).status_code == 200
    async with openai.AsyncOpenAI(base_url=stack.base_url + "/v1", api_key="none") as client:
        assert (await client.completions.create(model=MODEL, prompt="hello", max_tokens=100)).choices[0].text == TEXT
    assert await stack.redis.command("KEYS", "headrace:limits:*") == []


async def test_as_soon_as_there_is_a_key_calls_need_one(stack: Stack) -> None:
    key = await make_key(stack.redis)

    async def closed() -> bool:
        return await refused(stack, {})

    await eventually(closed)
    assert (await key.complete(stack)).json()["choices"][0]["text"] == TEXT
    assert not await refused(stack, key.headers)
    assert not await refused(stack, {"x-api-key": key.secret})
    assert not await refused(stack, {"authorization": f"bearer  {key.secret}"})
    for path in ("/health/live", "/health/ready", "/metrics"):
        assert (await stack.http.get(path)).status_code == 200


@pytest.mark.parametrize("wrong", ["none", "sk-abc", "hr-0123456789ab", new_key("hr-0123456789ab"), "é", "x" * 10_000])
async def test_a_wrong_key_is_openais_authentication_error(redis_url: str, wrong: str) -> None:
    client = RedisClient(redis_url)
    await make_key(client)
    async with running_stack(redis_url) as stack:
        headers = [("authorization", f"Bearer {wrong}".encode())]
        for response in (
            await stack.http.post("/v1/completions", json={"model": MODEL, "prompt": "x"}, headers=headers),
            await stack.http.get("/v1/models", headers=headers),
        ):
            error = response.json()["error"]
            assert (response.status_code, error["code"]) == (401, "invalid_api_key")
            assert error["type"] == "invalid_request_error"
            assert response.headers["www-authenticate"] == "Bearer"
            assert wrong not in response.text
    await client.close()


async def test_the_visible_part_with_another_secret_is_wrong(stack: Stack) -> None:
    key = await make_key(stack.redis)
    assert not await refused(stack, key.headers)
    assert await refused(stack, {"authorization": f"Bearer {new_key(key.key.id)}"})


async def test_keys_in_grpc_metadata(stack: Stack) -> None:
    key = await make_key(stack.redis, models=[MODEL])
    request = GenerateRequest(model=MODEL, text="hello")
    for metadata in (key.metadata, (("x-api-key", key.secret),)):
        text = "".join([delta.text async for delta in stack.inference.Generate(request, metadata=metadata)])
        assert text == TEXT
        assert len((await stack.inference.ListModels(ListModelsRequest(), metadata=metadata)).models) == 1
        await stack.inference.Tokenize(TokenizeRequest(model=MODEL, text="hello"), metadata=metadata)

    wrong = (("authorization", f"Bearer {new_key(new_id())}"),)
    for call in (
        stack.inference.Generate(request, metadata=wrong).read(),
        stack.inference.ListModels(ListModelsRequest(), metadata=wrong),
        stack.inference.Tokenize(TokenizeRequest(model=MODEL, text="hello"), metadata=wrong),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


async def test_a_model_or_a_scope_that_a_key_does_not_have(stack: Stack) -> None:
    other = await make_key(stack.redis, models=["org/other"])
    response = await other.complete(stack)
    assert (response.status_code, response.json()["error"]["param"]) == (403, "model")
    assert (await stack.http.get("/v1/models", headers=other.headers)).json()["data"] == []
    assert (await stack.http.get(f"/v1/models/{MODEL}", headers=other.headers)).status_code == 403
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stack.inference.Generate(GenerateRequest(model=MODEL, text="x"), metadata=other.metadata).read()
    assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED

    reader = await make_key(stack.redis, scopes=["models"])
    assert (await reader.complete(stack)).status_code == 403
    assert (await stack.http.get("/v1/models", headers=reader.headers)).status_code == 200
    writer = await make_key(stack.redis, scopes=["generate"])
    assert (await writer.complete(stack)).status_code == 200
    assert (await stack.http.get("/v1/models", headers=writer.headers)).status_code == 403


async def test_what_redis_says_of_a_key_holds_for_a_second(redis_url: str) -> None:
    now = 100.0
    client = RedisClient(redis_url)
    keys = Keys(KeyStore(client), KeyFile(None), GatewaySettings(), clock=lambda: now)
    revoked, rotated = await make_key(client), await make_key(client)
    for key in (revoked, rotated):
        assert (await keys.identify(key.secret, "generate")).key_id == key.key.id
    await revoked.change(revoked=datetime.now(UTC))
    secret = new_key(rotated.key.id)
    await rotated.change(sha256=digest(secret))
    now += 1.0
    for key in (revoked, rotated):
        with pytest.raises(InvalidKey):
            await keys.identify(key.secret, "generate")
    assert (await keys.identify(secret, "generate")).key_id == rotated.key.id
    await client.close()


async def test_wrong_expired_and_revoked_keys_at_every_door(stack: Stack) -> None:
    now = datetime.now(UTC)
    right = await make_key(stack.redis)
    expired = await make_key(stack.redis, expires=now - timedelta(seconds=1))
    revoked = await make_key(stack.redis, revoked=now)
    for secret, why in (
        (new_key(right.key.id), "not one of this server's"),
        (expired.secret, "has expired"),
        (revoked.secret, "was revoked"),
    ):
        headers, metadata = {"x-api-key": secret}, (("x-api-key", secret),)
        bodies = {"/v1/completions": {"prompt": "x"}, "/v1/chat/completions": {"messages": []}, "/tokenize": {}}
        for path, body in bodies.items():
            response = await stack.http.post(path, json={"model": MODEL, **body}, headers=headers)
            assert (response.status_code, why in response.text) == (401, True), (path, response.text)
        for call in (
            stack.inference.Generate(GenerateRequest(model=MODEL, text="x"), metadata=metadata).read(),
            stack.inference.Resume(ResumeRequest(answer_id="x"), metadata=metadata).read(),
            stack.inference.Cancel(CancelRequest(answer_id="x"), metadata=metadata),
            stack.inference.ListModels(ListModelsRequest(), metadata=metadata),
            stack.inference.Tokenize(TokenizeRequest(model=MODEL, text="x"), metadata=metadata),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match=why) as caught:
                await call
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(
    ("settings", "with_keys", "status"),
    [
        ({"host": "0.0.0.0"}, False, 401),
        ({"host": "0.0.0.0", "allow_anonymous": True}, False, 200),
        ({"host": "0.0.0.0", "allow_anonymous": True}, True, 401),
        ({"host": "0.0.0.0", "allow_anonymous": True, "require_key": False}, True, 200),
        ({"host": "0.0.0.0", "require_key": False}, False, 401),
        ({"require_key": True}, False, 401),
        ({"require_key": False}, True, 200),
    ],
)
async def test_where_callers_need_no_key(
    redis_url: str, settings: dict[str, object], with_keys: bool, status: int
) -> None:
    client = RedisClient(redis_url)
    if with_keys:
        await make_key(client)
    async with running_stack(redis_url, **settings) as stack:
        assert (await stack.complete()).status_code == status
    await client.close()


async def test_two_keys_share_cached_prefixes_only_under_one_salt(stack: Stack) -> None:
    own, other = await make_key(stack.redis), await make_key(stack.redis)
    shared = [await make_key(stack.redis, cache_salt="team") for _ in range(2)]
    prompt = list(range(5, 14))
    for key in (own, own, other, *shared):
        await key.complete(stack, prompt)
    await own.complete(stack, prompt, cache_salt="mine")
    assert len({start.cache_salt for start in stack.workers[0].starts}) == 4
    prefixes = [job.block_hashes for job in stack.scheduler.jobs]
    assert prefixes[0] == prefixes[1] and prefixes[3] == prefixes[4]
    assert len(set(prefixes)) == 4
    forged = await other.complete(stack, cache_salt=f"{own.key.id}\0")
    assert (forged.status_code, forged.json()["error"]["param"]) == (400, "cache_salt")


async def test_a_key_gives_a_priority_and_is_its_ceiling(stack: Stack) -> None:
    wanted = {"high": PRIORITY_HIGH, "normal": PRIORITY_NORMAL, "low": PRIORITY_LOW}
    for ceiling, highest in wanted.items():
        key = await make_key(stack.redis, priority=ceiling)
        await key.complete(stack)
        assert stack.scheduler.jobs[-1].priority == highest
        for name, number in wanted.items():
            await key.complete(stack, priority=name)
            assert stack.scheduler.jobs[-1].priority == max(number, highest)


async def test_keys_are_in_no_log_no_metric_and_no_message(stack: Stack, caplog: pytest.LogCaptureFixture) -> None:
    key = await make_key(stack.redis, models=["org/other"], requests_per_minute=1)
    with caplog.at_level(logging.DEBUG):
        answers = [await key.complete(stack), await key.complete(stack, model="org/other")]
        answers.append(await stack.http.get("/v1/models", headers={"x-api-key": key.secret + "x"}))
        with pytest.raises(grpc.aio.AioRpcError):
            await stack.inference.Generate(GenerateRequest(model="x"), metadata=key.metadata).read()
    told = caplog.text + (await stack.http.get("/metrics")).text + "".join(answer.text for answer in answers)
    secret = key.secret.removeprefix(key.key.id)
    assert secret not in told and digest(key.secret) not in told


def test_which_header_is_the_key() -> None:
    assert credential_of("Bearer a", "b") == "a"
    assert credential_of("Basic a", "b") == credential_of(None, "b") == credential_of("Bearer ", "b") == "b"
    assert credential_of(None, None) is credential_of("Bearer", "") is None


def test_who_reaches_an_address() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.8.0.1", "::1", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "gateway"))
