"""The whole stack without a model: answers are their prompts, or the last messages of chats."""

from pathlib import Path

import httpx
import pytest

from tests.flows.headrace_up import HeadraceUp

TEXT = "The quick brown fox jumps over the lazy dog."


@pytest.fixture
def echo(tmp_path: Path, default_model: Path) -> HeadraceUp:
    return HeadraceUp(tmp_path, "--engine", "echo", "--deterministic")


def test_an_echo_answers_with_its_prompt(echo: HeadraceUp) -> None:
    try:
        echo.wait_ready()
        model = echo.fleet().workers[0].registration.model.name
        body = {"model": model, "prompt": TEXT, "max_tokens": 20, "deterministic": True}
        choice, usage = _choice(httpx.post(f"{echo.http_url}/v1/completions", json=body, timeout=60))
        assert choice["text"] == TEXT * 2
        assert choice["finish_reason"] == "length"
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (10, 20)
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXT}]
        answer = httpx.post(f"{echo.http_url}/v1/chat/completions", json={"model": model, "messages": messages})
        choice, _ = _choice(answer)
        assert (choice["message"], choice["finish_reason"]) == (
            {"role": "assistant", "content": TEXT, "refusal": None},
            "stop",
        )
    finally:
        echo.kill()


def _choice(answer: httpx.Response) -> tuple[dict[str, object], dict[str, int]]:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0], answer.json()["usage"]
