from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.browser import Browser, running_browser


@pytest.fixture
async def browser(tmp_path: Path) -> AsyncIterator[Browser]:
    async with running_browser(tmp_path) as browser:
        await browser.resize(1360, 860)
        yield browser
