"""A Node client with @grpc/grpc-js that loads the protos as they are."""

import json
from pathlib import Path

import pytest

from tests.flows.headrace_up import HeadraceUp
from tests.flows.node_program import install, run

PROTOS = Path(__file__).parents[2] / "protos"


@pytest.fixture(scope="module")
def node_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(Path(__file__).parent / "node_client", tmp_path_factory.mktemp("node_client"))


def test_node_client(node_client: Path, stack: HeadraceUp, model: str) -> None:
    answer = json.loads(run(node_client, str(PROTOS), stack.grpc_address))
    assert answer["model"] == model
    assert answer["tokens"]
    assert "Paris" in answer["chat"]["text"]
    assert answer["chat"]["finishReason"] == "FINISH_REASON_STOP"
    assert answer["text"]["usage"]["completionTokens"] == 8
    assert answer["text"]["usage"]["promptTokens"] == len(answer["tokens"])
    assert answer["refusal"]["code"] == "NOT_FOUND"
    assert "nobody" in answer["refusal"]["details"]
