"""Readers of a recorded request that runs here: all of its deltas, in order, however slowly they are read."""

import asyncio
from collections.abc import AsyncGenerator
from typing import cast

import pytest

from headrace.v1.sampling_pb2 import FinishReason
from services.gateway.answers.journal import Journal
from services.gateway.answers.recorded_run import RecordedRun
from services.gateway.request import Delta


def delta(number: int) -> Delta:
    return Delta(0, number, f"{number} ", 0, [number], FinishReason.FINISH_REASON_UNSPECIFIED)


@pytest.mark.parametrize("position", [0, 1, 2])
async def test_what_comes_while_a_delta_is_read_is_read_next(position: int) -> None:
    go_on = asyncio.Event()

    async def deltas() -> AsyncGenerator[Delta, None]:
        for number in range(3):
            yield delta(number)
        await go_on.wait()
        for number in range(3, 7):
            yield delta(number)

    recorded = RecordedRun("r", cast(Journal, None))
    collecting = asyncio.create_task(recorded.collect(deltas()))
    read = []
    async with asyncio.timeout(10):
        async for one in recorded.deltas(position):
            read.append(one.seq)
            go_on.set()
            await collecting  # all others have come before it is asked for the next
    assert read == list(range(position, 7))
