"""What nginx and HAProxy do, with the files of Compose, before gateways that are gone, break off, or stream."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import pytest

from headrace.v1.inference_pb2 import GenerateDelta, GenerateRequest
from headrace.v1.inference_pb2_grpc import InferenceStub
from tests.proxies import Proxy, Upstream, binary_of
from tests.stand_ins import BreaksOff, Holds, KeepsStep, Names, StandIn, Starts, out_of_reach

# Far below the 60 s for which nginx waits for a connection unless told.
PATIENCE_S = 30


@pytest.fixture(params=["nginx", "haproxy"])
def front(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if not binary_of(name) and not os.environ.get("CI"):
        pytest.skip(f"there is no {name} here")
    return name


@pytest.fixture
def well() -> Iterator[StandIn]:
    with StandIn() as gateway:
        yield gateway


def post(proxy: Proxy, body: bytes = b"") -> str:
    answer = httpx.post(f"{proxy.url}/v1/completions", content=body, timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    return answer.text


def generate(proxy: Proxy) -> str:
    with grpc.insecure_channel(proxy.grpc_address) as channel:
        return "".join(delta.text for delta in InferenceStub(channel).Generate(GenerateRequest(), timeout=PATIENCE_S))


def test_a_gateway_that_is_gone_costs_no_call(front: str, well: StandIn, tmp_path: Path) -> None:
    with out_of_reach() as address, Proxy(front, tmp_path, [Upstream(address, address), well.upstream]) as proxy:
        with ThreadPoolExecutor(8) as pool:
            over_http = [pool.submit(post, proxy) for _ in range(4)]
            over_grpc = [pool.submit(generate, proxy) for _ in range(4)]
            assert {call.result() for call in over_http} == {"0"}
            assert {call.result() for call in over_grpc} == {"ok"}
        # Both have tried: nginx with these calls, HAProxy by itself.
        tried = {"nginx": r"timed out\) while connecting to upstream", "haproxy": r"gateways_(http|grpc)/g0 is DOWN"}
        proxy.wait_for(tried[front])


def test_what_a_gateway_breaks_off_is_asked_of_another(front: str, well: StandIn, tmp_path: Path) -> None:
    with BreaksOff() as gateway, Proxy(front, tmp_path, [gateway.upstream, well.upstream]) as proxy:
        assert [post(proxy, b"x" * 50_000) for _ in range(8)] == ["50000"] * 8
        assert gateway.posts > 0


def test_an_event_does_not_wait_for_the_next(front: str, tmp_path: Path) -> None:
    events = 500  # at 0.2 s each they would take longer than the test waits

    def follow(items: Iterator[object], gateway: KeepsStep) -> int:
        count = 0
        for _ in items:
            count += 1
            gateway.seen.release()
        return count

    def over_http(proxy: Proxy, gateway: KeepsStep) -> int:
        with httpx.stream("POST", f"{proxy.url}/v1/completions", content=b"", timeout=PATIENCE_S) as answer:
            return follow((line for line in answer.iter_lines() if line), gateway)

    def over_grpc(proxy: Proxy, gateway: KeepsStep) -> int:
        with grpc.insecure_channel(proxy.grpc_address) as channel:
            return follow(InferenceStub(channel).Generate(GenerateRequest()), gateway)

    with ThreadPoolExecutor(1) as pool:
        for ask in (over_http, over_grpc):
            with KeepsStep(events) as gateway, Proxy(front, tmp_path / ask.__name__, [gateway.upstream]) as proxy:
                assert pool.submit(ask, proxy, gateway).result(timeout=PATIENCE_S) == events


@pytest.mark.parametrize("front", ["haproxy"], indirect=True)
def test_haproxy_finds_gateways_by_their_name(front: str, well: StandIn, tmp_path: Path) -> None:
    with (
        StandIn("127.0.0.2", well.http_port, well.grpc_port) as newer,
        Names("127.0.0.1") as names,
        Proxy(front, tmp_path, [well.upstream], dns_port=names.port) as proxy,
    ):
        newer.ready = False
        names.addresses = ("127.0.0.1", "127.0.0.2")
        for server in ("gateways_http/gateway2", "gateways_grpc/gateway2"):
            proxy.wait_for(f"{server} is DOWN, reason: Layer7 wrong status, code: 503")
        newer.ready = True
        for server in ("gateways_http/gateway2", "gateways_grpc/gateway2"):
            proxy.wait_for(f"{server} is UP, reason: Layer7 check passed")
        names.addresses = ("127.0.0.2",)
        for server in ("gateways_http/gateway1", "gateways_grpc/gateway1"):
            proxy.wait_for(f"{server} .*maintenance")
        assert (post(proxy), generate(proxy), newer.posts) == ("0", "ok", 1)


@pytest.mark.parametrize("front", ["nginx"], indirect=True)
def test_a_gateway_that_is_starting_does_not_draw_all_calls(front: str, tmp_path: Path) -> None:
    with (
        Starts() as starting,
        Holds() as busy,
        Proxy(front, tmp_path, [starting.upstream, busy.upstream]) as proxy,
        grpc.insecure_channel(proxy.grpc_address) as channel,
    ):
        let_in: list[Iterator[GenerateDelta]] = []
        for _ in range(4):
            call = InferenceStub(channel).Generate(GenerateRequest(), timeout=PATIENCE_S)
            let_in += [call] if begins(call) else []
        assert len(let_in) == 2


def begins(call: Iterator[GenerateDelta]) -> bool:
    try:
        return next(call).text == "x"
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        return False
