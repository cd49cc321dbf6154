"""Several requests' deltas as one stream, for HTTP completions with more than one prompt."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

from services.gateway.request import Delta


async def merge(streams: Sequence[AsyncGenerator[Delta, None]], choices_each: int) -> AsyncGenerator[Delta, None]:
    """Deltas in the order they come; choice j of prompt i becomes choice i * `choices_each` + j.

    The first error ends all: the others are cancelled and it is raised.
    """
    arrived: asyncio.Queue[Delta | asyncio.Task[None]] = asyncio.Queue()

    async def pump(position: int, deltas: AsyncGenerator[Delta, None]) -> None:
        async for delta in deltas:
            delta.choice += position * choices_each
            arrived.put_nowait(delta)

    tasks = [asyncio.create_task(pump(position, deltas)) for position, deltas in enumerate(streams)]

    def ended(task: asyncio.Task[None]) -> None:
        _ = task.cancelled() or task.exception()  # looked at, whether or not somebody still reads `arrived`
        arrived.put_nowait(task)

    for task in tasks:
        task.add_done_callback(ended)
    running = len(tasks)
    try:
        while running:
            item = await arrived.get()
            if isinstance(item, asyncio.Task):
                item.result()
                running -= 1
            else:
                yield item
    finally:
        # Not awaited: CPython 3.11 crashes when a second cancellation meets a nested async generator that awaits here.
        for task in tasks:
            task.cancel()
