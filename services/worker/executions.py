"""Execute streams: which gateway runs which sequences here, and who gets which tokens.

Runs on the event loop. Admits requests to the engine, sends each gateway one message per step, and frees what a broken
stream leaves behind. Knows no gRPC: a stream is an `Execution` with an outbox.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import cast

from headrace.v1 import sampling_pb2, worker_pb2
from services.common.channel import cancel_and_wait
from services.common.errors import InvalidRequest
from services.common.tracing import traceparent_of
from services.worker.cancellations import Cancellations
from services.worker.capacity import Capacity, Claim
from services.worker.engine.engine import StepResult
from services.worker.engine.sequence import Finish, Sequence
from services.worker.engine_loop import EngineLoop, Turn
from services.worker.kv_import import Gathered, KvImporter
from services.worker.prefill_rate import PrefillRate
from services.worker.request_metrics import RequestMetrics
from services.worker.run_times import RunTimes
from services.worker.run_traces import RunTraces
from services.worker.sequence_times import SequenceTimes
from services.worker.start_request import ModelLimits, build_sequences, count_ids, demand_of
from services.worker.step_output import StepOutput
from services.worker.ticket import Execution, Gathering, Ticket

log = logging.getLogger(__name__)

_LONGEST_STEP_S = 5.0  # what streams that are to end wait for, so that gateways hear of what their sequences took

SequenceEnded = worker_pb2.SequenceEnded
_FINISH_REASONS = {
    Finish.STOP: sampling_pb2.FINISH_REASON_STOP,
    Finish.LENGTH: sampling_pb2.FINISH_REASON_LENGTH,
}


class Executions:
    """All Execute streams of this worker.

    `on_settled` is told of every placement that was started or refused: (request id, attempt, sequences, prompt
    tokens).
    """

    def __init__(
        self,
        engine: EngineLoop,
        capacity: Capacity,
        limits: ModelLimits,
        importer: KvImporter,
        prefill_rate: PrefillRate,
        cancellations: Cancellations,
        metrics: RequestMetrics,
        traces: RunTraces,
        on_settled: Callable[[str, int, int, int], None],
        price_per_hour: float | None = None,
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._traces = traces
        self._price_per_hour = price_per_hour
        self._times = SequenceTimes()
        self._cancellations = cancellations
        self._capacity = capacity
        self._limits = limits
        self._importer = importer
        self._prefill_rate = prefill_rate
        self._gathering: set[asyncio.Task[None]] = set()
        self._on_settled = on_settled
        self._executions: set[Execution] = set()
        self._step = 0
        self._delivered_at = -1.0  # when the turn before was
        self.draining = False
        """Whether no new requests are taken on."""

    def open(self, gateway_id: str) -> Execution:
        """A new stream."""
        execution = Execution(gateway_id)
        self._executions.add(execution)
        if self._price_per_hour is not None:
            execution.send(worker_pb2.StepOutput(step=self._step, price_per_hour=self._price_per_hour))
        return execution

    def close(self, execution: Execution) -> None:
        """The stream has ended: frees every sequence started on it. May be called again."""
        self._executions.discard(execution)
        execution.outbox.close()
        if execution.tickets:
            log.info("gateway %s is gone, %d sequences are freed", execution.gateway_id, len(execution.tickets))
            self._drop(list(execution.tickets.values()))

    def start(self, execution: Execution, start: worker_pb2.Start) -> None:
        """Takes a request on as a whole, or answers each of its choices why not.

        Raises InvalidRequest when it cannot even be answered, which ends the stream.
        """
        handles = [choice.handle for choice in start.choices]
        if not handles or len(set(handles)) < len(handles) or not execution.tickets.keys().isdisjoint(handles):
            raise InvalidRequest(f"Request {start.request_id} needs choices with handles that are not in use.")
        now = time.monotonic()
        tickets = [
            Ticket(execution, choice.handle, start.request_id, start.attempt, choice.choice, RunTimes(now))
            for choice in start.choices
        ]
        try:
            sequences = build_sequences(start, tickets, self._limits)
        except InvalidRequest as error:
            self._turn_away(execution, handles, SequenceEnded.OUTCOME_FAILED, error.message)
        else:
            self._admit(execution, start, tickets, sequences)
        self._on_settled(start.request_id, start.attempt, len(handles), count_ids(start.prompt_ids))

    def cancel(self, execution: Execution, handles: Iterable[int]) -> None:
        """Ends sequences that the gateway wants no more. Handles that have ended already are no mistake."""
        tickets = [execution.tickets[handle] for handle in handles if handle in execution.tickets]
        self._drop(tickets)
        ended = [
            SequenceEnded(
                handle=ticket.handle,
                outcome=SequenceEnded.OUTCOME_FINISHED,
                finish_reason=sampling_pb2.FINISH_REASON_CANCELLED,
            )
            for ticket in tickets
        ]
        if ended:
            execution.send(worker_pb2.StepOutput(step=self._step, ended=ended))

    def deliver(self, turn: Turn) -> None:
        """Sends each gateway what a turn of the engine brought for its sequences."""
        self._step = turn.status.counters.steps
        outputs: dict[Execution, StepOutput] = {}
        now = time.monotonic()
        if turn.result is not None:
            self._collect(turn.result, outputs, now)
        for sequence, reason in turn.failed:
            ended = SequenceEnded(outcome=SequenceEnded.OUTCOME_FAILED, error=reason)
            if self._collect_end(sequence, ended, outputs, now) is not None:
                self._metrics.ended("error")
        self._collect_times(turn, outputs)
        for execution, output in outputs.items():
            execution.send(output.to_proto(self._step))

    def send_signs_of_life(self) -> None:
        """To be called once a second: lets gateways that got nothing since the last call know the engine's step."""
        for execution in self._executions:
            if execution.silent:
                execution.outbox.put(worker_pb2.StepOutput(step=self._step))
            execution.silent = True

    async def drain(self, grace_s: float) -> None:
        """Takes on nothing more, lets sequences finish for a while, then hands on those that are left."""
        self.draining = True
        try:
            await asyncio.wait_for(self._capacity.idle.wait(), grace_s)
        except TimeoutError:
            log.info("%d sequences are left after %g s and go on elsewhere", self._capacity.live_sequences, grace_s)
        for execution in self._executions:
            self._hand_on(execution, list(execution.tickets.values()))

    async def close_all(self) -> None:
        """Ends all streams, after a drain."""
        await self._times.wait_told(_LONGEST_STEP_S)
        for execution in self._executions:
            execution.outbox.close()
        await cancel_and_wait(self._gathering)

    def _admit(
        self, execution: Execution, start: worker_pb2.Start, tickets: list[Ticket], sequences: list[Sequence]
    ) -> None:
        coming_blocks = max((source.blocks for source in start.kv_sources), default=0)
        demand = demand_of(sequences, self._limits.block_size, coming_blocks)
        handles = [ticket.handle for ticket in tickets]
        if self.draining:
            self._turn_away(execution, handles, SequenceEnded.OUTCOME_DRAINING)
        elif not self._capacity.admits(demand, alone=start.alone):
            self._turn_away(execution, handles, SequenceEnded.OUTCOME_BUSY)
        else:
            execution.tickets.update(zip(handles, tickets, strict=True))
            claim = self._capacity.take(demand, alone=start.alone)
            self._metrics.choices(len(handles))
            for ticket in tickets:
                ticket.span = self._traces.begin(start.traceparent, start.request_id, start.attempt, ticket.choice)
            if coming_blocks > 0:
                self._gather(start, Gathering(tickets, sequences, claim))
            else:
                self._run(claim, sequences)

    def _run(self, claim: Claim, sequences: list[Sequence]) -> None:
        self._times.entered(sequences)
        self._capacity.sent(claim, self._engine.add(sequences))

    def _gather(self, start: worker_pb2.Start, gathering: Gathering) -> None:
        for ticket in gathering.tickets:
            ticket.gathering = gathering
        gathering.task = asyncio.create_task(self._gather_and_run(start, gathering), name=f"gather {start.request_id}")
        self._gathering.add(gathering.task)
        gathering.task.add_done_callback(self._gathered)

    async def _gather_and_run(self, start: worker_pb2.Start, gathering: Gathering) -> None:
        """Brings the KV of the request's prompt, then sends its sequences to the engine, with whatever has come."""
        first, block_size = gathering.sequences[0], self._limits.block_size
        first.hash_blocks((len(first.tokens) - 1) // block_size, block_size)
        gathered = Gathered()
        if (span := gathering.tickets[0].span) is not None:
            start.traceparent = traceparent_of(span)
        try:
            gathered = await self._importer.gather(
                first.hashes,
                start,
                keep_free=self._capacity.live_sequences,
                compute_s=block_size / self._prefill_rate.tokens_per_s,
            )
        finally:  # whatever went wrong, the request runs
            self._run_gathered(gathering, gathered)

    def _run_gathered(self, gathering: Gathering, gathered: Gathered) -> None:
        for ticket in gathering.tickets:
            ticket.gathering = None
        live = [sequence for sequence in gathering.sequences if not cast(Ticket, sequence.key).ended]
        if not live:
            self._engine.exchange.release(gathered.blocks)
            self._capacity.withdraw(gathering.claim)
            return
        live[0].held = gathered.blocks
        now = time.monotonic()
        for sequence in live:
            ticket = cast(Ticket, sequence.key)
            ticket.times.gathered = now
            ticket.computed_elsewhere = gathered.computed_blocks * self._limits.block_size
        cast(Ticket, live[0].key).elsewhere = gathered.spent
        self._run(gathering.claim, live)

    def _gathered(self, task: "asyncio.Task[None]") -> None:
        self._gathering.discard(task)
        if not task.cancelled() and (bug := task.exception()) is not None:
            log.error("%s failed, all of its KV is computed", task.get_name(), exc_info=bug)

    def _turn_away(
        self,
        execution: Execution,
        handles: list[int],
        outcome: worker_pb2.SequenceEnded.Outcome.ValueType,
        invalid: str = "",
    ) -> None:
        """Answers sequences that are not taken on. `invalid`: one sentence why the request can never run."""
        ended = [
            SequenceEnded(handle=handle, outcome=outcome, error=invalid, invalid_request=bool(invalid))
            for handle in handles
        ]
        times = [worker_pb2.SequenceTime(handle=handle) for handle in handles]
        execution.send(worker_pb2.StepOutput(step=self._step, ended=ended, times=times))

    def _hand_on(self, execution: Execution, tickets: list[Ticket]) -> None:
        if tickets:
            outcome = SequenceEnded.OUTCOME_DRAINING
            ended = [SequenceEnded(handle=ticket.handle, outcome=outcome) for ticket in tickets]
            execution.send(worker_pb2.StepOutput(step=self._step, ended=ended))
            self._drop(tickets)

    def _drop(self, tickets: list[Ticket]) -> None:
        """Ends live sequences whose tokens nobody wants any more."""
        if tickets:
            running = [ticket for ticket in tickets if ticket.gathering is None]
            if running:
                self._cancellations.cancel(
                    {ticket: "decode" if ticket.times.begun else "prefill" for ticket in running}
                )
            now = time.monotonic()
            for ticket in tickets:
                self._end(ticket, now)
                self._metrics.ended("abort")

    def _end(self, ticket: Ticket, now: float) -> None:
        ticket.ended = True
        ticket.times.ended = now
        if ticket.span is not None:
            self._traces.end(ticket.span, ticket.times)
        gathering = ticket.gathering
        if gathering is not None and gathering.task is not None and all(one.ended for one in gathering.tickets):
            gathering.task.add_done_callback(self._cancellations.watch("fetch"))
            gathering.task.cancel()
        if gathering is not None and ticket.execution in self._executions:  # the engine never had it
            spent = worker_pb2.SequenceTime(handle=ticket.handle)
            ticket.execution.send(worker_pb2.StepOutput(step=self._step, times=[spent]))
        del ticket.execution.tickets[ticket.handle]
        self._capacity.release()

    def _collect(self, result: StepResult, outputs: dict[Execution, StepOutput], now: float) -> None:
        self._collect_tokens(result, outputs, now)
        for sequence, logprobs in result.logprobs:
            ticket = cast(Ticket, sequence.key)
            if not ticket.ended:
                outputs[ticket.execution].add_logprobs(ticket.handle, logprobs)
        for sequence in result.started:
            ticket = cast(Ticket, sequence.key)
            if not ticket.ended:
                outputs[ticket.execution].started.append(self._started(sequence, ticket, now))
        for sequence in result.finished:
            assert sequence.finish is not None, "a finished sequence says why"
            reason = _FINISH_REASONS[sequence.finish]
            ended = SequenceEnded(outcome=SequenceEnded.OUTCOME_FINISHED, finish_reason=reason)
            if (finished := self._collect_end(sequence, ended, outputs, now)) is not None:
                self._metrics.ended(sequence.finish.value)
                self._metrics.finished(sequence, finished.times)

    def _collect_tokens(self, result: StepResult, outputs: dict[Execution, StepOutput], now: float) -> None:
        """The hot path: once per token of every gateway. Most sequences had their last token in the turn before."""
        before, in_turn_before = self._delivered_at, 0
        for sequence, token in result.tokens:
            ticket = cast(Ticket, sequence.key)
            if not ticket.ended:
                output = outputs.get(ticket.execution)
                if output is None:
                    output = outputs[ticket.execution] = StepOutput()
                output.add_token(ticket.handle, token)
                times = ticket.times
                if times.newest == before:
                    in_turn_before += 1
                elif times.newest and times.newest != now:
                    self._metrics.gap(now - times.newest)
                times.newest = now
        if in_turn_before:
            self._metrics.gap(now - before, in_turn_before)
        self._delivered_at = now

    def _started(self, sequence: Sequence, ticket: Ticket, now: float) -> worker_pb2.SequenceStarted:
        times = ticket.times
        times.admitted, times.begun = sequence.admitted_at, now
        self._metrics.began(times)
        return worker_pb2.SequenceStarted(
            handle=ticket.handle,
            cached_prompt_tokens=_cached_tokens(sequence, ticket),
            fetch_us=int(times.fetch_s * 1e6),
            queue_us=int(times.queue_s * 1e6),
            prefill_us=int(times.prefill_s * 1e6),
        )

    def _collect_end(
        self, sequence: Sequence, ended: worker_pb2.SequenceEnded, outputs: dict[Execution, StepOutput], now: float
    ) -> Ticket | None:
        """Returns whose end it is, if anybody still waits for it."""
        ticket = cast(Ticket, sequence.key)
        if ticket.ended:
            return None
        self._end(ticket, now)
        ended.handle = ticket.handle
        if ticket.times.begun:
            ended.decode_us = int(ticket.times.decode_s * 1e6)
        outputs.setdefault(ticket.execution, StepOutput()).ended.append(ended)
        return ticket

    def _collect_times(self, turn: Turn, outputs: dict[Execution, StepOutput]) -> None:
        """Tells what was spent on each sequence that left the engine in this turn, to whoever still listens."""
        left = [*turn.dropped, *(sequence for sequence, _ in turn.failed)]
        if turn.result is not None:
            left += turn.result.finished
        for sequence in left:
            ticket = sequence.key
            if isinstance(ticket, Ticket):  # and nothing that runs for another worker
                cached = _cached_tokens(sequence, ticket)
                spent = self._times.left(ticket.handle, sequence, cached, ticket.elsewhere, turn.status.counters)
                if ticket.execution in self._executions:
                    outputs.setdefault(ticket.execution, StepOutput()).times.append(spent)


def _cached_tokens(sequence: Sequence, ticket: Ticket) -> int:
    """Prompt tokens that nobody computed for it."""
    return max(0, sequence.cached_tokens - ticket.computed_elsewhere)
