"""Servers take turns: one runs, the others stand still with all their children."""

import pytest

from tests.toolkit.fake_server import FakeServer, fake_server
from toolkit import bench_servers
from toolkit.bench_peers import Peer, peer_server
from toolkit.bench_servers import NotAnswering, Server, Turns
from toolkit.process_tree import ProcessTree


async def server_of(name: str, fake: FakeServer) -> Server:
    return await peer_server(Peer(name, fake.url, fake.pid))


async def test_one_runs_at_a_time_and_all_at_the_end() -> None:
    with fake_server() as first, fake_server() as second:
        servers = [await server_of("first", first), await server_of("second", second)]
        with Turns(servers) as turns:
            await turns.give(servers[0])
            assert (first.is_stopped, second.is_stopped) == (False, True)
            await turns.give(servers[1])
            assert (first.is_stopped, second.is_stopped) == (True, False)
        assert (first.is_stopped, second.is_stopped) == (False, False)


async def test_all_go_on_after_an_error() -> None:
    with fake_server() as first, fake_server() as second:
        servers = [await server_of("first", first), await server_of("second", second)]
        with pytest.raises(RuntimeError), Turns(servers) as turns:
            await turns.give(servers[0])
            assert second.is_stopped
            raise RuntimeError
        assert (first.is_stopped, second.is_stopped) == (False, False)


async def test_one_without_a_known_process_is_left_alone() -> None:
    with fake_server() as first, fake_server() as second:
        unknown = await peer_server(Peer("unknown", second.url, None))
        servers = [await server_of("first", first), unknown]
        with Turns(servers) as turns:
            await turns.give(servers[0])
            assert (first.is_stopped, second.is_stopped) == (False, False)
            await turns.give(unknown)
            assert (first.is_stopped, second.is_stopped) == (True, False)


async def test_a_turn_starts_when_the_server_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([False, False, True])

    async def answer() -> bool:
        return next(answers)

    async def never() -> bool:
        return False

    with fake_server() as fake:
        tree = ProcessTree(fake.pid)
        with Turns([]) as turns:
            await turns.give(Server("late", fake.url, tree, answer))
            assert list(answers) == []
            monkeypatch.setattr(bench_servers, "_RECOVERY_DEADLINE_S", 0.1)
            with pytest.raises(NotAnswering, match=rf"never at {fake.url} did not answer"):
                await turns.give(Server("never", fake.url, tree, never))
