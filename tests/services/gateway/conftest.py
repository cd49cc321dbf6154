from collections.abc import AsyncIterator

import pytest

from tests.services.gateway.stack import Stack, running_stack


@pytest.fixture
async def stack(redis_url: str) -> AsyncIterator[Stack]:
    """A ready gateway with one worker that tells a story."""
    async with running_stack(redis_url) as running:
        yield running
