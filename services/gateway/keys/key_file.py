"""A file of keys, for machines whose keys are deployed with their settings instead of kept in Redis.

TOML, or JSON of the same shape. Each key has the fields of `ApiKey` and one of: `sha256`, the hash of the whole key;
`key_env` or `key_file`, the variable or the file that holds the key; `key`, the key itself. It may look like anything.

    [[keys]]
    name = "ci"
    key_env = "CI_KEY"
    tokens_per_minute = 50_000
    group = "internal"

    [groups.internal]
    money_per_month = 100

A file that changed is read again within a second. What is wrong with it stops the start, but not a gateway that runs:
that one keeps the keys it has.
"""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, ValidationError

from services.common.api_keys import ApiKey, Limits, digest
from services.common.config import ConfigError, read_tables, secret_variable
from services.gateway.keys.account import KeyInUse

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0
_SOURCES = ("sha256", "key", "key_env", "key_file")


class _FileKey(ApiKey):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _FileLimits(Limits):
    model_config = ConfigDict(frozen=True, extra="forbid")


class KeyFile:
    """The keys of a file, or none without one. Raises ConfigError at its start."""

    def __init__(self, path: Path | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._looked_at = clock()
        self._version = _version(path)
        self._keys = read_keys(path) if path else {}

    def __bool__(self) -> bool:
        self._look()
        return bool(self._keys)

    def find(self, credential: str) -> KeyInUse | None:
        """The key in the file that this is. What is compared are hashes, of which a caller cannot choose a part."""
        self._look()
        used = self._keys.get(digest(credential)) if self._keys else None
        return used if used and used.key.matches(credential) else None

    def named(self, key_id: str) -> KeyInUse | None:
        """The key of that id."""
        self._look()
        return next((used for used in self._keys.values() if used.key.id == key_id), None)

    def _look(self) -> None:
        """Reads the file again if it has changed."""
        if self._path is None or self._clock() - self._looked_at < _LOOK_EVERY_S:
            return
        self._looked_at = self._clock()
        if (version := _version(self._path)) == self._version:
            return
        self._version = version
        try:
            self._keys = read_keys(self._path)
            log.info("%s: %d keys", self._path, len(self._keys))
        except ConfigError as error:
            log.error("the keys stay as they were: %s", error)


def read_keys(path: Path) -> Mapping[str, KeyInUse]:
    """The keys of a file by their hashes. Raises ConfigError that names the key at fault."""
    tables = read_tables(path)
    if unknown := tables.keys() - {"keys", "groups"}:
        raise ConfigError(f"{path}: unknown table {min(unknown)!r}; known are keys and groups")
    groups = {
        name: _read(_FileLimits, table, f"{path}: group {name}") for name, table in tables.get("groups", {}).items()
    }
    keys: dict[str, KeyInUse] = {}
    for number, table in enumerate(tables.get("keys", [])):
        where = f"{path}: key {table.get('name', number)}"
        key = _read(_FileKey, _with_hash(table, where), where)
        if key.group and key.group not in groups:
            raise ConfigError(f"{where}: there is no group {key.group!r}")
        keys[key.sha256] = KeyInUse.of(key, groups.get(key.group, Limits()))
    return keys


def _with_hash(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a key, its secret replaced by the hash of it."""
    sources = [source for source in _SOURCES if source in table]
    if len(sources) != 1:
        raise ConfigError(f"{where}: has {' and '.join(sources) or 'no key'}; give one of {', '.join(_SOURCES)}")
    rest = {field: value for field, value in table.items() if field not in _SOURCES}
    sha256 = table["sha256"] if sources[0] == "sha256" else digest(_secret(sources[0], str(table[sources[0]]), where))
    return {"id": f"file-{str(sha256)[:12]}", "name": "", **rest, "sha256": sha256}


def _secret(source: str, value: str, where: str) -> str:
    """Raises ConfigError, which does not tell the key."""
    if source == "key_env":
        secret = secret_variable(value)
    elif source == "key_file":
        try:
            secret = Path(value).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where}: cannot read {value}: {type(error).__name__}") from None
    else:
        secret = value
    if not secret:
        raise ConfigError(f"{where}: {source} gives no key")
    return secret


def _read(schema: type[Any], table: Any, where: str) -> Any:
    try:
        return schema.model_validate(table)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_input=False)]
        raise ConfigError(f"{where}: {'; '.join(problems)}") from None


def _version(path: Path | None) -> tuple[int, int, int]:
    """Another one when the file is another one; zeros if it is not there."""
    try:
        state = path.stat() if path else None
    except OSError:
        state = None
    return (state.st_mtime_ns, state.st_size, state.st_ino) if state else (0, 0, 0)
