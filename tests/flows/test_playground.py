"""The playground before the whole stack with the default model."""

import os
from pathlib import Path

import pytest

from tests.browser import chromium, running_browser
from tests.flows.headrace_up import HeadraceUp


@pytest.mark.skipif(not chromium() and not os.environ.get("CI"), reason="there is no chromium here")
async def test_the_default_model_answers_on_the_page(stack: HeadraceUp, model: str, tmp_path: Path) -> None:
    async with running_browser(tmp_path) as browser:
        await browser.resize(1360, 860)
        await browser.open(stack.http_url)
        await browser.wait_for("document.querySelector('[name=model]').value")
        await browser.fill("[name=temperature]", "0")
        await browser.fill("#prompt", "What is the capital of France?")
        await browser.press("Enter")
        await browser.wait_for("document.querySelector('.answer[aria-busy=false]')")
        assert "Paris" in await browser.text(".answer .text")
        budget = await browser.text(".answer .budget")
        assert "prefill" in budget and "decode" in budget
        await browser.wait_for("document.querySelector('.worker')")
        assert f"{model} Batch" in await browser.text(".worker")
        assert browser.complaints == []
