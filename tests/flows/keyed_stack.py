"""A stack with API keys: made by the command, used by clients of each gateway."""

import json
from typing import Any

import openai

from tests.flows.headrace_up import HeadraceUp

MODEL = "SmolLM2-135M-Instruct"
PROMPT = [100, 200, 300]


class KeyedStack:
    """The stack, and clients of its gateways by key."""

    def __init__(self, up: HeadraceUp) -> None:
        self.up = up

    def keys(self, *words: str) -> dict[str, Any]:
        """What `headrace keys` tells."""
        told = json.loads(self.up.run("keys", *words, "--json"))
        assert isinstance(told, dict)
        return told

    def base_url(self, gateway: int = 1) -> str:
        """Of the API of a gateway, counted from 1."""
        gateways = [process for process in self.up.state.processes if process.service == "gateway"]
        return str(gateways[gateway - 1].metrics_url).removesuffix("/metrics") + "/v1"

    def client(self, key: str, gateway: int = 1) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.base_url(gateway), api_key=key, max_retries=0, timeout=120)

    def complete(self, key: str, gateway: int = 1, max_tokens: int = 4) -> int:
        """Tokens that a call took."""
        with self.client(key, gateway) as client:
            answer = client.completions.create(
                model=MODEL, prompt=PROMPT, max_tokens=max_tokens, extra_body={"ignore_eos": True}
            )
        assert answer.usage is not None
        return answer.usage.total_tokens

    def is_refused(self, key: str, gateway: int) -> bool:
        with self.client(key, gateway) as client:
            try:
                client.models.list()
            except openai.AuthenticationError as error:
                return error.code == "invalid_api_key"
        return False
