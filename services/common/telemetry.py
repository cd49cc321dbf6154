"""Logs, metrics and traces, set up alike in every service."""

import json
import logging
import sys
import time
from collections.abc import Iterable
from socketserver import ThreadingMixIn
from threading import Thread
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIEnvironment

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from services.common.config import CommonSettings
from services.common.metrics_switch import METRICS_ARE_OFF

_encode = json.JSONEncoder(ensure_ascii=False).encode  # made once: `json.dumps` makes one for each call


def set_up(service: str, settings: CommonSettings) -> None:
    """Configures this process's logging and, when an OTLP endpoint is set, its traces."""
    # What no format shows is not looked up: threads, processes, and whose line it is.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter(service) if settings.log_format == "json" else _TextFormatter(service))
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    if settings.otlp_endpoint:
        sampler = ParentBasedTraceIdRatio(settings.trace_sample)
        provider = TracerProvider(sampler, Resource.create({"service.name": f"headrace-{service}"}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=settings.otlp_endpoint)))
        trace.set_tracer_provider(provider)


def serve_metrics(settings: CommonSettings, port: int) -> int:
    """Serves /metrics from a thread of its own. Returns the port, which is chosen when 0 is asked for."""
    page = _metrics_page if settings.metrics else _no_metrics_page
    server = make_server(settings.metrics_host, port, page, _ThreadingServer, _SilentHandler)
    Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server.server_port


def _metrics_page(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Always the text format: in OpenMetrics the client library writes the colons of vLLM's names as underscores. Only
    the gateway, whose names have none, speaks OpenMetrics, and so has exemplars.
    """
    start_response("200 OK", [("Content-Type", CONTENT_TYPE_PLAIN_0_0_4)])
    return [generate_latest()]


def _no_metrics_page(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    start_response("404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
    return [f"{METRICS_ARE_OFF}\n".encode()]


class _ThreadingServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _SilentHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """A scrape is not worth a line."""


class _TextFormatter(logging.Formatter):
    """A line for people; what a record carries as `fields` follows the message as name=value."""

    def __init__(self, service: str) -> None:
        super().__init__(f"%(asctime)s {service} %(levelname)s %(message)s", datefmt="%H:%M:%S")
        self._second, self._time = 0, ""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """Made once a second: a busy service writes hundreds of lines in one."""
        if (second := int(record.created)) != self._second:
            self._second, self._time = second, super().formatTime(record, datefmt)
        return self._time

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = getattr(record, "fields", {})
        return " ".join([super().formatMessage(record), *(f"{name}={_word(value)}" for name, value in fields.items())])


def _word(value: object) -> str:
    """A number, or a text without spaces, as it is; any other value as JSON."""
    text = str(value) if isinstance(value, str | int | float) else ""
    return text if text and text.isprintable() and " " not in text else _encode(value)


class _JsonFormatter(logging.Formatter):
    """One JSON object a line: time (RFC 3339, UTC), service, level, logger, message, `fields`, and an exception."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "service": self._service,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return _encode(entry)
