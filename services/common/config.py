"""Settings: one typed, frozen schema per service, filled from the environment and a TOML file.

The only module that reads the environment. A field of `CommonSettings` is set for every service by `HEADRACE_FIELD`,
for one service by `HEADRACE_SERVICE_FIELD`; a field of a service's own schema by `HEADRACE_SERVICE_FIELD` alone. The
file named by `HEADRACE_CONFIG` has the same fields in a table `[common]` and one table per service. The environment
wins over the file, the narrower name over the wider. An unknown name or a bad value stops the start and is named in
the message.
"""

import json
import os
import sys
import tomllib
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

PREFIX = "HEADRACE_"
SERVICES = ("gateway", "scheduler", "cache", "worker")
_REDIS_USERS = ("gateway", "scheduler")


class ConfigError(Exception):
    """A setting is unknown or has a bad value; the message names the variable or the file's key."""


def split_commas(value: object) -> object:
    """The items of a comma-separated setting; lists stay as they are."""
    return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value


def _check_address(address: str) -> str:
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and 0 < int(port) <= 65535):
        raise ValueError(f"{address!r} is not host:port")
    return address


Addresses = Annotated[tuple[Annotated[str, AfterValidator(_check_address)], ...], BeforeValidator(split_commas)]
"""`host:port` items, comma-separated; a DNS name stands for all its addresses and is looked up again and again."""

Port = Annotated[int, Field(ge=0, le=65535)]

OptionalPath = Annotated[Path | None, BeforeValidator(lambda value: value or None)]
"""A file or folder; an empty value is none."""


class CommonSettings(BaseModel):
    """Fields that every service has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # The least that is logged; `headrace log-level` changes it while a service runs.
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    # text for people, json for programs: one object a line.
    log_format: Literal["text", "json"] = "text"
    # OTLP/gRPC endpoint that traces are sent to, e.g. http://127.0.0.1:4317. Empty: no traces are recorded.
    otlp_endpoint: str = ""
    # Share of the requests whose trace is recorded, from 0 to 1. Decided by the gateway, and not for requests that come
    # with a trace context: they are recorded if their caller's trace is.
    trace_sample: Annotated[float, Field(ge=0, le=1)] = 0.1
    # May hold a password. Used by gateways and schedulers alone: the others need not be told.
    redis_url: str = "redis://127.0.0.1:6379/0"
    # Every scheduler replica: gateways and workers dial them all.
    schedulers: Addresses = ("127.0.0.1:50061",)
    # The cache service, dialled by workers and schedulers.
    caches: Addresses = ("127.0.0.1:50071",)
    # False: no metric counts anything and /metrics answers 404, to measure what metrics cost.
    metrics: bool = True
    # Where /metrics of the services without an HTTP front is served. 0 takes a free port.
    metrics_host: str = "127.0.0.1"
    # Mutual TLS between services: PEM files of a private CA, and of a certificate of it and its key. All three or none:
    # then connections between services are plain, for one machine or a network that nobody else is on.
    mtls_ca: OptionalPath = None
    mtls_cert: OptionalPath = None
    mtls_key: OptionalPath = None


S = TypeVar("S", bound=CommonSettings)


def load(schema: type[S], service: str) -> S:
    """Settings of one service from this process's environment and the file it names.

    Exits with status 2 and one sentence per problem if a setting is unknown or bad.
    """
    try:
        return parse(schema, service, os.environ)
    except ConfigError as error:
        print(f"headrace {service}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def parse(schema: type[S], service: str, environment: Mapping[str, str]) -> S:
    """Settings from the given environment; raises ConfigError."""
    sources: dict[str, str] = {}  # field -> where its value came from, for messages
    values: dict[str, Any] = {}
    if path := environment.get(f"{PREFIX}CONFIG"):
        _read_file(schema, service, Path(path), values, sources)
    _read_environment(schema, service, environment, values, sources)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            if item["loc"]:
                name = str(item["loc"][0])
                problems.append(f"{sources.get(name, name)}: {item['msg']} (got {item['input']!r})")
            else:  # of several fields; its input is all of them, with the password in Redis' URL
                problems.append(item["msg"])
        raise ConfigError("; ".join(problems)) from error


def child_environment(service: str, settings: Mapping[str, object]) -> dict[str, str]:
    """This process's environment with a service's settings added, for a child process; Redis' URL for its users."""
    names = {f"{PREFIX}{service.upper()}_{field.upper()}": str(value) for field, value in settings.items()}
    inherited = {
        name: value for name, value in os.environ.items() if service in _REDIS_USERS or not _is_redis_url(name)
    }
    return {**inherited, **names}


def _is_redis_url(variable: str) -> bool:
    return variable.startswith(PREFIX) and variable.endswith("REDIS_URL")


def secret_variable(name: str) -> str | None:
    """A variable that another file names as the place of a secret."""
    return os.environ.get(name)


def is_set(variable: str) -> bool:
    """Whether a variable that is a setting of another process, which this one starts, is in the environment."""
    return bool(os.environ.get(variable))


def read_tables(path: Path) -> dict[str, Any]:
    """What a TOML file says, or one whose name ends in .json; numbers with a point as decimals. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
        parse_text = json.loads if path.suffix == ".json" else tomllib.loads
        tables = parse_text(text, parse_float=Decimal)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except ValueError as error:  # the bad syntax of either
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(tables, dict):
        raise ConfigError(f"{path}: must be an object of tables")
    return tables


def home_directory(kind: Literal["cache", "state"]) -> Path:
    """Where this user's Headrace keeps models and caches, or what it knows of running stacks (XDG base directories)."""
    variable, default = {"cache": ("XDG_CACHE_HOME", ".cache"), "state": ("XDG_STATE_HOME", ".local/state")}[kind]
    base = os.environ.get(variable)
    return (Path(base) if base else Path.home() / default) / "headrace"


def _read_file(
    schema: type[CommonSettings], service: str, path: Path, values: dict[str, Any], sources: dict[str, str]
) -> None:
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{PREFIX}CONFIG: cannot read {path}: {error}") from error
    if unknown := tables.keys() - {"common", *SERVICES}:
        raise ConfigError(f"{path}: unknown table [{min(unknown)}]; known are common, {', '.join(SERVICES)}")
    for table, known in (("common", CommonSettings.model_fields), (service, schema.model_fields)):
        for field, value in tables.get(table, {}).items():
            if field not in known:
                raise ConfigError(f"{path}: [{table}] has no setting {field!r}")
            values[field], sources[field] = value, f"{path}: [{table}] {field}"


def _read_environment(
    schema: type[CommonSettings],
    service: str,
    environment: Mapping[str, str],
    values: dict[str, Any],
    sources: dict[str, str],
) -> None:
    own = f"{service.upper()}_"
    others = tuple(f"{other.upper()}_" for other in SERVICES if other != service)
    narrow: dict[str, tuple[str, str]] = {}
    for variable, value in environment.items():
        name = variable.removeprefix(PREFIX)
        if name == variable or name == "CONFIG" or name.startswith(others):
            continue
        field = name.removeprefix(own).lower()
        known = schema.model_fields if name.startswith(own) else CommonSettings.model_fields
        if field not in known:
            raise ConfigError(f"{variable}: there is no such setting")
        if name.startswith(own):
            narrow[field] = (variable, value)
        else:
            values[field], sources[field] = value, variable
    for field, (variable, value) in narrow.items():
        values[field], sources[field] = value, variable
