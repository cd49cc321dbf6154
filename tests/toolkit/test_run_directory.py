"""Run folders: what other commands read, and what is cleared away."""

import subprocess
import sys
from pathlib import Path

from services.common.tls import FrontCert, TlsFiles
from toolkit.run_directory import RunDirectory, RunningProcess, RunningStack, running_stacks

WORKER = RunningProcess("worker", "worker", "127.0.0.1:1", None, "worker.log", "ready", 12, 1.5)


def stack(directory: RunDirectory) -> RunningStack:
    return RunningStack(
        1,
        str(directory.path),
        "http://h:1",
        "h:2",
        "h:3",
        "redis://h:4/0",
        (WORKER,),
        FrontCert("c", "n"),
        TlsFiles("a", "c", "k"),
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    assert running_stacks(tmp_path) == [], "nothing is told yet"
    directory.write_state(stack(directory))
    assert running_stacks(tmp_path) == [stack(directory)]


def test_a_stack_whose_process_is_gone_does_not_run(tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from tests.toolkit.test_run_directory import RunDirectory, stack
directory = RunDirectory(Path({str(tmp_path)!r}))
directory.write_state(stack(directory))
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    assert len(list(tmp_path.glob("*/stack.json"))) == 1
    assert running_stacks(tmp_path) == []


def test_the_last_few_dead_runs_are_kept(tmp_path: Path) -> None:
    for day in range(1, 10):
        (tmp_path / f"2026010{day}-000000-1").mkdir()
    RunDirectory(tmp_path)
    assert sorted(path.name[:8] for path in tmp_path.iterdir())[:-1] == [f"2026010{day}" for day in range(5, 10)]


def test_no_runs_at_all(tmp_path: Path) -> None:
    assert running_stacks(tmp_path / "never-made") == []
