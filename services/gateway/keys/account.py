"""What a call may do, by the key that it came with. Pure: knows neither how keys are found nor where limits are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from headrace.v1.sampling_pb2 import Priority
from services.common.api_keys import ApiKey, Limits, Scope
from services.common.redis.key_limits import group_meters, key_meters, scope_of
from services.common.redis.limits import Meter, Standing
from services.gateway.errors import NotAllowed

_PRIORITIES: Mapping[str, Priority.ValueType] = {
    "high": Priority.PRIORITY_HIGH,
    "normal": Priority.PRIORITY_NORMAL,
    "low": Priority.PRIORITY_LOW,
}


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit that a request is under."""

    # Its name in `Limits`.
    name: str
    # Whose it is, as messages say it.
    owner: str
    meter: Meter


@dataclass(frozen=True, slots=True)
class KeyInUse:
    """A key that was found to work, with all limits that its requests are under."""

    key: ApiKey
    scope: str
    limits: Sequence[Limit]
    counts_tokens: bool

    @classmethod
    def of(cls, key: ApiKey, group: Limits) -> "KeyInUse":
        own = [Limit(name, "this key", meter) for name, meter in key_meters(key).items()]
        shared = [Limit(name, f"group {key.group!r}", meter) for name, meter in group_meters(group).items()]
        return cls(key, scope_of(key), own + shared, key.counts_tokens or group.counts_tokens)

    def check_scope(self, scope: Scope) -> None:
        if scope not in self.key.scopes:
            raise NotAllowed(f"This key has no scope {scope!r}; it has {', '.join(self.key.scopes) or 'none'}.")


@dataclass(slots=True)
class Account:
    """The key of one call, or none, and how its limits stood when a request of that call came to them."""

    in_use: KeyInUse | None = None
    # Output tokens of a request that names no number; None: what its front makes of that.
    default_max_tokens: int | None = None
    standings: Sequence[tuple[Limit, Standing]] = field(default_factory=tuple)
    # Whether the standings are those of a request that was let in.
    reserved: bool = False

    @property
    def key_id(self) -> str:
        return self.in_use.key.id if self.in_use else ""

    def allows_model(self, model: str) -> bool:
        return self.in_use is None or not self.in_use.key.models or model in self.in_use.key.models

    def check_model(self, model: str) -> None:
        if not self.allows_model(model):
            raise NotAllowed(f"This key may not use the model {model!r}.", field="model")

    def priority(self, wanted: Priority.ValueType) -> Priority.ValueType:
        """The priority of a request that names this one, or none (0): at most the key's."""
        if self.in_use is None:
            return wanted or Priority.PRIORITY_NORMAL
        return max(wanted, _PRIORITIES[self.in_use.key.priority])  # the smaller, the earlier

    def cache_salt(self, wanted: str) -> str:
        """The salt of a request that names this one: within the key's own. No caller's salt has the NUL between."""
        if self.in_use is None:
            return wanted
        key = self.in_use.key
        return f"{key.cache_salt or key.id}\0{wanted}"
