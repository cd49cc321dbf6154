"""The engine's thread, and how the event loop talks to it.

Commands go in through a queue; after every turn of the thread one value, a `Turn`, goes to a listener on the event
loop. Neither side ever waits for the other. Knows sequences and their keys, not who they belong to.
"""

import asyncio
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import partial

from services.worker.engine.block_exchange import BlockExchange, PublishedBlocks
from services.worker.engine.counters import EngineCounters
from services.worker.engine.engine import Engine, StepResult
from services.worker.engine.sequence import Sequence
from services.worker.engine.step_probe import StepProbe
from services.worker.engine.step_shares import charge

log = logging.getLogger(__name__)

_FILLING_POLL_S = 0.005  # how often a static batch that is still filling is looked at
_MAX_FAILURES_IN_A_ROW = 5  # then it is the engine that is broken and not a sequence


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """What the engine is doing, as of one turn."""

    counters: EngineCounters  # a copy
    running: int
    waiting: int
    waiting_blocks: int  # blocks that sequences without any will take when they are admitted
    pending_prefill_tokens: int
    commands: int  # commands that are reflected in all this


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of the engine's thread: commands were carried out, then at most one step was made."""

    status: EngineStatus
    held_blocks: PublishedBlocks | None  # a snapshot, if one was asked for, from before the step
    result: StepResult | None
    failed: list[tuple[Sequence, str]]  # sequences the engine gave up, with one sentence why
    dropped: list[Sequence]  # sequences that it let go of since they were cancelled
    step_seconds: float


Listener = Callable[[Turn], None]


class EngineLoop:
    """Owns an engine, which only its thread touches. Methods are called on the event loop."""

    def __init__(self, engine: Engine, block_size: int) -> None:
        self._engine = engine
        self._block_size = block_size
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._commands_sent = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop
        self._listener: Listener
        self._ended: asyncio.Future[None]
        # Everything below belongs to the thread.
        self._commands_done = 0
        self._sequences: dict[Hashable, Sequence] = {}
        self._failed: list[tuple[Sequence, str]] = []
        self._dropped: list[Sequence] = []
        self._started_ns = time.perf_counter_ns()
        self._busy_ns = 0  # in steps that have ended
        self._step_began_ns: int | None = None
        self._held_blocks: PublishedBlocks | None = None
        self._filling = False
        self._probe: StepProbe | None = None
        self._failures_in_a_row = 0

    @property
    def exchange(self) -> BlockExchange:
        """The engine's blocks, which anybody may use at any time."""
        return self._engine.exchange

    @property
    def counters(self) -> EngineCounters:
        """Those of the engine, as they are now."""
        return self._engine.counters

    @property
    def idle_seconds(self) -> float:
        """Time since the start that no step took, the one that runs included. May be read at any time."""
        now = time.perf_counter_ns()
        began = self._step_began_ns
        return (now - self._started_ns - self._busy_ns - (now - began if began is not None else 0)) / 1e9

    def start(self, listener: Listener) -> None:
        """Starts the thread; `listener` is called on the running event loop, once per turn."""
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._ended = self._loop.create_future()
        self._thread.start()

    def add(self, sequences: list[Sequence]) -> int:
        """Queues new sequences. Returns this command's number, counted from 1 (see `EngineStatus.commands`)."""
        return self._send(partial(self._add, sequences))

    def cancel(self, keys: Iterable[Hashable]) -> int:
        """Drops sequences and frees their blocks. Their tokens may still arrive in turns that are on their way.

        Returns this command's number.
        """
        return self._send(partial(self._drop, list(keys)))

    def request_snapshot(self) -> None:
        """Has the next turn bring the hashes of all blocks held; block events after it go on from there."""
        self._send(self._take_snapshot)

    def profile(self, *, steps: int, traced_steps: int, on_end: Callable[[], None]) -> StepProbe:
        """Has the next steps timed and those after them traced; `on_end` is called on the thread. One at a time."""
        probe = StepProbe(self._engine, steps=steps, traced_steps=traced_steps, on_end=on_end)
        self._send(partial(self._begin_profile, probe))
        return probe

    def end_profile(self, probe: StepProbe) -> None:
        """Ends a profile before it has all its steps. One that has ended stays as it is."""
        self._send(partial(self._end_profile, probe))

    async def stop(self) -> None:
        """Ends the thread after the step it is in."""
        self._inbox.put(None)
        await self.ended()

    async def ended(self) -> None:
        """Returns when the thread has ended after `stop`; raises what it died of if it died."""
        await asyncio.shield(self._ended)

    def _send(self, command: Callable[[], None]) -> int:
        self._inbox.put(command)
        self._commands_sent += 1
        return self._commands_sent

    # --- on the engine's thread

    def _run(self) -> None:
        death: Exception | None = None
        try:
            while self._carry_out_commands():
                self._loop.call_soon_threadsafe(self._listener, self._turn())
        except Exception as error:
            log.exception("the engine's thread died, with sequences %s", _names(self._sequences))
            death = error
        self._loop.call_soon_threadsafe(self._end, death)

    def _end(self, death: Exception | None) -> None:
        if death is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(death)

    def _carry_out_commands(self) -> bool:
        """Carries out what is in the inbox, waiting for something while there is no work. False: stop."""
        wait_s: float | None = None
        if self._engine.has_work:
            wait_s = _FILLING_POLL_S if self._filling else 0.0
        try:
            while (command := self._inbox.get(timeout=wait_s)) is not None:
                command()
                self._commands_done += 1
                wait_s = 0.0
        except queue.Empty:
            return True
        return False

    def _turn(self) -> Turn:
        held_blocks, self._held_blocks = self._held_blocks, None
        result, step_ns = self._step() if self._engine.has_work else (None, 0)
        if result is not None:
            self._failures_in_a_row = 0
            self._filling = result.computed_tokens == 0
            for sequence in result.finished:
                del self._sequences[sequence.key]
        failed, self._failed = self._failed, []
        dropped, self._dropped = self._dropped, []
        return Turn(self._status(), held_blocks, result, failed, dropped, step_ns / 1e9)

    def _step(self) -> tuple[StepResult | None, int]:
        """A step, None if it failed, and how many nanoseconds it took, which are charged to its sequences."""
        counters = self._engine.counters
        self._step_began_ns = began_ns = time.perf_counter_ns()
        try:
            result = self._engine.step() if self._probe is None else self._probed_step(self._probe)
        except Exception as error:
            lost = self._give_up_running(error)
            log.exception("a step failed, which ends sequences %s", _names(lost))
            result = None
        step_ns = time.perf_counter_ns() - began_ns
        if result is None:
            counters.failed_ns += step_ns
        elif result.slices:
            prefill_ns, decode_ns = charge(result.slices, step_ns)
            counters.prefill_ns += prefill_ns
            counters.decode_ns += decode_ns
        if result is None or result.slices:
            self._busy_ns += step_ns
        self._step_began_ns = None
        return result, step_ns

    def _begin_profile(self, probe: StepProbe) -> None:
        self._probe = probe
        probe.begin()

    def _probed_step(self, probe: StepProbe) -> StepResult:
        result = probe.step()
        if probe.ended:
            self._probe = None
        return result

    def _end_profile(self, probe: StepProbe) -> None:
        probe.end()
        if self._probe is probe:
            self._probe = None

    def _status(self) -> EngineStatus:
        engine = self._engine
        waiting = [sequence for sequence in self._sequences.values() if not sequence.blocks]
        spared = [self._spared(sequence) for sequence in waiting]
        own = [len(sequence.tokens) - tokens for sequence, tokens in zip(waiting, spared, strict=True)]
        return EngineStatus(
            counters=dataclasses.replace(engine.counters),
            running=engine.num_running,
            waiting=engine.num_waiting,
            waiting_blocks=sum(-(-length // self._block_size) for length in own),
            pending_prefill_tokens=engine.pending_prefill_tokens - sum(spared),
            commands=self._commands_done,
        )

    def _spared(self, sequence: Sequence) -> int:
        """Tokens that a waiting sequence need not compute, since its leader will (those of the prompt's full blocks
        before its last token) or since their blocks are kept for it.
        """
        if sequence.leader is not None:
            return (sequence.prompt_length - 1) // self._block_size * self._block_size
        return len(sequence.held) * self._block_size

    def _add(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            try:
                self._engine.add(sequence)
            except ValueError as error:
                self._failed.append((sequence, f"The engine refuses this sequence: {error}."))
            else:
                self._sequences[sequence.key] = sequence

    def _drop(self, keys: list[Hashable]) -> None:
        self._dropped += [self._sequences[key] for key in keys if key in self._sequences]
        self._cancel(keys)

    def _cancel(self, keys: list[Hashable]) -> None:
        for key in keys:
            self._engine.cancel(key)
            self._sequences.pop(key, None)

    def _take_snapshot(self) -> None:
        self._held_blocks = self._engine.exchange.snapshot()

    def _give_up_running(self, error: Exception) -> list[Hashable]:
        """After a failed step: ends the sequences that were in it, so that the others can go on. Returns their keys."""
        self._failures_in_a_row += 1
        if self._failures_in_a_row == _MAX_FAILURES_IN_A_ROW:
            raise error
        running = [sequence for sequence in self._sequences.values() if sequence.blocks]
        lost = running or list(self._sequences.values())
        keys = [sequence.key for sequence in lost]
        self._cancel(keys)
        reason = f"The engine failed in a step that computed this sequence ({type(error).__name__})."
        self._failed += [(sequence, reason) for sequence in lost]
        return keys


def _names(keys: Iterable[Hashable]) -> str:
    return ", ".join(map(str, keys)) or "none"
