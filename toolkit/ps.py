"""`headrace ps`: the stacks that run on this machine, each process with its health and what it uses."""

import asyncio
import time
from collections.abc import Sequence

import grpc.aio
import psutil
from rich.console import Console

from headrace.v1.scheduler_pb2 import DescribeFleetRequest, FleetWorker, WorkerRole
from headrace.v1.scheduler_pb2_grpc import SchedulerStub
from services.common.channel import dial, dial_front
from services.common.mutual_tls import showing
from services.common.tls import FrontCert
from toolkit.health import grpc_health, redis_answers
from toolkit.run_directory import RunningProcess, RunningStack
from toolkit.tables import new_table, print_whole

_FLEET_TIMEOUT_S = 2.0
_COLUMNS = (
    "service",
    "id",
    "pid",
    "address",
    "health",
    "uptime",
    "memory",
    "model",
    "role",
    "state",
    "running",
    "KV use",
)


async def show_stacks(stacks: Sequence[RunningStack], console: Console) -> None:
    """Prints a table per stack. Raises ConfigError if the certificates of a stack cannot be read."""
    for stack in stacks:
        with showing(stack.tls):
            health = await asyncio.gather(*(_health(process, stack.front_cert) for process in stack.processes))
            fleet = await _fleet(stack.scheduler_address)
        table = new_table(*_COLUMNS, words=len(_COLUMNS))
        for process, word in zip(stack.processes, health, strict=True):
            table.add_row(*_process_cells(process, word), *worker_cells(fleet.get(process.name)))
        heading = f"{stack.http_url} (gRPC {stack.grpc_address}, pid {stack.pid}, logs {stack.directory})"
        console.print(heading, soft_wrap=True)
        print_whole(table, console)


async def _health(process: RunningProcess, front_cert: FrontCert | None) -> str:
    if process.pid is None:
        return process.state
    if process.service == "redis":
        host, _, port = process.address.rpartition(":")
        return "serving" if await redis_answers(host, int(port)) else "unreachable"
    if process.service == "gateway":
        return await grpc_health(dial_front(process.address, front_cert))
    return await grpc_health(dial(process.address))


async def _fleet(scheduler_address: str) -> dict[str, FleetWorker]:
    """Workers by id, as the scheduler sees them; none if it does not answer."""
    async with dial(scheduler_address) as channel:
        try:
            reply = await SchedulerStub(channel).DescribeFleet(DescribeFleetRequest(), timeout=_FLEET_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return {}
    return {worker.registration.worker_id: worker for worker in reply.workers}


def _process_cells(process: RunningProcess, health: str) -> tuple[str, ...]:
    pid = str(process.pid or "")
    uptime = format_duration(time.time() - process.started_unix_s) if process.pid else ""
    return process.service, process.name, pid, process.address, health, uptime, format_memory(process.pid)


def worker_cells(worker: FleetWorker | None) -> tuple[str, str, str, str, str]:
    if worker is None:
        return "", "", "", "", ""
    total_blocks = worker.registration.total_blocks
    used = 1 - worker.state.free_blocks / total_blocks if total_blocks else 0.0
    role = WorkerRole.Name(worker.state.role or worker.registration.role).removeprefix("WORKER_ROLE_").lower()
    condition = FleetWorker.Condition.Name(worker.condition).removeprefix("CONDITION_").lower().replace("_", " ")
    return worker.registration.model.name, role, condition, str(worker.state.running_sequences), f"{used:.0%}"


def format_memory(pid: int | None) -> str:
    """Resident set size in MiB; empty when the process is gone."""
    try:
        return f"{psutil.Process(pid).memory_info().rss / 2**20:.0f} MiB" if pid else ""
    except psutil.NoSuchProcess:
        return ""


def format_duration(seconds: float) -> str:
    """The two largest units: `42s`, `3m 5s`, `2h 0m`, `4d 7h`."""
    whole = max(0, int(seconds))
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "m"), (whole % 60, "s")]
    first = next((index for index, (count, _) in enumerate(parts) if count), len(parts) - 1)
    return " ".join(f"{count}{unit}" for count, unit in parts[first : first + 2])
