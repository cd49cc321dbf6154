"""`headrace keys` on a real Redis, as it is typed."""

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from services.common.api_keys import visible_part
from toolkit.keys import KeyProblem, expiry
from toolkit.main import app


class Keys:
    def __init__(self, redis_url: str) -> None:
        self._url = redis_url

    def run(self, *words: str) -> Result:
        return CliRunner().invoke(app, ["keys", *words, "--redis-url", self._url])

    def json(self, *words: str) -> dict[str, object]:
        done = self.run(*words, "--json")
        assert done.exit_code == 0, done.output
        told = json.loads(done.stdout)
        assert isinstance(told, dict)
        return told


@pytest.fixture
def keys(redis_url: str) -> Keys:
    return Keys(redis_url)


def test_a_key_is_told_once(keys: Keys) -> None:
    made = keys.json(
        "create",
        "ci",
        "--requests-per-minute",
        "60",
        "--money-per-month",
        "5.50",
        "--models",
        "a,b",
        "--expires",
        "30d",
    )
    assert visible_part(str(made["key"])) == made["id"]
    assert (made["name"], made["requests_per_minute"], made["money_per_month"]) == ("ci", 60, "5.50")
    shown = keys.json("show", "ci")
    assert shown["use"] == {
        "requests_per_minute": {"used": 0, "held": 0, "limit": 60},
        "money_per_month": {"used": 0.0, "held": 0.0, "limit": 5.5},
    }
    for told in (keys.run("show", "ci").output, keys.run("list").output, keys.run("list", "--json").output):
        assert str(made["id"]) in told and str(made["key"]) not in told and "sha256" not in told


def test_plain_output_is_the_key_alone(keys: Keys) -> None:
    assert visible_part(keys.run("create").stdout.strip())


def test_rotating_keeps_the_id_and_revoking_ends_it(keys: Keys) -> None:
    made = keys.json("create", "ci")
    rotated = keys.json("rotate", "ci")
    assert rotated["id"] == made["id"] and rotated["key"] != made["key"]
    assert keys.run("revoke", str(made["id"])).exit_code == 0
    assert keys.json("show", "ci")["state"] == "revoked"
    again = keys.run("rotate", "ci")
    assert (again.exit_code, "was revoked" in again.output) == (1, True)
    assert keys.json("create", "ci")["id"] != made["id"]
    assert keys.json("show", "ci")["state"] == "active", "the one that works comes first"


def test_limits_of_a_group(keys: Keys) -> None:
    assert "concurrent=3" in keys.run("group", "team", "--concurrent", "3").output
    keys.json("create", "ci", "--group", "team", "--tokens-per-minute", "9")
    use = keys.json("show", "ci")["use"]
    assert isinstance(use, dict) and set(use) == {"tokens_per_minute", "group_concurrent"}
    assert "concurrent=3" in keys.run("group", "team").output, "to ask changes nothing"
    assert keys.json("group", "team", "--money-per-month", "5") == {"group": "team", "money_per_month": "5"}
    assert keys.run("group", "team", "--no-limits", "--concurrent", "1").exit_code == 1
    assert "no limits" in keys.run("group", "team", "--no-limits").output
    assert keys.json("group", "team") == {"group": "team"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("show", "nobody"), "There is no key 'nobody'"),
        (("create", "--expires", "soon"), "'soon' is not a number with s, m, h or d"),
        (("create", "--scopes", "fly"), "--scopes: "),
        (("create", "--money-per-month", "much"), "'much' is not a number"),
        (("create", "--money-per-month", "-1"), "--money-per-month: "),
    ],
)
def test_what_cannot_be_is_said(keys: Keys, words: tuple[str, ...], said: str) -> None:
    done = keys.run(*words)
    assert (done.exit_code, said in done.output) == (1, True), done.output


def test_a_name_is_taken_once(keys: Keys) -> None:
    keys.json("create", "ci")
    assert "There is a key 'ci' already" in keys.run("create", "ci").output


def test_without_a_stack_the_redis_must_be_named(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["keys", "list"], env={"XDG_STATE_HOME": str(tmp_path)})
    assert (done.exit_code, "--redis-url" in done.output) == (1, True)


def test_units_of_an_expiry() -> None:
    moments = [expiry(given) for given in ("90s", "45m", "12h", "30d")]
    assert all(moment is not None for moment in moments) and moments == sorted(moments, key=str)
    with pytest.raises(KeyProblem):
        expiry("30")
