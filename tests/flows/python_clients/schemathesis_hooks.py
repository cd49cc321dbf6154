"""What generated requests need so that some are served: a schema cannot say which models, tokens and keys there are.

Counts the answers of each operation by status, into the file that FUZZ_STATUSES names.
"""

import atexit
import itertools
import json
import os
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import schemathesis

MODEL = os.environ["FUZZ_MODEL"]
# Of each request in turn; an empty one leaves what schemathesis makes up: none, or one that does not work.
KEYS = json.loads(os.environ["FUZZ_KEYS"])
FEW_TOKENS = 4
# A shorter deadline may pass, which is a 503 that the caller has asked for.
LONG_MS = 600_000
# Fields whose every value, or nearly so, one model or another field rules out.
RULED_OUT = {
    "deterministic",
    "echo",
    "logit_bias",
    "max_completion_tokens",
    "min_tokens",
    "n",
    "priority",
    "resumable",
    "stop",
    "stop_token_ids",
    "stream_options",
    "top_logprobs",
}
TURNS = itertools.count()
STATUSES: defaultdict[str, Counter[int]] = defaultdict(Counter)
# Path parameters that name what is there, by path; and headers that name what answers had.
THERE = {"/v1/models/{name}": {"name": MODEL}, "/playground/{name}": {"name": "app.js"}}
SEEN: dict[str, str] = {}
atexit.register(lambda: Path(os.environ["FUZZ_STATUSES"]).write_text(json.dumps(STATUSES)))


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case, kwargs: dict[str, Any]) -> None:
    """Gives the request the next key, the model and time; in every second round of keys also what can be served."""
    turn, headers = next(TURNS), case.headers
    if key := KEYS[turn % len(KEYS)]:
        headers.pop("authorization", None)
        headers["x-api-key"] = key
    timeout = str(headers.get("x-request-timeout-ms", ""))
    if re.fullmatch("[0-9]+", timeout) and 0 < int(timeout) < LONG_MS:
        headers["x-request-timeout-ms"] = str(LONG_MS)
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body = {"max_tokens": FEW_TOKENS, **case.body, "model": MODEL}
    if turn // len(KEYS) % 2:
        case.path_parameters |= THERE.get(case.path, {})
        headers.pop("last-event-id", None)
        # One is recorded, one names what answers had, one is as it was made up.
        headers.update(({"idempotency-key": str(turn)}, SEEN, {})[turn % 3])
        if isinstance(case.body, dict):
            case.body = _possible(case.body) | ({"stream": True} if turn % 3 < 2 else {})


def _possible(body: dict[str, Any]) -> dict[str, Any]:
    """Without what no model could do."""
    possible = {field: value for field, value in body.items() if field not in RULED_OUT}
    if "max_tokens" in body:
        possible["max_tokens"] = FEW_TOKENS
    if isinstance(body.get("messages"), list):
        possible["messages"] = [{"role": "user", "content": "hello"}]
    if isinstance(body.get("prompt"), list) or body.get("prompt") == "":
        possible["prompt"] = "hello"
    if isinstance(body.get("tokens"), list):
        possible["tokens"] = [abs(token) % 1000 for token in body["tokens"] if isinstance(token, int)]
    return possible


@schemathesis.hook
def after_call(context: schemathesis.HookContext, case: schemathesis.Case, response: schemathesis.Response) -> None:
    STATUSES[case.operation.label][response.status_code] += 1
    if etag := response.headers.get("etag"):
        SEEN["if-none-match"] = etag[0]
    if event := re.match(rb"id: ((.+):[0-9]+)\n", response.content):
        SEEN["last-event-id"] = event[1].decode()
        for path in ("/v1/answers/{answer_id}", "/v1/answers/{answer_id}/cancel"):
            THERE[path] = {"answer_id": event[2].decode()}


@schemathesis.check
def every_status_is_documented(
    context: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    """Also of methods that a path does not take and wrong content types, which schemathesis' own check leaves out."""
    documented = case.operation.responses.status_codes
    assert str(response.status_code) in documented, f"{response.status_code} is none of {', '.join(documented)}"
