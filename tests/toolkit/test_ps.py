"""Cells of the table of processes."""

import os

import pytest

from headrace.v1.scheduler_pb2 import WORKER_ROLE_DECODE, FleetWorker, ModelInfo, Registration, WorkerState
from toolkit.ps import format_duration, format_memory, worker_cells


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
