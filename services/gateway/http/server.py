"""uvicorn inside this process's event loop; signals and logs stay the process's own."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator

import uvicorn

from services.gateway.http.exchange import AsgiApp
from services.gateway.http.protocol import HttpLimits, LimitedConfig

_BACKLOG = 2048
_SHUTDOWN_S = 5


class HttpServer:
    """Serves the application on one port, over TLS if a context is given."""

    def __init__(
        self, app: AsgiApp, host: str, port: int, limits: HttpLimits, tls: ssl.SSLContext | None = None
    ) -> None:
        config = LimitedConfig(
            app,
            limits,
            ws="none",
            lifespan="off",
            interface="asgi3",
            access_log=False,
            log_config=None,
            log_level="warning",
            server_header=False,
            proxy_headers=False,  # nothing here depends on a caller's address
            timeout_graceful_shutdown=_SHUTDOWN_S,
            ssl_context_factory=(lambda _config, _default: tls) if tls else None,
        )
        self._server = _Server(config)
        self._host = host
        self._port = port
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Binds and answers. Returns the port. Raises OSError when the address cannot be bound."""
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        listener = socket.create_server((self._host, self._port), family=family, backlog=_BACKLOG)
        self._task = asyncio.create_task(self._server.serve([listener]), name="http")
        return int(listener.getsockname()[1])

    async def stop(self) -> None:
        """Closes the port, lets answers that are being sent finish, and returns."""
        self._server.should_exit = True
        if self._task is not None:
            await self._task


class _Server(uvicorn.Server):
    """uvicorn would take the signals over and end the process's event loop its own way."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
