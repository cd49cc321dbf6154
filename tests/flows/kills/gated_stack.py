"""A stack of real processes whose workers are held at a token, to be killed there."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from headrace.v1.scheduler_pb2 import DescribeFleetRequest, FleetWorker
from headrace.v1.scheduler_pb2_grpc import SchedulerStub
from tests.flows.headrace_up import eventually
from tests.flows.kills.gate import OPEN, Gate
from toolkit.ports import free_ports


@dataclass(slots=True)
class GatedWorker:
    name: str
    pid: int
    gate: Gate
    role: str


class GatedStack:
    """Gateway, scheduler and cache, started at construction, and forked workers; `close` at its end."""

    def __init__(self, folder: Path, redis_url: str, worker_settings: Mapping[str, object]) -> None:
        self._folder = folder
        self._worker_settings = worker_settings
        self._processes: list[subprocess.Popen[str]] = []
        self._forked = 0
        self.workers: dict[str, GatedWorker] = {}
        ports = free_ports("127.0.0.1")
        cache, scheduler, http, grpc_port = (next(ports) for _ in range(4))
        self._scheduler = f"127.0.0.1:{scheduler}"
        self.http_url, self.grpc_address = f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc_port}"
        self._finding = {
            "HEADRACE_REDIS_URL": redis_url,
            "HEADRACE_CACHES": f"127.0.0.1:{cache}",
            "HEADRACE_SCHEDULERS": self._scheduler,
        }
        self._start("cache", port=cache, metrics_port=0)
        self._start("scheduler", port=scheduler, metrics_port=0)
        self._start("gateway", http_port=http, grpc_port=grpc_port)
        self._nursery = self._run("tests.flows.kills.nursery_process", {}, subprocess.PIPE)

    def fork_worker(self, role: str = "both") -> GatedWorker:
        """A new worker, on its way, with its gate open."""
        self._forked += 1
        name = f"w{self._forked}"
        gate = Gate(self._folder / f"{name}.gate")
        settings = {"id": name, "port": 0, "metrics_port": 0, "role": role, **self._worker_settings}
        environment = {**self._finding, **_environment("worker", settings)}
        order = {"environment": environment, "gate": str(gate.path), "log": str(self._folder / "workers.log")}
        assert self._nursery.stdin is not None and self._nursery.stdout is not None
        print(json.dumps(order), file=self._nursery.stdin, flush=True)
        self.workers[name] = worker = GatedWorker(name, int(self._nursery.stdout.readline()), gate, role)
        return worker

    def kill(self, worker: GatedWorker) -> None:
        os.kill(worker.pid, signal.SIGKILL)
        del self.workers[worker.name]

    def replace_the_dead(self) -> None:
        """Forks a worker for each that has died by itself."""
        for worker in list(self.workers.values()):
            if not psutil.pid_exists(worker.pid):
                del self.workers[worker.name]
                self.fork_worker(worker.role)

    def hold(self, tokens: int) -> None:
        """From now on each worker but those that prefill computes so many tokens and no more."""
        for worker in self.workers.values():
            if worker.role != "prefill":
                worker.gate.allow(tokens)

    def open(self) -> None:
        self.hold(OPEN)

    def tokens(self) -> dict[str, int]:
        """How many each worker has computed."""
        return {name: worker.gate.tokens for name, worker in self.workers.items()}

    def until_ready(self, workers: int) -> None:
        """Returns when so many workers can be placed on, and the gateway is ready."""
        eventually(lambda: self._healthy() >= workers, f"{workers} workers", timeout_s=240)
        eventually(self._is_ready, "the gateway is ready", timeout_s=60)

    def who_decodes(self, before: Mapping[str, int], tokens: int) -> GatedWorker:
        """The worker that has work, and so many tokens more than before, when there is one."""
        found: list[GatedWorker] = []

        def one_is_there() -> bool:
            busy = [worker for worker in self._with_work() if worker.role != "prefill"]
            found[:] = [worker for worker in busy if worker.gate.tokens - before[worker.name] >= tokens]
            return len(found) == 1

        eventually(one_is_there, f"a worker at token {tokens}")
        return found[0]

    def until_sequences(self, count: int) -> None:
        """Returns when the workers have so many together."""

        def has() -> bool:
            states = [worker.state for worker in self._fleet()]
            return sum(state.running_sequences + state.waiting_sequences for state in states) == count

        eventually(has, f"{count} sequences")

    def resumes(self, reason: str) -> float:
        """How often the gateway went on elsewhere."""
        families = text_string_to_metric_families(httpx.get(f"{self.http_url}/metrics", timeout=10).text)
        samples = [
            sample for family in families for sample in family.samples if sample.name == "headrace_resumes_total"
        ]
        return sum(sample.value for sample in samples if sample.labels["reason"] == reason)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def _with_work(self) -> list[GatedWorker]:
        busy = [worker for worker in self._fleet() if worker.state.running_sequences + worker.state.waiting_sequences]
        names = {worker.registration.worker_id for worker in busy}
        return [worker for worker in self.workers.values() if worker.name in names]

    def _healthy(self) -> int:
        return sum(worker.healthy for worker in self._fleet() if worker.registration.worker_id in self.workers)

    def _fleet(self) -> list[FleetWorker]:
        try:
            with grpc.insecure_channel(self._scheduler) as channel:
                return list(SchedulerStub(channel).DescribeFleet(DescribeFleetRequest(), timeout=5).workers)
        except grpc.RpcError:
            return []

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.http_url}/health/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def _start(self, service: str, **settings: object) -> None:
        self._run(f"services.{service}", _environment(service, settings))

    def _run(self, module: str, environment: Mapping[str, str], pipes: int | None = None) -> "subprocess.Popen[str]":
        own = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
        log = (self._folder / f"{module}.log").open("w")
        process = subprocess.Popen(
            (sys.executable, "-m", module),
            env={**own, **self._finding, **environment},
            stdin=pipes or subprocess.DEVNULL,
            stdout=pipes or log,
            stderr=log,
            text=True,
        )
        self._processes.append(process)
        return process


def _environment(service: str, settings: Mapping[str, object]) -> dict[str, str]:
    return {f"HEADRACE_{service.upper()}_{name.upper()}": str(value) for name, value in settings.items()}
