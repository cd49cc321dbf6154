"""Services that show one another certificates, and whoever cannot."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.channel import ReplicaSessions, cancel_and_wait, dial, dial_front
from services.common.config import CommonSettings, ConfigError, child_environment
from services.common.mutual_tls import files_of, read_identity, set_up, showing
from services.common.serve import GrpcServer
from services.common.tls import Front, TlsFiles, read_file
from tests.certificates import certificate
from toolkit.health import grpc_health


def files(folder: Path, name: str, *, days: int = 365) -> TlsFiles:
    """A certificate of the folder's own CA."""
    certificate(folder, name, days=days)
    return TlsFiles.of(folder, name)


@asynccontextmanager
async def serving(shown: TlsFiles | None, front: Front | None = None) -> AsyncIterator[str]:
    """The address of a ready server of a process that shows these files."""
    with showing(shown):
        server = GrpcServer([], front)
        port = await server.start("127.0.0.1:0")
    await server.set_serving(True)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def asked_by(shown: TlsFiles | None, address: str) -> str:
    with showing(shown):
        channel = dial(address)
    return await grpc_health(channel)


async def test_a_server_answers_those_of_its_ca_alone(tmp_path: Path) -> None:
    scheduler, worker = files(tmp_path, "scheduler"), files(tmp_path, "worker")
    stranger = files(tmp_path / "other", "worker")
    async with serving(scheduler) as address:
        assert await asked_by(worker, address) == "serving"
        assert await asked_by(None, address) == "unreachable"
        assert await asked_by(stranger, address) == "unreachable"
        trusts_only = grpc.ssl_channel_credentials(read_file(Path(worker.ca)))
        assert await grpc_health(grpc.aio.secure_channel(address, trusts_only)) == "unreachable"
        claims = TlsFiles(worker.ca, stranger.cert, stranger.key)
        with pytest.raises(ConfigError):
            await asked_by(claims, address)


async def test_a_caller_talks_to_those_of_its_ca_alone(tmp_path: Path) -> None:
    worker, stranger = files(tmp_path, "worker"), files(tmp_path / "other", "scheduler")
    async with serving(stranger) as address:
        assert await asked_by(worker, address) == "unreachable"
    async with serving(None) as address:
        assert await asked_by(worker, address) == "unreachable"
        assert await asked_by(None, address) == "serving"


async def test_a_renewed_ca_counts_for_connections_from_then_on(tmp_path: Path) -> None:
    old, new = files(tmp_path / "old", "worker"), files(tmp_path / "new", "worker")
    used = TlsFiles(*(str(tmp_path / name) for name in ("ca", "cert", "key")))

    def put(files: TlsFiles) -> None:
        for source, target in zip((files.ca, files.cert, files.key), (used.ca, used.cert, used.key), strict=True):
            Path(target).write_bytes(Path(source).read_bytes())

    put(old)
    async with serving(used) as address:
        with showing(used):
            standing = dial(address)
            check = health_pb2_grpc.HealthStub(standing).Check
            await check(health_pb2.HealthCheckRequest())
            put(new)
            assert await grpc_health(dial(address)) == "serving"
        assert await asked_by(old, address) == "unreachable"
        assert await asked_by(new, address) == "serving"
        await check(health_pb2.HealthCheckRequest())
        await standing.close()


async def test_a_public_front_demands_nothing_of_its_callers(tmp_path: Path) -> None:
    async with serving(files(tmp_path, "gateway"), Front()) as address:
        assert await grpc_health(dial_front(address, None)) == "serving"


async def test_sessions_are_kept_with_addresses_that_no_certificate_lists(tmp_path: Path) -> None:
    begun: asyncio.Queue[str] = asyncio.Queue()

    async def session(address: str, channel: grpc.aio.Channel) -> None:
        await channel.channel_ready()
        begun.put_nowait(address)
        await asyncio.Event().wait()

    with showing(files(tmp_path, "scheduler")):
        server = GrpcServer([])
        port = await server.start("127.0.0.2:0")
        keeper = asyncio.create_task(ReplicaSessions("test", [f"127.0.0.2:{port}"], session).run())
        assert await asyncio.wait_for(begun.get(), 10) == f"127.0.0.2:{port}"
        await cancel_and_wait([keeper])
        await server.stop(0)


def test_files_that_other_services_would_refuse(tmp_path: Path) -> None:
    good, other = files(tmp_path / "a", "worker"), files(tmp_path / "b", "worker")
    for bad, said in (
        (
            TlsFiles(good.ca, other.cert, other.key),
            r"worker\.crt cannot be used: unable to get local issuer certificate",
        ),
        (TlsFiles(good.ca, good.cert, other.key), r"b/worker\.key is not the key of .*a/worker\.crt"),
        (TlsFiles(good.key, good.cert, good.key), r"worker\.key holds no certificate in PEM form"),
        (files(tmp_path / "old", "worker", days=-1), r"worker\.crt cannot be used: certificate has expired"),
        (TlsFiles(good.ca, good.ca, str(tmp_path / "a/ca.key")), r"ca\.crt cannot be used: "),
    ):
        with pytest.raises(ConfigError, match=said):
            read_identity(bad)


def test_keys_are_in_no_description(tmp_path: Path) -> None:
    assert "PRIVATE" not in repr(read_identity(files(tmp_path, "worker")))


def test_files_are_given_together() -> None:
    assert files_of(CommonSettings()) is None
    with pytest.raises(ConfigError, match="HEADRACE_MTLS_CA needs HEADRACE_MTLS_CERT beside it"):
        files_of(CommonSettings(mtls_ca=Path("ca.crt")))


def test_a_process_with_bad_files_does_not_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = tmp_path / "nowhere.crt"
    with pytest.raises(SystemExit) as stopped:
        set_up("worker", CommonSettings(mtls_ca=gone, mtls_cert=gone, mtls_key=gone))
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"headrace worker: cannot read {gone}: No such file or directory\n"


async def test_the_probe_of_a_container_shows_what_the_settings_name(tmp_path: Path) -> None:
    own = files(tmp_path, "worker")
    plain = child_environment("worker", {})
    named = {**plain, "HEADRACE_MTLS_CA": own.ca, "HEADRACE_MTLS_CERT": own.cert, "HEADRACE_MTLS_KEY": own.key}
    async with serving(own) as address:
        for environment, status in ((named, 0), (plain, 1)):
            probe = (sys.executable, "-m", "services.common.probe", address)
            process = await asyncio.create_subprocess_exec(*probe, env=environment)
            assert await process.wait() == status
