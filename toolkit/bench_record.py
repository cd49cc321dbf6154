"""What a benchmark leaves behind: its figures, and the facts that they depend on, as one JSON file."""

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from os import sched_getaffinity
from pathlib import Path

from services.common.config import child_environment
from toolkit.bench_peers import Peer
from toolkit.cpu_time import CpuUse
from toolkit.loadtest import Row, RowResult

_PACKAGES = ("headrace", "torch", "transformers", "numpy", "grpcio")
# Variables that change how fast a worker computes; addresses, which may hold a password, are left out.
_TELLING_PREFIXES = ("HEADRACE_WORKER_", "OMP_", "MKL_", "KMP_")
_SECRET_SUFFIXES = ("_URL", "_ENDPOINT")
_GIT_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Measurement:
    """One row, run once on one server. `cpu`: of the server's processes, where they are known."""

    server: str
    round: int
    result: RowResult
    cpu: CpuUse | None


@dataclass(frozen=True, slots=True)
class Facts:
    """Where, when and with what the figures were taken."""

    started: str
    command: str
    # From git, of the source tree that this runs from; None outside of one.
    git: str | None
    versions: Mapping[str, str | None]
    environment: Mapping[str, str]
    cpu: str
    cores: int


@dataclass(frozen=True, slots=True)
class Record:
    """A whole benchmark; the two lists grow while it runs."""

    facts: Facts
    rounds: int
    first_seed: int
    rows: tuple[Row, ...]
    peers: tuple[Peer, ...]
    measurements: list[Measurement] = field(default_factory=list)
    # The mixed row on our own stack, continuous against static batching.
    batching: list[Measurement] = field(default_factory=list)


def gather_facts() -> Facts:
    """Of this machine and this moment."""
    return Facts(
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(["headrace", *sys.argv[1:]]),
        git=_git_describe(Path(__file__).parent.parent),
        versions={"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        environment=telling_variables(child_environment("worker", {})),
        cpu=_cpu_model(),
        cores=len(sched_getaffinity(0)),
    )


def telling_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Those of the variables that say how the workers compute."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if name.startswith(_TELLING_PREFIXES) and not name.endswith(_SECRET_SUFFIXES)
    }


def write(document: Record | Sequence[RowResult], path: Path) -> None:
    """Writes the dataclasses as JSON; makes the folder if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2, default=_plain) + "\n")


def _plain(value: object) -> object:
    if isinstance(value, range):
        return {"least": value.start, "most": value[-1]}
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_describe(folder: Path) -> str | None:
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--tags", "--always", "--dirty"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
