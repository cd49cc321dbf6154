"""Hands out the bytes of this worker's blocks, and computes those that a decoding worker wants computed.

Blocks are held only while they are copied into messages, a few at a time: a reader that is slow, or gone without a
word, keeps nothing of the pool.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from headrace.v1.cache_pb2 import FetchBlocksRequest
from headrace.v1.machine_time_pb2 import MachineTime, PricedTime
from headrace.v1.sampling_pb2 import Sampling, Stopping
from headrace.v1.worker_pb2 import PrefillRequest, Start, StartChoice
from services.common.block_hash import HASH_BYTES, split_hashes
from services.common.errors import InvalidRequest, Mismatch, Overloaded, RequestFailed, Unavailable
from services.common.kv_blocks import BlockBytes, chunks
from services.common.kv_wire import SIGN_OF_LIFE, encode, encode_spent
from services.worker.cancellations import Cancellations
from services.worker.capacity import Capacity, Claim
from services.worker.engine.block_exchange import BlockExchange
from services.worker.engine.sequence import Sequence as EngineSequence
from services.worker.engine_loop import EngineLoop, Turn
from services.worker.kv_metrics import KvMetrics
from services.worker.start_request import ModelLimits, build_sequences, count_ids, demand_of

_COPIED_AT_ONCE = 4
_SIGN_OF_LIFE_S = 0.5


class KvExporter:
    """What this worker holds, as messages: see `kv_wire`."""

    def __init__(self, exchange: BlockExchange, kv_format: str, metrics: KvMetrics) -> None:
        self._exchange = exchange
        self._kv_format = kv_format
        self._metrics = metrics

    def check(self, kv_format: str) -> None:
        """Raises Mismatch unless this is what is held here."""
        if kv_format != self._kv_format:
            raise Mismatch(f"This worker's KV format is {self._kv_format}, not {kv_format or '(empty)'}.")

    async def fetch(self, request: FetchBlocksRequest) -> AsyncIterator[bytes]:
        """The leading blocks of a chain that are here."""
        self.check(request.kv_format)
        if len(request.block_hashes) % HASH_BYTES:
            raise InvalidRequest(f"Chain hashes are {HASH_BYTES} bytes each.", field="block_hashes")
        async for message in self.send(Run(split_hashes(request.block_hashes))):
            yield message

    async def send(self, run: "Run", most: int | None = None) -> AsyncIterator[bytes]:
        """What of a run is here now and was not sent, up to the first block that is missing; `most` blocks of it."""
        end = len(run.names) if most is None else min(run.sent + most, len(run.names))
        while blocks := self._copy(run.names[run.sent : min(run.sent + _COPIED_AT_ONCE, end)]):
            for messages in blocks:
                for message in messages:
                    yield message
                run.sent += 1

    def _copy(self, names: Sequence[bytes]) -> list[list[bytes]]:
        """The messages of each of the leading blocks that are here."""
        held = self._exchange.hold(names)
        try:
            blocks = [BlockBytes(one.name, self._exchange.read(one.block), one.digest) for one in held]
            self._metrics.exported(sum(len(block.data) for block in blocks), len(blocks))
            return [[encode(chunk) for chunk in chunks(self._kv_format, block)] for block in blocks]
        finally:
            self._exchange.release(one.block for one in held)


class Run:
    """Consecutive blocks of a chain on their way to somebody."""

    def __init__(self, names: Sequence[bytes], sent: int = 0) -> None:
        self.names = names
        self.sent = sent

    @property
    def complete(self) -> bool:
        return self.sent == len(self.names)


class _Prefill:
    """The engine's key of a sequence that is run for its KV alone."""

    ended = True
    """Its token has no reader: see `executions.Ticket`."""

    def __init__(self, request: PrefillRequest) -> None:
        self.request = request
        self.news = asyncio.Event()
        self.finished = False
        self.error = ""

    def __str__(self) -> str:
        return f"{self.request.request_id}/prefill/{self.request.attempt}"


class Prefills:
    """Prompts computed for other workers.

    Such a prompt runs as a sequence of one token, which nobody reads. Its full blocks before the last token go out as
    the engine completes them.
    """

    def __init__(
        self,
        engine: EngineLoop,
        exporter: KvExporter,
        capacity: Capacity,
        limits: ModelLimits,
        cancellations: Cancellations,
        *,
        draining: Callable[[], bool],
        on_settled: Callable[[str, int, int, int], None],
        on_left: Callable[[], None],
        price_per_hour: float | None = None,
    ) -> None:
        """`on_settled` is told of every placement that was started or refused, `on_left` of every end of one."""
        self._price_per_hour = price_per_hour or 0.0
        self._engine = engine
        self._exporter = exporter
        self._capacity = capacity
        self._limits = limits
        self._cancellations = cancellations
        self._draining = draining
        self._on_settled = on_settled
        self._on_left = on_left
        self._running: set[_Prefill] = set()

    async def run(self, request: PrefillRequest) -> AsyncIterator[bytes]:
        """The blocks of a prompt, each as soon as it is computed; in between signs of life, while the engine steps; in
        the end what it took.

        Raises Overloaded when this worker has no room for it, and InvalidRequest if it can never run here.
        """
        prefill = _Prefill(request)
        try:
            self._exporter.check(request.kv_format)
            sequence = self._sequence(prefill)
            claim = self._admit(sequence)
        finally:
            self._on_settled(request.request_id, request.attempt, 1, count_ids(request.prompt_ids))
        sequence.hash_blocks(self._full_blocks(sequence), self._limits.block_size)
        run = Run(sequence.hashes[request.skip_blocks :])
        self._capacity.sent(claim, self._engine.add([sequence]))  # from now on it is the engine's
        self._running.add(prefill)
        try:
            async for message in self._follow(prefill, run):
                yield message
            if prefill.error:
                raise RequestFailed(prefill.error)
            time = MachineTime(prefill_ns=sequence.prefill_ns, decode_ns=sequence.decode_ns)
            yield encode_spent(PricedTime(time=time, price_per_hour=self._price_per_hour))
        finally:
            self._leave(prefill)

    def give_up(self) -> None:
        """Ends those that run: whoever wanted a prompt computes the rest of it."""
        for prefill in self._running:
            prefill.error = "This worker is draining."
            prefill.news.set()

    def observe(self, turn: Turn) -> None:
        """Called on the event loop after each turn of the engine."""
        if not self._running:
            return
        for sequence in turn.result.finished if turn.result is not None else ():
            if isinstance(sequence.key, _Prefill):
                sequence.key.finished = True
        for sequence, reason in turn.failed:
            if isinstance(sequence.key, _Prefill):
                sequence.key.finished, sequence.key.error = True, reason
        for prefill in self._running:
            prefill.news.set()

    async def _follow(self, prefill: _Prefill, run: Run) -> AsyncIterator[bytes]:
        """The run's blocks as the engine's turns complete them, until all are sent or the sequence has ended."""
        loop = asyncio.get_running_loop()
        sent_at = loop.time()
        while True:
            ended = prefill.finished or prefill.error  # asked before what there is, so that nothing comes between
            async for message in self._exporter.send(run):
                yield message
                sent_at = loop.time()
            if ended or run.complete:
                return
            if loop.time() - sent_at > _SIGN_OF_LIFE_S:
                yield SIGN_OF_LIFE
                sent_at = loop.time()
            await prefill.news.wait()
            prefill.news.clear()

    def _sequence(self, prefill: _Prefill) -> EngineSequence:
        request = prefill.request
        start = Start(
            request_id=request.request_id,
            attempt=request.attempt,
            prompt_ids=request.prompt_ids,
            cache_salt=request.cache_salt,
            choices=[StartChoice()],
            sampling=Sampling(temperature=0.0),
            stopping=Stopping(max_tokens=1),
        )
        [sequence] = build_sequences(start, [prefill], self._limits)
        if not 0 <= request.skip_blocks < self._full_blocks(sequence):
            raise InvalidRequest(
                f"skip_blocks {request.skip_blocks} leaves nothing of {self._full_blocks(sequence)} blocks.",
                field="skip_blocks",
            )
        return sequence

    def _full_blocks(self, sequence: EngineSequence) -> int:
        """Blocks that end before the last token, which is computed where the output is."""
        return (sequence.prompt_length - 1) // self._limits.block_size

    def _admit(self, sequence: EngineSequence) -> Claim:
        if self._draining():
            raise Unavailable("This worker is draining.")
        demand = demand_of([sequence], self._limits.block_size)
        if not self._capacity.admits(demand):
            raise Overloaded("This worker has no room for another prompt.")
        return self._capacity.take(demand)

    def _leave(self, prefill: _Prefill) -> None:
        self._running.discard(prefill)
        if not prefill.finished:
            self._cancellations.cancel({prefill: "remote_prefill"})
        self._capacity.release()
        self._on_left()
