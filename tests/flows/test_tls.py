"""A stack on TLS, with certificates of a private CA."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from tests.certificates import Pair, certificate
from tests.flows.conftest import WORKER_OPTIONS
from tests.flows.headrace_up import HeadraceUp
from tests.nginx_server import NginxServer, nginx_binary


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return certificate(tmp_path_factory.mktemp("certs"))


@pytest.fixture(scope="module")
def stack(pair: Pair, tmp_path_factory: pytest.TempPathFactory, default_model: Path) -> Iterator[HeadraceUp]:
    fronts = ("--tls-cert", str(pair.cert), "--tls-key", str(pair.key))
    running = HeadraceUp(tmp_path_factory.mktemp("stack"), *WORKER_OPTIONS, *fronts)
    try:
        running.wait_ready()
        yield running
    finally:
        running.kill()


def test_the_line_that_is_printed_asks_over_tls(stack: HeadraceUp) -> None:
    (line,) = [line for line in stack.output.splitlines() if line.startswith("  curl ")]
    assert "https://" in line
    answer = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=60, check=True).stdout
    assert answer.rstrip().endswith("data: [DONE]")


def test_ps_finds_every_process_serving(stack: HeadraceUp) -> None:
    rows = [line.split() for line in stack.run("ps").splitlines() if "127.0.0.1:" in line][1:]
    assert [row[0] for row in rows] == ["redis", "cache", "scheduler", "worker", "gateway"]
    assert all("serving" in row for row in rows)


@pytest.mark.skipif(not nginx_binary() and not os.environ.get("CI"), reason="there is no nginx here")
def test_nginx_reaches_the_gateway_and_checks_its_certificate(stack: HeadraceUp, pair: Pair, tmp_path: Path) -> None:
    nginx = NginxServer(tmp_path, [urlsplit(stack.http_url).netloc], ca=pair.ca)
    try:
        assert httpx.get(f"{nginx.url}/v1/models", timeout=10).json()["data"]
    finally:
        nginx.kill()
