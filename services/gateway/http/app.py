"""The gateway's HTTP: what takes bodies, and with Starlette the models, health and metrics."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Protocol

import msgspec
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from services.common.api_keys import Scope as KeyScope
from services.common.errors import HeadraceError, NotFound, RequestFailed
from services.common.metrics_switch import METRICS_ARE_OFF, NoMetrics
from services.gateway.answers.answers import Answer, Answers
from services.gateway.caller import sane_request_id
from services.gateway.catalog import Catalog, Model
from services.gateway.errors import MethodNotAllowed
from services.gateway.http.callers import Callers
from services.gateway.http.docs_page import document_routes
from services.gateway.http.exchange import CLIENT_GONE_STATUS, CONNECTION, Connection, Message, Receive, Scope, Send
from services.gateway.http.openai_api import WholeResponse
from services.gateway.http.openai_errors import error_body, error_headers
from services.gateway.http.openai_types import ModelList, ModelObject, StatusObject
from services.gateway.http.playground import playground_routes
from services.gateway.http.post_route import PostRoute
from services.gateway.http.stats_api import stats_object
from services.gateway.keys.account import Account
from services.gateway.metrics import Metrics
from services.gateway.readiness import Readiness


class Identify(Protocol):
    """Whose request it is. Raises HeadraceError if its key does not hold or lacks the scope."""

    async def __call__(self, request: Request, scope: KeyScope = "models") -> Account: ...


class HttpApp:
    """The whole ASGI application."""

    def __init__(
        self,
        post_routes: Mapping[str, PostRoute],
        answers: Answers,
        whole: Callable[[Answer], Coroutine[None, None, WholeResponse]],
        callers: Callers,
        catalog: Catalog,
        readiness: Readiness,
        metrics: Metrics,
        more: Sequence[Route] = (),
    ) -> None:
        """`whole`: the body that an answer in one piece is. `more`: routes that stand beside those made here."""
        self._post_routes = post_routes
        self._metrics = metrics
        self._rest = _rest(answers, whole, callers, catalog, readiness, metrics, more)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if route := self._post_routes.get(scope["path"]):
            await route(scope, receive, send)
        else:
            await self._serve_rest(scope, receive, send)

    async def _serve_rest(self, scope: Scope, receive: Receive, send: Send) -> None:
        wanted = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = sane_request_id(wanted)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                route = getattr(scope.get("route"), "path", "other")  # the template: paths of callers have no bound
                self._metrics.http_requests.labels(route, str(message["status"])).inc()
            await send(message)

        await self._rest(scope, receive, send_with_id)


def _rest(
    answers: Answers,
    whole: Callable[[Answer], Coroutine[None, None, WholeResponse]],
    callers: Callers,
    catalog: Catalog,
    readiness: Readiness,
    metrics: Metrics,
    more: Sequence[Route],
) -> Starlette:
    async def identify(request: Request, scope: KeyScope = "models") -> Account:
        return await callers.identify(dict(request.scope["headers"]), scope)

    return Starlette(
        routes=[
            *_model_routes(catalog, identify),
            *_answer_routes(answers, whole, identify),
            *_operator_routes(readiness, metrics),
            *document_routes(),
            *playground_routes(),
            *more,
        ],
        exception_handlers={HeadraceError: _answer_error, HTTPException: _answer_error, Exception: _answer_error},
    )


def _model_routes(catalog: Catalog, identify: Identify) -> list[Route]:
    async def list_models(request: Request) -> Response:
        account = await identify(request)
        allowed = (model for model in catalog.usable() if account.allows_model(model.name))
        return _json(ModelList([_model_object(model) for model in allowed]))

    async def get_model(request: Request) -> Response:
        name = request.path_params["name"]
        (await identify(request)).check_model(name)
        return _json(_model_object(catalog.get(name)))

    return [Route("/v1/models", list_models), Route("/v1/models/{name:path}", get_model)]


def _answer_routes(
    answers: Answers, whole: Callable[[Answer], Coroutine[None, None, WholeResponse]], identify: Identify
) -> list[Route]:
    async def get_answer(request: Request) -> Response:
        account = await identify(request, "generate")
        answer = await answers.resume(request.path_params["answer_id"], 0, account.key_id)
        connection: Connection = request.scope[CONNECTION]
        response = await _while_connected(connection, whole(answer))
        if response is None:
            return Response(status_code=CLIENT_GONE_STATUS)
        return Response(response.body, media_type="application/json")

    async def cancel_answer(request: Request) -> Response:
        account = await identify(request, "generate")
        await answers.cancel(request.path_params["answer_id"], account.key_id)
        return _json(StatusObject("cancelled"))

    return [
        Route("/v1/answers/{answer_id:path}/cancel", cancel_answer, methods=["POST"]),
        Route("/v1/answers/{answer_id:path}", get_answer),
    ]


async def _while_connected(connection: Connection, work: Coroutine[None, None, WholeResponse]) -> WholeResponse | None:
    """What the work comes to; None once the client has gone, which ends it."""
    task = asyncio.create_task(work)

    def lose() -> None:
        task.cancel()

    connection.on_lost = lose
    if connection.lost:
        lose()
    try:
        return await task
    except asyncio.CancelledError:
        if not connection.lost:
            raise
        return None
    finally:
        connection.on_lost = None


def _operator_routes(readiness: Readiness, metrics: Metrics) -> list[Route]:
    async def live(_: Request) -> Response:
        return _json(StatusObject("live"))

    async def ready(_: Request) -> Response:
        problem = readiness.problem()
        if problem is None:
            return _json(StatusObject("ready"))
        return _json(StatusObject("not ready", problem), status=503)

    async def show_metrics(request: Request) -> Response:
        if isinstance(metrics.registry, NoMetrics):
            raise NotFound(METRICS_ARE_OFF)
        # Exemplars are told to scrapers that ask for OpenMetrics: no name here has a colon (see common/telemetry.py).
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(metrics.registry), headers={"content-type": content_type})

    async def show_stats(_: Request) -> Response:
        return _json(stats_object(metrics.stats.report()))

    return [
        Route("/health/live", live),
        Route("/health/ready", ready),
        Route("/metrics", show_metrics),
        Route("/v1/stats", show_stats),
    ]


async def _answer_error(request: Request, error: Exception) -> Response:
    known = _as_known(request, error)
    headers = {name.decode(): value.decode() for name, value in error_headers(known)}
    return Response(error_body(known), known.http_status, headers)


def _as_known(request: Request, error: Exception) -> HeadraceError:
    if isinstance(error, HeadraceError):
        return error
    if isinstance(error, HTTPException) and error.status_code == 405:
        allow = (error.headers or {})["Allow"]
        return MethodNotAllowed(f"{request.url.path[:200]} does not take {request.method}.", allow=allow)
    if isinstance(error, HTTPException):
        return NotFound(f"There is nothing at {request.url.path[:200]}.")
    return RequestFailed("The server failed while it handled this request; its log says why.")


def _model_object(model: Model) -> ModelObject:
    return ModelObject(id=model.name, created=model.created_unix_s, max_model_len=model.max_context_tokens)


def _json(content: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")
