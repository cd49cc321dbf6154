"""The Place stream to every scheduler: offers and catalogs come down, answers, placement requests and reports go up."""

import asyncio
import logging
import random
from collections.abc import Callable, Iterable

import grpc.aio

from headrace.v1.job_pb2 import Job
from headrace.v1.scheduler_pb2 import (
    AttemptReport,
    DescribeFleetRequest,
    DescribeFleetResponse,
    GatewayHello,
    GatewayMessage,
    Offer,
    OfferAnswer,
    PlacementRefusal,
    PlacementRequest,
    SchedulerMessage,
)
from headrace.v1.scheduler_pb2_grpc import SchedulerStub
from services.common.channel import Outbox, ReplicaSessions
from services.common.errors import InvalidRequest, Unavailable
from services.gateway.active_request import ActiveRequests, ReceivedOffer
from services.gateway.catalog import Catalog

log = logging.getLogger(__name__)

_DESCRIBE_TIMEOUT_S = 2.0


class PlacementLinks:
    """Connections with all schedulers. A placement request that its scheduler cannot answer goes to another."""

    def __init__(self, addresses: Iterable[str], hello: GatewayHello, active: ActiveRequests, catalog: Catalog) -> None:
        self._sessions = ReplicaSessions("scheduler", addresses, self._talk)
        self._hello = hello
        self._active = active
        self._catalog = catalog
        self._on_adoption: Callable[[Job, str], None] = lambda job, entry_id: None
        self._outboxes: dict[str, Outbox[GatewayMessage]] = {}  # by scheduler; those that have said hello back
        self._channels: dict[str, grpc.aio.Channel] = {}  # of the same
        # Placement requests without an offer so far, by request id, with the scheduler that has each.
        self._asked: dict[str, tuple[PlacementRequest, str | None]] = {}

    @property
    def connected(self) -> int:
        return len(self._outboxes)

    async def run(self, on_adoption: Callable[[Job, str], None]) -> None:
        """Keeps the connections until cancelled. `on_adoption(job, entry_id)`: a dead gateway's request is offered."""
        self._on_adoption = on_adoption
        await self._sessions.run()

    def ask(self, request: PlacementRequest) -> None:
        """Asks any connected scheduler to place a request again; if there is none, the next that connects."""
        scheduler = random.choice(list(self._outboxes)) if self._outboxes else None
        self._asked[request.job.request_id] = (request, scheduler)
        if scheduler is not None:
            self._outboxes[scheduler].put(GatewayMessage(placement_request=request))

    def forget(self, request_id: str) -> None:
        """Asks no more for this request: it is placed, or has ended."""
        self._asked.pop(request_id, None)

    def tell(self, report: AttemptReport) -> None:
        """Tells every connected scheduler what an attempt says of its worker."""
        for outbox in self._outboxes.values():
            outbox.put(GatewayMessage(attempt_report=report))

    async def describe(self) -> list[DescribeFleetResponse]:
        """The fleet as each connected scheduler sees it, without those that do not answer within two seconds."""
        views = await asyncio.gather(*map(_describe, self._channels.values()))
        return [view for view in views if view is not None]

    async def _talk(self, scheduler: str, channel: grpc.aio.Channel) -> None:
        outbox: Outbox[GatewayMessage] = Outbox(_merge)
        outbox.put(GatewayMessage(hello=self._hello))
        try:
            async for message in SchedulerStub(channel).Place(outbox):
                if scheduler not in self._outboxes:
                    self._connected(scheduler, outbox, channel)
                self._receive(message, scheduler, outbox)
        finally:
            outbox.close()
            self._disconnected(scheduler)

    def _connected(self, scheduler: str, outbox: Outbox[GatewayMessage], channel: grpc.aio.Channel) -> None:
        log.info("scheduler %s: connected", scheduler)
        self._outboxes[scheduler], self._channels[scheduler] = outbox, channel
        self._ask_again(None)

    def _disconnected(self, scheduler: str) -> None:
        if self._outboxes.pop(scheduler, None) is not None:
            del self._channels[scheduler]
            log.info("scheduler %s: disconnected", scheduler)
            self._catalog.disconnected(scheduler)
            self._ask_again(scheduler)

    def _ask_again(self, scheduler: str | None) -> None:
        for request, asked in list(self._asked.values()):
            if asked == scheduler:
                self.ask(request)

    def _receive(self, message: SchedulerMessage, scheduler: str, outbox: Outbox[GatewayMessage]) -> None:
        for offer in message.offers:
            self._offered(offer, outbox)
        match message.WhichOneof("message"):
            case "catalog":
                self._catalog.announce(scheduler, message.catalog)
            case "refusal":
                self._refused(message.refusal)
            case "adoption":
                self._on_adoption(message.adoption.job, message.adoption.queue_entry_id)

    def _offered(self, offer: Offer, outbox: Outbox[GatewayMessage]) -> None:
        def send(answer: OfferAnswer) -> None:
            # Nobody waits to hear that a request goes on as was expected.
            outbox.put(GatewayMessage(answers=[answer]), hurry=answer.status != OfferAnswer.STATUS_ACCEPTED)

        received = ReceivedOffer(offer, send)
        if active := self._active.get(offer.request_id):
            active.receive(received)
        else:
            received.answer(OfferAnswer.STATUS_GONE)

    def _refused(self, refusal: PlacementRefusal) -> None:
        if active := self._active.get(refusal.request_id):
            error = InvalidRequest if refusal.permanent else Unavailable
            active.refuse(refusal.attempt, error(refusal.reason))


async def _describe(channel: grpc.aio.Channel) -> DescribeFleetResponse | None:
    try:
        return await SchedulerStub(channel).DescribeFleet(DescribeFleetRequest(), timeout=_DESCRIBE_TIMEOUT_S)
    except grpc.aio.AioRpcError:
        return None


def _merge(message: GatewayMessage, following: GatewayMessage) -> bool:
    if not message.answers or not following.answers:
        return False
    message.MergeFrom(following)
    return True
