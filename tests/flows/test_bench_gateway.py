"""`headrace bench-gateway` on a real stack, for a second a load."""

import os
import re
import subprocess
from pathlib import Path

from tests.flows.headrace_up import HEADRACE


def test_the_cost_of_all_but_the_model_is_printed(tmp_path: Path) -> None:
    command = [*HEADRACE, "bench-gateway", "--part", "cost", "--rounds", "1", "--seconds", "1"]
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
    run = subprocess.run(command, capture_output=True, text=True, timeout=110, env=environment)
    assert run.returncode == 0, run.stderr
    for service in ("gateway", "scheduler", "cache", "redis"):
        assert any(line.startswith(service) for line in run.stdout.splitlines()), run.stdout
    assert re.search(r"Where the engine answers at once, TTFT is .* ours adds [0-9.]+ ms\.", run.stdout)


def test_a_peer_without_processes_is_refused() -> None:
    command = [*HEADRACE, "bench-gateway", "--peer", "a=http://127.0.0.1:1"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert "--peer a: name its processes" in run.stderr
