"""The stack that a benchmark starts for itself: `headrace up`, from its start to its drained stop."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from os import getpid
from pathlib import Path

from headrace.v1.scheduler_pb2 import DescribeFleetRequest, Registration
from headrace.v1.scheduler_pb2_grpc import SchedulerStub
from services.common.channel import dial
from services.common.config import is_set
from toolkit.bench_servers import Server
from toolkit.command_line import REDIS_VARIABLE
from toolkit.health import http_ready
from toolkit.loadtest import completes
from toolkit.log_tail import last_lines
from toolkit.ports import free_ports
from toolkit.process_tree import ProcessTree
from toolkit.run_directory import RunningStack
from toolkit.stack import INTERNAL_HOST

# On a Redis of its own, whatever the person has set.
HEADRACE_UP = ("env", "-u", REDIS_VARIABLE, sys.executable, "-P", "-m", "toolkit.main", "up")

_TLS_CERT = "HEADRACE_GATEWAY_TLS_CERT"  # which `headrace up` takes for --tls-cert
_TLS_FLAGS = ("--tls", "--tls-cert")
_ASK_EVERY_S = 0.2
_SHOWN_LOG_LINES = 20
_WORKERS_TIMEOUT_S = 120.0
# A request that was lost with a connection is given up and sent anew after this time.
_COMPLETION_TIMEOUT_S = 20.0


class StackEnded(Exception):
    """The stack for a benchmark ended before it was ready, and the message has the end of its log; or it cannot be."""


@asynccontextmanager
async def stack_of_our_own(
    name: str, arguments: Sequence[str], log: Path, command: Sequence[str] = HEADRACE_UP
) -> AsyncIterator[Server]:
    """Runs `headrace up` with these arguments until the end of the `with`. Raises StackEnded.

    It dies with this process, however that ends. What it prints is appended to `log`.
    """
    _refuse_tls(arguments)
    ports = free_ports(INTERNAL_HOST)
    http_port, grpc_port = next(ports), next(ports)
    process = await _start([*command, *arguments, *_public_ports(http_port, grpc_port)], log)
    url = f"http://{INTERNAL_HOST}:{http_port}"
    try:
        while not await http_ready(f"{url}/health/ready"):
            if process.returncode is not None:
                raise StackEnded("\n".join([_end_of(process), *last_lines(log, _SHOWN_LOG_LINES)]))
            await asyncio.sleep(_ASK_EVERY_S)
        yield Server(name, url, ProcessTree(process.pid), partial(_works, url))
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await process.wait()


def _refuse_tls(arguments: Sequence[str]) -> None:
    """A stack on TLS would be asked in plain for ever."""
    flags = (argument.partition("=")[0] for argument in arguments)
    if flag := next((flag for flag in flags if flag in _TLS_FLAGS), None):
        raise StackEnded(f"Benchmarks ask their own stack in plain: leave out {flag}.")
    if is_set(_TLS_CERT):
        raise StackEnded(f"Benchmarks ask their own stack in plain: unset {_TLS_CERT}.")


def _public_ports(http_port: int, grpc_port: int) -> tuple[str, ...]:
    return ("--http-port", str(http_port), "--grpc-port", str(grpc_port))


def _end_of(process: asyncio.subprocess.Process) -> str:
    return f"the stack ended with status {process.returncode} before it was ready"


async def all_workers(stack: RunningStack, count: int) -> list[Registration]:
    """The registrations of so many workers, once they are there: a stack is ready when its first one is."""
    async with dial(stack.scheduler_address) as channel, asyncio.timeout(_WORKERS_TIMEOUT_S):
        while True:
            fleet = await SchedulerStub(channel).DescribeFleet(DescribeFleetRequest(), wait_for_ready=True)
            if len(fleet.workers) == count:
                return [worker.registration for worker in fleet.workers]
            await asyncio.sleep(_ASK_EVERY_S)


async def _start(command: Sequence[str], log: Path) -> asyncio.subprocess.Process:
    tether = (sys.executable, "-P", "-m", "toolkit.tether", str(getpid()))
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return await asyncio.create_subprocess_exec(
            *tether,
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then stops the stack once
        )


async def _works(url: str) -> bool:
    """Ready by its own word, and a completion goes all the way through it: after a stand-still links may be dead."""
    return await http_ready(f"{url}/health/ready") and await completes(url, _COMPLETION_TIMEOUT_S)
