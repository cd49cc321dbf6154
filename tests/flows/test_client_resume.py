"""Callers of resumable answers lose their connection or their gateway, and go on with the other gateway."""

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import pytest

from headrace.v1.inference_pb2 import CancelRequest, GenerateRequest, ResumeRequest
from headrace.v1.inference_pb2_grpc import InferenceStub
from headrace.v1.sampling_pb2 import Sampling, Stopping
from tests.flows.conftest import WORKER_OPTIONS
from tests.flows.headrace_up import HeadraceUp, eventually

TOKENS = 160
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def two_gateways(tmp_path_factory: pytest.TempPathFactory, default_model: Path) -> Iterator[HeadraceUp]:
    running = HeadraceUp(tmp_path_factory.mktemp("two-gateways"), *WORKER_OPTIONS, "--gateways", "2", "--deterministic")
    try:
        running.wait_ready()
        yield running
    finally:
        running.kill()


def gateways(stack: HeadraceUp) -> list[str]:
    """URLs of both, the first one first."""
    members = [member for member in stack.state.processes if member.service == "gateway"]
    return [str(member.metrics_url).removesuffix("/metrics") for member in members]


def body(stack: HeadraceUp) -> dict[str, object]:
    return {
        "model": stack.fleet().workers[0].registration.model.name,
        "prompt": "Once upon a time",
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "seed": 7,
        "stream": True,
        "resumable": True,
        "deterministic": True,
    }


class Reader:
    """The text that a caller has seen, over one connection or several."""

    def __init__(self, stack: HeadraceUp) -> None:
        self._body = body(stack)
        self.text = ""
        self.event_id = ""
        self.done = False

    def read(self, url: str, events: int | None = None) -> None:
        """Reads from there on: so many events, or to the end."""
        headers = {"last-event-id": self.event_id} if self.event_id else {}
        with httpx.stream("POST", f"{url}/v1/completions", json=self._body, headers=headers, timeout=120) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line.startswith("id: "):
                    self.event_id = line.removeprefix("id: ")
                elif line.startswith("data: "):
                    self._take(line.removeprefix("data: "))
                    if events is not None and (events := events - 1) == 0:
                        return

    def _take(self, data: str) -> None:
        self.done = data == "[DONE]"
        if not self.done:
            event = json.loads(data)
            assert "error" not in event, event
            self.text += event["choices"][0]["text"]


@pytest.fixture(scope="module")
def whole(two_gateways: HeadraceUp) -> str:
    """The undisturbed answer."""
    reader = Reader(two_gateways)
    reader.read(gateways(two_gateways)[1])
    assert reader.done
    return reader.text


def test_a_dropped_connection_goes_on_on_the_other_gateway(two_gateways: HeadraceUp, whole: str) -> None:
    reader = Reader(two_gateways)
    for events in range(3, 30, 9):
        for url in gateways(two_gateways):
            reader.read(url, events)
    reader.read(gateways(two_gateways)[0])
    assert reader.done
    assert reader.text == whole


def test_a_killed_gateways_answer_goes_on_on_the_other(two_gateways: HeadraceUp, whole: str) -> None:
    first, second = gateways(two_gateways)
    before = two_gateways.metric("gateway-2", "headrace_adoptions_total")
    reader = Reader(two_gateways)
    reader.read(first, 5)
    two_gateways.kill_member("gateway-1")
    reader.read(second)
    assert reader.done
    assert reader.text == whole
    adopted_here = two_gateways.metric("gateway-2", "headrace_adoptions_total") - before
    assert adopted_here + two_gateways.metric("gateway-1", "headrace_adoptions_total") == 1


def test_a_gateway_that_wakes_up_late_adds_nothing(two_gateways: HeadraceUp, whole: str) -> None:
    pid = two_gateways.pid_of("gateway-1")
    adoptions = two_gateways.metric("gateway-2", "headrace_adoptions_total")
    stopped, late = Reader(two_gateways), Reader(two_gateways)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(stopped.read, gateways(two_gateways)[0])
        eventually(lambda: bool(stopped.event_id), "the answer has begun")
        os.kill(pid, signal.SIGSTOP)
        try:
            late.event_id = stopped.event_id.rpartition(":")[0] + ":0"
            late.read(gateways(two_gateways)[1])
        finally:
            os.kill(pid, signal.SIGCONT)
        reading.result()
    assert two_gateways.metric("gateway-2", "headrace_adoptions_total") == adoptions + 1
    assert stopped.done
    assert stopped.text == whole
    assert late.done
    assert whole.endswith(late.text)


def test_a_call_over_grpc_goes_on(two_gateways: HeadraceUp, whole: str) -> None:
    request = GenerateRequest(
        model=str(body(two_gateways)["model"]),
        text="Once upon a time",
        sampling=Sampling(seed=7),
        stopping=Stopping(max_tokens=TOKENS, ignore_eos=True),
        resumable=True,
        deterministic=True,
    )
    with grpc.insecure_channel(two_gateways.grpc_address) as channel:
        inference = InferenceStub(channel)
        call = inference.Generate(request, timeout=120)
        seen = [next(call) for _ in range(5)]
        call.cancel()
        resume = ResumeRequest(answer_id=seen[-1].answer_id, next_position=seen[-1].position + 1)
        seen += inference.Resume(resume, timeout=120)
        assert "".join(delta.text for delta in seen) == whole
        with pytest.raises(grpc.RpcError) as raised:
            inference.Cancel(CancelRequest(answer_id="nobody"), timeout=30)
    assert raised.value.code() == grpc.StatusCode.NOT_FOUND


def test_a_repeated_request_is_answered_once(two_gateways: HeadraceUp, whole: str) -> None:
    request = {**body(two_gateways), "stream": False, "resumable": None}
    headers = {"idempotency-key": "order 66"}

    def ask(url: str) -> object:
        answer = httpx.post(f"{url}/v1/completions", json=request, headers=headers, timeout=120)
        assert answer.status_code == 200, answer.text
        return answer.json()

    urls = gateways(two_gateways) * 3
    with ThreadPoolExecutor(len(urls)) as pool:
        first, *others = pool.map(ask, urls)
    assert all(other == first for other in others)
    assert first["choices"][0]["text"] == whole  # type: ignore[index]
