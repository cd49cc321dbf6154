"""Run folders: what other commands read, and what is cleared away."""

import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from services.common.tls import FrontCert, TlsFiles
from toolkit.run_directory import (
    RunDirectory,
    RunningProcess,
    RunningStack,
    UnclearStack,
    redis_url_of,
    running_stacks,
)

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


def test_only_its_user_can_read_it(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.write_state(stack(directory))
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory.path / "stack.json").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("rediss://headrace:secret@h:4/0?ssl_ca_certs=/ca", "rediss://headrace:***@h:4/0?ssl_ca_certs=/ca"),
        ("redis://:secret@[::1]:4/0", "redis://:***@[::1]:4/0"),
        ("redis://u:a/secret@b@h:4/0", "redis://u:***@h:4/0"),
        ("redis://h:4/0?username=u&password=secret@&db=1", "redis://h:4/0?username=u&password=***&db=1"),
        ("redis://user@h:4/0", "redis://user@h:4/0"),
        ("unix:///run/redis.sock?db=1", "unix:///run/redis.sock?db=1"),
    ],
)
def test_of_several_stacks_one_is_to_be_chosen_and_no_password_is_shown(tmp_path: Path, url: str, shown: str) -> None:
    one = stack(RunDirectory(tmp_path))
    with pytest.raises(UnclearStack) as caught:
        redis_url_of([one, replace(one, redis_url=url)], None)
    said = str(caught.value)
    assert "secret" not in said
    assert one.redis_url in said and shown in said
    assert redis_url_of([one], url) == url


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
