"""Cells of the table of processes."""

import io
import os

import pytest
from rich.console import Console

from headrace.v1.scheduler_pb2 import WORKER_ROLE_DECODE, FleetWorker, ModelInfo, Registration, WorkerState
from toolkit.ps import format_duration, format_memory, show_stacks, worker_cells
from toolkit.run_directory import RunningProcess, RunningStack


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-1, "0s"), (0.4, "0s"), (42, "42s"), (185, "3m 5s"), (7200, "2h 0m"), (4 * 86400 + 7 * 3600 + 59, "4d 7h")],
)
def test_durations(seconds: float, words: str) -> None:
    assert format_duration(seconds) == words


def test_memory_of_a_process_that_is_there_and_of_one_that_is_not() -> None:
    assert format_memory(os.getpid()).endswith(" MiB")
    assert format_memory(2**22 + 1) == format_memory(None) == ""


def test_a_worker_shows_its_model_and_load() -> None:
    registration = Registration(model=ModelInfo(name="m"), total_blocks=200)
    state = WorkerState(running_sequences=3, free_blocks=150, role=WORKER_ROLE_DECODE)
    worker = FleetWorker(registration=registration, state=state, condition=FleetWorker.CONDITION_DRAINING)
    assert worker_cells(worker) == ("m", "decode", "draining", "3", "25%")
    assert worker_cells(None) == ("", "", "", "", "")


async def test_no_cell_is_cut_on_a_narrow_console() -> None:
    process = RunningProcess(
        name="gateway-with-a-long-name",
        service="gateway",
        address="127.0.0.1:1",
        metrics_url=None,
        log="",
        state="restarting soon",
        pid=None,
        started_unix_s=0.0,
    )
    stack = RunningStack(1, "logs", "http://127.0.0.1:1", "127.0.0.1:1", "127.0.0.1:1", "", (process,))
    shown = io.StringIO()
    await show_stacks([stack], Console(file=shown, width=40))
    [row] = [line for line in shown.getvalue().splitlines() if process.name in line]
    assert process.address in row and process.state in row
