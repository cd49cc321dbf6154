"""`headrace keys`: makes, shows, rotates and revokes API keys in the Redis of a stack."""

import contextlib
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from services.common.api_keys import ApiKey, Limits, digest, new_id, new_key
from services.common.redis.client import RedisClient
from services.common.redis.key_limits import group_meters, key_meters, scope_of
from services.common.redis.key_store import KeyStore
from services.common.redis.limits import LimitStore, Standing

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


class KeyProblem(Exception):
    """One sentence for the person."""


@dataclass(frozen=True, slots=True)
class MadeKey:
    """A key as it is made: the only moment at which the whole of it is known."""

    secret: str
    key: ApiKey


class KeyRing:
    """The keys of one stack, as a person works with them: by id or by name."""

    def __init__(self, redis: RedisClient) -> None:
        self._store = KeyStore(redis)
        self._limits = LimitStore(redis)

    async def create(self, name: str, fields: dict[str, Any]) -> MadeKey:
        """Raises KeyProblem if the name is taken by a key that still works."""
        now = _now()
        if name and any(key.name == name and not key.problem(now) for key in await self._store.all()):
            raise KeyProblem(f"There is a key {name!r} already; `headrace keys rotate` gives it a new secret.")
        key_id = new_id()
        secret = new_key(key_id)
        key = ApiKey(id=key_id, name=name, sha256=digest(secret), created=now, **fields)
        await self._store.put(key)
        return MadeKey(secret, key)

    async def rotate(self, wanted: str) -> MadeKey:
        """Gives a key a new secret; the old one no longer works."""
        key = await self.find(wanted)
        secret = new_key(key.id)
        rotated = key.model_copy(update={"sha256": digest(secret)})
        if not await self._store.replace(rotated):
            raise KeyProblem(f"The key {wanted!r} was revoked; make a new one with `headrace keys create`.")
        return MadeKey(secret, rotated)

    async def revoke(self, wanted: str) -> ApiKey:
        """Ends a key for good. It stays in the list."""
        key = await self.find(wanted)
        revoked = key.model_copy(update={"revoked": key.revoked or _now()})
        await self._store.put(revoked)
        return revoked

    async def all(self) -> list[ApiKey]:
        return await self._store.all()

    async def find(self, wanted: str) -> ApiKey:
        """By id or, among those that still work first, by name. Raises KeyProblem."""
        now = _now()
        named = [key for key in await self._store.all() if wanted in (key.id, key.name)]
        named.sort(key=lambda key: key.problem(now) is not None)
        if not named:
            raise KeyProblem(f"There is no key {wanted!r}; `headrace keys list` shows them.")
        return named[0]

    async def use(self, key: ApiKey) -> dict[str, Standing]:
        """How the limits of a key and of its group stand."""
        meters = key_meters(key)
        if key.group:
            shared = group_meters(await self._store.group(key.group))
            meters |= {f"group_{name}": meter for name, meter in shared.items()}
        standings = await self._limits.look(scope_of(key), meters.values())
        return dict(zip(meters, standings, strict=True))

    async def set_group(self, name: str, limits: Limits) -> None:
        await self._store.put_group(name, limits)

    async def group(self, name: str) -> Limits:
        return await self._store.group(name)


@contextlib.asynccontextmanager
async def open_ring(redis_url: str) -> AsyncIterator[KeyRing]:
    redis = RedisClient(redis_url)
    try:
        yield KeyRing(redis)
    finally:
        await redis.close()


def expiry(given: str | None) -> datetime | None:
    """The time that `30d`, `12h`, `45m` or `90s` from now is. Raises KeyProblem."""
    if given is None:
        return None
    found = re.fullmatch(r"([0-9]{1,6})([smhd])", given)
    if found is None:
        raise KeyProblem(f"--expires: {given!r} is not a number with s, m, h or d, such as 30d.")
    return _now() + timedelta(**{_UNITS[found[2]]: int(found[1])})


def key_json(key: ApiKey) -> dict[str, Any]:
    """All that may be told of a key."""
    return key.model_dump(mode="json", exclude={"sha256"}, exclude_none=True)


def state_of(key: ApiKey) -> str:
    return {None: "active", "was revoked": "revoked", "has expired": "expired"}[key.problem(_now())]


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
