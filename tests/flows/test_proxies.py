"""nginx and HAProxy in front of two gateways: streams, gRPC, and a gateway that ends while callers ask."""

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import grpc
import httpx
import pytest

from headrace.v1.inference_pb2 import GenerateRequest
from headrace.v1.inference_pb2_grpc import InferenceStub
from headrace.v1.sampling_pb2 import Sampling, Stopping
from tests.flows.conftest import WORKER_OPTIONS
from tests.flows.headrace_up import START_TIMEOUT_S, HeadraceUp, eventually
from tests.proxies import Proxy, binary_of, gateways_of

# What gRPC's clients are told for the calls that a gateway refuses as it ends; nginx cannot tell these from others.
RETRY = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{"service": "headrace.v1.Inference"}],
                "retryPolicy": {
                    "maxAttempts": 5,
                    "initialBackoff": "0.2s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)
TOKENS = 24

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, default_model: Path) -> Iterator[HeadraceUp]:
    settle = {"HEADRACE_GATEWAY_DRAIN_SETTLE_S": "3"}  # HAProxy asks every second
    running = HeadraceUp(tmp_path_factory.mktemp("proxies"), *WORKER_OPTIONS, "--gateways", "2", settings=settle)
    try:
        running.wait_ready()
        yield running
    finally:
        running.kill()


@pytest.fixture(scope="module", params=["nginx", "haproxy"])
def proxy(
    request: pytest.FixtureRequest, stack: HeadraceUp, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    if not binary_of(request.param) and not os.environ.get("CI"):
        pytest.skip(f"there is no {request.param} here")
    running = Proxy(request.param, tmp_path_factory.mktemp(request.param), gateways_of(stack))
    yield running
    running.kill()


def body(stack: HeadraceUp, **fields: object) -> dict[str, object]:
    model = stack.fleet().workers[0].registration.model.name
    asked = {"prompt": "Once upon a time", "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0}
    return {"model": model, **asked, **fields}


def active_requests(stack: HeadraceUp) -> float:
    return sum(stack.metric(name, "llm_active_requests") for name in ("gateway-1", "gateway-2"))


def test_events_come_as_they_are_made(stack: HeadraceUp, proxy: Proxy) -> None:
    long = body(stack, max_tokens=300, stream=True)
    with httpx.stream("POST", f"{proxy.url}/v1/completions", json=long, timeout=60) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        assert first.startswith("data: {"), first
        assert active_requests(stack) == 1, "the answer has not ended when its first event is here"
    eventually(lambda: active_requests(stack) == 0, "a caller that leaves is noticed behind the proxy")


def test_no_call_fails_while_a_gateway_ends(stack: HeadraceUp, proxy: Proxy) -> None:
    expected = httpx.post(f"{proxy.url}/v1/completions", json=body(stack), timeout=60).json()["choices"][0]["text"]
    request = GenerateRequest(
        model=str(body(stack)["model"]),
        text="Once upon a time",
        sampling=Sampling(temperature=0),
        stopping=Stopping(max_tokens=TOKENS, ignore_eos=True),
    )
    over = Event()

    def over_http() -> int:
        asked = 0
        with httpx.Client(base_url=proxy.url, timeout=60) as client:
            while not over.is_set():
                answer = client.post("/v1/completions", json=body(stack))
                assert answer.status_code == 200, answer.text
                assert answer.json()["choices"][0]["text"] == expected
                asked += 1
        return asked

    def over_grpc() -> int:
        asked = 0
        with grpc.insecure_channel(proxy.grpc_address, options=[("grpc.service_config", RETRY)]) as channel:
            while not over.is_set():
                deltas = InferenceStub(channel).Generate(request, timeout=60)
                assert "".join(delta.text for delta in deltas) == expected
                asked += 1
        return asked

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(work) for work in (over_http, over_http, over_grpc, over_grpc)]
        for name in ("gateway-1", "gateway-2"):
            restart(stack, name)
        over.set()
        assert all(call.result() > 0 for call in asking)


def restart(stack: HeadraceUp, name: str) -> None:
    """SIGTERM; returns when `headrace up` has it ready again."""
    since, pid = stack.lines_so_far, stack.pid_of(name)
    os.kill(pid, signal.SIGTERM)
    eventually(lambda: stack.member(name).pid not in (None, pid), f"{name} runs again", timeout_s=START_TIMEOUT_S)
    stack.wait_for_line(rf"^{name} +ready on", since=since, timeout_s=START_TIMEOUT_S)
