"""Keeps a set of processes running and stops them in order. Knows nothing of what the processes are."""

import asyncio
from collections.abc import Callable, Iterable, Sequence

from toolkit.process import ProcessSpec, SupervisedProcess


class Supervisor:
    """Runs processes until they are stopped. `on_change` is called whenever the state of one of them changes."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        self._tiers: list[list[SupervisedProcess]] = []
        self._runs: dict[SupervisedProcess, asyncio.Task[None]] = {}
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def processes(self) -> Sequence[SupervisedProcess]:
        """In the order in which they were started."""
        return tuple(self._runs)

    def start(self, specs: Iterable[ProcessSpec]) -> None:
        """Starts a tier of processes, which will be stopped together, before those started earlier."""
        tier = [SupervisedProcess(spec, self._on_change) for spec in specs]
        self._tiers.append(tier)
        for process in tier:
            run = asyncio.create_task(process.run(), name=process.spec.name)
            run.add_done_callback(self._note_failure)
            self._runs[process] = run

    async def wait_ready(self) -> None:
        """Returns when every process started so far has become ready; `wait_failed` tells whether one never will."""
        await asyncio.gather(*(process.ready.wait() for process in self._runs))

    async def wait_failed(self) -> None:
        """Raises ProcessFailed when a process is given up; never returns otherwise."""
        await asyncio.shield(self._failure)

    async def stop(self) -> list[SupervisedProcess]:
        """Stops tier by tier, the last started first. Returns those that had to be killed to end."""
        stubborn: list[SupervisedProcess] = []
        for tier in reversed(self._tiers):
            for process in tier:
                process.ask_to_stop()
            ended = await asyncio.gather(*(self._wait_ended(process) for process in tier))
            stubborn += [process for process, by_itself in zip(tier, ended, strict=True) if not by_itself]
        return stubborn

    def kill(self) -> None:
        """Ends every process at once."""
        for process in self._runs:
            process.kill()

    async def _wait_ended(self, process: SupervisedProcess) -> bool:
        """True if it ended by itself in its grace period; after that it is killed."""
        run = self._runs[process]
        ended, _ = await asyncio.wait({run}, timeout=process.spec.stop_grace_s)
        if not ended:
            process.kill()
            await asyncio.wait({run})
        return bool(ended)

    def _note_failure(self, run: asyncio.Task[None]) -> None:
        error = None if run.cancelled() else run.exception()
        if error is not None and not self._failure.done():
            self._failure.set_exception(error)
