"""Mutual TLS between services: each process shows a certificate of one private CA, and demands one of others.

What a process shows is a context variable, set once at its start, since it is the same for every connection to another
service. Files that are renewed count for connections that are made from then on (`renewal.py`). A process without a
certificate is refused by those that demand one.
"""

import contextlib
import ssl
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import grpc

from services.common.config import CommonSettings, ConfigError
from services.common.renewal import Renewed
from services.common.tls import SERVICE_NAME, TlsFiles, loaded, newest_credentials, read_file, shake_hands, trust

# Internal channels check the name that all services share in place of the address that they dial; tls.py says why.
CHANNEL_OPTIONS = (("grpc.ssl_target_name_override", SERVICE_NAME),)


@dataclass(frozen=True, slots=True)
class Identity:
    """What a process shows to other services, and whom it trusts: the content of `TlsFiles`."""

    ca: bytes
    cert: bytes
    key: bytes = field(repr=False)

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(self.key, self.cert)], self.ca)


_identity: ContextVar[Renewed[Identity] | None] = ContextVar("identity", default=None)


def server_credentials() -> grpc.ServerCredentials | None:
    """Of a server for other services, which must show certificates of the CA; None: connections are plain."""
    if (own := _identity.get()) is None:
        return None
    return newest_credentials(own, Identity.configuration, require_client_auth=True)


def channel_credentials() -> grpc.ChannelCredentials | None:
    """Of a channel to another service, for use with CHANNEL_OPTIONS; None: connections are plain."""
    if (own := _identity.get()) is None:
        return None
    newest = own.get()
    return grpc.ssl_channel_credentials(newest.ca, newest.key, newest.cert)


def set_up(service: str, settings: CommonSettings) -> None:
    """Has this process show and demand certificates if the settings name some.

    Exits with status 2 and one sentence if they cannot be used.
    """
    try:
        if files := files_of(settings):
            _identity.set(_renewed(files))
    except ConfigError as error:
        print(f"headrace {service}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


@contextlib.contextmanager
def showing(files: TlsFiles | None) -> Iterator[None]:
    """Channels that are made within it show these certificates; none: they are plain. Raises ConfigError."""
    token = _identity.set(_renewed(files) if files else None)
    try:
        yield
    finally:
        _identity.reset(token)


def files_of(settings: CommonSettings) -> TlsFiles | None:
    """The files that the settings name, all or none of them. Raises ConfigError."""
    paths = {"CA": settings.mtls_ca, "CERT": settings.mtls_cert, "KEY": settings.mtls_key}
    given = [name for name, path in paths.items() if path]
    missing = [name for name, path in paths.items() if not path]
    if given and missing:
        raise ConfigError(f"HEADRACE_MTLS_{given[0]} needs HEADRACE_MTLS_{missing[0]} beside it")
    return None if missing else TlsFiles(str(settings.mtls_ca), str(settings.mtls_cert), str(settings.mtls_key))


def _renewed(files: TlsFiles) -> Renewed[Identity]:
    """Raises ConfigError."""
    return Renewed([Path(path) for path in (files.ca, files.cert, files.key)], partial(read_identity, files))


def read_identity(files: TlsFiles) -> Identity:
    """Raises ConfigError, in one sentence, if another service of the same CA would not accept what is in the files."""
    ca, cert, key = Path(files.ca), Path(files.cert), Path(files.key)
    read = Identity(read_file(ca), read_file(cert), read_file(key))
    server = loaded(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), cert, key)
    client = loaded(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), cert, key)
    for context in (server, client):
        trust(context, ca)
        context.verify_mode = ssl.CERT_REQUIRED
    shake_hands(server, client, cert, SERVICE_NAME)
    return read
