"""One whole stack with the default model for all flow tests that leave it as they found it."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import openai
import pytest

from headrace.v1.inference_pb2_grpc import InferenceStub
from tests.flows.headrace_up import HeadraceUp

# One full context and some more; float32, in which a repeated greedy answer is the same answer.
WORKER_OPTIONS = ("--dtype", "float32", "--kv-blocks", "640")


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, default_model: Path) -> Iterator[HeadraceUp]:
    running = HeadraceUp(tmp_path_factory.mktemp("stack"), *WORKER_OPTIONS)
    try:
        running.wait_ready()
        yield running
    finally:
        running.kill()


@pytest.fixture(scope="session")
def model(stack: HeadraceUp) -> str:
    """The name under which the stack serves the default model."""
    return str(httpx.get(f"{stack.http_url}/v1/models").json()["data"][0]["id"])


@pytest.fixture(scope="session")
def http(stack: HeadraceUp) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.http_url, timeout=120, trust_env=False) as client:
        yield client


@pytest.fixture(scope="session")
def client(stack: HeadraceUp) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.http_url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="session")
def channel(stack: HeadraceUp) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(stack.grpc_address) as channel:
        yield channel


@pytest.fixture(scope="session")
def inference(channel: grpc.Channel) -> InferenceStub:
    return InferenceStub(channel)
