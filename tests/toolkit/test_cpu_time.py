"""CPU time of a tree of real processes."""

import subprocess
import sys

import pytest

from toolkit.cpu_time import CpuMeter, CpuUse, is_worker_command

BURNED_S = 0.1

# Each process burns a known amount of CPU time when it is told to.
BURNER = f"""
import sys, time
def burn():
    until = time.process_time() + {BURNED_S}
    while time.process_time() < until:
        pass
"""
WORKER = BURNER + "sys.stdin.readline(); burn(); print('burned', flush=True); sys.stdin.readline()"
PARENT = BURNER + (
    "import subprocess\n"
    f"worker = subprocess.Popen([sys.executable, '-c', {WORKER!r}, '-m', 'services.worker'], "
    "stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)\n"
    "print('up', flush=True); sys.stdin.readline(); burn()\n"
    "print('', file=worker.stdin, flush=True); worker.stdout.readline(); print('burned', flush=True)\n"
    "sys.stdin.readline()"
)


def measure(script: str) -> CpuUse:
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    with process:
        assert process.stdout.readline() == "up\n"
        with CpuMeter(process.pid) as meter:
            print("", file=process.stdin, flush=True)
            assert process.stdout.readline() == "burned\n"
    assert meter.use is not None
    return meter.use


def test_workers_and_the_rest_are_told_apart() -> None:
    use = measure(PARENT)
    # The kernel counts in ticks of 10 ms.
    assert use.worker_s >= BURNED_S - 0.02
    assert use.other_s >= BURNED_S - 0.02
    assert use.control_plane_share == use.other_s / (use.worker_s + use.other_s)
    assert use.worker_rss_mib > 1


def test_a_tree_without_workers_has_no_share() -> None:
    use = measure(BURNER + "print('up', flush=True); sys.stdin.readline(); burn(); print('burned', flush=True)")
    assert (use.worker_s, use.worker_rss_mib, use.control_plane_share) == (0.0, 0.0, None)


def test_a_tree_that_ends_meanwhile_counts_nothing() -> None:
    process = subprocess.Popen(["sleep", "600"])
    with CpuMeter(process.pid) as meter:
        process.kill()
        process.wait()
    assert meter.use == CpuUse(0, 0, 0, None)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python -P -m services.worker", True),
        ("python -P -m services.gateway", False),
        ("grep services.worker", False),
        ("", False),
    ],
)
def test_which_commands_are_workers(command: str, expected: bool) -> None:
    assert is_worker_command(command.split()) is expected
