"""What generated requests need so that some are served: a schema cannot say which models and tokens there are."""

import json
import os
import zlib
from typing import Any

import schemathesis

MODEL = os.environ["FUZZ_MODEL"]
FEW_TOKENS = 4
# Fields whose every value, or nearly so, one model or another field rules out.
RULED_OUT = {
    "deterministic",
    "echo",
    "logit_bias",
    "max_completion_tokens",
    "min_tokens",
    "n",
    "resumable",
    "stop",
    "stop_token_ids",
    "stream_options",
    "top_logprobs",
}


@schemathesis.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:
    """Names the model; and of every second body takes away what no model could do."""
    if not (isinstance(body, dict) and body.get("model") and isinstance(body["model"], str)):
        return body
    body = {"max_tokens": FEW_TOKENS, **body, "model": MODEL}
    return body if zlib.crc32(json.dumps(body).encode()) % 2 else _possible(body)


def _possible(body: dict[str, Any]) -> dict[str, Any]:
    possible = {field: value for field, value in body.items() if field not in RULED_OUT}
    possible["max_tokens"] = FEW_TOKENS
    if isinstance(body.get("messages"), list):
        possible["messages"] = [{"role": "user", "content": "hello"}]
    if isinstance(body.get("prompt"), list) or body.get("prompt") == "":
        possible["prompt"] = "hello"
    if isinstance(body.get("tokens"), list):
        possible["tokens"] = [abs(token) % 1000 for token in body["tokens"] if isinstance(token, int)]
    return possible


@schemathesis.hook
def map_path_parameters(context: schemathesis.HookContext, path_parameters: dict[str, Any]) -> dict[str, Any]:
    """Every second name is the model's."""
    name = (path_parameters or {}).get("name")
    return path_parameters if name is None or len(str(name)) % 2 else {**path_parameters, "name": MODEL}
