"""Requests that schemathesis makes up from a gateway's OpenAPI document, valid and not: `make fuzz`.

Fails if one of them gets a 5xx, a status or a content type that the document does not have, or a body that is not as it
says. Starts a stack of its own, without a model.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.flows.headrace_up import HeadraceUp
from tests.flows.keyed_stack import MODEL
from tests.flows.python_program import clients_python

HOOKS = Path(__file__).parent / "python_clients" / "schemathesis_hooks.py"
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
# Of each operation with something to vary. Together with schemathesis' own fixed cases that makes 10,000 at least.
MANY = 1200
_AT_LEAST = 10_000


def run_cases(url: str, max_examples: int, seed: int, timeout_s: float) -> tuple[bool, str]:
    """Whether all was well, and what schemathesis said. `max_examples`: of each operation."""
    command = [clients_python(), "-m", "schemathesis.cli", "run", f"{url}/openapi.json"]
    command += ["--checks", CHECKS, "--phases", "examples,coverage,fuzzing", "--max-examples", str(max_examples)]
    command += ["--seed", str(seed), "--continue-on-failure", "--no-shrink", "--request-timeout", "60"]
    environment = {"SCHEMATHESIS_HOOKS": str(HOOKS), "FUZZ_MODEL": MODEL, "NO_COLOR": "1"}
    with tempfile.TemporaryDirectory() as folder:  # where it leaves what it has found
        ended = subprocess.run(
            command,
            env={**os.environ, **environment},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    return ended.returncode == 0, ended.stdout + ended.stderr


def cases_in(report: str) -> int:
    """How many requests a report of schemathesis tells of."""
    told = re.search(r"(\d+) generated", report)
    assert told, report
    return int(told[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-examples", type=int, default=MANY, help="of each operation")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        up = HeadraceUp(Path(folder), "--engine", "echo")
        try:
            up.wait_ready()
            good, report = run_cases(up.http_url, options.max_examples, options.seed, timeout_s=7200)
        finally:
            up.kill()
    print(report)
    if options.max_examples >= MANY and (cases := cases_in(report)) < _AT_LEAST:
        sys.exit(f"schemathesis made up {cases} requests: {_AT_LEAST} were wanted.")
    sys.exit(not good)


if __name__ == "__main__":
    main()
