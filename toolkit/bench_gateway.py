"""`headrace bench-gateway`: what everything but the model costs, with a worker that answers without one.

CPU seconds are those of gateway, scheduler, cache and Redis together, from the system's own accounts, without workers
and clients. Where there are two cores or more, these four have the first one, worker and clients the others.
"""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from headrace.v1.scheduler_pb2 import DescribeFleetRequest
from headrace.v1.scheduler_pb2_grpc import SchedulerStub
from services.common.channel import dial
from services.common.mutual_tls import showing
from toolkit.bench_peers import BadPeer, Peer, check_answers, parse_peers, parse_pid
from toolkit.bench_stack import HEADRACE_UP, stack_of_our_own
from toolkit.chat_load import ChatLoad, ChatResult
from toolkit.cpu_time import cpu_s, rss_bytes
from toolkit.keys import open_ring
from toolkit.loadtest import first_model, quantile
from toolkit.process_tree import processes_below
from toolkit.run_directory import RunningStack, running_stacks
from toolkit.slow_clients import SlowClients
from toolkit.worker_ttft import worker_ttft_s

OURS = "ours"
STEP_MS = 10
MAX_SEQUENCES = 256  # that a worker runs at once: as many as a mocker of Dynamo does
PACED = (64, 64)  # streams, tokens of each answer
SHORT = (64, 1)
SLOW_READERS, IDLE_CONNECTIONS, SLOW_TOKENS = 500, 2000, 2000
OTHERS = 200  # requests that are timed beside them
_WARM_S = 2.0
_LOOK_EVERY_S = 0.5
_ENGINE_TIMEOUT_S = 300.0
_ENOUGH = 10**9  # of every limit: it is looked at for each request and never reached


class GatewayBenchFailed(Exception):
    """One sentence for the person."""


@dataclass(frozen=True, slots=True)
class ControlPlane:
    """What is measured: a server, and its processes by the service that each belongs to."""

    name: str
    url: str
    model: str
    key: str
    services: Mapping[str, Sequence[psutil.Process]]


@dataclass(frozen=True, slots=True)
class CpuOfLoad:
    """One load on one control plane. CPU seconds by service."""

    chats: ChatResult
    tokens: int
    cpu_s: Mapping[str, float]

    @property
    def per_1000_tokens(self) -> float:
        return 1000 * sum(self.cpu_s.values()) / self.tokens

    @property
    def per_1000_requests(self) -> float:
        return 1000 * sum(self.cpu_s.values()) / self.chats.requests


@dataclass(slots=True)
class CostRow:
    """A control plane's figures, one of each per round."""

    name: str
    paced: list[CpuOfLoad] = field(default_factory=list)
    short: list[CpuOfLoad] = field(default_factory=list)
    ttft_ms: list[float] = field(default_factory=list)
    # Ours alone, where the engine answers at once: through the whole stack, and of the worker without the rest.
    prompt_ttft_ms: list[float] = field(default_factory=list)
    worker_ttft_ms: list[float] = field(default_factory=list)
    rss_mib: Mapping[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class SlowRow:
    """Time to the first token of others, one of each per round: alone and beside slow clients; the gateway's memory."""

    alone_ms: list[float] = field(default_factory=list)
    beside_ms: list[float] = field(default_factory=list)
    rss_mib: float = 0.0


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """The gateway's resident memory as requests went by."""

    requests: int
    before_mib: float
    after_mib: float


@dataclass(frozen=True, slots=True)
class GatewayBenchOptions:
    """What the person asked for."""

    rounds: int
    measured_s: float
    peers: tuple[tuple[Peer, tuple[int, ...]], ...]
    up_arguments: tuple[str, ...]
    log: Path


def parse_control_planes(texts: Sequence[str]) -> tuple[tuple[Peer, tuple[int, ...]], ...]:
    """Reads `NAME=URL,PID[,PID...]` items. Raises BadPeer."""
    heads = [text.partition(",")[0] for text in texts]
    peers = parse_peers(heads)
    pids = [text.split(",")[1:] for text in texts]
    if bare := next((peer.name for peer, own in zip(peers, pids, strict=True) if not own), None):
        raise BadPeer(f"--peer {bare}: name its processes, as in dynamo=http://127.0.0.1:8001,4242,4243.")
    return tuple((peer, tuple(parse_pid(peer.name, pid) for pid in own)) for peer, own in zip(peers, pids, strict=True))


async def run_cost_bench(options: GatewayBenchOptions, runs: Path) -> list[CostRow]:
    """Every round measures each control plane in turn. Raises StackEnded, GatewayBenchFailed, NotAnswering.

    What ours adds to the time to the first token shows best with an engine that takes none: that has rounds of its own.
    """
    async with _echo_stack(options, runs, STEP_MS) as (_, ours):
        planes = [ours, *[await _peer(peer, pids) for peer, pids in options.peers]]
        rows = [CostRow(plane.name) for plane in planes]
        for _ in range(options.rounds):
            for plane, row in zip(planes, rows, strict=True):
                row.paced.append(await _measure_cpu(plane, *PACED, options.measured_s))
                row.short.append(await _measure_cpu(plane, *SHORT, options.measured_s))
                row.ttft_ms.append(await _ttft_ms(plane, 1, options.measured_s / 2))
                row.rss_mib = _rss_mib(plane)
    async with _echo_stack(options, runs, 0) as (stack, ours):
        for _ in range(options.rounds):
            rows[0].prompt_ttft_ms.append(await _ttft_ms(ours, 1, options.measured_s / 2))
            rows[0].worker_ttft_ms.append(1e3 * quantile(await worker_ttft_s(stack, 300), 0.5))
    return rows


async def run_slow_bench(options: GatewayBenchOptions, runs: Path) -> SlowRow:
    """Measures two stacks in turn, of which one has the slow clients. Raises StackEnded, GatewayBenchFailed.

    The slow readers' answers are complete on the worker before the others are timed: what is compared is the gateway.
    """
    row = SlowRow()
    async with AsyncExitStack() as running:
        _, alone = await running.enter_async_context(_echo_stack(options, runs, 0))
        stack, beside = await running.enter_async_context(
            _echo_stack(options, runs, 0, "--max-sequences", str(SLOW_READERS))
        )
        clients = SlowClients(beside.url, beside.model, beside.key, SLOW_READERS, IDLE_CONNECTIONS, SLOW_TOKENS)
        process = await running.enter_async_context(_client("toolkit.slow_clients", clients))
        await _expect(process, "begun")
        await _until_idle(stack)
        for _ in range(options.rounds):
            row.alone_ms.append(await _ttft_ms(alone, 4, options.measured_s, OTHERS))
            row.beside_ms.append(await _ttft_ms(beside, 4, options.measured_s, OTHERS))
        row.rss_mib = _rss_mib(beside)["gateway"]
        assert process.stdin is not None
        process.stdin.close()
        await _expect(process, "held")
    return row


async def run_memory_bench(options: GatewayBenchOptions, runs: Path, requests: int) -> MemoryRow:
    """Raises StackEnded, GatewayBenchFailed."""
    async with _echo_stack(options, runs, 0) as (_, ours):
        await _chat(ours, *SHORT, options.measured_s)
        before_mib = _rss_mib(ours)["gateway"]
        await _chat(ours, *SHORT, float("inf"), requests)
        return MemoryRow(requests, before_mib, _rss_mib(ours)["gateway"])


# --- control planes


@asynccontextmanager
async def _echo_stack(
    options: GatewayBenchOptions, runs: Path, step_ms: float, *arguments: str
) -> AsyncIterator[tuple[RunningStack, ControlPlane]]:
    """A stack whose worker answers at this pace, with a key whose limits are on."""
    # On a machine that others keep busy nobody is to be turned away because of the wait.
    settings = (f"HEADRACE_WORKER_ECHO_STEP_MS={step_ms:g}", "HEADRACE_GATEWAY_MAX_WAIT_S=3600")
    command = ("env", *settings, *HEADRACE_UP)
    up = ("--engine", "echo", "--max-sequences", str(MAX_SEQUENCES), *arguments, *options.up_arguments)
    async with stack_of_our_own(OURS, up, options.log, command) as server:
        stack = next(stack for stack in running_stacks(runs) if stack.http_url == server.url)
        model = await first_model(server.url)  # while nobody needs a key for it
        limits = {"requests_per_minute": _ENOUGH, "tokens_per_minute": _ENOUGH, "concurrent": _ENOUGH}
        async with open_ring(stack.redis_url) as ring:
            # Of high priority, so that a crowd that comes at once to an idle server is let in.
            made = await ring.create("bench", {**limits, "priority": "high"})
        services: dict[str, list[psutil.Process]] = {}
        for process in stack.processes:
            assert process.pid is not None, "a stack that is ready runs"
            if process.service == "worker":
                _pin([psutil.Process(process.pid)], _cores()[1:])
            else:
                services.setdefault(process.service, []).append(psutil.Process(process.pid))
        for processes in services.values():
            _pin(processes, _cores()[:1])
        with showing(stack.tls):
            yield stack, ControlPlane(OURS, server.url, model, made.secret, services)


async def _peer(peer: Peer, pids: Sequence[int]) -> ControlPlane:
    """Raises NotAnswering."""
    await check_answers(f"--peer {peer.name}", peer.url)
    processes = [process for pid in pids for process in processes_below(psutil.Process(pid))]
    _pin(processes, _cores()[:1])
    return ControlPlane(peer.name, peer.url, await first_model(peer.url), "none", {"all": processes})


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def _pin(processes: Sequence[psutil.Process], cores: Sequence[int]) -> None:
    """Keeps all threads of the processes to these cores; on a machine with a single one leaves all as it is."""
    for process in processes if cores and len(_cores()) > 1 else ():
        for thread in process.threads():
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.sched_setaffinity(thread.id, cores)


# --- loads


async def _measure_cpu(plane: ControlPlane, streams: int, tokens: int, measured_s: float) -> CpuOfLoad:
    chats, cpu = await _chat(plane, streams, tokens, measured_s)
    if not chats.requests:
        raise GatewayBenchFailed(f"{plane.name} answered nothing within {measured_s:g} s.")
    return CpuOfLoad(chats, chats.requests * tokens, cpu)


async def _ttft_ms(plane: ControlPlane, streams: int, measured_s: float, requests: int | None = None) -> float:
    """The median."""
    chats, _ = await _chat(plane, streams, 8, measured_s, requests)
    if not chats.ttft_s:
        raise GatewayBenchFailed(f"{plane.name} answered nothing within {measured_s:g} s.")
    return 1e3 * quantile(chats.ttft_s, 0.5)


async def _chat(
    plane: ControlPlane, streams: int, tokens: int, measured_s: float, requests: int | None = None
) -> tuple[ChatResult, dict[str, float]]:
    """What the clients saw, and the CPU seconds of each service meanwhile. Raises GatewayBenchFailed."""
    most_s = measured_s if requests is None else 1e6
    load = ChatLoad(plane.url, plane.model, plane.key, streams, tokens, _WARM_S, most_s, requests)
    async with _client("toolkit.chat_load", load) as process:
        await _expect(process, "measure")
        before = _cpu(plane)
        await _expect(process, "end")
        after = _cpu(plane)
        assert process.stdout is not None
        result = ChatResult(**json.loads(await process.stdout.read()))
    return result, {service: after[service] - before[service] for service in after}


def _cpu(plane: ControlPlane) -> dict[str, float]:
    return {service: sum(cpu_s(process) for process in own) for service, own in plane.services.items()}


def _rss_mib(plane: ControlPlane) -> dict[str, float]:
    return {service: sum(rss_bytes(process) for process in own) / 2**20 for service, own in plane.services.items()}


@asynccontextmanager
async def _client(module: str, job: ChatLoad | SlowClients) -> AsyncIterator[asyncio.subprocess.Process]:
    """A client in a process of its own, which ends with the `with`."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", module, json.dumps(asdict(job))),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=2**24,
    )
    _pin([psutil.Process(process.pid)], _cores()[1:])
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _expect(process: asyncio.subprocess.Process, word: str) -> None:
    assert process.stdout is not None
    if (line := await process.stdout.readline()).strip() != word.encode():
        raise GatewayBenchFailed(f"the client ended before it said {word!r}: {line.decode(errors='replace').strip()}")


async def _until_idle(stack: RunningStack) -> None:
    """Returns when no worker runs or waits for anything."""
    async with dial(stack.scheduler_address) as channel, asyncio.timeout(_ENGINE_TIMEOUT_S):
        while True:
            fleet = await SchedulerStub(channel).DescribeFleet(DescribeFleetRequest())
            states = [worker.state for worker in fleet.workers]
            if not fleet.held_jobs and not any(state.running_sequences + state.waiting_sequences for state in states):
                return
            await asyncio.sleep(_LOOK_EVERY_S)
