"""A real nginx or HAProxy of a test's own, in front of several gateways, with the files that compose uses."""

import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
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
    """Starts at construction and answers; `kill` at its end."""

    def __init__(self, name: str, folder: Path, gateways: Sequence[Upstream], *, ca: Path | None = None) -> None:
        """`name`: nginx or haproxy. `ca`: whose certificates the gateways show, if they are on TLS (nginx, HTTP)."""
        binary = binary_of(name)
        assert binary is not None, f"there is no {name} here: install Debian's"
        http, grpc = free_port(), free_port()
        folder.mkdir(exist_ok=True)
        file = folder / f"{name}.conf"
        text = _CONFIGURATIONS[name](folder, http, grpc, gateways)
        file.write_text(text if ca is None else text.replace(_PLAIN, _TRUSTING.format(ca=ca)))
        commands = {
            "nginx": [binary, "-e", str(folder / "error.log"), "-p", str(folder), "-c", str(file), "-g", "daemon off;"],
            "haproxy": [binary, "-db", "-f", str(file)],
        }
        self.url, self.grpc_address = f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc}"
        self._process = subprocess.Popen(commands[name])
        eventually(self._answers, f"{name} answers")

    def kill(self) -> None:
        self._process.terminate()
        self._process.wait()

    def _answers(self) -> bool:
        assert self._process.poll() is None, "the proxy has ended"
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
    text = (_COMPOSE / "haproxy/haproxy.cfg").read_text()
    text = text.replace("bind :8000", f"bind 127.0.0.1:{http}").replace("bind :50051", f"bind 127.0.0.1:{grpc}")
    numbered = list(enumerate(gateways))
    by_http = [f"server g{number} {gateway.http}" for number, gateway in numbered]
    text = _one_line_each(text, r"server-template gateway 8 gateway:8000 .*", by_http)
    by_grpc = [
        rf"server g{number} {gateway.grpc}\g<1>{gateway.http.rpartition(':')[2]}\g<2>" for number, gateway in numbered
    ]
    pattern = r"server-template gateway 8 gateway:50051( proto h2 check port )8000( check-proto h1) .*"
    return _one_line_each(text, pattern, by_grpc)


def _one_line_each(text: str, pattern: str, lines: Sequence[str]) -> str:
    """In the place of the line that matches, each of the lines, in which \\1 is the pattern's first group."""
    match = re.search(rf"^ *{pattern}$", text, re.MULTILINE)
    assert match is not None, pattern
    return text.replace(match.group(), "\n".join(match.expand(line) for line in lines))


_CONFIGURATIONS: dict[str, Callable[[Path, int, int, Sequence[Upstream]], str]] = {"nginx": _nginx, "haproxy": _haproxy}
