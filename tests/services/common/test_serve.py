import asyncio

import pytest

from services.common.serve import stopped


async def forever() -> None:
    await asyncio.Event().wait()


async def test_a_service_runs_until_it_is_told_to_stop() -> None:
    stop = asyncio.Event()
    task = asyncio.create_task(forever())
    waiting = asyncio.create_task(stopped(stop, [task]))
    await asyncio.sleep(0)
    assert not waiting.done()
    stop.set()
    await waiting
    assert not task.done()
    task.cancel()


async def test_a_service_ends_with_what_one_of_its_tasks_died_of() -> None:
    async def fails() -> None:
        raise ValueError("a bug")

    running = asyncio.create_task(forever())
    with pytest.raises(ValueError, match="a bug"):
        await stopped(asyncio.Event(), [running, asyncio.create_task(fails())])
    running.cancel()
