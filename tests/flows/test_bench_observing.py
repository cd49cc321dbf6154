"""`headrace bench-observing` on two real stacks without a model, a single pair."""

import os
import re
import subprocess
from pathlib import Path

from tests.flows.headrace_up import HEADRACE


def test_a_ratio_is_printed(tmp_path: Path) -> None:
    command = [*HEADRACE, "bench-observing", "--pairs", "1", "--requests", "8", "--", "--engine", "echo"]
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
    run = subprocess.run(command, capture_output=True, text=True, timeout=110, env=environment)
    assert run.returncode == 0, run.stderr
    _, pair, ratio = run.stdout.splitlines()
    assert re.fullmatch(r"pair  1: [\d.]+ s with, [\d.]+ s without: [\d.]+", pair)
    assert re.match(r"Median ratio of 1 pairs: [\d.]+ \(workers [\d.]+, all others [\d.]+\)", ratio)
