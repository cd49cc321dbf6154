import os

import pytest

from toolkit.log_levels import NotChanged, change_level
from toolkit.run_directory import RunningProcess, RunningStack


def stack_of(pid: int | None) -> RunningStack:
    gateway = RunningProcess("gateway", "gateway", "127.0.0.1:1", None, "", "ready", pid, 0.0)
    return RunningStack(1, "logs", "http://h:1", "h:2", "127.0.0.1:3", "", (gateway,))


def test_a_service_that_no_stack_has() -> None:
    with pytest.raises(NotChanged, match="No stack that runs here has a service 'worker'"):
        change_level([stack_of(1)], "worker", "debug")


@pytest.mark.parametrize("pid", [None, os.getpid()])
def test_a_process_that_would_end_by_the_signal_gets_none(pid: int | None) -> None:
    """This one does not follow these signals, as one that is still starting."""
    with pytest.raises(NotChanged, match="gateway is still starting, or does not run"):
        change_level([stack_of(pid)], "all", "debug")
