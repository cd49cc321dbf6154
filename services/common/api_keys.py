"""API keys: what one is, how it is written, and what is kept of it. Pure: knows neither Redis nor requests.

A key reads `hr-<12 hex digits>-<43 characters>`. What comes before the second hyphen is visible: it names the key in
lists, messages and Redis, and finds it. The whole key is known to its owner alone; only its SHA-256 is kept, which
needs no salt and no stretching, since the rest is 256 random bits.
"""

import hmac
import re
import secrets
from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from hashlib import sha256
from typing import Annotated, Literal, get_args

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

Scope = Literal["generate", "models"]
"""generate: completions and chats. models: listing models, tokenizing, and looking at the cluster."""
Priority = Literal["high", "normal", "low"]

SCOPES: tuple[Scope, ...] = get_args(Scope)
MICROS = 1_000_000
"""Money is counted in millionths of the unit that prices are in."""

_KEY = re.compile(r"(hr-[0-9a-f]{12})-[A-Za-z0-9_-]{43}")
_LONGEST_CREDENTIAL = 1024

Count = Annotated[int, Field(gt=0, lt=2**53)]
# Limits are compared as floats in Redis, which hold whole numbers up to 2**53.
Money = Annotated[Decimal, Field(gt=0, decimal_places=6, lt=2**53 // MICROS)]
CacheSalt = Annotated[str, Field(max_length=256, pattern=r"^[^\x00]*$")]


class Limits(BaseModel):
    """What a key, or all keys of a group together, may use. None: as much as there is."""

    model_config = ConfigDict(frozen=True)

    requests_per_minute: Count | None = None
    # Prompt and completion.
    tokens_per_minute: Count | None = None
    # Requests that run or wait at once.
    concurrent: Count | None = None
    tokens_per_day: Count | None = None
    # In the unit that prices are in.
    money_per_month: Money | None = None

    def amounts(self) -> Mapping[str, int]:
        """The limits there are, by name; money in millionths."""
        amounts = {name: getattr(self, name) for name in Limits.model_fields}
        if self.money_per_month is not None:
            amounts["money_per_month"] = int(self.money_per_month * MICROS)
        return {name: amount for name, amount in amounts.items() if amount is not None}

    @property
    def counts_tokens(self) -> bool:
        """Whether it must be known beforehand how many tokens a request can take."""
        return any(limit is not None for limit in (self.tokens_per_minute, self.tokens_per_day, self.money_per_month))


class ApiKey(Limits):
    """What is kept of a key, with its own limits."""

    # The visible part.
    id: str = Field(min_length=1)
    name: str
    # Of the whole key, in hexadecimal.
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    created: AwareDatetime | None = None
    expires: AwareDatetime | None = None
    revoked: AwareDatetime | None = None
    # Whose limits it shares; empty: nobody's.
    group: str = ""
    # Models it may use; empty: all.
    models: tuple[str, ...] = ()
    scopes: tuple[Scope, ...] = SCOPES
    # Of its requests that name none, and the highest they may name.
    priority: Priority = "normal"
    # Keys with the same one share cached prefixes; empty: this key alone.
    cache_salt: CacheSalt = ""

    def problem(self, now: datetime) -> str | None:
        """Why the key no longer works, or None."""
        if self.revoked is not None:
            return "was revoked"
        if self.expires is not None and self.expires <= now:
            return "has expired"
        return None

    def matches(self, credential: str) -> bool:
        return hmac.compare_digest(digest(credential), self.sha256)


def new_id() -> str:
    return f"hr-{secrets.token_hex(6)}"


def new_key(key_id: str) -> str:
    """A whole key with that visible part."""
    return f"{key_id}-{secrets.token_urlsafe(32)}"


def visible_part(credential: str) -> str | None:
    """The visible part of what looks like a key; None: no key of ours looks like that."""
    found = _KEY.fullmatch(credential)
    return found[1] if found else None


def digest(credential: str) -> str:
    """What is kept of a key."""
    return sha256(credential[:_LONGEST_CREDENTIAL].encode()).hexdigest()
