"""A real nginx or HAProxy of a test's own, in front of several gateways, with the files that compose uses."""

import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import httpx

from tests.flows.headrace_up import HeadraceUp, eventually
from tests.redis_server import free_port

# How nginx asks gateways that are on TLS, as docs/tls.md has it.
_PLAIN = "proxy_pass http://gateways_http;"
_TRUSTING = """proxy_pass https://gateways_http;
            proxy_ssl_trusted_certificate {ca};
            proxy_ssl_name gateway;
            proxy_ssl_server_name on;
            proxy_ssl_verify on;"""
_COMPOSE = Path(__file__).parents[1] / "deploy/compose"
LONGEST_WAIT_S = 660
"""Seconds that a gateway may be silent, in both files."""


@dataclass(frozen=True, slots=True)
class Upstream:
    """One gateway: host:port of its HTTP and of its gRPC."""

    http: str
    grpc: str


def gateways_of(stack: HeadraceUp) -> list[Upstream]:
    members = [member for member in stack.state.processes if member.service == "gateway"]
    return [Upstream(urlsplit(str(member.metrics_url)).netloc, member.address) for member in members]


def binary_of(name: str) -> str | None:
    """Debian puts them where only root looks."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin")


class Proxy:
    """Starts at construction and answers; `kill` at its end, or leave it as a context."""

    def __init__(
        self,
        name: str,
        folder: Path,
        gateways: Sequence[Upstream],
        *,
        ca: Path | None = None,
        longest_wait_s: int = LONGEST_WAIT_S,
        dns_port: int | None = None,
    ) -> None:
        """`name`: nginx or haproxy. `ca`: whose certificates the gateways show, if they are on TLS (nginx, HTTP).
        `longest_wait_s`: in the place of `LONGEST_WAIT_S`. `dns_port`: where HAProxy looks up "gateway", at whose
        addresses gateways have the first one's ports.
        """
        binary = binary_of(name)
        assert binary is not None, f"there is no {name} here: install Debian's"
        http, grpc = free_port(), free_port()
        folder.mkdir(exist_ok=True)
        file = folder / f"{name}.conf"
        if dns_port is None:
            text = _CONFIGURATIONS[name](folder, http, grpc, gateways)
        else:
            text = _haproxy_by_name(http, grpc, gateways[0], dns_port)
        text = text if ca is None else text.replace(_PLAIN, _TRUSTING.format(ca=ca))
        file.write_text(text.replace(f" {LONGEST_WAIT_S}s", f" {longest_wait_s}s"))
        # As root, if the test is: nobody else may write into its folder.
        start = "daemon off; user root;"
        commands = {
            "nginx": [binary, "-e", "stderr", "-p", str(folder), "-c", str(file), "-g", start],
            "haproxy": [binary, "-db", "-f", str(file)],
        }
        self.url, self.grpc_address = f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc}"
        self._log = folder / "log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(commands[name], stdout=log, stderr=log)
        eventually(self._answers, f"{name} answers")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()

    @property
    def output(self) -> str:
        return self._log.read_text()

    def wait_for(self, pattern: str, *, since: int = 0) -> None:
        """Returns when what it has said after the first `since` characters matches."""
        eventually(lambda: re.search(pattern, self.output[since:]) is not None, f"the proxy says {pattern!r}")

    def kill(self) -> None:
        self._process.terminate()
        self._process.wait()

    def _answers(self) -> bool:
        assert self._process.poll() is None, f"the proxy has ended: {self.output}"
        try:
            return httpx.get(f"{self.url}/health/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False


def _nginx(folder: Path, http: int, grpc: int, gateways: Sequence[Upstream]) -> str:
    text = (_COMPOSE / "nginx/nginx.conf").read_text().replace("/tmp/", f"{folder}/")
    text = text.replace("listen 8000;", f"listen 127.0.0.1:{http};")
    text = text.replace("listen 50051 http2;", f"listen 127.0.0.1:{grpc} http2;")
    for named, addresses in (
        ("gateway:8000", [gateway.http for gateway in gateways]),
        ("gateway:50051", [gateway.grpc for gateway in gateways]),
    ):
        text = _one_line_each(text, rf"server {named}(.*)", [rf"server {address}\1" for address in addresses])
    return text


def _haproxy(folder: Path, http: int, grpc: int, gateways: Sequence[Upstream]) -> str:
    text = _haproxy_at(http, grpc)
    numbered = list(enumerate(gateways))
    by_http = [f"server g{number} {gateway.http}" for number, gateway in numbered]
    text = _one_line_each(text, r"server-template gateway 8 gateway:8000 .*", by_http)
    by_grpc = [
        rf"server g{number} {gateway.grpc}\g<1>{gateway.http.rpartition(':')[2]}" for number, gateway in numbered
    ]
    return _one_line_each(text, r"server-template gateway 8 gateway:50051( proto h2 check port )8000 .*", by_grpc)


def _haproxy_by_name(http: int, grpc: int, gateway: Upstream, dns_port: int) -> str:
    text = _haproxy_at(http, grpc).replace("127.0.0.11:53", f"127.0.0.1:{dns_port}")
    http_port, grpc_port = gateway.http.rpartition(":")[2], gateway.grpc.rpartition(":")[2]
    for there, here in (("gateway:8000", f"gateway:{http_port}"), ("gateway:50051", f"gateway:{grpc_port}")):
        text = text.replace(there, here)
    return text.replace("check port 8000", f"check port {http_port}")


def _haproxy_at(http: int, grpc: int) -> str:
    text = (_COMPOSE / "haproxy/haproxy.cfg").read_text()
    return text.replace("bind :8000", f"bind 127.0.0.1:{http}").replace("bind :50051", f"bind 127.0.0.1:{grpc}")


def _one_line_each(text: str, pattern: str, lines: Sequence[str]) -> str:
    """In the place of the line that matches, each of the lines, in which \\1 is the pattern's first group."""
    match = re.search(rf"^ *{pattern}$", text, re.MULTILINE)
    assert match is not None, pattern
    return text.replace(match.group(), "\n".join(match.expand(line) for line in lines))


_CONFIGURATIONS: dict[str, Callable[[Path, int, int, Sequence[Upstream]], str]] = {"nginx": _nginx, "haproxy": _haproxy}
