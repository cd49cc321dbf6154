"""Runs a command that dies with the process that started it: `python -P -m toolkit.tether PARENT_PID COMMAND...`.

Asks Linux to send SIGKILL when the parent ends, however it ends, then becomes the command. This is done in a process of
its own because code that runs between fork and exec (`preexec_fn`) may deadlock in a parent that has threads. On other
systems the command simply runs.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(arguments: list[str]) -> None:
    parent_pid, command = int(arguments[0]), arguments[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it ended before the request above was in force
        sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
