"""The service that most tests talk to."""

from collections.abc import AsyncIterator

import pytest

from tests.services.cache.serving import Service, serving


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with serving() as service:
        yield service
