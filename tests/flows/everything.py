"""Drives every feature of a stack once a round, so that whatever is measured has something to measure."""

import itertools
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.flows.headrace_up import HeadraceUp, eventually

# One gateway more than there need be, a worker for prompts, and two for output, one of which can be killed.
OPTIONS = ("--engine", "echo", "--gateways", "2", "--prefill-workers", "1", "--decode-workers", "2")
TIGHT = (
    "--kv-blocks",
    "700",
    "--max-sequences",
    "4",
    "--price-per-hour",
    "1.5",
)  # so that pools fill and requests queue
SETTINGS = {
    "HEADRACE_WORKER_ECHO_STEP_MS": "4",  # as of a model: time in which something can happen
    "HEADRACE_WORKER_KV_OFFLOAD_LEAST_TOKENS": "64",
}
LONG_TOKENS = 400


@contextmanager
def everything_stack(folder: Path) -> Iterator["Everything"]:
    running = HeadraceUp(folder, *OPTIONS, *TIGHT, "--cache-disk", str(folder / "blocks"), settings=SETTINGS)
    try:
        running.wait_ready()
        eventually(lambda: sum(worker.healthy for worker in running.fleet().workers) == 3, "all workers are there")
        yield Everything(running)
    finally:
        running.kill()


class Everything:
    """Callers of a stack."""

    def __init__(self, stack: HeadraceUp) -> None:
        self.stack = stack
        self._model = stack.fleet().workers[0].registration.model.name
        self._numbers = itertools.count(1000)
        limits = ("--tokens-per-day", "100000000", "--requests-per-minute", "100000", "--concurrent", "1000")
        self._key = self._new_key("tenant", *limits)
        self._poor = self._new_key("poor", "--requests-per-minute", "1")
        self._broke = self._new_key("broke", "--tokens-per-day", "300")

    def round(self) -> None:
        """All of it once; takes a second or two."""
        with ThreadPoolExecutor(8) as threads:
            done = [
                threads.submit(part) for part in (self._chats, self._prefixes, self._leave, self._exceed, self._record)
            ]
            done += [threads.submit(self._complete, "Once upon a time", n=2, max_tokens=60) for _ in range(4)]
            for one in done:
                one.result()

    def kill_workers(self) -> None:
        """One under a stream, which goes on elsewhere; then the others, after which the cache service has all KV."""
        kept = self._long_prompt()
        for _ in range(2):
            self._complete(kept)
        with ThreadPoolExecutor(4) as threads:
            streams = [threads.submit(self._complete, f"Once {number}", max_tokens=600) for number in range(4)]
            eventually(lambda: all(self._running(name) for name in ("decode-1", "decode-2")), "both have work")
            self.stack.kill_member("decode-1")
            for one in streams:
                assert one.result().status_code == 200
        for name in ("decode-2", "prefill"):
            self.stack.kill_member(name)
        eventually(lambda: sum(worker.healthy for worker in self.stack.fleet().workers) == 3, "all workers are back")
        assert self._complete(kept).status_code == 200

    def _running(self, worker: str) -> int:
        states = {one.registration.worker_id: one.state for one in self.stack.fleet().workers}
        return states[worker].running_sequences if worker in states else 0

    def _new_key(self, name: str, *limits: str) -> str:
        return str(json.loads(self.stack.run("keys", "create", name, *limits, "--json"))["key"])

    def _post(
        self, path: str, body: Mapping[str, Any], key: str = "", headers: Mapping[str, str] | None = None
    ) -> httpx.Response:
        sent = {"authorization": f"Bearer {key or self._key}", **(headers or {})}
        return httpx.post(
            f"{self.stack.http_url}{path}", json={"model": self._model, **body}, headers=sent, timeout=120
        )

    def _complete(
        self, prompt: object, *, key: str = "", headers: Mapping[str, str] | None = None, **fields: Any
    ) -> httpx.Response:
        body = {"prompt": prompt, "max_tokens": 8, "ignore_eos": True, **fields}
        return self._post("/v1/completions", body, key, headers)

    def _chats(self) -> None:
        for stream in (True, False):
            messages = [{"role": "user", "content": "Tell me a story."}]
            answer = self._post("/v1/chat/completions", {"messages": messages, "max_tokens": 40, "stream": stream})
            assert answer.status_code == 200, answer.text

    def _prefixes(self) -> None:
        """A long prompt, three times: computed by the prefill worker, and found after that."""
        prompt = self._long_prompt()
        for _ in range(3):
            assert self._complete(prompt).status_code == 200

    def _long_prompt(self) -> list[int]:
        return [next(self._numbers) % 40_000 for _ in range(LONG_TOKENS)]

    def _leave(self) -> None:
        """A caller goes away in the middle of its stream."""
        body = {"model": self._model, "prompt": "Once", "max_tokens": 2000, "ignore_eos": True, "stream": True}
        headers = {"authorization": f"Bearer {self._key}"}
        with httpx.stream("POST", f"{self.stack.http_url}/v1/completions", json=body, headers=headers) as answer:
            next(answer.iter_bytes())

    def _exceed(self) -> None:
        """Two keys ask for more than they may, the one in a minute, the other in a day."""
        for key, max_tokens in ((self._poor, 1), (self._broke, 200)):
            assert 429 in [self._complete("Once", key=key, max_tokens=max_tokens).status_code for _ in range(2)]

    def _record(self) -> None:
        headers = {"idempotency-key": f"round-{next(self._numbers)}"}
        for _ in range(2):
            assert self._complete("Once", headers=headers).status_code == 200
