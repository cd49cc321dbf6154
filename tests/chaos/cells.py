"""The faults, and what callers may see of each."""

import asyncio
import os
import signal
import time
from dataclasses import dataclass

from tests.chaos.callers import Callers, Question, Seen
from tests.flows.headrace_up import START_TIMEOUT_S, HeadraceUp, eventually

OPTIONS = (
    "--gateways",
    "2",
    "--prefill-workers",
    "1",
    "--decode-workers",
    "2",
    "--deterministic",
    "--dtype",
    "float32",
    "--kv-blocks",
    "640",
)
MEMBERS = {
    "gateway": "gateway-1",
    "gateway, resumable": "gateway-1",
    "scheduler": "scheduler",
    "cache": "cache",
    "decode worker": "decode-1",
    "prefill worker": "prefill",
    "Redis": "redis",
}
FAULTS = ("SIGKILL", "SIGTERM", "SIGSTOP")
WORKERS = 3
AT_ONCE = 6
QUESTIONS = [
    Question(tuple(range(1000 + 700 * number, 1000 + 700 * number + (500 if number % 4 == 3 else 24))), 40)
    for number in range(12)
]
_BEFORE_S, _STOPPED_S, _AFTER_S = 3.0, 10.0, 4.0
_LONGEST_PAUSE_S = {"SIGKILL": 10.0, "SIGTERM": 10.0, "SIGSTOP": 15.0}  # recomputing included


@dataclass(frozen=True, slots=True)
class Cell:
    """What callers saw of one fault of one member."""

    member: str
    fault: str
    seen: Seen

    @property
    def failures(self) -> list[str]:
        """What must not be."""
        ends = self.seen.ends
        bad = [f"{count} {end}" for end in ("wrong", "error", "lost") if (count := ends[end])]
        if ends["broken"] and (self.member, self.fault) != ("gateway", "SIGKILL"):
            bad.append(f"{ends['broken']} broken")
        if self.seen.longest_pause_s > _LONGEST_PAUSE_S[self.fault]:
            bad.append(f"a pause of {self.seen.longest_pause_s:.1f} s")
        if not ends["finished"]:
            bad.append("nothing finished")
        return bad


def start(stack: HeadraceUp) -> Callers:
    """Waits for the whole stack, and has callers learn the answers."""
    stack.wait_ready()
    until_healthy(stack, WORKERS)
    model = stack.fleet().workers[0].registration.model.name
    gateways = [member for member in stack.state.processes if member.service == "gateway"]
    urls = [str(gateway.metrics_url).removesuffix("/metrics") for gateway in gateways]
    callers = Callers(urls, model, QUESTIONS, AT_ONCE)
    asyncio.run(callers.learn())
    return callers


def until_healthy(stack: HeadraceUp, workers: int) -> None:
    """So many workers can be placed on."""

    def healthy() -> bool:
        return sum(worker.healthy for worker in stack.fleet().workers) == workers

    eventually(healthy, f"{workers} workers are there", timeout_s=START_TIMEOUT_S)


async def measure(stack: HeadraceUp, callers: Callers, member: str, fault: str, stopped_s: float = _STOPPED_S) -> Cell:
    """Strikes one member while the callers ask, and lets them ask until it is well again."""
    if member.endswith("resumable"):
        callers = callers.resumable()
    running = asyncio.create_task(callers.run())
    await asyncio.sleep(_BEFORE_S)
    await asyncio.to_thread(_strike, stack, MEMBERS[member], fault, stopped_s)
    await asyncio.to_thread(until_healthy, stack, WORKERS)
    await asyncio.sleep(_AFTER_S)
    callers.stop()
    return Cell(member, fault, await running)


def _strike(stack: HeadraceUp, name: str, fault: str, stopped_s: float) -> None:
    """Returns when the member is there again."""
    since, pid = stack.lines_so_far, stack.pid_of(name)
    if fault == "SIGSTOP":
        os.kill(pid, signal.SIGSTOP)
        time.sleep(stopped_s)
        os.kill(pid, signal.SIGCONT)
        return
    os.kill(pid, signal.Signals[fault])
    eventually(lambda: stack.member(name).pid not in (None, pid), f"{name} runs again", timeout_s=START_TIMEOUT_S)
    if name != "redis":
        stack.wait_for_line(rf"^{name} +ready on", since=since, timeout_s=START_TIMEOUT_S)
