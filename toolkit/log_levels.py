"""`headrace log-level`: changes what running services log, by the signals that they follow."""

import os
from collections.abc import Sequence

from services.common.log_levels import Level, follows_signals, signal_of
from toolkit.run_directory import RunningStack


class NotChanged(Exception):
    """One sentence for the person."""


def change_level(stacks: Sequence[RunningStack], service: str, level: Level) -> list[str]:
    """Of every process of a service, of the one with that id, or of all. Returns their ids. Raises NotChanged."""
    processes = [one for stack in stacks for one in stack.processes if one.service != "redis"]
    found = [one for one in processes if service in (one.name, one.service, "all")]
    if not found:
        raise NotChanged(f"No stack that runs here has a service {service!r}; `headrace ps` lists them.")
    for one in found:
        if one.pid is None or not follows_signals(one.pid):
            raise NotChanged(f"{one.name} is still starting, or does not run: try again once it is ready.")
    for one in found:
        assert one.pid is not None, "looked at above"
        os.kill(one.pid, signal_of(level))
    return [one.name for one in found]
