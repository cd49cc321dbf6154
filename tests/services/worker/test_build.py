"""The name a model gets when nobody gives it one, and work that must not hold up the end of the process."""

from pathlib import Path

import pytest

from services.worker.build import default_name, run_in_daemon_thread


def testdefault_names(tmp_path: Path) -> None:
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
