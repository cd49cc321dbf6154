"""`headrace profile`: what a running worker's engine spends its time on, and what any process of a stack does.

A worker profiles itself and streams its report and the files of its trace, so that it need not be on this machine's
disk. Every other service is looked at from outside, by py-spy, which needs no word with it.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import grpc.aio
from google.protobuf.json_format import MessageToJson
from rich.console import Console

from headrace.v1.profile_pb2 import ProfilePart, ProfileReport, ProfileRequest
from headrace.v1.worker_pb2_grpc import WorkerStub
from services.common.channel import dial
from services.common.config import ConfigError
from services.common.mutual_tls import showing
from toolkit.directives import NotTold
from toolkit.run_directory import RunningProcess, RunningStack
from toolkit.tables import new_table, print_whole

RecordFormat = Literal["flamegraph", "speedscope"]

_EXPORT_TIMEOUT_S = 300.0  # beyond the steps: a trace with stacks takes its time to write
_SUFFIXES: dict[RecordFormat, str] = {"flamegraph": ".svg", "speedscope": ".speedscope.json"}
_TRACE = "trace.json.gz"


async def profile_worker(
    stacks: Sequence[RunningStack], worker: str, request: ProfileRequest, out: Path
) -> ProfileReport:
    """Has a worker profile its next steps; puts report and trace into `out`. Raises NotTold, also when it is idle."""
    found = [
        (stack, one) for stack in stacks for one in stack.processes if one.service == "worker" and one.name == worker
    ]
    if not found:
        raise NotTold(f"No stack that runs here has a worker {worker!r}; `headrace ps` lists them.")
    stack, process = found[0]
    try:
        with showing(stack.tls):
            channel = dial(process.address)
    except ConfigError as error:
        raise NotTold(f"The stack's certificates cannot be used: {error}.") from None
    results, timeout_s = Results(worker, out), request.timeout_ms / 1000 + _EXPORT_TIMEOUT_S
    async with channel:
        try:
            async for part in WorkerStub(channel).Profile(request, timeout=timeout_s):
                results.take(part)
        except grpc.aio.AioRpcError as error:
            raise NotTold(error.details() or error.code().name) from None
    results.complete()
    return results.report


class Results:
    """What a worker sends, in a folder: report.json, and of a trace operators.txt, trace.json.gz and tensorboard/."""

    def __init__(self, worker: str, folder: Path) -> None:
        """Makes the folder with the first part."""
        self.report = ProfileReport()
        self._worker = worker
        self._folder = folder

    def take(self, part: ProfilePart) -> None:
        if part.HasField("file"):
            with (self._folder / Path(part.file.name).name).open("ab") as file:
                file.write(part.file.data)
            return
        self.report = part.report
        self._folder.mkdir(parents=True, exist_ok=True)
        text = MessageToJson(self.report, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        (self._folder / "report.json").write_text(text + "\n")
        for old in (_TRACE, "operators.txt"):
            (self._folder / old).unlink(missing_ok=True)

    def complete(self) -> None:
        """TensorBoard finds a trace by its name."""
        if (self._folder / _TRACE).exists():
            board = self._folder / "tensorboard"
            board.mkdir(exist_ok=True)
            shutil.copyfile(self._folder / _TRACE, board / f"{self._worker}.pt.{_TRACE}")


def show_report(report: ProfileReport, console: Console) -> None:
    """The report as a table. Shares are of the time in steps, and of all the time for what runs beside them."""
    table = new_table("phase", "tokens", "seconds", "ms/token", "share", "memory")
    for phase in report.phases:
        whole = report.seconds if phase.name == "transfer" else report.step_seconds
        per_token = f"{phase.seconds / phase.tokens * 1000:.3f}" if phase.tokens else ""
        memory = f"{phase.memory_delta_bytes / 2**20:+.1f} MiB" if phase.memory_delta_bytes else ""
        if phase.bytes_moved:
            memory = f"{phase.bytes_moved / 2**20:.1f} MiB moved"
        share = f"{phase.seconds / whole:.1%}" if whole else ""
        table.add_row(phase.name, str(phase.tokens), f"{phase.seconds:.3f}", per_token, share, memory)
    console.print(
        f"{report.worker_id}: {report.steps} steps in {report.seconds:.2f} s, {report.step_seconds:.2f} s of it in "
        f"steps; {report.traced_steps} more were traced. Memory: {report.memory_before_bytes / 2**20:.0f} MiB before, "
        f"{report.peak_memory_bytes / 2**20:.0f} MiB at most.",
        soft_wrap=True,
    )
    print_whole(table, console)


def record_service(stacks: Sequence[RunningStack], service: str, seconds: int, kind: RecordFormat, out: Path) -> Path:
    """Records what the Python code of a process does, and returns the file in `out`. Raises NotTold."""
    process = _process_of(stacks, service)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{process.name}{_SUFFIXES[kind]}"
    command = ("record", "--pid", str(process.pid), "--duration", str(seconds), "--format", kind, "--output", str(path))
    done = subprocess.run((_py_spy(), *command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise NotTold(_what_failed(process, done.stdout))
    return path


def _process_of(stacks: Sequence[RunningStack], service: str) -> RunningProcess:
    """The one process of that id, or of that service. Raises NotTold."""
    processes = [one for stack in stacks for one in stack.processes if one.service != "redis"]
    found = [one for one in processes if one.name == service] or [one for one in processes if one.service == service]
    if not found:
        raise NotTold(f"No stack that runs here has a service {service!r}; `headrace ps` lists them.")
    if len(found) > 1:
        raise NotTold(f"Several processes are {service!r}: choose one of {', '.join(one.name for one in found)}.")
    if found[0].pid is None:
        raise NotTold(f"{found[0].name} does not run at this moment.")
    return found[0]


def _py_spy() -> str:
    beside = Path(sys.executable).with_name("py-spy")
    path = str(beside) if beside.exists() else shutil.which("py-spy")
    if path is None:
        raise NotTold("py-spy is not installed: it comes with `make setup`, or with pip install py-spy.")
    return path


def _what_failed(process: RunningProcess, said: str) -> str:
    if "permission denied" in said.lower() or "not permitted" in said.lower():
        return (
            f"py-spy may not look into {process.name} (pid {process.pid}): that takes the right to trace processes. "
            "Run this as root, grant CAP_SYS_PTRACE (in containers: cap_add SYS_PTRACE), or set "
            "kernel.yama.ptrace_scope to 0."
        )
    if "no stack counts found" in said.lower():
        return f"{process.name} had nothing to do all the time: record it while it has work."
    errors = [line for line in said.splitlines() if line.startswith("Error: ")]
    return f"py-spy could not record {process.name}: {errors[0] if errors else said.strip() or 'it said nothing'}"
