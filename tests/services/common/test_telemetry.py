import json
import logging
import urllib.error
import urllib.request

import pytest
from prometheus_client import Gauge

from services.common.config import CommonSettings
from services.common.telemetry import serve_metrics, set_up


def test_metrics_keep_their_names_whatever_format_is_asked_for() -> None:
    """Prometheus prefers OpenMetrics; vLLM's names with colons must come through all the same."""
    Gauge("vllm:test_of_names", "A name with a colon.").set(1)
    port = serve_metrics(CommonSettings(), 0)
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/metrics", headers={"Accept": "application/openmetrics-text;version=1.0.0,text/plain"}
    )
    with urllib.request.urlopen(request, timeout=5) as reply:
        assert reply.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert "\nvllm:test_of_names 1.0\n" in reply.read().decode()


def test_metrics_that_are_off_are_not_found() -> None:
    port = serve_metrics(CommonSettings(metrics=False), 0)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5)
    assert caught.value.code == 404
    assert caught.value.read() == b"This service counts nothing: HEADRACE_METRICS is false.\n"


def formatted(service: str, log_format: str, record: logging.LogRecord) -> str:
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    try:
        set_up(service, CommonSettings.model_validate({"log_format": log_format}))
        formatter = root.handlers[0].formatter
        assert formatter is not None
        return formatter.format(record)
    finally:
        root.handlers[:], root.level = before


def test_fields_of_a_record_are_shown_in_either_format() -> None:
    record = logging.LogRecord("a.logger", logging.INFO, __file__, 1, "the end", None, None)
    record.fields = {"worker": "w1", "total_ms": 1.5, "error": "no such luck", "answers": ["a\nb"]}
    assert json.loads(formatted("gateway", "json", record)).items() >= record.fields.items()
    line = formatted("gateway", "text", record)
    assert line.endswith('gateway INFO the end worker=w1 total_ms=1.5 error="no such luck" answers=["a\\nb"]')


def test_json_logs_are_one_object_a_line() -> None:
    record = logging.LogRecord("a.logger", logging.WARNING, __file__, 1, "two %s", ("words",), None)
    entry = json.loads(formatted("cache", "json", record))
    assert (entry["service"], entry["level"], entry["logger"], entry["message"]) == (
        "cache",
        "warning",
        "a.logger",
        "two words",
    )
