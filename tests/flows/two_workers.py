"""What flow tests do with a stack of two workers: look at the workers, and stream through the gateway."""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx

from headrace.v1.scheduler_pb2 import FleetWorker
from tests.flows.conftest import WORKER_OPTIONS
from tests.flows.headrace_up import HeadraceUp, eventually


@contextmanager
def running_pair(folder: Path, *options: str, settings: Mapping[str, str]) -> Iterator[HeadraceUp]:
    """A stack whose two workers can both be placed on."""
    running = HeadraceUp(folder, *WORKER_OPTIONS, "--workers", "2", *options, settings=settings)
    try:
        running.wait_ready()
        eventually(lambda: conditions(running) == ["healthy", "healthy"], "the scheduler sees both workers")
        yield running
    finally:
        running.kill()


def workers(stack: HeadraceUp) -> list[FleetWorker]:
    return sorted(stack.fleet().workers, key=lambda worker: worker.registration.worker_id)


def conditions(stack: HeadraceUp) -> list[str]:
    names = (FleetWorker.Condition.Name(worker.condition) for worker in workers(stack))
    return [name.removeprefix("CONDITION_").lower() for name in names]


def sequences(worker: FleetWorker) -> int:
    return worker.state.running_sequences + worker.state.waiting_sequences


def stream(stack: HeadraceUp, number: int, begun: threading.Barrier | None = None, tokens: int = 160) -> int:
    """How many tokens a streamed completion says it has, once it has ended well."""
    model = stack.fleet().workers[0].registration.model.name
    body = {"model": model, "prompt": f"Chapter {number}:", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    body |= {"stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{stack.http_url}/v1/completions", json=body, timeout=120) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        if begun is not None:
            begun.wait()
        events = [line.removeprefix("data: ") for line in (first, *lines) if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    return int(json.loads(events.pop())["usage"]["completion_tokens"])
