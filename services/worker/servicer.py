"""The Worker service on the wire: translates, and delegates to the executions."""

import asyncio
from collections.abc import AsyncIterator, Mapping

import grpc.aio

from headrace.v1 import cache_pb2, profile_pb2, worker_pb2, worker_pb2_grpc
from services.common.errors import InvalidRequest, NotFound
from services.common.tracing import Tracer
from services.worker.executions import Executions
from services.worker.kv_export import KvExporter, Prefills
from services.worker.profiling import Profiler
from services.worker.ticket import Execution

_CHUNK_BYTES = 1024 * 1024

Context = grpc.aio.ServicerContext[object, object]
Commands = AsyncIterator[worker_pb2.ExecuteCommand]


class WorkerServicer(worker_pb2_grpc.WorkerServicer):
    """Implements `headrace.v1.Worker`."""

    def __init__(
        self,
        executions: Executions,
        exporter: KvExporter,
        prefills: Prefills,
        profiler: Profiler,
        tokenizer_hash: str,
        tokenizer_files: Mapping[str, bytes],
        tracer: Tracer,
    ) -> None:
        self._executions = executions
        self._exporter = exporter
        self._prefills = prefills
        self._profiler = profiler
        self._tokenizer_hash = tokenizer_hash
        self._tokenizer_files = tokenizer_files
        self._tracer = tracer

    async def Execute(self, request_iterator: Commands, context: Context) -> AsyncIterator[worker_pb2.StepOutput]:
        """Ends when the gateway ends its side, when the connection breaks, or after a drain."""
        execution = self._executions.open(await _read_hello(request_iterator))
        reader = asyncio.create_task(self._follow(execution, request_iterator))
        try:
            async for output in execution.outbox:
                yield output
            if reader.done():
                reader.result()  # raises what was wrong with the commands
        finally:
            self._executions.close(execution)
            # Not awaited: CPython 3.11 crashes when a second cancellation meets a nested async generator that
            # awaits here.
            reader.cancel()

    async def _follow(self, execution: Execution, commands: Commands) -> None:
        """Carries out a gateway's commands until it ends its side."""
        try:
            async for command in commands:
                if not (command.starts or command.HasField("cancel")):
                    raise InvalidRequest("After its hello, an Execute stream carries starts and cancel.")
                for start in command.starts:
                    self._executions.start(execution, start)
                if command.cancel.handles:
                    self._executions.cancel(execution, command.cancel.handles)
        finally:
            self._executions.close(execution)

    async def GetTokenizer(
        self, request: worker_pb2.GetTokenizerRequest, context: Context
    ) -> AsyncIterator[worker_pb2.FileChunk]:
        if request.hash != self._tokenizer_hash:
            raise NotFound(f"This worker has no tokenizer {request.hash or '(empty hash)'}.")
        for name, data in self._tokenizer_files.items():
            for start in range(0, max(len(data), 1), _CHUNK_BYTES):
                yield worker_pb2.FileChunk(name=name, data=data[start : start + _CHUNK_BYTES])

    async def Profile(
        self, request: profile_pb2.ProfileRequest, context: Context
    ) -> AsyncIterator[profile_pb2.ProfilePart]:
        async for part in self._profiler.run(request):
            yield part

    # Both yield KvChunk as `kv_wire` encodes it.

    async def Prefill(  # type: ignore[override]
        self, request: worker_pb2.PrefillRequest, context: Context
    ) -> AsyncIterator[bytes]:
        with self._tracer.serving("prefill for another", context):
            async for chunk in self._prefills.run(request):
                yield chunk

    async def FetchBlocks(  # type: ignore[override]
        self, request: cache_pb2.FetchBlocksRequest, context: Context
    ) -> AsyncIterator[bytes]:
        with self._tracer.serving("fetch blocks", context):
            async for chunk in self._exporter.fetch(request):
                yield chunk


async def _read_hello(commands: Commands) -> str:
    first = await anext(commands, None)
    if first is None or not first.hello.gateway_id:
        raise InvalidRequest("An Execute stream begins with a hello that names the gateway.")
    return first.hello.gateway_id
