"""A stack on TLS, before its callers and between its services."""

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from services.common.channel import dial
from services.common.mutual_tls import showing
from tests.certificates import Pair, certificate
from tests.flows.conftest import WORKER_OPTIONS
from tests.flows.headrace_up import HeadraceUp
from tests.proxies import Proxy, binary_of, gateways_of
from toolkit.health import grpc_health


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return certificate(tmp_path_factory.mktemp("certs"))


@pytest.fixture(scope="module")
def stack(pair: Pair, tmp_path_factory: pytest.TempPathFactory, default_model: Path) -> Iterator[HeadraceUp]:
    fronts = ("--tls", str(pair.cert.parent), "--mtls")
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


@pytest.mark.skipif(not binary_of("nginx") and not os.environ.get("CI"), reason="there is no nginx here")
def test_nginx_reaches_the_gateway_and_checks_its_certificate(stack: HeadraceUp, pair: Pair, tmp_path: Path) -> None:
    nginx = Proxy("nginx", tmp_path, gateways_of(stack), ca=pair.ca)
    try:
        assert httpx.get(f"{nginx.url}/v1/models", timeout=10).json()["data"]
    finally:
        nginx.kill()


async def test_who_shows_no_certificate_is_refused_by_every_service(stack: HeadraceUp) -> None:
    tls = stack.state.tls
    assert tls is not None
    for name in ("cache", "scheduler", "worker"):
        address = stack.member(name).address
        assert await grpc_health(dial(address)) == "unreachable"
        with showing(tls):
            assert await grpc_health(dial(address)) == "serving"


def test_commands_find_the_certificates_of_the_run(stack: HeadraceUp) -> None:
    stack.run("role", "worker", "decode")
    assert "takes no new work" in stack.run("drain", "worker")
    assert "takes work again" in stack.run("drain", "worker", "--undo")


def test_nobody_can_sign_for_the_run_and_keys_are_private(stack: HeadraceUp) -> None:
    keys = list((Path(stack.state.directory) / "tls").glob("*.key"))
    assert {key.stem for key in keys} == {"gateway", "scheduler", "cache", "worker", "headrace"}
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}
