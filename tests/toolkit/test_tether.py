"""A tethered command dies with its parent, however the parent dies."""

import os
import signal
import subprocess
import sys

PARENT = """
import os, subprocess, sys
tether = [sys.executable, "-P", "-m", "toolkit.tether", str(os.getpid())]
subprocess.call([*tether, "sh", "-c", "echo $$; exec sleep 600"])
"""


def test_the_command_dies_when_its_parent_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert int(parent.stdout.readline()) != parent.pid
    parent.kill()
    parent.wait()
    assert parent.stdout.read() == ""  # the pipe closes when the last process that holds it ends


def test_a_command_whose_parent_is_gone_already_does_not_start() -> None:
    gone = 2**22 + 1  # above the largest process id
    command = [sys.executable, "-P", "-m", "toolkit.tether", str(gone), "echo", "started"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")


def test_the_command_takes_the_place_of_the_tether() -> None:
    command = [sys.executable, "-P", "-m", "toolkit.tether", str(os.getpid()), "sh", "-c", "kill -TERM $$"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGTERM
