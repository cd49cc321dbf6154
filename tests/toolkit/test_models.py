"""`headrace models pull` against the real store, and the drawing of its progress."""

import asyncio
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from toolkit.models import PullFailed, draw_progress, pull_model


def silent() -> Console:
    return Console(file=io.StringIO())


async def test_progress_is_drawn_per_stage_and_the_outcome_is_returned() -> None:
    reports = asyncio.StreamReader()
    for report in (
        {"stage": "reading", "fraction": 0.5},
        {"stage": "writing", "fraction": 0.25},
        {"stage": "writing", "fraction": 1.0},
        {"path": "/models/x"},
    ):
        reports.feed_data(json.dumps(report).encode() + b"\n")
    reports.feed_eof()
    console = silent()
    assert await draw_progress(reports, console) == {"path": "/models/x"}
    assert isinstance(console.file, io.StringIO)
    drawn = console.file.getvalue()
    assert "reading" in drawn and "50%" in drawn
    assert "writing" in drawn and "100%" in drawn


async def test_what_the_store_cannot_find_is_told_in_its_words() -> None:
    with pytest.raises(PullFailed, match="No model 'no such model'"):
        await pull_model("no such model", silent())


async def test_a_folder_is_found_where_it_is(default_model: Path) -> None:
    assert await pull_model(str(default_model), silent()) == str(default_model)
