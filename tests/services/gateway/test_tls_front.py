"""The gateway as a process with its fronts on TLS, and files that stop its start."""

import asyncio
import re
import signal
import ssl
from pathlib import Path

import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.channel import dial_front
from services.common.tls import FrontCert
from tests.certificates import certificate
from tests.services.gateway.test_main import start, until_logged
from toolkit.health import grpc_health, http_ready


async def test_both_fronts_are_on_tls_and_on_nothing_else(redis_url: str, tmp_path: Path) -> None:
    pair = certificate(tmp_path)
    process = await start(redis_url, tls_cert=pair.cert, tls_key=pair.key)
    ports = re.search(r"ready on \S+:(\d+) \(HTTP\) and \S+:(\d+) \(gRPC\)", await until_logged(process, "(gRPC)"))
    assert ports is not None
    http, grpc = (f"127.0.0.1:{port}" for port in ports.groups())
    trusted = ssl.create_default_context(cafile=str(pair.ca))
    async with httpx.AsyncClient(verify=trusted, trust_env=False) as client:
        assert (await client.get(f"https://{http}/health/live")).json() == {"status": "live"}
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get(f"http://{http}/health/live")
    async with httpx.AsyncClient(trust_env=False) as client:
        with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
            await client.get(f"https://{http}/health/live")
    assert await http_ready(f"https://{http}/health/live")
    assert await grpc_health(dial_front(grpc, FrontCert(str(pair.cert), "localhost"))) == "not serving"
    assert await grpc_health(dial_front(grpc, None)) == "unreachable"
    process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.wait(), 15) == 0


async def test_renewed_certificates_are_shown_to_new_connections_and_old_ones_go_on(
    redis_url: str, tmp_path: Path
) -> None:
    pair, renewed = certificate(tmp_path / "old"), certificate(tmp_path / "new")
    process = await start(redis_url, tls_cert=pair.cert, tls_key=pair.key)
    ports = re.search(r"ready on \S+:(\d+) \(HTTP\) and \S+:(\d+) \(gRPC\)", await until_logged(process, "(gRPC)"))
    assert ports is not None
    url, address = f"https://127.0.0.1:{ports[1]}/health/live", f"127.0.0.1:{ports[2]}"
    trusts_old, trusts_new = (ssl.create_default_context(cafile=str(each.ca)) for each in (pair, renewed))
    old_cert = tmp_path / "shown_before.crt"
    old_cert.write_bytes(pair.cert.read_bytes())
    channel = dial_front(address, FrontCert(str(old_cert), "localhost"))
    check = health_pb2_grpc.HealthStub(channel).Check
    async with httpx.AsyncClient(verify=trusts_old, trust_env=False) as standing:
        assert (await standing.get(url)).status_code == 200
        await check(health_pb2.HealthCheckRequest())

        pair.cert.write_bytes(renewed.cert.read_bytes())  # not its key yet: what was there before goes on
        async with httpx.AsyncClient(verify=trusts_old, trust_env=False) as client:
            assert (await client.get(url)).status_code == 200
        pair.key.write_bytes(renewed.key.read_bytes())
        async with httpx.AsyncClient(verify=trusts_new, trust_env=False) as client:
            assert (await client.get(url)).status_code == 200
        async with httpx.AsyncClient(verify=trusts_old, trust_env=False) as client:
            with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
                await client.get(url)
        assert await grpc_health(dial_front(address, FrontCert(str(renewed.cert), "localhost"))) == "not serving"
        assert await grpc_health(dial_front(address, FrontCert(str(old_cert), "localhost"))) == "unreachable"

        assert (await standing.get(url)).status_code == 200
        await check(health_pb2.HealthCheckRequest())
    await channel.close()
    process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.wait(), 15) == 0


async def test_a_key_of_another_certificate_stops_the_start(redis_url: str, tmp_path: Path) -> None:
    pair, other = certificate(tmp_path), certificate(tmp_path / "other")
    process = await start(redis_url, tls_cert=pair.cert, tls_key=other.key)
    said = await until_logged(process, "cannot start")
    assert f"gateway cannot start: {other.key} is not the key of {pair.cert}" in said
    assert await process.wait() == 2
