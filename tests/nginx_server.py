"""A real nginx of a test's own, in front of several gateways."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import httpx

from tests.flows.headrace_up import eventually
from tests.redis_server import free_port

# A request goes to the next gateway when one refuses the connection, breaks it before it answered, or says 503; none is
# taken for dead, since one that ends is back in a moment.
_CONFIGURATION = """
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream gateways {{ {servers} }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass {scheme}://gateways;
            {trust}
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_read_timeout 300s;
            proxy_next_upstream error timeout http_503 non_idempotent;
        }}
    }}
}}
"""

# As docs/tls.md has it.
_TRUST = """
            proxy_ssl_trusted_certificate {ca};
            proxy_ssl_name gateway;
            proxy_ssl_server_name on;
            proxy_ssl_verify on;
"""


def nginx_binary() -> str | None:
    """Debian puts it where only root looks."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


class NginxServer:
    """Starts at construction and answers; `kill` at its end."""

    def __init__(self, folder: Path, gateways: Sequence[str], *, ca: Path | None = None) -> None:
        """`gateways`: host:port of each one's HTTP. `ca`: whose certificates they show, if they are on TLS."""
        binary = nginx_binary()
        assert binary is not None, "there is no nginx here: install Debian's nginx-light"
        port = free_port()
        servers = " ".join(f"server {address} max_fails=0;" for address in gateways)
        file = folder / "nginx.conf"
        scheme, trust = ("https", _TRUST.format(ca=ca)) if ca else ("http", "")
        file.write_text(_CONFIGURATION.format(folder=folder, servers=servers, port=port, scheme=scheme, trust=trust))
        self.url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen([binary, "-e", str(folder / "error.log"), "-p", str(folder), "-c", str(file)])
        eventually(self._answers, "nginx answers")

    def kill(self) -> None:
        self._process.terminate()
        self._process.wait()

    def _answers(self) -> bool:
        assert self._process.poll() is None, "nginx has ended"
        try:
            return httpx.get(f"{self.url}/health/live", timeout=5).status_code == 200
        except httpx.TransportError:
            return False
