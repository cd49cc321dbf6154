"""`headrace role` and `headrace drain`: tell a worker of a running stack something, through the stack's scheduler."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc.aio

from headrace.v1.scheduler_pb2 import DrainWorkerRequest, SetRoleRequest, WorkerRole
from headrace.v1.scheduler_pb2_grpc import SchedulerStub
from services.common.channel import dial
from services.common.config import ConfigError
from services.common.mutual_tls import showing
from toolkit.run_directory import RunningStack

if TYPE_CHECKING:
    from headrace.v1.scheduler_pb2_grpc import SchedulerAsyncStub

_TIMEOUT_S = 5.0


class NotTold(Exception):
    """One sentence for the person."""


async def set_role(stacks: Sequence[RunningStack], worker: str, role: str) -> None:
    """Changes what a worker is preferred for. Raises NotTold."""
    request = SetRoleRequest(worker_id=worker, role=WorkerRole.Value(f"WORKER_ROLE_{role.upper()}"))
    async with _scheduler_of(stacks, worker) as scheduler:
        await scheduler.SetRole(request, timeout=_TIMEOUT_S)


async def drain(stacks: Sequence[RunningStack], worker: str, *, undo: bool) -> str:
    """Takes a worker out of service, or back. Returns a sentence on what happens now. Raises NotTold."""
    request = DrainWorkerRequest(worker_id=worker, undo=undo)
    async with _scheduler_of(stacks, worker) as scheduler:
        told = await scheduler.DrainWorker(request, timeout=_TIMEOUT_S)
    if undo:
        return f"{worker} takes work again."
    if told.other_workers:
        return f"{worker} takes no new work; `headrace ps` shows when it is drained."
    return f"{worker} takes no new work. No other worker serves its model: requests wait until one does."


@asynccontextmanager
async def _scheduler_of(stacks: Sequence[RunningStack], worker: str) -> AsyncIterator["SchedulerAsyncStub"]:
    """The scheduler of the stack that has this worker. Raises NotTold, also for what the scheduler refuses."""
    stack = next((stack for stack in stacks if any(process.name == worker for process in stack.processes)), None)
    if stack is None:
        raise NotTold(f"No stack that runs here has a worker {worker!r}; `headrace ps` lists them.")
    async with _dial_scheduler(stack) as channel:
        try:
            yield SchedulerStub(channel)
        except grpc.aio.AioRpcError as error:
            raise NotTold(error.details() or error.code().name) from None


def _dial_scheduler(stack: RunningStack) -> grpc.aio.Channel:
    try:
        with showing(stack.tls):
            return dial(stack.scheduler_address)
    except ConfigError as error:
        raise NotTold(f"The stack's certificates cannot be used: {error}.") from None
