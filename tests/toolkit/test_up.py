"""What a person is told when a stack is ready: the line that asks it something, and of which model."""

from dataclasses import replace
from itertools import count
from pathlib import Path

import grpc.aio
import pytest

from headrace.v1 import scheduler_pb2_grpc
from headrace.v1.scheduler_pb2 import (
    DescribeFleetRequest,
    DescribeFleetResponse,
    FleetWorker,
    ModelInfo,
    Registration,
)
from services.common.tls import FrontCert
from tests.certificates import certificate
from toolkit.stack import StackOptions, plan_stack
from toolkit.up import served_model, welcome

OPTIONS = StackOptions(host="127.0.0.1", http_ports=(8000,), grpc_ports=(50051,))


@pytest.mark.parametrize(
    ("cert", "line"),
    [
        (None, "curl -N http://127.0.0.1:8000/v1/chat/completions"),
        (FrontCert("/c/a b.crt", "127.0.0.1"), "curl -N --cacert '/c/a b.crt' https://127.0.0.1:8000/v1/"),
        (
            FrontCert("/c/front.crt", "llm.example.com"),
            "curl -N --cacert /c/front.crt --connect-to ::127.0.0.1:8000 https://llm.example.com:8000/v1/",
        ),
    ],
)
def test_curl_trusts_the_certificate_and_uses_a_name_of_it(cert: FrontCert | None, line: str) -> None:
    stack = plan_stack(replace(OPTIONS, front_cert=cert), count(20_000), cores=2)
    assert line in welcome(stack, "m", 5.61, Path("/logs"))


def test_curl_trusts_the_ca_beside_the_certificate(tmp_path: Path) -> None:
    pair = certificate(tmp_path)
    stack = plan_stack(replace(OPTIONS, front_cert=FrontCert(str(pair.cert), "127.0.0.1")), count(20_000), cores=2)
    assert f"--cacert {pair.ca} https://127.0.0.1:8000/" in welcome(stack, "m", 5.61, Path("/logs"))


def test_curl_shows_a_key_where_one_is_needed() -> None:
    stack = plan_stack(OPTIONS, count(20_000), cores=2)
    needed, not_needed = (welcome(stack, "m", 5.61, Path("/logs"), needs_key=needs) for needs in (True, False))
    assert "completions -H 'authorization: Bearer KEY' -H" in needed and "keys create NAME makes the KEY" in needed
    assert "KEY" not in not_needed and "headrace keys create NAME  " in not_needed


@pytest.mark.parametrize("redis_url", [None, "redis://127.0.0.1:6379/0"])
def test_what_ends_with_the_run_is_told(redis_url: str | None) -> None:
    stack = plan_stack(replace(OPTIONS, redis_url=redis_url), count(20_000), cores=2)
    assert ("--redis-url keeps" in welcome(stack, "m", 5.61, Path("/logs"))) == (redis_url is None)


class LateScheduler(scheduler_pb2_grpc.SchedulerServicer):
    """Hears of its first worker only after it was asked once."""

    def __init__(self) -> None:
        self.asked = 0

    async def DescribeFleet(self, request: DescribeFleetRequest, context: object) -> DescribeFleetResponse:
        self.asked += 1
        worker = FleetWorker(registration=Registration(model=ModelInfo(name="m")))
        return DescribeFleetResponse(workers=[worker] if self.asked > 1 else [])


async def test_a_scheduler_that_knows_no_worker_yet_is_asked_again() -> None:
    server, scheduler = grpc.aio.server(), LateScheduler()
    scheduler_pb2_grpc.add_SchedulerServicer_to_server(scheduler, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    assert await served_model(f"127.0.0.1:{port}") == "m"
    assert scheduler.asked == 2
    await server.stop(0)
