"""What may be given as a peer, and what is said of the rest."""

import os
import subprocess

import pytest

from tests.toolkit.fake_server import fake_server
from toolkit.bench_peers import BadPeer, Peer, parse_peers, peer_server
from toolkit.bench_servers import NotAnswering


def test_good_forms() -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        given = parse_peers(["vllm=http://127.0.0.1:8001/", f"llama.cpp=https://host,{process.pid}"])
        process.kill()
    assert given == (Peer("vllm", "http://127.0.0.1:8001", None), Peer("llama.cpp", "https://host", process.pid))


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["http://127.0.0.1:8001"], "is not of the form NAME=URL"),
        (["=http://127.0.0.1:8001"], "is not of the form NAME=URL"),
        (["a="], "is not of the form NAME=URL"),
        (["a=http://h:1,"], "is not of the form NAME=URL"),
        (["a=127.0.0.1:8001"], "is not a URL without a path"),
        (["a=http://h:1/v1"], "is not a URL without a path"),
        (["a=http://h:port"], "is not a URL without a path"),
        (["a=http://h:1,-5"], "'-5' is not a positive number"),
        (["a=http://h:1,0"], "'0' is not a positive number"),
        (["a=http://h:1,5,6"], "'5,6' is not a positive number"),
        ([f"a=http://h:1,{2**22 + 1}"], f"there is no process {2**22 + 1}"),
        ([f"a=http://h:1,{10**30}"], f"there is no process {10**30}"),
        ([f"a=http://h:1,{os.getpid()}"], "would stop itself"),
        (["ours=http://h:1"], "'ours' is taken"),
        (["a=http://h:1", "a=http://h:2"], "'a' is given twice"),
    ],
)
def test_bad_forms_are_told_in_a_sentence(texts: list[str], said: str) -> None:
    with pytest.raises(BadPeer, match=said) as told:
        parse_peers(texts)
    assert str(told.value).startswith("--peer")
    assert str(told.value).endswith(".")


def test_a_process_can_be_one_peer_only() -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        with pytest.raises(BadPeer, match=f"the process {process.pid} is given twice"):
            parse_peers([f"a=http://h:1,{process.pid}", f"b=http://h:2,{process.pid}"])
        process.kill()


async def test_a_peer_is_asked_before_it_is_measured() -> None:
    with fake_server() as server:
        peer = Peer("a", server.url, server.pid)
        ready = await peer_server(peer)
        assert ready.tree is not None and ready.tree.pid == server.pid
        assert await ready.answers()
        server.end()
        with pytest.raises(NotAnswering, match=rf"--peer a: {server.url} does not answer"):
            await peer_server(peer)
