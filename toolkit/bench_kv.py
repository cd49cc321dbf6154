"""`headrace bench-kv`: the time to the first token of a long prompt, computed and with its KV brought from elsewhere.

Speaks to two workers of a stack of its own as a gateway would, so that it chooses itself where the KV comes from. Every
prompt is new, so that nothing is there already; both engines are idle unless a row says otherwise.
"""

import asyncio
import os
import random
import signal
import statistics
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, cast

import grpc.aio

from headrace.v1.cache_pb2 import FetchBlocksRequest, Holder, LookupRequest
from headrace.v1.cache_pb2_grpc import CacheStub
from headrace.v1.sampling_pb2 import Sampling, Stopping
from headrace.v1.scheduler_pb2 import KvSource, Registration
from headrace.v1.worker_pb2 import ExecuteCommand, ExecuteHello, Start, StartChoice
from headrace.v1.worker_pb2_grpc import WorkerStub
from services.common.block_hash import chain_hashes, chain_root
from services.common.channel import Outbox, dial
from services.common.kv_wire import ChunkChannel
from services.common.mutual_tls import showing
from toolkit.bench_stack import all_workers, stack_of_our_own
from toolkit.run_directory import RunningStack, running_stacks

_TOKENS = (300, 40_000)  # ids that every vocabulary of interest has
_KEPT_TIMEOUT_S = 60.0
_POLL_S = 0.05


class KvBenchFailed(Exception):
    """One sentence for the person."""


@dataclass(frozen=True, slots=True)
class KvBenchOptions:
    """What the person asked for."""

    prompt_tokens: int
    repeats: int
    # Options of `headrace up` for the stack.
    up_arguments: tuple[str, ...]
    # For the stack's log and the cache service's disk.
    folder: Path


@dataclass(frozen=True, slots=True)
class KvRow:
    """Medians of one way to a prompt's KV."""

    name: str
    first_token_ms: float
    # Of the blocks that travelled, over the whole time to the first token; None where none did.
    mb_per_s: float | None = None


@dataclass(slots=True)
class KvRecord:
    """Everything that was measured."""

    prompt_tokens: int
    block_bytes: int = 0
    rows: list[KvRow] = field(default_factory=list)
    # Bytes a second that `FetchBlocks` gives to a client in a process of its own, in MB/s.
    fetch_idle: float = 0.0
    fetch_busy: float = 0.0


class WorkerClient:
    """One worker, as a gateway sees it."""

    def __init__(self, registration: Registration, channel: grpc.aio.Channel) -> None:
        self.registration = registration
        self._stub = WorkerStub(channel)
        self._kv_stub = WorkerStub(cast(Any, ChunkChannel(channel)))
        self._numbers = count()

    def names(self, prompt: Sequence[int]) -> list[bytes]:
        """Chain hashes of the prompt's full blocks before its last token."""
        model = self.registration.model
        return chain_hashes(chain_root(model.name, model.block_size, ""), prompt[:-1], model.block_size)

    async def first_token_s(self, prompt: Sequence[int], *sources: KvSource) -> float:
        """Runs a prompt for one token, and says how long that took."""
        async with self._running(prompt, 1, sources) as first_token_s:
            return first_token_s

    @asynccontextmanager
    async def busy(self) -> AsyncIterator[None]:
        """Keeps the engine decoding one long sequence."""
        async with self._running(new_prompt(random.Random(0), 32), 4000, ()):
            yield

    async def fetch_mb_per_s(self, names: Sequence[bytes]) -> float:
        """Fetches blocks and throws them away."""
        request = FetchBlocksRequest(kv_format=self.registration.kv_format, block_hashes=b"".join(names))
        started, size = time.perf_counter(), 0
        async for chunk in self._kv_stub.FetchBlocks(request):
            size += len(chunk.data)
        if size != len(names) * self.registration.block_bytes:
            raise KvBenchFailed(f"The worker gave {size} bytes of {len(names)} blocks.")
        return size / (time.perf_counter() - started) / 1e6

    @asynccontextmanager
    async def _running(
        self, prompt: Sequence[int], max_tokens: int, sources: Sequence[KvSource]
    ) -> AsyncIterator[float]:
        """Gives the seconds to the first token; the sequence is dropped at the end."""
        commands: Outbox[ExecuteCommand] = Outbox()
        commands.put(ExecuteCommand(hello=ExecuteHello(gateway_id="bench-kv")))
        call = self._stub.Execute(commands)
        started = time.perf_counter()
        commands.put(ExecuteCommand(starts=[self._start(prompt, max_tokens, sources)]))
        try:
            async for output in call:
                if failed := [ended for ended in output.ended if ended.error]:
                    raise KvBenchFailed(failed[0].error)
                if output.started:
                    break
            yield time.perf_counter() - started
        finally:
            commands.close()
            call.cancel()

    def _start(self, prompt: Sequence[int], max_tokens: int, sources: Sequence[KvSource]) -> Start:
        return Start(
            request_id=f"bench-kv-{next(self._numbers)}",
            attempt=1,
            prompt_ids=struct.pack(f"<{len(prompt)}I", *prompt),
            choices=[StartChoice(handle=1)],
            sampling=Sampling(temperature=0.0),
            stopping=Stopping(max_tokens=max_tokens, ignore_eos=True),
            kv_sources=sources,
        )


def new_prompt(random_: random.Random, tokens: int) -> list[int]:
    return [random_.randrange(*_TOKENS) for _ in range(tokens)]


class KvBench:
    """The run, once its stack is up."""

    def __init__(self, options: KvBenchOptions, stack: RunningStack, cold: WorkerClient, peer: WorkerClient) -> None:
        self._options = options
        self._stack = stack
        self._cold = cold
        self._peer = peer
        self._cache = next(process for process in stack.processes if process.service == "cache")
        self._random = random.Random()
        self.record = KvRecord(options.prompt_tokens, cold.registration.block_bytes)

    async def run(self) -> None:
        await self._row("computed", self._computed, moves=False)
        await self._row("prefill worker", self._from_prefill)
        await self._row("peer", self._from_peer)
        await self._row("cache, RAM", self._from_cache)
        await self._row("cache, disk", self._from_disk)
        async with self._peer.busy(), self._cold.busy():
            await self._row("peer, both engines busy", self._from_peer)
        prompt = self._prompt()
        await self._peer.first_token_s(prompt)
        names = self._peer.names(prompt)
        self.record.fetch_idle = await self._fetch_rate(names)
        async with self._peer.busy():
            self.record.fetch_busy = await self._fetch_rate(names)

    async def _row(self, name: str, measure: Callable[[], Awaitable[float]], *, moves: bool = True) -> None:
        seconds = statistics.median([await measure() for _ in range(self._options.repeats)])
        blocks = (self._options.prompt_tokens - 1) // self._cold.registration.model.block_size
        rate = blocks * self.record.block_bytes / seconds / 1e6 if moves else None
        self.record.rows.append(KvRow(name, seconds * 1e3, rate))

    async def _fetch_rate(self, names: Sequence[bytes]) -> float:
        return statistics.median([await self._peer.fetch_mb_per_s(names) for _ in range(self._options.repeats)])

    async def _computed(self) -> float:
        return await self._cold.first_token_s(self._prompt())

    async def _from_prefill(self) -> float:
        prompt = self._prompt()
        return await self._cold.first_token_s(prompt, self._source(KvSource.KIND_PREFILL, prompt))

    async def _from_peer(self) -> float:
        prompt = self._prompt()
        await self._peer.first_token_s(prompt)
        return await self._cold.first_token_s(prompt, self._source(KvSource.KIND_WORKER, prompt))

    async def _from_cache(self) -> float:
        prompt = await self._kept_prompt()
        return await self._cold.first_token_s(prompt, self._source(KvSource.KIND_CACHE, prompt))

    async def _from_disk(self) -> float:
        prompt = await self._kept_prompt()
        await asyncio.sleep(1.0)  # the disk is written behind; nobody tells when
        pid = next(process.pid for process in self._now().processes if process.service == "cache")
        assert pid is not None, "it was asked just now"
        os.kill(pid, signal.SIGKILL)
        await self._until_kept(prompt)
        return await self._cold.first_token_s(prompt, self._source(KvSource.KIND_CACHE, prompt))

    async def _kept_prompt(self) -> list[int]:
        """A prompt that the peer has computed and the cache service keeps."""
        prompt = self._prompt()
        await self._peer.first_token_s(prompt)
        await self._until_kept(prompt)
        return prompt

    async def _until_kept(self, prompt: Sequence[int]) -> None:
        names = self._peer.names(prompt)
        request = LookupRequest(kv_format=self._peer.registration.kv_format, block_hashes=b"".join(names))
        async with dial(self._cache.address) as channel, asyncio.timeout(_KEPT_TIMEOUT_S):
            stub = CacheStub(channel)
            while True:
                answer = await stub.Lookup(request, wait_for_ready=True)
                kept = (match.blocks for match in answer.matches if match.holder.kind == Holder.KIND_CACHE)
                if max(kept, default=0) == len(names):
                    return
                await asyncio.sleep(_POLL_S)

    def _source(self, kind: "KvSource.Kind.ValueType", prompt: Sequence[int]) -> KvSource:
        address = self._cache.address if kind == KvSource.KIND_CACHE else self._peer.registration.address
        return KvSource(kind=kind, address=address, blocks=len(self._peer.names(prompt)))

    def _prompt(self) -> list[int]:
        return new_prompt(self._random, self._options.prompt_tokens)

    def _now(self) -> RunningStack:
        runs = Path(self._stack.directory).parent
        return next(stack for stack in running_stacks(runs) if stack.pid == self._stack.pid)


async def run_kv_bench(options: KvBenchOptions, runs: Path) -> KvRecord:
    """Starts a stack with two workers and measures. Raises KvBenchFailed, StackEnded."""
    arguments = ("--workers", "2", "--cache-disk", str(options.folder / "blocks"), *options.up_arguments)
    async with stack_of_our_own("bench-kv", arguments, options.folder / "stack.log") as server:
        stack = next(stack for stack in running_stacks(runs) if stack.http_url == server.url)
        with showing(stack.tls):
            first, second = await all_workers(stack, 2)
            async with dial(first.address) as one, dial(second.address) as other:
                bench = KvBench(options, stack, WorkerClient(first, one), WorkerClient(second, other))
                await bench.run()
                return bench.record
