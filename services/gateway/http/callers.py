"""Who calls over HTTP, and, where no key tells, from which page.

A page that a person happens to visit can send requests to every address that the browser reaches, this machine's own
among them. They run, though the page may not read the answers; under a name of its own that it lets point here (DNS
rebinding) it reads those as well. A key is what such a page does not have, so only calls without one are looked at.
"""

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from services.common.api_keys import Scope
from services.gateway.config import GatewaySettings
from services.gateway.errors import NotAllowed
from services.gateway.http.cors import ANY_ORIGIN
from services.gateway.keys.account import Account
from services.gateway.keys.keys import Keys, credential_of, is_loopback

# Names that nobody can have in the public DNS.
_LOCAL_SUFFIXES = (".localhost", ".local", ".internal", ".home.arpa")


class Callers:
    """Whose each call is."""

    def __init__(self, keys: Keys, settings: GatewaySettings) -> None:
        self._keys = keys
        self._origins = frozenset(settings.cors_origins)
        self._only_this_machine = is_loopback(settings.host)

    async def identify(self, headers: Mapping[bytes, bytes], scope: Scope) -> Account:
        """Raises InvalidKey, NotAllowed or Unavailable."""
        authorization, x_api_key = _text(headers.get(b"authorization")), _text(headers.get(b"x-api-key"))
        account = await self._keys.identify(credential_of(authorization, x_api_key), scope)
        if account.in_use is None:
            self._check_page(_text(headers.get(b"origin")), _text(headers.get(b"host")))
        return account

    def _check_page(self, origin: str | None, host: str | None) -> None:
        """Raises NotAllowed for a page that has no business here. What is no browser sends no origin."""
        if origin is not None and not {origin, ANY_ORIGIN} & self._origins:
            # Whatever the port: proxies leave it out of `host`, and what runs beside the gateway needs no page to call.
            own = origin.partition("://")[2]
            if _name(own) != _name(host or "") or not is_local(own):
                raise NotAllowed(f"A page of {origin[:200]} may not call without a key: cors_origins does not name it.")
        elif origin is None and self._only_this_machine and host is not None and not is_local(host):
            raise NotAllowed(f"Calls without a key name this machine as localhost or by address, not {host[:200]!r}.")


def is_local(host: str) -> bool:
    """Whether a `host[:port]` is an address, or a name that means nothing beyond its own network."""
    name = _name(host)
    return bool(name) and ("." not in name or name.endswith(_LOCAL_SUFFIXES) or _is_address(name))


def _name(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").removesuffix(".")
    except ValueError:  # brackets without an address
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("latin-1")
