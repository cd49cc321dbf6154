"""The load test's client against the real stack, and what `headrace bench` says to bad input."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.flows.headrace_up import HEADRACE, HeadraceUp
from toolkit.bench import write
from toolkit.loadtest import Row, first_model, run_row

TINY = Row("tiny", requests=3, concurrency=2, shared_prefix=32, unique_prompt=8, output=4)


async def test_a_row_is_done_whole(stack: HeadraceUp, tmp_path: Path) -> None:
    answered: list[None] = []
    model = await first_model(stack.http_url)
    result = await run_row(stack.http_url, model, TINY, seed=1, on_answer=lambda: answered.append(None))
    assert len(answered) == TINY.requests
    assert result.short_answers == 0
    assert 0 < result.ttft_p50_ms <= result.ttft_p99_ms <= result.wall_s * 1e3
    assert result.output_tokens_per_s * result.wall_s == pytest.approx(TINY.requests * TINY.output)
    write([result], tmp_path / "new folder/bench.json")
    assert json.loads((tmp_path / "new folder/bench.json").read_text())[0]["row"] == "tiny"


def test_an_unknown_row_is_named() -> None:
    run = subprocess.run([*HEADRACE, "bench", "--rows", "single,doubel"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert "there is no row 'doubel'; the rows are single, batch8, batch32, prefill, prefix, text." in run.stderr


def test_a_server_that_is_not_there_is_named() -> None:
    command = [*HEADRACE, "bench", "--url", "http://127.0.0.1:9"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert "--url: http://127.0.0.1:9 does not answer" in run.stderr
