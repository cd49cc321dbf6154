"""What all POST routes that speak raw ASGI share: from the exchange to the error that ends it."""

import logging

from prometheus_client import Counter

from services.common.errors import HeadraceError, RequestFailed
from services.gateway.admission import Admission
from services.gateway.config import GatewaySettings
from services.gateway.errors import MethodNotAllowed
from services.gateway.http.callers import Callers
from services.gateway.http.exchange import CLIENT_GONE_STATUS, ClientGone, HttpExchange, Receive, Scope, Send
from services.gateway.metrics import Metrics

log = logging.getLogger(__name__)

JSON = ((b"content-type", b"application/json"),)


class PostRoute:
    """The ASGI application of one path. Subclasses say in `handle` what it does."""

    def __init__(
        self, path: str, admission: Admission, callers: Callers, metrics: Metrics, settings: GatewaySettings
    ) -> None:
        self.path = path
        self.admission = admission
        self.callers = callers
        self.settings = settings
        self._metrics = metrics
        self._answered: dict[int, Counter] = {}  # by status

    async def handle(self, exchange: HttpExchange) -> None:
        """Answers one request. Raises HeadraceError or ClientGone."""
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = HttpExchange(
            scope,
            receive,
            send,
            comment_every_s=self.settings.sse_comment_every_s,
            write_timeout_s=self.settings.write_timeout_s,
        )
        try:
            if scope["method"] != "POST":
                raise MethodNotAllowed(f"{self.path} takes POST, not {scope['method']}.", allow="POST")
            with self._metrics.counting_shed():
                await self.handle(exchange)
        except ClientGone:
            exchange.status = CLIENT_GONE_STATUS
        except HeadraceError as error:
            await exchange.fail(error)
        except Exception:
            log.exception("request %s failed", exchange.internal_id)
            await exchange.fail(RequestFailed("The server failed while it handled this request; its log says why."))
        self._count(exchange.status)

    def _count(self, status: int) -> None:
        if status not in self._answered:
            self._answered[status] = self._metrics.http_requests.labels(self.path, str(status))
        self._answered[status].inc()
