"""The name a model gets when nobody gives it one, who drafts, and work that must not hold up the end of the process."""

from dataclasses import replace
from pathlib import Path

import pytest

from services.worker.build import default_name, run_in_daemon_thread, speculative_rows
from services.worker.config import WorkerSettings
from services.worker.engine.model.echo import EchoModel


def test_default_names(tmp_path: Path) -> None:
    folder = tmp_path / "Qwen3-0.6B"
    folder.mkdir()
    file = tmp_path / "tiny.gguf"
    file.touch()
    assert default_name(str(folder)) == "Qwen3-0.6B"
    assert default_name(str(file)) == "tiny"
    assert default_name("Qwen/Qwen3-0.6B@main") == "Qwen/Qwen3-0.6B"
    assert default_name("default") == default_name("SmolLM2-135M-Instruct") == "SmolLM2-135M-Instruct"


async def test_work_off_the_loop_gives_its_result_or_its_error() -> None:
    assert await run_in_daemon_thread(lambda: 3) == 3

    def fail() -> int:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await run_in_daemon_thread(fail)


def test_drafts_only_where_they_change_no_token() -> None:
    echo = EchoModel(9, 9, step_s=0.0, special_ids=frozenset()).facts
    for implementation, rows in (("compiled", 5), ("native", 0), ("transformers", 0), ("echo", 0)):
        facts = replace(echo, implementation=implementation)
        assert speculative_rows(WorkerSettings(speculative_rows=5), facts) == rows
