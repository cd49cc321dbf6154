"""nginx and HAProxy in front of two gateways: streams, gRPC, and a gateway that ends, drains or stands still."""

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

# What gRPC's clients are told for the calls that a gateway refuses as it ends and as it starts; nginx cannot tell these
# from others.
RETRY = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{"service": "headrace.v1.Inference"}],
                "retryPolicy": {
                    "maxAttempts": 5,
                    "initialBackoff": "0.5s",
                    "maxBackoff": "5s",
                    "backoffMultiplier": 3,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)
TOKENS = 24
GATEWAYS = ("gateway-1", "gateway-2")

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
def front(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if not binary_of(name) and not os.environ.get("CI"):
        pytest.skip(f"there is no {name} here")
    return name


@pytest.fixture(scope="module")
def proxy(front: str, stack: HeadraceUp, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with Proxy(front, tmp_path_factory.mktemp(front), gateways_of(stack)) as running:
        yield running


def body(stack: HeadraceUp, **fields: object) -> dict[str, object]:
    model = stack.fleet().workers[0].registration.model.name
    asked = {"prompt": "Once upon a time", "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0}
    return {"model": model, **asked, **fields}


def generate_request(stack: HeadraceUp, tokens: int) -> GenerateRequest:
    return GenerateRequest(
        model=str(body(stack)["model"]),
        text="Once upon a time",
        sampling=Sampling(temperature=0),
        stopping=Stopping(max_tokens=tokens, ignore_eos=True),
    )


def active_requests(stack: HeadraceUp) -> float:
    return sum(stack.metric(name, "llm_active_requests") for name in GATEWAYS)


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
    request = generate_request(stack, TOKENS)
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
        for name in GATEWAYS:
            restart(stack, name)
        over.set()
        assert all(call.result() > 0 for call in asking)


def restart(stack: HeadraceUp, name: str) -> None:
    """SIGTERM; returns when `headrace up` has it ready again."""
    since, pid = stack.lines_so_far, stack.pid_of(name)
    os.kill(pid, signal.SIGTERM)
    eventually(lambda: stack.member(name).pid not in (None, pid), f"{name} runs again", timeout_s=START_TIMEOUT_S)
    stack.wait_for_line(rf"^{name} +ready on", since=since, timeout_s=START_TIMEOUT_S)


def until_told(proxy: Proxy, state: str, since: int) -> None:
    """Returns when HAProxy has said of the first gateway's both ports that they are UP or DOWN."""
    for backend in ("gateways_http", "gateways_grpc"):
        proxy.wait_for(rf"Server {backend}/g0 is {state}", since=since)


def ask_all(stack: HeadraceUp, proxy: Proxy) -> None:
    """More calls at once than one gateway would get if there were two, over HTTP and over gRPC. None fails."""

    def over_http() -> None:
        answer = httpx.post(f"{proxy.url}/v1/completions", json=body(stack, max_tokens=1), timeout=60)
        assert answer.status_code == 200, answer.text

    def over_grpc() -> None:
        with grpc.insecure_channel(proxy.grpc_address) as channel:
            assert list(InferenceStub(channel).Generate(generate_request(stack, 1), timeout=60))

    with ThreadPoolExecutor(8) as pool:
        for call in [pool.submit(ask) for ask in (over_http, over_grpc) * 4]:
            call.result()


def came_to(stack: HeadraceUp, name: str) -> float:
    """Requests that have ended at a gateway, or were refused by it."""
    return stack.metric(name, "llm_requests_total") + stack.metric(name, "headrace_shed_total")


@pytest.mark.parametrize("front", ["haproxy"], indirect=True)
def test_haproxy_sends_nothing_to_a_gateway_that_stands_still(stack: HeadraceUp, proxy: Proxy) -> None:
    pid, before, since = stack.pid_of("gateway-1"), came_to(stack, "gateway-1"), len(proxy.output)
    os.kill(pid, signal.SIGSTOP)
    try:
        until_told(proxy, "DOWN", since)
        ask_all(stack, proxy)
    finally:
        os.kill(pid, signal.SIGCONT)
    until_told(proxy, "UP", since)
    assert came_to(stack, "gateway-1") == before


@pytest.mark.parametrize("front", ["haproxy"], indirect=True)
def test_haproxy_sends_nothing_to_a_gateway_that_drains(stack: HeadraceUp, proxy: Proxy) -> None:
    pid, before, since = stack.pid_of("gateway-1"), came_to(stack, "gateway-1"), len(proxy.output)
    lines = stack.lines_so_far
    long = body(stack, max_tokens=4000, stream=True)
    with httpx.Client(base_url=proxy.url, timeout=60) as client:
        with client.stream("POST", "/v1/completions", json=long), client.stream("POST", "/v1/completions", json=long):
            assert [stack.metric(name, "llm_active_requests") for name in GATEWAYS] == [1, 1]
            os.kill(pid, signal.SIGTERM)
            until_told(proxy, "DOWN", since)
            ask_all(stack, proxy)
            assert came_to(stack, "gateway-1") == before
            assert stack.metric("gateway-1", "llm_active_requests") == 1, "what it runs goes on"
    stack.wait_for_line(r"^gateway-1 +ready on", since=lines, timeout_s=START_TIMEOUT_S)
    until_told(proxy, "UP", since)


@pytest.mark.parametrize("front", ["nginx"], indirect=True)
def test_nginx_leaves_a_request_with_a_gateway_that_stands_still(front: str, stack: HeadraceUp, tmp_path: Path) -> None:
    with Proxy(front, tmp_path, gateways_of(stack), longest_wait_s=3) as proxy:
        pid = stack.pid_of("gateway-1")
        os.kill(pid, signal.SIGSTOP)
        try:
            answers = [httpx.get(f"{proxy.url}/v1/models", timeout=60) for _ in range(4)]
        finally:
            os.kill(pid, signal.SIGCONT)
        assert {answer.status_code for answer in answers} == {200, 504}
