"""Names of everything Headrace keeps in Redis.

key                                      type     meaning
headrace:queue:{MODEL}:PRIORITY          stream   a model's jobs of one priority (high, normal, low), oldest first.
                                                  An entry stays from acceptance to the request's last event.
                                                  Field `job`: a serialized `headrace.v1.Job`. Never trimmed.
    its group `schedulers`               group    entries handed out; the pending-entries list says who owns each:
    consumer s:ID:INCARNATION                     a scheduler, from pop to the gateway's acceptance
    consumer g:ID:INCARNATION                     a gateway, which runs the job
headrace:gateway:ID:INCARNATION          string   "1", expires (PX): this gateway is alive
headrace:answer:{ID}:request             hash     an answer that its caller may come back for, expires. Fields:
                                                  `owner` (a consumer), `request` (`headrace.v1.StoredRequest`),
                                                  `fingerprint` of what the caller sent, `state` (open, done, failed),
                                                  `attempt`, `cancelled`
headrace:answer:{ID}:events              stream   its events, expires. Event N has the id 0-(N + 1) and one field,
                                                  `event`: a `headrace.v1.AnswerEvent`
headrace:dead                            stream   requests that were given up, the newest thousand. Fields: `request`
                                                  (`headrace.v1.StoredRequest`), `reason`, `failures`
headrace:api-keys                        hash     the API keys: visible prefix -> JSON, with the key's hash
headrace:key-groups                      hash     limits that the keys of a group share: its name -> JSON
headrace:limits:{SCOPE}:meters           hash     what a key, or a group and its keys, has used and holds
headrace:limits:{SCOPE}:reservations     hash     what each running request holds
headrace:limits:{SCOPE}:leases           sorted   when the reservations run out if their gateway does not renew them
                                         set      (meters.lua says what is in the three)
headrace:costs:YYYY-MM-DD                hash     what machines spent on the requests that ended on that day (UTC),
                                                  expires. `KEY_ID MODEL WHAT` -> a whole number (KEY_ID and MODEL
                                                  quoted as in URLs, WHAT as in `MachineCosts`); `@INCARNATION` -> the
                                                  last batch of a gateway that is in it

An owner's lease on an entry is the entry's idle time in the pending-entries list: whoever renews sets it to 0.
The braces are a hash tag: all streams of one model, both keys of an answer, and all keys of one scope, are in one slot
of a Redis Cluster, so that a script may use them. But for reserve.lua, which uses a scope and a stream: limits need
both on one server.
"""

from dataclasses import dataclass
from datetime import date
from typing import Literal, NamedTuple
from urllib.parse import quote

from headrace.v1 import sampling_pb2

GROUP = "schedulers"
JOB_FIELD = "job"
DEAD_LETTERS = "headrace:dead"
API_KEYS = "headrace:api-keys"
KEY_GROUPS = "headrace:key-groups"

PRIORITIES = (sampling_pb2.PRIORITY_HIGH, sampling_pb2.PRIORITY_NORMAL, sampling_pb2.PRIORITY_LOW)
"""Highest first; a smaller number is served before a larger one."""

PRIORITY_NAMES = dict(zip(PRIORITIES, ("high", "normal", "low"), strict=True))


@dataclass(frozen=True, slots=True)
class Owner:
    """A process that owns queue entries: `gateway` or `scheduler`, its id and its incarnation."""

    kind: Literal["gateway", "scheduler"]
    id: str
    incarnation: str

    @property
    def consumer(self) -> str:
        return f"{self.kind[0]}:{self.id}:{self.incarnation}"


class StreamEntry(NamedTuple):
    """What is to be added to a stream."""

    stream: str
    field: str
    value: bytes


def known_priority(priority: int) -> "sampling_pb2.Priority.ValueType":
    """The priority as the queue has it: what is unspecified or unknown is normal."""
    return next((known for known in PRIORITIES if known == priority), sampling_pb2.PRIORITY_NORMAL)


def queue_stream(model: str, priority: int) -> str:
    """The stream of a model's jobs of one priority. Braces in a model's name must not cut the hash tag short."""
    return f"headrace:queue:{{{quote(model, safe='/:@+')}}}:{PRIORITY_NAMES[known_priority(priority)]}"


def queue_streams(model: str) -> list[str]:
    """A model's streams, the highest priority first."""
    return [queue_stream(model, priority) for priority in PRIORITIES]


def gateway_heartbeat(gateway_id: str, incarnation: str) -> str:
    return f"headrace:gateway:{gateway_id}:{incarnation}"


def heartbeat_of(consumer: str) -> str:
    """The heartbeat of the gateway that is this consumer."""
    gateway_id, _, incarnation = consumer.partition(":")[2].rpartition(":")
    return gateway_heartbeat(gateway_id, incarnation)


def answer_request(answer_id: str) -> str:
    return f"headrace:answer:{{{answer_id}}}:request"


def answer_events(answer_id: str) -> str:
    return f"headrace:answer:{{{answer_id}}}:events"


def costs_of_day(day: date) -> str:
    return f"headrace:costs:{day.isoformat()}"


def limit_keys(scope: str) -> list[str]:
    """Meters, reservations and leases of one scope, as the scripts of limits take them."""
    prefix = f"headrace:limits:{{{quote(scope, safe=':')}}}"
    return [f"{prefix}:{kind}" for kind in ("meters", "reservations", "leases")]
