"""API keys and the limits of their groups in Redis. Knows nothing of what keys are used for, or how much was."""

from typing import TypeVar

from services.common.api_keys import ApiKey, Limits
from services.common.redis import scripts
from services.common.redis.client import RedisClient
from services.common.redis.keys import API_KEYS, KEY_GROUPS

L = TypeVar("L", bound=Limits)


class KeyStore:
    """All keys. All raise Unavailable when Redis does not answer."""

    def __init__(self, redis: RedisClient) -> None:
        self._redis = redis

    async def put(self, key: ApiKey) -> None:
        """Writes a key, in the place of the one with its id if there is one."""
        await self._redis.command("HSET", API_KEYS, key.id, _json(key))

    async def replace(self, key: ApiKey) -> bool:
        """Writes a key in the place of the one with its id. False: that was revoked meanwhile, which stays so."""
        return bool(await self._redis.script(scripts.KEY_REPLACE, [API_KEYS], (key.id, _json(key))))

    async def get(self, key_id: str) -> ApiKey | None:
        return _read(ApiKey, await self._redis.command("HGET", API_KEYS, key_id))

    async def all(self) -> list[ApiKey]:
        """Revoked and expired ones included, the oldest first."""
        keys = [ApiKey.model_validate_json(value) for value in await self._redis.command("HVALS", API_KEYS)]
        return sorted(keys, key=lambda key: (str(key.created), key.id))

    async def count(self) -> int:
        """How many keys there are, revoked and expired ones included."""
        return int(await self._redis.command("HLEN", API_KEYS))

    async def put_group(self, name: str, limits: Limits) -> None:
        await self._redis.command("HSET", KEY_GROUPS, name, _json(limits))

    async def group(self, name: str) -> Limits:
        """What the keys of a group share; no limits if nobody has set any."""
        return _read(Limits, await self._redis.command("HGET", KEY_GROUPS, name)) or Limits()


def _json(limits: Limits) -> str:
    return limits.model_dump_json(exclude_defaults=True)


def _read(schema: type[L], value: bytes | None) -> L | None:
    return None if value is None else schema.model_validate_json(value)
