"""Who calls: finds the key of a call, in a file or in Redis, and says whether it may come in.

What Redis says of a key holds for a second, so that a key that is revoked, rotated or expired stops working within two
on every gateway, and a busy one costs a command a second. Keys are in no log, error, metric or trace.
"""

import asyncio
import contextlib
import ipaddress
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from services.common.api_keys import ApiKey, Limits, Scope, visible_part
from services.common.errors import Unavailable, failures_logged
from services.common.redis.key_store import KeyStore
from services.gateway.config import GatewaySettings
from services.gateway.errors import InvalidKey
from services.gateway.keys.account import Account, KeyInUse
from services.gateway.keys.key_file import KeyFile

log = logging.getLogger(__name__)

_HOLDS_S = 1.0
_MOST_REMEMBERED = 10_000


@dataclass(frozen=True, slots=True)
class _Remembered:
    until: float
    used: KeyInUse


class Keys:
    """The keys that this gateway knows. `run` keeps it up to date on whether there are any."""

    def __init__(
        self,
        store: KeyStore,
        file: KeyFile,
        settings: GatewaySettings,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._file = file
        self._open_door = is_loopback(settings.host) or settings.allow_anonymous
        self._require_key = settings.require_key
        self._default_max_tokens = settings.default_max_tokens
        self._clock = clock
        self._remembered: dict[str, _Remembered] = {}
        self._in_redis: int | None = None

    async def run(self) -> None:
        """Counts the keys in Redis every second, until cancelled."""
        while True:
            # Redis says so itself when a key is looked for.
            with failures_logged(log, "the API keys could not be counted"), contextlib.suppress(Unavailable):
                self._in_redis = await self._store.count()
            await asyncio.sleep(_HOLDS_S)

    async def identify(self, credential: str | None, scope: Scope) -> Account:
        """The account of a call that came with this credential. Raises InvalidKey, NotAllowed or Unavailable.

        While there is no key, what does not look like one means nothing: OpenAI's clients always send something.
        """
        if credential is None or not (visible_part(credential) or await self._any_keys()):
            if await self._key_required():
                raise InvalidKey(
                    "This server needs an API key, as `Authorization: Bearer KEY`; over gRPC that is the metadata "
                    "`authorization` with the value `Bearer KEY`."
                )
            return Account()
        used = await self._find(credential)
        if problem := used.key.problem(datetime.now(UTC)):
            raise InvalidKey(f"The API key {used.key.id} {problem}.")
        used.check_scope(scope)
        return Account(used, self._default_max_tokens if used.counts_tokens else None)

    async def account(self, key_id: str) -> Account:
        """The account of a request that another gateway let in, by the id of its key. Raises Unavailable."""
        return Account(self._file.named(key_id) or await self._in_store(key_id)) if key_id else Account()

    async def _key_required(self) -> bool:
        if not self._open_door:
            return True
        return await self._any_keys() if self._require_key is None else self._require_key

    async def _any_keys(self) -> bool:
        if self._in_redis is None:
            self._in_redis = await self._store.count()
        return bool(self._in_redis or self._file)

    async def _find(self, credential: str) -> KeyInUse:
        """The key that matches. Raises InvalidKey."""
        if (in_file := self._file.find(credential)) is not None:
            return in_file
        key_id = visible_part(credential)
        used = await self._in_store(key_id) if key_id else None
        if used is None or not used.key.matches(credential):
            raise InvalidKey("The API key is not one of this server's.")
        return used

    async def _in_store(self, key_id: str) -> KeyInUse | None:
        remembered = self._remembered.get(key_id)
        now = self._clock()
        if remembered is not None and now < remembered.until:
            return remembered.used
        key = await self._store.get(key_id)
        if key is None:
            self._remembered.pop(key_id, None)
            return None
        used = KeyInUse.of(key, await self._group(key))
        if len(self._remembered) >= _MOST_REMEMBERED:
            self._remembered.clear()
        self._remembered[key_id] = _Remembered(now + _HOLDS_S, used)
        return used

    async def _group(self, key: ApiKey) -> Limits:
        return await self._store.group(key.group) if key.group else Limits()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def credential_of(authorization: str | None, x_api_key: str | None) -> str | None:
    """The key in the headers or the metadata of a call, or None."""
    scheme, _, value = (authorization or "").partition(" ")
    bearer = value.strip() if scheme.lower() == "bearer" else ""
    return bearer or x_api_key or None
