"""Certificate files that callers would accept, and those that they would not."""

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import grpc.aio
import pytest

from services.common.channel import dial, dial_front
from services.common.config import ConfigError
from services.common.serve import GrpcServer
from services.common.tls import Front, FrontCert, front_cert_at, open_front
from tests.certificates import Pair, certificate, encrypted
from toolkit.health import grpc_health


def missing(pair: Pair, _folder: Path) -> tuple[Path, Path]:
    return pair.cert.with_name("nowhere.crt"), pair.key


def missing_key(pair: Pair, _folder: Path) -> tuple[Path, Path]:
    return pair.cert, pair.key.with_name("nowhere.key")


def no_certificate(pair: Pair, _folder: Path) -> tuple[Path, Path]:
    return pair.key, pair.key


def no_key(pair: Pair, _folder: Path) -> tuple[Path, Path]:
    return pair.cert, pair.cert


def of_another(pair: Pair, folder: Path) -> tuple[Path, Path]:
    return pair.cert, certificate(folder / "other").key


def under_a_passphrase(pair: Pair, _folder: Path) -> tuple[Path, Path]:
    return pair.cert, encrypted(pair.key)


def expired(_pair: Pair, folder: Path) -> tuple[Path, Path]:
    old = certificate(folder / "old", days=-1)
    return old.cert, old.key


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (missing, r"cannot read .*nowhere\.crt: No such file or directory"),
        (missing_key, r"cannot read .*nowhere\.key: No such file or directory"),
        (no_certificate, r"gateway\.key holds no certificate in PEM form"),
        (no_key, r"gateway\.crt holds no private key in PEM form that can be used with .*gateway\.crt"),
        (of_another, r"other/gateway\.key is not the key of .*gateway\.crt"),
        (under_a_passphrase, r"gateway\.encrypted needs a passphrase, and there is nobody to ask"),
        (expired, r"gateway\.crt cannot be used: certificate has expired"),
    ],
)
def test_files_that_cannot_be_used(files: Callable[[Pair, Path], tuple[Path, Path]], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        open_front(*files(certificate(tmp_path), tmp_path))
    assert "PRIVATE" not in str(caught.value)


def test_one_file_alone_is_refused(tmp_path: Path) -> None:
    pair = certificate(tmp_path)
    assert open_front(None, None) == Front()
    with pytest.raises(ConfigError, match="tls_cert and tls_key are given together"):
        open_front(pair.cert, None)


async def test_a_front_on_tls_answers_whoever_trusts_it_and_nobody_in_plain(tmp_path: Path) -> None:
    pair = certificate(tmp_path, "front", "llm.example.com")
    other = certificate(tmp_path / "other", "front", "llm.example.com")
    front = open_front(pair.cert, pair.key)
    server = GrpcServer([], front)
    address = f"127.0.0.1:{await server.start('127.0.0.1:0')}"
    await server.set_serving(True)
    assert await grpc_health(dial_front(address, FrontCert(str(pair.cert), "llm.example.com"))) == "serving"
    assert await grpc_health(dial_front(address, FrontCert(str(pair.cert), "elsewhere.com"))) == "unreachable"
    assert await grpc_health(dial_front(address, FrontCert(str(other.cert), "llm.example.com"))) == "unreachable"
    assert await grpc_health(dial(address)) == "unreachable"
    with_ca = grpc.ssl_channel_credentials(pair.ca.read_bytes())
    assert await grpc_health(grpc.aio.secure_channel(f"localhost:{address[10:]}", with_ca)) == "serving"
    await server.stop(0)


async def test_the_probe_of_a_container_asks_a_front_on_tls(tmp_path: Path) -> None:
    pair = certificate(tmp_path, "front")
    server = GrpcServer([], open_front(pair.cert, pair.key))
    address = f"127.0.0.1:{await server.start('127.0.0.1:0')}"

    async def status(*arguments: str) -> int:
        probe = (sys.executable, "-m", "services.common.probe", "--front", *arguments)
        return await (await asyncio.create_subprocess_exec(*probe)).wait()

    assert await status(address, str(pair.cert)) == 1
    await server.set_serving(True)
    assert await status(address, str(pair.cert)) == 0
    assert await status(address) == 1
    await server.stop(0)
    assert await status(address, str(pair.cert)) == 1


async def test_another_certificate_than_expected_is_an_os_error(tmp_path: Path) -> None:
    pair = certificate(tmp_path, "front")
    other = certificate(tmp_path / "other", "front")
    front = open_front(pair.cert, pair.key)
    server = GrpcServer([], front)
    port = await server.start("127.0.0.1:0")
    with pytest.raises(OSError, match="certificate verify failed"):
        await asyncio.to_thread(front_cert_at, f"127.0.0.1:{port}", other.cert, 3.0)
    await server.stop(0)
