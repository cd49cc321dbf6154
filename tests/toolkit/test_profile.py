"""What `headrace profile` says and writes; what it finds in a running stack is for the flow tests."""

import json
import os
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from headrace.v1.profile_pb2 import ProfileFile, ProfilePart, ProfilePhase, ProfileReport, ProfileRequest
from toolkit import profile
from toolkit.directives import NotTold
from toolkit.main import app
from toolkit.profile import Results, profile_worker, record_service, show_report
from toolkit.run_directory import RunningProcess, RunningStack

REPORT = ProfileReport(
    worker_id="w1",
    steps=50,
    traced_steps=10,
    seconds=2.0,
    step_seconds=1.6,
    phases=[
        ProfilePhase(name="decode", tokens=400, seconds=1.2, memory_delta_bytes=3 << 20),
        ProfilePhase(name="transfer", tokens=160, seconds=0.5, bytes_moved=5 << 20),
    ],
    peak_memory_bytes=700 << 20,
    memory_before_bytes=600 << 20,
)


def stack_of(*processes: RunningProcess) -> RunningStack:
    return RunningStack(1, "logs", "http://h:1", "h:2", "127.0.0.1:3", "", processes)


def process(name: str, service: str, pid: int | None = 1) -> RunningProcess:
    return RunningProcess(name, service, "127.0.0.1:1", None, "", "ready", pid, 0.0)


async def test_a_worker_that_no_stack_has(tmp_path: Path) -> None:
    with pytest.raises(NotTold, match="No stack that runs here has a worker 'gateway'"):
        await profile_worker([stack_of(process("gateway", "gateway"))], "gateway", ProfileRequest(), tmp_path)


def test_the_files_of_a_profile(tmp_path: Path) -> None:
    folder = tmp_path / "profile"
    for _ in range(2):  # a second profile replaces the first
        results = Results("w1", folder)
        results.take(ProfilePart(report=REPORT))
        for name, data in (("trace.json.gz", b"first "), ("trace.json.gz", b"second"), ("operators.txt", b"table")):
            results.take(ProfilePart(file=ProfileFile(name=name, data=data)))
        results.complete()
    assert json.loads((folder / "report.json").read_text())["phases"][0]["name"] == "decode"
    assert (folder / "operators.txt").read_text() == "table"
    for trace in ("trace.json.gz", "tensorboard/w1.pt.trace.json.gz"):
        assert (folder / trace).read_text() == "first second"


def test_the_table_of_a_profile() -> None:
    console = Console(record=True, width=120)
    show_report(REPORT, console)
    shown = console.export_text()
    assert "w1: 50 steps in 2.00 s, 1.60 s of it in steps; 10 more were traced." in shown
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines()[-2:]}
    assert rows["decode"] == ["400", "1.200", "3.000", "75.0%", "+3.0", "MiB"]
    assert rows["transfer"] == ["160", "0.500", "3.125", "25.0%", "5.0", "MiB", "moved"]


@pytest.mark.parametrize(
    ("service", "said"),
    [
        ("redis", "No stack that runs here has a service 'redis'"),
        ("worker", "Several processes are 'worker': choose one of worker-1, worker-2"),
        ("gateway", "gateway does not run at this moment"),
    ],
)
def test_a_service_that_cannot_be_recorded(tmp_path: Path, service: str, said: str) -> None:
    workers = (process("worker-1", "worker"), process("worker-2", "worker"))
    stack = stack_of(process("redis", "redis"), *workers, process("gateway", "gateway", pid=None))
    with pytest.raises(NotTold, match=said):
        record_service([stack], service, 1, "flamegraph", tmp_path)


@pytest.mark.parametrize(
    ("spy_says", "said"),
    [
        ("Error: Permission Denied (os error 13)", r"may not look into gateway .* as root, grant CAP_SYS_PTRACE"),
        ("Error: Failed to write flamegraph: No stack counts found\n\nStack backtrace:\n 8: main", "had nothing to do"),
        ("Error: no such process\n\nStack backtrace:\n 8: main", "could not record gateway: Error: no such process"),
        ("", "it said nothing"),
    ],
)
def test_what_went_wrong_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spy_says: str, said: str
) -> None:
    """What py-spy says, said by a program in its place: tests may run as root, who has every right."""
    spy = tmp_path / "py-spy"
    spy.write_text(f"#!/bin/sh\ncat <<'END'\n{spy_says}\nEND\nexit 1\n")
    spy.chmod(0o755)
    monkeypatch.setattr(profile.sys, "executable", str(tmp_path / "python"))
    stack = stack_of(process("gateway", "gateway", pid=os.getpid()))
    with pytest.raises(NotTold, match=said):
        record_service([stack], "gateway", 1, "flamegraph", tmp_path)


def test_either_a_worker_or_a_service() -> None:
    for options in ([], ["--worker", "w", "--service", "gateway"]):
        assert CliRunner().invoke(app, ["profile", *options]).exit_code == 2
