"""Python programs in the environment of other projects' clients (python_clients/requirements.lock)."""

import os
import subprocess
import sys
from pathlib import Path

_PROGRAMS = Path(__file__).parent / "python_clients"
# Neither may ask anybody on the network about prices or send anybody traces.
_QUIET = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false"}


def clients_python() -> str:
    """The interpreter of that environment."""
    python = Path(sys.prefix) / "clients" / "bin" / "python"
    assert python.exists(), f"{python} is not there: `make setup` makes it"
    return str(python)


def run(program: str, *arguments: str) -> str:
    """What a program of `python_clients/` prints; fails with what it said."""
    command = [clients_python(), "-I", str(_PROGRAMS / program), *arguments]
    ended = subprocess.run(command, env={**os.environ, **_QUIET}, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    return ended.stdout
