"""The gateway instances that are connected: what is sent to them, and whom their answers are for."""

import logging
import random
from collections.abc import Callable

from headrace.v1 import scheduler_pb2
from headrace.v1.job_pb2 import Job
from services.common.channel import Outbox

log = logging.getLogger(__name__)

# Offers that wait together become one message up to this size: digests of KV sources make one large.
_MOST_MERGED_BYTES = 1024 * 1024

GatewayKey = tuple[str, str]
"""A gateway's id and incarnation."""

OnAnswer = Callable[["scheduler_pb2.OfferAnswer.Status.ValueType"], None]


class GatewaySession:
    """One gateway's stream."""

    def __init__(self, key: GatewayKey) -> None:
        self.key = key
        self.outbox: Outbox[scheduler_pb2.SchedulerMessage] = Outbox(_merge)
        self._waiting_for: dict[tuple[str, int], OnAnswer] = {}

    def offer(self, offer: scheduler_pb2.Offer, on_answer: OnAnswer) -> None:
        """Sends an offer; `on_answer` is called with the answer, if one comes."""
        self._waiting_for[offer.request_id, offer.attempt] = on_answer
        self.outbox.put(scheduler_pb2.SchedulerMessage(offers=[offer]))

    def offer_adoption(self, job: Job, queue_entry_id: str) -> None:
        adoption = scheduler_pb2.Adoption(job=job, queue_entry_id=queue_entry_id)
        self.outbox.put(scheduler_pb2.SchedulerMessage(adoption=adoption))

    def withdraw(self, request_id: str, attempt: int) -> None:
        """Waits no longer for the answer to an offer."""
        self._waiting_for.pop((request_id, attempt), None)

    def answered(self, answer: scheduler_pb2.OfferAnswer) -> None:
        """Hands an answer to whoever made the offer. An answer that comes too late has no reader."""
        on_answer = self._waiting_for.pop((answer.request_id, answer.attempt), None)
        if on_answer is not None:
            on_answer(answer.status)

    def refuse(self, request_id: str, attempt: int, reason: str, *, permanent: bool) -> None:
        refusal = scheduler_pb2.PlacementRefusal(
            request_id=request_id, attempt=attempt, reason=reason, permanent=permanent
        )
        self.outbox.put(scheduler_pb2.SchedulerMessage(refusal=refusal))


class Gateways:
    """All connected gateway instances."""

    def __init__(self) -> None:
        self._sessions: dict[GatewayKey, GatewaySession] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def connect(self, hello: scheduler_pb2.GatewayHello, catalog: scheduler_pb2.Catalog) -> GatewaySession:
        """Opens a session, which begins with the catalog. An older stream of the same instance is ended."""
        session = GatewaySession((hello.gateway_id, hello.incarnation))
        if old := self._sessions.get(session.key):
            old.outbox.close()
        self._sessions[session.key] = session
        session.outbox.put(scheduler_pb2.SchedulerMessage(catalog=catalog))
        log.info("gateway %s connected", hello.gateway_id)
        return session

    def leave(self, session: GatewaySession) -> None:
        if self._sessions.get(session.key) is session:
            del self._sessions[session.key]
            log.info("gateway %s left", session.key[0])

    def find(self, key: GatewayKey) -> GatewaySession | None:
        return self._sessions.get(key)

    def any(self) -> GatewaySession | None:
        return random.choice(list(self._sessions.values())) if self._sessions else None

    def announce(self, catalog: scheduler_pb2.Catalog) -> None:
        """Sends the catalog to every gateway."""
        for session in self._sessions.values():
            session.outbox.put(scheduler_pb2.SchedulerMessage(catalog=catalog))


def _merge(message: scheduler_pb2.SchedulerMessage, following: scheduler_pb2.SchedulerMessage) -> bool:
    if not message.offers or not following.offers or message.ByteSize() > _MOST_MERGED_BYTES:
        return False
    message.MergeFrom(following)
    return True
