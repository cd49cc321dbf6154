"""What the wire refuses."""

import contextlib
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest

from headrace.v1.job_pb2 import Job
from headrace.v1.scheduler_pb2 import (
    WORKER_ROLE_PREFILL,
    DrainWorkerRequest,
    GatewayHello,
    GatewayMessage,
    ModelInfo,
    OfferAnswer,
    PlacementRequest,
    Registration,
    SetRoleRequest,
    WorkerReport,
    WorkerState,
)
from headrace.v1.scheduler_pb2_grpc import SchedulerStub
from services.common.channel import dial
from tests.services.scheduler.fakes import RunningScheduler

HELLO = GatewayMessage(hello=GatewayHello(gateway_id="g", incarnation="1"))
JOB = Job(request_id="r", gateway_id="g", gateway_incarnation="1", model="m", choices=1)
REGISTRATION = WorkerReport(
    registration=Registration(
        worker_id="w",
        incarnation="1",
        address="w:1",
        model=ModelInfo(name="m", block_size=16, max_context_tokens=10),
    )
)


def request(job: Job, entry_id: str) -> GatewayMessage:
    return GatewayMessage(placement_request=PlacementRequest(job=job, queue_entry_id=entry_id))


@pytest.fixture
async def stub(scheduler: RunningScheduler) -> AsyncIterator[SchedulerStub]:
    async with dial(scheduler.address) as channel:
        yield SchedulerStub(channel)


async def status_of(call: "grpc.aio.StreamStreamCall[object, object]", *messages: object) -> grpc.StatusCode:
    for message in messages:
        await call.write(message)
    await call.done_writing()
    with contextlib.suppress(grpc.aio.AioRpcError):
        async for _ in call:  # the status comes after the messages
            pass
    return await call.code()


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [GatewayMessage(answers=[OfferAnswer(request_id="r")])],
        [GatewayMessage(hello=GatewayHello(gateway_id="g"))],
        [HELLO, request(JOB, "nonsense")],
        [HELLO, request(Job(request_id="r", gateway_id="somebody"), "1-0")],
    ],
)
async def test_a_gateway_that_breaks_the_protocol(stub: SchedulerStub, messages: list[GatewayMessage]) -> None:
    assert await status_of(stub.Place(), *messages) == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [WorkerReport(state=WorkerState())],
        [WorkerReport(registration=Registration(worker_id="w"))],
        [REGISTRATION, REGISTRATION],
    ],
)
async def test_a_worker_that_breaks_the_protocol(stub: SchedulerStub, messages: list[WorkerReport]) -> None:
    assert await status_of(stub.Register(), *messages) == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_stream_ends_well_when_its_other_side_is_done(stub: SchedulerStub) -> None:
    late_answer = GatewayMessage(answers=[OfferAnswer(request_id="unknown", status=OfferAnswer.STATUS_ACCEPTED)])
    assert await status_of(stub.Place(), HELLO, late_answer) == grpc.StatusCode.OK
    assert await status_of(stub.Register(), REGISTRATION) == grpc.StatusCode.OK


async def test_a_role_is_passed_on_to_its_worker(stub: SchedulerStub) -> None:
    call = stub.Register()
    await call.write(REGISTRATION)
    request = SetRoleRequest(worker_id="w", role=WORKER_ROLE_PREFILL)
    while True:
        try:
            await stub.SetRole(request)
            break
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.NOT_FOUND  # its registration is on the way
    assert (await call.read()).set_role == WORKER_ROLE_PREFILL
    await call.done_writing()


async def test_a_worker_that_no_scheduler_knows_cannot_be_drained(stub: SchedulerStub) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="No worker nobody is connected") as error:
        await stub.DrainWorker(DrainWorkerRequest(worker_id="nobody"))
    assert error.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (SetRoleRequest(worker_id="nobody", role=WORKER_ROLE_PREFILL), grpc.StatusCode.NOT_FOUND),
        (SetRoleRequest(worker_id="w"), grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_a_role_that_cannot_be_set(
    stub: SchedulerStub, request_: SetRoleRequest, status: grpc.StatusCode
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.SetRole(request_)
    assert error.value.code() is status
