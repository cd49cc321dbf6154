"""Requests that schemathesis makes up from a gateway's OpenAPI document, valid and not: `make fuzz`.

Fails if one of them gets a 5xx, a status, a content type or a header that the document does not have, or a body that is
not as it says. Starts a stack of its own, without a model, whose callers have keys: with limits that are far and near,
for other models, without a scope, wrong ones and none.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.common.api_keys import new_key, visible_part
from tests.flows.headrace_up import HeadraceUp
from tests.flows.keyed_stack import MODEL, KeyedStack
from tests.flows.python_program import clients_python

HOOKS = Path(__file__).parent / "python_clients" / "schemathesis_hooks.py"
CHECKS = (
    "not_a_server_error",
    "every_status_is_documented",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "unsupported_method",
    "allow_header_conformance",
)
# Of each operation that reads more than headers. With schemathesis' own fixed cases that makes 10,000 at least.
MANY = 1200
_AT_LEAST = 10_000
_FEW = """
[[operations]]
include-path = ["/docs", "/health/live", "/health/ready", "/metrics", "/v1/cluster", "/v1/models", "/v1/stats"]
generation.max-examples = 10
"""
_FAR = ("--requests-per-minute", "100000", "--tokens-per-minute", "100000000", "--concurrent", "100")
_FAR_BUDGETS = ("--tokens-per-day", "1000000000", "--money-per-month", "1000000")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of the requests. `statuses`: how many answers of each operation had each."""

    good: bool
    report: str
    statuses: Mapping[str, Mapping[str, int]]

    @property
    def cases(self) -> int:
        """How many requests schemathesis tells of."""
        told = re.search(r"(\d+) generated", self.report)
        assert told, self.report
        return int(told[1])


@contextlib.contextmanager
def priced_stack(folder: Path) -> Iterator[KeyedStack]:
    """One whose models have a price, for budgets of money."""
    prices = folder / "prices.toml"
    prices.write_text('["*"]\nprompt = 0.15\ncompletion = 0.60\n')
    up = HeadraceUp(folder, "--engine", "echo", settings={"HEADRACE_GATEWAY_PRICES": str(prices)})
    try:
        up.wait_ready()
        yield KeyedStack(up)
    finally:
        up.kill()


def run_cases(stack: KeyedStack, max_examples: int, seed: int, timeout_s: float) -> Outcome:
    """`max_examples`: of each operation that reads more than headers."""
    command = [clients_python(), "-m", "schemathesis.cli", "run", f"{stack.up.http_url}/openapi.json"]
    command += ["--checks", ",".join(CHECKS), "--phases", "examples,coverage,fuzzing"]
    command += ["--max-examples", str(max_examples), "--seed", str(seed)]
    command += ["--continue-on-failure", "--no-shrink", "--request-timeout", "60"]
    with tempfile.TemporaryDirectory() as folder:  # where it leaves what it has found
        statuses = Path(folder) / "statuses.json"
        Path(folder, "schemathesis.toml").write_text(_FEW)
        environment = {
            "SCHEMATHESIS_HOOKS": str(HOOKS),
            "FUZZ_MODEL": MODEL,
            "FUZZ_KEYS": json.dumps(_keys(stack)),
            "FUZZ_STATUSES": str(statuses),
            "NO_COLOR": "1",
        }
        ended = subprocess.run(
            command,
            env={**os.environ, **environment},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        report = ended.stdout + ended.stderr
        return Outcome(ended.returncode == 0, report, json.loads(statuses.read_text()))


def _keys(stack: KeyedStack) -> Sequence[str]:
    """Those of one round of requests. An empty one stands for what schemathesis makes up."""

    def key(name: str, *options: str) -> str:
        return str(stack.keys("create", name, *options)["key"])

    far = key("far", *_FAR, *_FAR_BUDGETS)
    others = [
        key("few-requests", *_FAR[2:], "--requests-per-minute", "1"),
        key("few-tokens", *_FAR, "--tokens-per-day", "40"),
        key("other-model", "--models", "another"),
        key("generate-only", "--scopes", "generate"),
        key("models-only", "--scopes", "models"),
        new_key(visible_part(far) or ""),
        "",
        "",
    ]
    return [one for other in others for one in (far, other)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-examples", type=int, default=MANY, help="of each operation that reads more than headers")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, priced_stack(Path(folder)) as stack:
        outcome = run_cases(stack, options.max_examples, options.seed, timeout_s=7200)
    print(outcome.report)
    for operation, counts in outcome.statuses.items():
        print(operation, *(f"{status}: {count}" for status, count in sorted(counts.items())), sep="  ")
    if options.max_examples >= MANY and outcome.cases < _AT_LEAST:
        sys.exit(f"schemathesis made up {outcome.cases} requests: {_AT_LEAST} were wanted.")
    sys.exit(not outcome.good)


if __name__ == "__main__":
    main()
