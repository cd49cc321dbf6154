"""The benchmark's own stack, with a fake server in the place of `headrace up`."""

import json
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.toolkit.fake_server import FAKE_SERVER
from toolkit.bench_servers import Turns
from toolkit.bench_stack import StackEnded, stack_of_our_own


def events(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


async def test_it_is_ready_stands_still_recovers_and_ends(tmp_path: Path) -> None:
    log = tmp_path / "new folder" / "log"
    async with stack_of_our_own("ours", ["--batching", "static"], log, FAKE_SERVER) as server:
        assert server.tree is not None
        process = psutil.Process(server.tree.pid)
        assert events(log)[0]["batching"] == "static"
        with Turns([server]) as turns:
            await server.tree.stop()
            assert process.status() == psutil.STATUS_STOPPED
            await turns.give(server)
            assert await server.answers()
        assert events(log)[-1]["event"] == "asked"  # a completion, not only a word of readiness
        await server.tree.stop()
        server.tree.go_on()
    assert not process.is_running()


async def test_one_that_ends_before_it_is_ready_is_told_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(StackEnded, match="ended with status 1 before it was ready\nno such model"):
        async with stack_of_our_own("ours", ["--mood", "ends"], tmp_path / "log", FAKE_SERVER):
            pass


async def test_one_on_tls_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for flag, arguments in (("--tls", ["--tls", "certs"]), ("--tls-cert", ["--tls-cert=x", "--tls-key=y"])):
        with pytest.raises(StackEnded, match=rf"leave out {flag}\."):
            async with stack_of_our_own("ours", arguments, tmp_path / "log", FAKE_SERVER):
                pass
    monkeypatch.setenv("HEADRACE_GATEWAY_TLS_CERT", "front.crt")
    with pytest.raises(StackEnded, match="unset HEADRACE_GATEWAY_TLS_CERT"):
        async with stack_of_our_own("ours", [], tmp_path / "log", FAKE_SERVER):
            pass
