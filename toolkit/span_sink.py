"""What a benchmark's stack sends its spans to, as a process of its own: counts them, and forgets them.

`python -m toolkit.span_sink` prints its endpoint, OTLP over gRPC, and once its standard input ends, how many came.
"""

import asyncio
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)


class SpanSink:
    """A sink that runs."""

    def __init__(self, process: Process, endpoint: str) -> None:
        self.endpoint = endpoint
        self._process = process

    async def end(self) -> int:
        """How many spans came in all."""
        told, _ = await self._process.communicate(b"")  # which ends its standard input
        return int(told)


@asynccontextmanager
async def span_sink() -> AsyncIterator[SpanSink]:
    """A sink until its `end`, or that of the `with`. It dies with this process."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-P", "-m", __name__, stdin=PIPE, stdout=PIPE)
    try:
        assert process.stdout is not None
        yield SpanSink(process, (await process.stdout.readline()).decode().strip())
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


class _Servicer(TraceServiceServicer):
    def __init__(self) -> None:
        self.spans = 0

    async def Export(self, request: ExportTraceServiceRequest, context: Any) -> ExportTraceServiceResponse:
        scopes = (scope for resource in request.resource_spans for scope in resource.scope_spans)
        self.spans += sum(len(scope.spans) for scope in scopes)
        return ExportTraceServiceResponse()


async def _main() -> None:
    servicer, server = _Servicer(), grpc.aio.server()
    add_TraceServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"http://127.0.0.1:{port}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)
    print(servicer.spans)


if __name__ == "__main__":
    asyncio.run(_main())
