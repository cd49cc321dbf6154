"""Real servers and channels on loopback: errors become status, sessions follow replicas that come and go."""

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from headrace.v1 import inference_pb2, inference_pb2_grpc
from services.common.channel import Outbox, ReplicaSessions, cancel_and_wait, dial, host_port, reachable, resolve
from services.common.errors import InvalidRequest, Overloaded
from services.common.serve import GrpcServer, Registration

CUT_OFF = inference_pb2.TokenizeRequest(model="a model").SerializeToString()[:-2]


class Inference(inference_pb2_grpc.InferenceServicer):
    async def ListModels(self, request: Any, context: Any) -> inference_pb2.ListModelsResponse:
        raise Overloaded("The queue is full.")

    async def Tokenize(self, request: Any, context: Any) -> inference_pb2.TokenizeResponse:
        raise RuntimeError("a bug with a secret in it")

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.GenerateDelta]:
        yield inference_pb2.GenerateDelta(text="first")
        raise InvalidRequest("max_tokens must be at least 1.", field="max_tokens")


def server() -> GrpcServer:
    name = "headrace.v1.Inference"
    return GrpcServer([Registration(inference_pb2_grpc.add_InferenceServicer_to_server, Inference(), name)])


@pytest.fixture
async def address() -> AsyncIterator[str]:
    running = server()
    port = await running.start("127.0.0.1:0")
    yield f"127.0.0.1:{port}"
    await running.stop(0)


async def test_errors_become_status(address: str, caplog: pytest.LogCaptureFixture) -> None:
    async with dial(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as overloaded:
            await stub.ListModels(inference_pb2.ListModelsRequest())
        assert overloaded.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert overloaded.value.details() == "The queue is full."

        received = []
        with pytest.raises(grpc.aio.AioRpcError) as invalid:
            async for delta in stub.Generate(inference_pb2.GenerateRequest()):
                received.append(delta.text)
        assert received == ["first"]
        assert invalid.value.code() == grpc.StatusCode.INVALID_ARGUMENT

        with pytest.raises(grpc.aio.AioRpcError) as bug:
            await stub.Tokenize(inference_pb2.TokenizeRequest(), metadata=(("x-request-id", "r-17"),))
        assert bug.value.code() == grpc.StatusCode.INTERNAL
        assert "secret" not in (bug.value.details() or "")
        assert "request r-17" in caplog.text


async def test_what_is_no_message_is_the_callers_mistake(address: str, caplog: pytest.LogCaptureFixture) -> None:
    async with dial(address) as channel:
        for call in (
            channel.unary_unary("/headrace.v1.Inference/Tokenize")(CUT_OFF),
            channel.unary_stream("/headrace.v1.Inference/Generate")(CUT_OFF),
            channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")(iter([CUT_OFF])),
        ):
            assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert "no message of the method's type" in await call.details()
    assert not caplog.records


async def test_a_method_that_is_left_out_is_no_failure(address: str, caplog: pytest.LogCaptureFixture) -> None:
    async with dial(address) as channel:
        for method in ("grpc.health.v1.Health/List", "headrace.v1.Inference/Cancel"):
            assert await channel.unary_unary(f"/{method}")(b"").code() == grpc.StatusCode.UNIMPLEMENTED
    assert not caplog.records


async def test_health_follows_readiness() -> None:
    running = server()
    port = await running.start("127.0.0.1:0")
    async with dial(f"127.0.0.1:{port}") as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        request = health_pb2.HealthCheckRequest(service="headrace.v1.Inference")
        assert (await check(request)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await running.set_serving(True)
        assert (await check(request)).status == health_pb2.HealthCheckResponse.SERVING
    await running.stop(0)


async def test_a_taken_port_is_an_os_error(address: str) -> None:
    with pytest.raises(OSError, match=f"cannot listen on {address}"):
        await server().start(address)


async def test_a_server_on_an_ipv6_address_is_started_and_reached() -> None:
    running = server()
    port = await running.start(host_port("::1", 0))
    async with dial(await reachable("::1", port)) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        answer = await check(health_pb2.HealthCheckRequest(), timeout=10)
    assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
    await running.stop(0)


async def test_resolve_gives_ipv4_alone() -> None:
    assert await resolve("localhost:1") == {"127.0.0.1:1"}


class Names:
    """What a machine's resolver says, in place of the real one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.known: dict[str, list[str]] = {}
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", self._look_up, raising=False)

    async def _look_up(self, host: str, port: int, **options: object) -> list[tuple[object, ...]]:
        if host not in self.known:
            raise socket.gaierror(socket.EAI_AGAIN, "not now")
        families = [(socket.AF_INET6 if ":" in address else socket.AF_INET, address) for address in self.known[host]]
        return [(family, socket.SOCK_STREAM, 6, "", (address, port)) for family, address in families]


@pytest.mark.parametrize(
    ("host", "own", "advertised"),
    [
        ("10.1.2.3", ["192.168.7.8"], "10.1.2.3:7"),
        ("fd00::1", ["192.168.7.8"], "[fd00::1]:7"),
        ("0.0.0.0", ["192.168.7.8"], "192.168.7.8:7"),
        ("0.0.0.0", ["fd00::8"], "[fd00::8]:7"),
        ("0.0.0.0", ["127.0.1.1", "192.168.7.8"], "192.168.7.8:7"),
        ("::", ["127.0.1.1"], "node-7:7"),  # as on Debian
        ("0.0.0.0", None, "node-7:7"),
    ],
)
async def test_a_server_on_all_interfaces_is_reached_by_this_machines_address(
    host: str, own: list[str] | None, advertised: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = Names(monkeypatch)
    monkeypatch.setattr(socket, "gethostname", lambda: "node-7")
    if own is not None:
        names.known["node-7"] = own
    assert await reachable(host, 7) == advertised


async def test_sessions_outlive_a_name_that_cannot_be_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names(monkeypatch)
    names.known = {"a": ["10.0.0.1", "10.0.0.2"], "b": ["10.0.0.3"]}
    events: asyncio.Queue[tuple[str, str]] = asyncio.Queue()

    async def session(address: str, channel: grpc.aio.Channel) -> None:
        events.put_nowait(("begins", address))
        try:
            await asyncio.Event().wait()
        finally:
            events.put_nowait(("ends", address))

    keeper = asyncio.create_task(ReplicaSessions("test", ["a:1", "b:1"], session, refresh_s=0.001).run())
    assert {await events.get() for _ in range(3)} == {("begins", f"10.0.0.{last}:1") for last in (1, 2, 3)}
    del names.known["a"]
    names.known["b"] = ["10.0.0.4"]
    assert {await events.get() for _ in range(2)} == {("begins", "10.0.0.4:1"), ("ends", "10.0.0.3:1")}
    await cancel_and_wait([keeper])


async def test_cancelling_waits_for_all_whatever_one_failed_of(caplog: pytest.LogCaptureFixture) -> None:
    cleaned_up = asyncio.Event()

    async def fails() -> None:
        raise ValueError("a bug")

    async def runs() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned_up.set()

    tasks = [asyncio.create_task(fails()), asyncio.create_task(runs())]
    await asyncio.sleep(0)
    await cancel_and_wait(tasks)
    assert cleaned_up.is_set()
    assert "a bug" in caplog.text


async def test_a_cancelled_caller_of_cancel_and_wait_is_cancelled() -> None:
    going_on = asyncio.Event()

    async def ends_late() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            going_on.set()
            await asyncio.sleep(0.01)

    task = asyncio.create_task(ends_late())
    await asyncio.sleep(0)
    caller = asyncio.create_task(cancel_and_wait([task]))
    await going_on.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller


async def test_sessions_start_again_when_the_replica_returns() -> None:
    """The replica is stopped and started again on its port; the session comes back by itself."""
    connected: asyncio.Queue[str] = asyncio.Queue()

    async def session(address: str, channel: grpc.aio.Channel) -> None:
        health = health_pb2_grpc.HealthStub(channel)
        async for _status in health.Watch(health_pb2.HealthCheckRequest()):
            connected.put_nowait(address)

    first = server()
    port = await first.start("127.0.0.1:0")
    keeper = asyncio.create_task(ReplicaSessions("test", [f"127.0.0.1:{port}"], session).run())
    assert await connected.get() == f"127.0.0.1:{port}"
    await first.stop(0)
    second = server()
    await second.start(f"127.0.0.1:{port}")
    assert await connected.get() == f"127.0.0.1:{port}"
    keeper.cancel()
    with pytest.raises(asyncio.CancelledError):
        await keeper
    await second.stop(0)


async def test_outbox_delivers_in_order_and_ends() -> None:
    outbox: Outbox[int] = Outbox()
    for number in range(3):
        outbox.put(number)
    outbox.close()
    assert [number async for number in outbox] == [0, 1, 2]


async def test_an_outbox_sends_together_what_may_be_merged() -> None:
    def merge(message: list[int], following: list[int]) -> bool:
        fits = len(message) < 3
        if fits:
            message += following
        return fits

    outbox: Outbox[list[int]] = Outbox(merge)
    for number in range(5):
        outbox.put([number])
    outbox.close()
    assert [message async for message in outbox] == [[0, 1, 2], [3, 4]]


async def test_what_could_not_be_merged_is_sent_before_the_end() -> None:
    outbox: Outbox[int] = Outbox(lambda message, following: False)
    for number in range(3):
        outbox.put(number)
    outbox.close()
    assert [message async for message in outbox] == [0, 1, 2]


async def test_what_is_in_no_hurry_goes_with_what_comes_next_and_before_it() -> None:
    outbox: Outbox[list[int]] = Outbox(lambda message, following: message.extend(following) is None)
    outbox.put([0], hurry=False)
    outbox.put([1], hurry=False)
    assert outbox._queue.empty()
    outbox.put([2])
    assert await anext(outbox) == [0, 1, 2]


async def test_what_is_in_no_hurry_goes_alone_when_nothing_comes_and_is_sent_before_the_end() -> None:
    outbox: Outbox[int] = Outbox()
    outbox.put(0, hurry=False)
    assert await asyncio.wait_for(anext(outbox), 10) == 0
    outbox.put(1, hurry=False)
    outbox.close()
    assert [message async for message in outbox] == [1]
