"""Keys in a test's Redis, and calls with them."""

from dataclasses import dataclass

import httpx

from services.common.api_keys import ApiKey, Limits, digest, new_id, new_key
from services.common.redis.client import RedisClient
from services.common.redis.key_limits import group_meters, key_meters, scope_of
from services.common.redis.key_store import KeyStore
from services.common.redis.limits import LimitStore
from tests.services.gateway.fakes import MODEL
from tests.services.gateway.stack import Stack, eventually


@dataclass
class TestKey:
    """A key as its owner and as the operator see it."""

    __test__ = False

    secret: str
    key: ApiKey
    redis: RedisClient

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.secret}"}

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return tuple(self.headers.items())

    async def complete(self, stack: Stack, prompt: object = "hello", **fields: object) -> httpx.Response:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 100, **fields}
        return await stack.http.post("/v1/completions", json=body, headers=self.headers)

    async def change(self, **fields: object) -> None:
        self.key = self.key.model_copy(update=fields)
        await KeyStore(self.redis).put(self.key)

    async def sums(self) -> dict[str, tuple[int, int]]:
        """Used and held, by limit."""
        meters = key_meters(self.key)
        if self.key.group:
            group = await KeyStore(self.redis).group(self.key.group)
            meters |= {f"group {name}": meter for name, meter in group_meters(group).items()}
        standings = await LimitStore(self.redis).look(scope_of(self.key), meters.values())
        return {name: (one.used, one.held) for name, one in zip(meters, standings, strict=True)}

    async def settled(self) -> dict[str, tuple[int, int]]:
        """The sums once nothing is held."""

        async def nothing_held() -> bool:
            return not any(held for _, held in (await self.sums()).values())

        await eventually(nothing_held)
        return await self.sums()


async def make_key(redis: RedisClient, **fields: object) -> TestKey:
    """A new key in Redis; `fields` are those of ApiKey."""
    key_id = new_id()
    secret = new_key(key_id)
    key = ApiKey.model_validate({"id": key_id, "name": "test", "sha256": digest(secret), **fields})
    await KeyStore(redis).put(key)
    return TestKey(secret, key, redis)


async def set_group(redis: RedisClient, name: str, **limits: object) -> None:
    await KeyStore(redis).put_group(name, Limits.model_validate(limits))
