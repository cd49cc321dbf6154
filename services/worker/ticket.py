"""What `Executions` keeps of each gateway's stream and of each sequence that runs for one."""

import asyncio
from dataclasses import dataclass, field

from opentelemetry.trace import Span

from headrace.v1 import worker_pb2
from headrace.v1.machine_time_pb2 import PricedTime
from services.common.channel import Outbox
from services.worker.capacity import Claim
from services.worker.engine.sequence import Sequence
from services.worker.run_times import RunTimes


@dataclass(slots=True, eq=False)
class Execution:
    """One gateway's stream. What is put into its outbox is bounded by what its live sequences can still produce."""

    gateway_id: str
    outbox: Outbox[worker_pb2.StepOutput] = field(default_factory=Outbox)
    tickets: dict[int, "Ticket"] = field(default_factory=dict)  # by handle, of the sequences that have not ended
    silent: bool = True  # nothing was sent since the last sign of life

    def send(self, output: worker_pb2.StepOutput) -> None:
        self.silent = False
        self.outbox.put(output)


@dataclass(slots=True, eq=False)
class Ticket:
    """The engine's key of a sequence: says whose it is without a look-up per token."""

    execution: Execution
    handle: int
    request_id: str
    attempt: int
    choice: int
    times: RunTimes
    span: Span | None = None  # if its trace is recorded
    ended: bool = False  # what the engine still produces has no reader
    gathering: "Gathering | None" = None  # while its request's KV is brought from elsewhere
    computed_elsewhere: int = 0  # prompt tokens that were computed for it on another worker
    elsewhere: list[PricedTime] = field(default_factory=list)  # what that took there

    def __str__(self) -> str:
        return f"{self.request_id}/{self.choice}/{self.attempt}"


@dataclass(slots=True, eq=False)
class Gathering:
    """A request whose KV is on its way, before its sequences go to the engine."""

    tickets: list[Ticket]
    sequences: list[Sequence]
    claim: Claim
    task: "asyncio.Task[None] | None" = None
