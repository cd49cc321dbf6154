import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio.connection import AbstractConnection

from services.common.errors import Unavailable
from services.common.redis import client as client_module
from services.common.redis.client import RedisClient, UnfitRedis
from services.common.redis.scripts import Script
from services.common.redis.wire import OnReplies, Wire
from tests.redis_server import RedisServer

ECHO = Script("return ARGV[1]", "7f923f79fe76194c868d7e1d0820de36700eb649")


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[RedisClient]:
    client = RedisClient(redis_url)
    yield client
    await client.close()


async def test_concurrent_commands_get_their_own_replies(client: RedisClient) -> None:
    replies = await asyncio.gather(*(client.command("ECHO", str(number)) for number in range(1000)))
    assert replies == [str(number).encode() for number in range(1000)]


async def test_an_error_of_one_command_is_its_callers_alone(client: RedisClient) -> None:
    await client.command("SET", "text", "x")
    ok, failed = await asyncio.gather(
        client.command("ECHO", "a"), client.command("INCR", "text"), return_exceptions=True
    )
    assert ok == b"a"
    assert "not an integer" in str(failed)
    assert not isinstance(failed, Unavailable)


async def test_a_cancelled_caller_disturbs_nobody(client: RedisClient) -> None:
    cancelled = asyncio.create_task(client.command("ECHO", "a"))
    kept = asyncio.create_task(client.command("ECHO", "b"))
    await asyncio.sleep(0)
    cancelled.cancel()
    assert await kept == b"b"


async def test_what_is_in_no_hurry_travels_before_what_is(client: RedisClient, monkeypatch: pytest.MonkeyPatch) -> None:
    exchange, sizes = Wire.exchange, []

    def counted(self: Wire, packed: bytes, count: int, *rest: Any) -> None:
        sizes.append(count)
        exchange(self, packed, count, *rest)

    monkeypatch.setattr(Wire, "exchange", counted)
    monkeypatch.setattr(client_module, "_COMPANY_WITHIN_S", 60.0)
    patient = asyncio.create_task(client.command("RPUSH", "list", "a", hurry=False))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not sizes
    assert await client.command("RPUSH", "list", "b") == 2
    assert await patient == 1
    assert sizes == [2]


async def test_what_is_in_no_hurry_goes_alone_when_nothing_comes(client: RedisClient) -> None:
    assert await client.command("ECHO", "a", hurry=False) == b"a"
    hurried, patient = await asyncio.gather(client.command("ECHO", "b"), client.command("ECHO", "c", hurry=False))
    assert (hurried, patient) == (b"b", b"c")
    assert await client.script(ECHO, [], ["d"], hurry=False) == b"d"


async def test_closing_sends_what_is_in_no_hurry(redis_url: str) -> None:
    client = RedisClient(redis_url)
    patient = asyncio.create_task(client.command("ECHO", "a", hurry=False))
    await asyncio.sleep(0)
    await client.close()
    assert await patient == b"a"


async def test_a_script_is_sent_again_when_redis_forgot_it(client: RedisClient) -> None:
    assert await client.script(ECHO, [], ["a"]) == b"a"
    assert await client.script(ECHO, [], ["b"]) == b"b"
    await client.command("SCRIPT", "FLUSH")
    assert await client.script(ECHO, [], ["c"]) == b"c"


async def test_check_accepts_a_durable_redis(client: RedisClient) -> None:
    await client.check(allow_volatile=False)


async def test_check_refuses_eviction(client: RedisClient) -> None:
    await client.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(UnfitRedis, match="allkeys-lru"):
            await client.check(allow_volatile=True)
    finally:
        await client.command("CONFIG", "SET", "maxmemory-policy", "noeviction")


async def test_check_refuses_redis_without_aof_unless_allowed(client: RedisClient) -> None:
    await client.command("CONFIG", "SET", "appendonly", "no")
    try:
        with pytest.raises(UnfitRedis, match="appendonly"):
            await client.check(allow_volatile=False)
        await client.check(allow_volatile=True)
    finally:
        await client.command("CONFIG", "SET", "appendonly", "yes")


async def test_a_redis_that_is_away_is_unavailable_and_then_back(tmp_path: Path, redis_server: RedisServer) -> None:
    server = RedisServer(tmp_path, binary=redis_server.binary)
    client = RedisClient(server.url)
    await client.command("SET", "kept", "1")
    server.kill()
    for _ in range(2):
        with pytest.raises(Unavailable):
            await client.command("GET", "kept")
        with pytest.raises(Unavailable):
            await client.blocking_command("XREAD", "BLOCK", 10, "STREAMS", "s", "0")
    server.start()
    assert await client.command("GET", "kept") == b"1"
    await client.close()
    server.kill()


async def test_whatever_the_connection_raises_nobody_is_left_waiting(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def closed(*arguments: object, **options: object) -> None:
        raise RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")

    def fails(wire: Wire, packed: bytes, count: int, timeout_s: float, on_replies: OnReplies) -> None:
        on_replies([ValueError("what nobody has thought of")] * count)

    client = RedisClient(redis_url)
    for target, name, way in ((AbstractConnection, "send_packed_command", closed), (Wire, "exchange", fails)):
        with monkeypatch.context() as patched:
            patched.setattr(target, name, way)
            commands = [client.command("ECHO", "a"), client.command("ECHO", "b"), client.blocking_command("ECHO", "c")]
            outcomes = await asyncio.wait_for(asyncio.gather(*commands, return_exceptions=True), 5)
        assert {type(outcome) for outcome in outcomes} == {Unavailable}
        assert await client.command("ECHO", "d") == b"d"
    await client.close()


async def test_a_connection_that_ended_while_idle_is_made_anew(client: RedisClient) -> None:
    for _ in range(3):
        assert await client.command("ECHO", "a") == b"a"
        assert client._wire is not None
        client._wire.abort()


async def test_a_server_that_hangs_up_after_the_login_is_unavailable() -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (await reader.read(1000)).count(b"SETINFO") < 2:
            pass
        writer.write(b"+OK\r\n+OK\r\n")
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    client = RedisClient(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0")
    with pytest.raises(Unavailable):
        await asyncio.wait_for(client.command("PING"), 5)
    await client.close()
    server.close()


async def test_closing_sends_what_follows_from_what_was_under_way(redis_url: str) -> None:
    client = RedisClient(redis_url)
    await client.command("SCRIPT", "FLUSH")
    running = asyncio.create_task(client.script(ECHO, [], ["a"]))  # EVALSHA, then EVAL
    await asyncio.sleep(0)
    await asyncio.gather(client.close(), client.close())
    assert await running == b"a"


async def test_it_knows_for_how_long_redis_has_answered(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    client = RedisClient(redis_url, clock=lambda: now)
    await client.command("PING")
    now = 107.0
    assert client.answering_s == 7
    with pytest.raises(Exception, match="unknown command"):
        await client.command("NONSENSE")
    assert client.answering_s == 7
    slow = asyncio.create_task(client.command("PING"))
    for _ in range(3):
        await asyncio.sleep(0)  # it is sent
    now = 110.0
    await slow
    assert client.answering_s == 0
    now = 115.0
    connect = Wire.connect

    async def slowly(*arguments: Any) -> Wire:
        nonlocal now
        now += 2
        return await connect(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Wire, "connect", slowly)
        assert client._wire is not None
        client._wire.abort()
        await client.command("PING")
    assert client.answering_s == 0
    now = 122.0
    monkeypatch.setattr(client_module, "_PASSING_REPLIES", ("unknown command",))
    with pytest.raises(Unavailable):
        await client.command("NONSENSE")
    assert client.answering_s == 0
    await client.close()


async def test_a_hung_redis_is_unavailable(
    tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "ANSWER_TIMEOUT_S", 0.2)
    server = RedisServer(tmp_path, binary=redis_server.binary)
    client = RedisClient(server.url)
    await client.command("PING")
    server.signal(signal.SIGSTOP)
    with pytest.raises(Unavailable):
        await client.command("PING")
    server.signal(signal.SIGCONT)
    assert await client.command("ECHO", "a") == b"a"
    await client.close()
    server.kill()


async def test_a_read_only_replica_is_unavailable_for_scripts_too(client: RedisClient) -> None:
    await client.command("REPLICAOF", "127.0.0.1", "1")
    try:
        with pytest.raises(Unavailable):
            await client.command("SET", "a", "b")
        with pytest.raises(Unavailable):
            await client.script(Script("return redis.call('SET', KEYS[1], 'x')", "0" * 40), ["a"], [])
    finally:
        await client.command("REPLICAOF", "NO", "ONE")


async def test_a_blocked_caller_can_always_be_cancelled(client: RedisClient) -> None:
    async def read_forever() -> None:
        while True:
            await client.blocking_command("XREAD", "BLOCK", 1, "STREAMS", "s", "0")

    for number in range(200):
        reading = asyncio.create_task(read_forever())
        await asyncio.sleep(number / 50_000)
        reading.cancel()
        await asyncio.wait([reading], timeout=5)
        assert reading.cancelled()
    await connected(client, lambda connections: len(connections) <= 2)


async def test_a_blocked_caller_that_is_cancelled_leaves_no_connection(client: RedisClient) -> None:
    forever = [
        asyncio.create_task(client.blocking_command("XREAD", "BLOCK", 10_000, "STREAMS", "s", "0")) for _ in range(5)
    ]
    await connected(client, lambda connections: sum("cmd=xread" in one for one in connections) == 5)
    for reading in forever:
        reading.cancel()
    await connected(client, lambda connections: len(connections) == 1)


async def test_one_that_is_cancelled_while_it_connects_leaves_none_either(
    client: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, go_on, connect = asyncio.Event(), asyncio.Event(), Wire.connect

    async def stubborn(*arguments: Any) -> Wire:
        """Loses its cancellation, as asyncio.wait_for does in Python 3.11."""
        wire = await connect(*arguments)
        made.set()
        with contextlib.suppress(asyncio.CancelledError):
            await go_on.wait()
        return wire

    await client.command("PING")
    with monkeypatch.context() as patched:
        patched.setattr(Wire, "connect", stubborn)
        reading = asyncio.create_task(client.blocking_command("PING"))
        await made.wait()
        reading.cancel()
        await asyncio.wait([reading])
    await connected(client, lambda connections: len(connections) == 1)


async def test_connections_for_what_blocks_are_used_again(client: RedisClient) -> None:
    ids = [await client.blocking_command("CLIENT", "ID") for _ in range(3)]
    assert len(set(ids)) == 1
    with pytest.raises(Exception, match="unknown command"):
        await client.blocking_command("NONSENSE")
    assert await client.blocking_command("CLIENT", "ID") == ids[0]


async def connected(client: RedisClient, as_wanted: Callable[[list[str]], bool]) -> None:
    """Returns when the connections that Redis has are as wanted, long before a wait in it is over."""
    async with asyncio.timeout(5):
        while True:
            if as_wanted((await client.command("CLIENT", "LIST")).decode().splitlines()):
                return
            await asyncio.sleep(0.01)


async def test_closing_ends_what_is_blocked(redis_url: str) -> None:
    client = RedisClient(redis_url)
    reading = asyncio.create_task(client.blocking_command("XREAD", "BLOCK", 10_000, "STREAMS", "s", "0"))
    await client.command("ECHO", "a")
    await client.close()
    with pytest.raises(Unavailable):
        await reading
