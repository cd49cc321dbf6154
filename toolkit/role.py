"""`headrace role`: tells a worker of a running stack what it is preferred for."""

from collections.abc import Sequence

import grpc.aio

from headrace.v1.scheduler_pb2 import SetRoleRequest, WorkerRole
from headrace.v1.scheduler_pb2_grpc import SchedulerStub
from services.common.channel import dial
from toolkit.run_directory import RunningStack

_TIMEOUT_S = 5.0


class RoleNotSet(Exception):
    """One sentence for the person."""


async def set_role(stacks: Sequence[RunningStack], worker: str, role: str) -> None:
    """Asks the scheduler of the stack that has this worker. Raises RoleNotSet."""
    stack = next((stack for stack in stacks if any(process.name == worker for process in stack.processes)), None)
    if stack is None:
        raise RoleNotSet(f"No stack that runs here has a worker {worker!r}; `headrace ps` lists them.")
    request = SetRoleRequest(worker_id=worker, role=WorkerRole.Value(f"WORKER_ROLE_{role.upper()}"))
    async with dial(stack.scheduler_address) as channel:
        try:
            await SchedulerStub(channel).SetRole(request, timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise RoleNotSet(error.details() or error.code().name) from None
