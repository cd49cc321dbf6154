"""A worker is profiled over gRPC while it serves."""

from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest

from headrace.v1.profile_pb2 import ProfilePart, ProfileRequest
from headrace.v1.worker_pb2_grpc import WorkerStub
from tests.services.worker.stack import Gateway, Stack


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    stack = Stack()
    await stack.start()
    await stack.cache.until(lambda: stack.cache.snapshots == 1)  # from now on only tests give the engine commands
    yield stack
    await stack.stop()
    await stack.close()


async def profiled(stack: Stack, **fields: int) -> list[ProfilePart]:
    request = ProfileRequest(**{"steps": 4, "traced_steps": 0, "timeout_ms": 60_000, **fields})
    return [part async for part in WorkerStub(stack.channel).Profile(request)]


async def refused(stack: Stack, **fields: int) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await profiled(stack, **fields)
    return caught.value


async def test_a_report_and_the_files_of_a_trace(stack: Stack) -> None:
    gateway = Gateway(stack.channel)
    stack.hold(1)
    gateway.start("r1", [1], [5, 6, 7, 8, 9], max_tokens=20)
    await gateway.until(lambda: 1 in gateway.tokens)  # the prompt is done
    call = WorkerStub(stack.channel).Profile(ProfileRequest(steps=4, traced_steps=2, timeout_ms=60_000))
    commands = stack.commands
    await stack.until_commands(commands + 1)
    stack.release()
    parts = [part async for part in call]
    report = parts[0].report
    assert (report.worker_id, report.steps, report.traced_steps) == ("w1", 4, 2)
    phases = {phase.name: phase for phase in report.phases}
    assert list(phases) == ["prefill", "decode", "sample", "other", "transfer"]
    assert (phases["prefill"].tokens, phases["sample"].tokens) == (0, 4)
    assert sum(phases[name].seconds for name in ("prefill", "decode", "sample", "other")) == pytest.approx(
        report.step_seconds
    )
    sizes: dict[str, int] = {}
    for part in parts[1:]:
        sizes[part.file.name] = sizes.get(part.file.name, 0) + len(part.file.data)
    assert list(sizes) == ["trace.json.gz", "operators.txt"] and all(sizes.values())
    await gateway.finish(1)
    assert gateway.tokens[1] == stack.expected([5, 6, 7, 8, 9], 20), "a profile changes no token"


async def test_an_idle_worker_says_so(stack: Stack) -> None:
    error = await refused(stack, timeout_ms=50)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert error.details() == "w1 made no step within 0.05 s: it is idle."


async def test_what_came_in_time_is_reported(stack: Stack) -> None:
    gateway = Gateway(stack.channel)
    commands = stack.commands
    call = WorkerStub(stack.channel).Profile(ProfileRequest(steps=1000, traced_steps=5, timeout_ms=1500))
    await stack.until_commands(commands + 1)
    gateway.start("r1", [1], [5, 6, 7], max_tokens=6)
    parts = [part async for part in call]
    assert [(part.report.steps, part.report.traced_steps) for part in parts] == [(6, 0)]


async def test_one_profile_at_a_time_until_its_caller_has_gone(stack: Stack) -> None:
    commands = stack.commands
    call = WorkerStub(stack.channel).Profile(ProfileRequest(steps=4, timeout_ms=60_000))
    await stack.until_commands(commands + 1)
    error = await refused(stack)
    assert (error.code(), error.details()) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "A profile of w1 is running already.",
    )
    call.cancel()
    await stack.until_commands(commands + 2)  # it is told to end
    gateway = Gateway(stack.channel)
    gateway.start("r1", [1], [5, 6, 7], max_tokens=6)
    await gateway.finish(1)
    assert not stack.service._engine._probe
    error = await refused(stack, timeout_ms=50)
    assert "it is idle" in str(error.details())


async def test_senseless_wishes_are_refused(stack: Stack) -> None:
    for fields in ({"steps": 0}, {"traced_steps": -1}, {"timeout_ms": 0}):
        error = await refused(stack, **fields)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert f"{next(iter(fields))} must lie between" in str(error.details())
