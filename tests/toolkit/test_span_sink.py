import asyncio

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from toolkit.span_sink import span_sink


async def test_spans_are_counted() -> None:
    async with span_sink() as sink:
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(endpoint=sink.endpoint)))
        for name in ("one", "two"):
            span = provider.get_tracer("test").start_span(name)
            await asyncio.to_thread(span.end)
        assert await sink.end() == 2
        await asyncio.to_thread(provider.shutdown)
