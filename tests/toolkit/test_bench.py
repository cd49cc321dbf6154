"""The run as a whole, with fake servers in the place of our own stack and of its peers."""

import io
import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from tests.toolkit.fake_server import FAKE_SERVER, FakeServer, fake_server
from tests.toolkit.test_bench_stack import events
from toolkit import bench
from toolkit.bench import BenchOptions, run_bench
from toolkit.bench_peers import Peer
from toolkit.bench_stack import stack_of_our_own
from toolkit.loadtest import MIXED, LoadFailed, Row

TINY = Row("tiny", requests=3, concurrency=2, shared_prefix=0, unique_prompt=4, output=5)
SMALL = Row("small", requests=2, concurrency=1, shared_prefix=2, unique_prompt=3, output=2)
QUIET = Console(file=io.StringIO())


@pytest.fixture
def fake_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """`headrace up` is a fake server."""
    monkeypatch.setattr(bench, "stack_of_our_own", partial(stack_of_our_own, command=FAKE_SERVER))


def options(folder: Path, *peers: Peer, **changed: Any) -> BenchOptions:
    given: dict[str, Any] = {"url": None, "rows": (TINY, SMALL), "rounds": 2, "peers": peers}
    given |= {"compare_batching": False, "up_arguments": (), "out": folder / "bench.json"}
    return BenchOptions(**(given | changed))


def peer(name: str, server: FakeServer) -> Peer:
    return Peer(name, server.url, server.pid)


def states(asked: list[dict[str, Any]]) -> set[str]:
    return {state for event in asked for state in event["states"].values()}


def watch(folder: Path, name: str, *servers: FakeServer) -> None:
    (folder / name).write_text("\n".join(str(pid) for server in servers for pid in server.pids))


async def test_a_server_is_measured_while_the_others_stand_still(tmp_path: Path, fake_stack: None) -> None:
    with (
        fake_server("--watch", str(tmp_path / "first")) as first,
        fake_server("--watch", str(tmp_path / "second")) as second,
    ):
        watch(tmp_path, "first", second)
        watch(tmp_path, "second", first)
        watch(tmp_path, "ours", first, second)
        asked_ours = ("--watch", str(tmp_path / "ours"))
        chosen = options(tmp_path, peer("a", first), peer("b", second), up_arguments=asked_ours)
        record = await run_bench(chosen, QUIET)
        assert (first.is_stopped, second.is_stopped) == (False, False)
        ours = [event for event in events(tmp_path / "bench.log") if event["event"] == "asked"]
        warmed_work = 2 * (1 + TINY.requests + 1 + SMALL.requests)
        seen_by_peers = first.end(), second.end()
    assert [len(asked) for asked in seen_by_peers] == [warmed_work, warmed_work]
    for asked in (ours, *seen_by_peers):
        assert states(asked) == {psutil.STATUS_STOPPED}
    order = [(m.round, m.result.row, m.server) for m in record.measurements]
    assert order[:3] == [(0, "tiny", "ours"), (0, "tiny", "a"), (0, "tiny", "b")]
    assert order[-3:] == [(1, "small", "a"), (1, "small", "b"), (1, "small", "ours")]


async def test_every_server_does_the_same_work_and_each_round_other_work(tmp_path: Path, fake_stack: None) -> None:
    with fake_server() as first:
        await run_bench(options(tmp_path, peer("a", first), rows=(TINY,)), QUIET)
        theirs = [event["prompt"] for event in first.end()]
    ours = [event["prompt"] for event in events(tmp_path / "bench.log") if event["event"] == "asked"]
    assert sorted(prompt for prompt in ours if prompt in theirs) == sorted(theirs)
    assert len({tuple(prompt) for prompt in theirs}) == 2 * (1 + TINY.requests)


async def test_the_file_has_the_servers_figures_and_our_cpu_time(tmp_path: Path, fake_stack: None) -> None:
    with fake_server() as first:
        await run_bench(options(tmp_path, peer("a", first), rounds=1), QUIET)
        written = json.loads((tmp_path / "bench.json").read_text())
    assert [(m["server"], m["result"]["row"]) for m in written["measurements"]] == [
        ("ours", "tiny"),
        ("a", "tiny"),
        ("ours", "small"),
        ("a", "small"),
    ]
    assert written["peers"] == [{"name": "a", "url": first.url, "pid": first.pid}]
    assert {m["result"]["seed"] for m in written["measurements"]} == {written["first_seed"]}
    assert all(m["cpu"]["worker_rss_mib"] > 1 for m in written["measurements"])


async def test_peers_go_on_and_our_stack_ends_after_an_error(tmp_path: Path, fake_stack: None) -> None:
    with fake_server() as well, fake_server("--mood", "fails") as failing:
        with pytest.raises(LoadFailed, match="HTTP 500"):
            await run_bench(options(tmp_path, peer("a", well), peer("b", failing)), QUIET)
        assert (well.is_stopped, failing.is_stopped) == (False, False)
    (listening,) = [event for event in events(tmp_path / "bench.log") if event["event"] == "listening"]
    assert not psutil.pid_exists(listening["pid"])
    assert [m["server"] for m in json.loads((tmp_path / "bench.json").read_text())["measurements"]] == ["ours", "a"]


async def test_both_batching_policies_do_the_same_mixed_work(tmp_path: Path, fake_stack: None) -> None:
    record = await run_bench(options(tmp_path, rows=(TINY,), rounds=1, compare_batching=True), QUIET)
    assert [(m.server, m.result.row) for m in record.batching] == [("continuous", "mixed"), ("static", "mixed")]
    printed = events(tmp_path / "bench.log")
    starts = [index for index, event in enumerate(printed) if event["event"] == "listening"]
    assert [printed[start]["batching"] for start in starts] == ["continuous", "static"]

    def work(asked: list[dict[str, Any]]) -> list[tuple[list[int], int]]:
        # The last ones; before them come a look whether it answers, and a warming request.
        return sorted((event["prompt"], event["tokens"]) for event in asked[-MIXED.requests :])

    assert work(printed[: starts[1]]) == work(printed[starts[1] :])
    assert record.rows == (TINY, MIXED)


def test_peers_go_on_when_the_benchmark_is_asked_to_end(tmp_path: Path) -> None:
    with fake_server("--mood", "hangs") as measured, fake_server() as waiting:
        command = [sys.executable, "-P", "-m", "toolkit.main", "bench", "--url", measured.url]
        command += ["--peer", f"a={waiting.url},{waiting.pid}", "--out", str(tmp_path / "bench.json")]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as running:
            assert measured.next_event()["event"] == "asked"
            assert waiting.is_stopped
            running.send_signal(signal.SIGTERM)
            assert running.wait(timeout=60) != 0
        assert not waiting.is_stopped
