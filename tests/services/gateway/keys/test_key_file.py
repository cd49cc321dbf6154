import json
from pathlib import Path

import pytest

from services.common.api_keys import digest
from services.common.config import ConfigError
from services.gateway.keys.key_file import KeyFile
from tests.services.gateway.stack import running_stack

GROUPS = "[groups.team]\nconcurrent = 2\n"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_keys_by_hash_variable_file_or_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI_KEY", "from the environment")
    write(tmp_path / "secret", "from a file\n")
    path = write(
        tmp_path / "keys.toml",
        f"""
        [[keys]]
        name = "a"
        sha256 = "{digest("by its hash")}"
        money_per_month = 0.5
        expires = 2100-01-01T00:00:00Z
        [[keys]]
        name = "b"
        key_env = "CI_KEY"
        group = "team"
        [[keys]]
        id = "c"
        key_file = "{tmp_path}/secret"
        [[keys]]
        key = "plain"
        {GROUPS}""",
    )
    keys = KeyFile(path)
    found = [keys.find(key) for key in ("by its hash", "from the environment", "from a file", "plain")]
    names = [(used.key.name, [limit.name for limit in used.limits]) for used in found if used]
    assert names == [("a", ["money_per_month"]), ("b", ["concurrent"]), ("", []), ("", [])]
    assert found[2] is not None and found[2].key.id == "c"
    assert keys.find("another") is None and keys


def test_json_has_the_same_shape(tmp_path: Path) -> None:
    tables = {"keys": [{"key": "plain", "money_per_month": 0.25, "group": "g"}], "groups": {"g": {"concurrent": 1}}}
    used = KeyFile(write(tmp_path / "keys.json", json.dumps(tables))).find("plain")
    assert used is not None and [limit.meter.limit for limit in used.limits] == [250_000, 1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[keys]]\nname = 'a'", "key a: has no key"),
        ("[[keys]]\nkey = 'secret'\nsha256 = 'b'", "has sha256 and key"),
        ("[[keys]]\nkey_env = 'NOT_THERE'", "key_env gives no key"),
        ("[[keys]]\nkey_file = '/not/there'", "cannot read /not/there"),
        ("[[keys]]\nkey = 'secret'\nspeed = 1", "speed"),
        ("[[keys]]\nkey = 'secret'\nconcurrent = 0", "concurrent"),
        ("[[keys]]\nkey = 'secret'\ngroup = 'g'", "no group 'g'"),
        ("[groups.g]\nspeed = 1", "group g: speed"),
        ("[[kyes]]", "unknown table 'kyes'"),
        ("[[keys", "keys.toml"),
    ],
)
def test_a_bad_file_is_named_and_tells_no_secret(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        KeyFile(write(tmp_path / "keys.toml", text))
    assert said in str(caught.value) and "secret" not in str(caught.value)


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    now = 0.0
    path = write(tmp_path / "keys.toml", "[[keys]]\nkey = 'one'")
    keys = KeyFile(path, clock=lambda: now)
    write(path, "[[keys]]\nkey = 'another'")
    assert keys.find("one") and not keys.find("another")
    now = 1.0
    assert keys.find("another") and not keys.find("one")
    write(path, "nonsense")
    now = 2.0
    assert keys.find("another"), "a bad file changes nothing"
    path.unlink()
    now = 3.0
    assert keys.find("another")


def test_an_empty_file_has_no_keys() -> None:
    assert not KeyFile(Path("/dev/null"))
    assert not KeyFile(None)


async def test_a_gateway_with_a_file_of_keys(redis_url: str, tmp_path: Path) -> None:
    path = write(tmp_path / "keys.toml", "[[keys]]\nkey = 'sk-mine'\nrequests_per_minute = 1")
    async with running_stack(redis_url, keys_file=path) as stack:
        body = {"model": "org/tiny", "prompt": "hello"}
        assert (await stack.http.post("/v1/completions", json=body)).status_code == 401
        posts = [await stack.http.post("/v1/completions", json=body, headers={"x-api-key": "sk-mine"}) for _ in "ab"]
        assert [post.status_code for post in posts] == [200, 429]
