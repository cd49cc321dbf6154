from pathlib import Path
from typing import Self

import pytest
from pydantic import Field, model_validator

from services.common.config import SERVICES, CommonSettings, ConfigError, child_environment, load, parse


class WorkerSettings(CommonSettings):
    port: int = Field(default=50052, ge=0, le=65535)
    model: str = "default"


def test_defaults_need_no_environment() -> None:
    assert parse(WorkerSettings, "worker", {"PATH": "/bin"}) == WorkerSettings()


def test_narrow_name_wins_over_wide_and_environment_over_file(tmp_path: Path) -> None:
    file = tmp_path / "headrace.toml"
    file.write_text(
        '[common]\nlog_level = "debug"\nredis_url = "redis://file/0"\n[worker]\nport = 1\nmodel = "filed"\n'
    )
    settings = parse(
        WorkerSettings,
        "worker",
        {
            "HEADRACE_CONFIG": str(file),
            "HEADRACE_LOG_LEVEL": "warning",
            "HEADRACE_WORKER_LOG_LEVEL": "error",
            "HEADRACE_WORKER_PORT": "2",
        },
    )
    assert (settings.log_level, settings.redis_url) == ("error", "redis://file/0")
    assert (settings.port, settings.model) == (2, "filed")


def test_addresses_are_comma_separated() -> None:
    settings = parse(WorkerSettings, "worker", {"HEADRACE_SCHEDULERS": "a:1, b:2,"})
    assert settings.schedulers == ("a:1", "b:2")


def test_settings_of_other_services_are_not_ours() -> None:
    assert parse(WorkerSettings, "worker", {"HEADRACE_GATEWAY_HTTP_PORT": "x"}) == WorkerSettings()


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"HEADRACE_WORKER_PROT": "1"}, "HEADRACE_WORKER_PROT: there is no such setting"),
        ({"HEADRACE_PORT": "1"}, "HEADRACE_PORT: there is no such setting"),
        ({"HEADRACE_WORKER_PORT": "70000"}, "HEADRACE_WORKER_PORT: Input should be less than or equal to 65535"),
        ({"HEADRACE_LOG_LEVEL": "loud"}, "HEADRACE_LOG_LEVEL: "),
        ({"HEADRACE_SCHEDULERS": "a:1,scheduler"}, "HEADRACE_SCHEDULERS: Value error, 'scheduler' is not host:port"),
        ({"HEADRACE_CACHES": "cache:0"}, "HEADRACE_CACHES: Value error, 'cache:0' is not host:port"),
        ({"HEADRACE_CONFIG": "/nowhere.toml"}, "HEADRACE_CONFIG: cannot read /nowhere.toml"),
    ],
)
def test_a_bad_setting_is_named(environment: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(WorkerSettings, "worker", environment)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[gatway]\n", "unknown table [gatway]"),
        ("[worker]\nprot = 1\n", "[worker] has no setting 'prot'"),
        ("[", "cannot read"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "headrace.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse(WorkerSettings, "worker", {"HEADRACE_CONFIG": str(file)})
    assert said in str(caught.value)


def test_load_stops_the_start_with_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HEADRACE_WORKER_PORT", "many")
    with pytest.raises(SystemExit) as stopped:
        load(WorkerSettings, "worker")
    assert stopped.value.code == 2
    assert "headrace worker: HEADRACE_WORKER_PORT: Input should be a valid integer" in capsys.readouterr().err


def test_a_problem_of_several_settings_shows_none_of_them() -> None:
    class Related(CommonSettings):
        @model_validator(mode="after")
        def _fail(self) -> Self:
            raise ValueError("these do not go together")

    with pytest.raises(ConfigError) as caught:
        parse(Related, "worker", {"HEADRACE_REDIS_URL": "redis://u:secret@h/0"})
    assert str(caught.value) == "Value error, these do not go together"


def test_only_children_that_use_redis_get_its_url(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"HEADRACE_REDIS_URL": "redis://u:secret@h/0", "HEADRACE_GATEWAY_REDIS_URL": "redis://u:secret@h/1"}
    for name, value in {**own, "HEADRACE_LOG_LEVEL": "debug"}.items():
        monkeypatch.setenv(name, value)
    children = {service: child_environment(service, {"id": "a"}) for service in SERVICES}
    assert {service for service, child in children.items() if "secret" in str(child)} == {"gateway", "scheduler"}
    assert own.items() <= children["gateway"].items()
    assert {child["HEADRACE_LOG_LEVEL"] for child in children.values()} == {"debug"}
    assert children["worker"]["HEADRACE_WORKER_ID"] == "a"
