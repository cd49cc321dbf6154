"""Clients of other projects through keys and limits, each in its own process."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.common.api_keys import new_key, visible_part
from tests.flows.headrace_up import HeadraceUp, eventually
from tests.flows.keyed_stack import MODEL, KeyedStack
from tests.flows.python_program import run

PROGRAMS = ("litellm_client.py", "langchain_client.py")
CLOSED_DOOR = {"name": "AuthenticationError", "status": 401, "retry_after": None}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, default_model: Path) -> Iterator[KeyedStack]:
    up = HeadraceUp(tmp_path_factory.mktemp("clients"), "--engine", "echo")
    try:
        up.wait_ready()
        yield KeyedStack(up)
    finally:
        up.kill()


def ask(stack: KeyedStack, program: str, key: str) -> dict[str, Any]:
    answer = json.loads(run(program, stack.base_url(), key, MODEL))
    assert isinstance(answer, dict)
    return answer


@pytest.mark.timeout(300)  # they take long to start from a cold disk
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_chat_and_a_stream_until_the_limit_is_reached(stack: KeyedStack, program: str) -> None:
    key = stack.keys("create", program, "--requests-per-minute", "2")["key"]
    answer = ask(stack, program, key)
    whole, streamed = answer["texts"]
    assert whole == streamed == "Name three rivers."
    refusal = answer["refusal"]
    assert (refusal["name"], refusal["status"]) == ("RateLimitError", 429)
    assert 0 < int(refusal["retry_after"]) <= 61


@pytest.mark.timeout(300)  # they take long to start from a cold disk
@pytest.mark.parametrize("program", PROGRAMS)
def test_keys_that_do_not_work(stack: KeyedStack, program: str) -> None:
    key = stack.keys("create", f"revoked {program}")
    wrong = new_key(visible_part(key["key"]) or "")
    assert ask(stack, program, wrong) == {"texts": [], "refusal": CLOSED_DOOR}
    stack.up.run("keys", "revoke", key["id"])
    eventually(lambda: stack.is_refused(key["key"], 1), "a revoked key ends")
    assert ask(stack, program, key["key"]) == {"texts": [], "refusal": CLOSED_DOOR}
