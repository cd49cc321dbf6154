"""An OpenAI-compatible server without a model, for the benchmark's tests; run as a process of its own.

It prints a JSON line when it listens, and one for each completion it is asked for, with the states (psutil's words) of
the processes whose ids stand in the file `--watch`. It takes the options of `headrace up` that the benchmark gives.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
from aiohttp import web

CHILD = "import sys; print('up', flush=True); sys.stdin.read()"


def say(event: str, **facts: object) -> None:
    print(json.dumps({"event": event, **facts}), flush=True)


class Server:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake"}]})

    async def ready(self, request: web.Request) -> web.Response:
        return web.Response()

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        say("asked", states=self._states(), tokens=body["max_tokens"], prompt=body["prompt"])
        if self.options.mood == "hangs":
            await asyncio.Event().wait()
        if self.options.mood == "fails":
            return web.Response(status=500, text="out of order")
        return await self._stream(request, body)

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        reply = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await reply.prepare(request)
        tokens = body["max_tokens"] - (self.options.mood == "short")
        for event in (
            {"choices": [{"text": "word"}]},
            {"choices": [{"text": " word"}]},
            {"choices": [], "usage": {"completion_tokens": tokens}, "timings": {"total_ms": 7.0, "prompt_n": 3}},
        ):
            await reply.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await reply.write(b"data: [DONE]\n\n")
        return reply

    def _states(self) -> dict[str, str]:
        watch: Path | None = self.options.watch
        pids = watch.read_text().split() if watch is not None and watch.exists() else []
        return {pid: psutil.Process(int(pid)).status() for pid in pids}


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--http-port", type=int, default=0)
    parser.add_argument("--grpc-port")
    parser.add_argument("--batching")
    parser.add_argument("--watch", type=Path)
    parser.add_argument("--mood", choices=["well", "short", "fails", "hangs", "ends"], default="well")
    return parser.parse_args()


def start_child() -> int:
    """A process that calls itself a worker; gives its id."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, "-m", "services.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.readline()
    return child.pid


async def serve(options: argparse.Namespace, child_pid: int) -> None:
    server = Server(options)
    app = web.Application()
    app.add_routes(
        [
            web.get("/v1/models", server.models),
            web.get("/health/ready", server.ready),
            web.post("/v1/completions", server.completions),
        ]
    )
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", options.http_port)
    await site.start()
    say("listening", port=runner.addresses[0][1], pid=os.getpid(), child=child_pid, batching=options.batching)
    await asyncio.Event().wait()


if __name__ == "__main__":
    given = parse_options()
    if given.mood == "ends":
        sys.exit("no such model")
    asyncio.run(serve(given, start_child()))
