"""Trees of real processes, stopped and let go on."""

import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from toolkit.process_tree import ProcessTree

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
print(child.pid, flush=True)
child.wait()
"""


@pytest.fixture
def family() -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """A process and its child."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    yield parent, child
    parent.kill()
    parent.wait()
    if child.is_running():
        child.kill()


async def test_a_tree_stops_whole_and_goes_on(family: tuple[subprocess.Popen[str], psutil.Process]) -> None:
    parent, child = family
    tree = ProcessTree(parent.pid)
    await tree.stop()
    assert [psutil.Process(parent.pid).status(), child.status()] == [psutil.STATUS_STOPPED] * 2
    tree.go_on()
    assert psutil.STATUS_STOPPED not in (psutil.Process(parent.pid).status(), child.status())


async def test_a_child_whose_parent_was_killed_meanwhile_goes_on(
    family: tuple[subprocess.Popen[str], psutil.Process],
) -> None:
    parent, child = family
    tree = ProcessTree(parent.pid)
    await tree.stop()
    parent.kill()
    parent.wait()
    assert child.status() == psutil.STATUS_STOPPED
    tree.go_on()
    # Its standard input is closed now, so that it ends, however soon whoever inherits it takes note.
    assert not child.is_running() or child.status() != psutil.STATUS_STOPPED


async def test_a_tree_that_has_ended_is_no_error(family: tuple[subprocess.Popen[str], psutil.Process]) -> None:
    parent, _ = family
    tree = ProcessTree(parent.pid)
    parent.kill()
    parent.wait()
    await tree.stop()
    tree.go_on()
