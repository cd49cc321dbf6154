"""TLS: certificate files, tried by a handshake before they are used, and what the public fronts need of them.

Files that are renewed are shown to the next caller (`renewal.py`). What services show one another: `mutual_tls.py`.
"""

import contextlib
import socket
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import grpc

from services.common.config import ConfigError
from services.common.renewal import Renewed

T = TypeVar("T")

SERVICE_NAME = "headrace.internal"
"""The name that the certificate of every service holds, beside its own.

Internal channels check it in place of the address that they dial. That is an IP address which a DNS name stood for, or
one that a worker found for itself; no certificate can list where a replica will run. Who may use the name is decided
by the private CA, which signs for services alone.
"""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths of PEM files: a certificate with what else is in its chain, its key, and the CA that others must be of."""

    ca: str
    cert: str
    key: str

    @classmethod
    def of(cls, folder: Path, name: str) -> Self:
        """Where `headrace certs` puts the files of a name."""
        return cls(str(folder / "ca.crt"), str(folder / f"{name}.crt"), str(folder / f"{name}.key"))


@dataclass(frozen=True, slots=True)
class FrontCert:
    """The certificate file of a gateway's public fronts, and one of the names that it is for."""

    path: str
    name: str

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Of a channel that trusts this certificate as it is. Raises ConfigError."""
        return grpc.ssl_channel_credentials(read_file(Path(self.path)))


@dataclass(frozen=True, slots=True)
class Front:
    """What the public fronts of a gateway need to be on TLS; None: they are plain."""

    http_context: ssl.SSLContext | None = None
    grpc_credentials: grpc.ServerCredentials | None = None


def open_front(cert: Path | None, key: Path | None) -> Front:
    """Plain without files. Raises ConfigError, in one sentence, if callers would not accept what is in them.

    Whoever signed the certificate is the callers' concern.
    """
    if cert is None and key is None:
        return Front()
    if cert is None or key is None:
        raise ConfigError("tls_cert and tls_key are given together, and one of them is missing")
    pair = Renewed((cert, key), partial(_read_pair, cert, key))
    return Front(_newest_context(pair), newest_credentials(pair, _Pair.configuration, require_client_auth=False))


@dataclass(frozen=True, slots=True)
class _Pair:
    """A certificate and its key, as each of the fronts takes them."""

    context: ssl.SSLContext
    cert: bytes
    key: bytes

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(self.key, self.cert)])


def _read_pair(cert: Path, key: Path) -> _Pair:
    """Raises ConfigError."""
    front_names(cert, key)
    context = loaded(ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), cert, key)
    context.set_alpn_protocols(["http/1.1"])
    return _Pair(context, read_file(cert), read_file(key))


def _newest_context(pair: Renewed[_Pair]) -> ssl.SSLContext:
    """A context whose every handshake goes on with the newest one. OpenSSL asks also where a caller names no host."""

    def take_newest(connection: ssl.SSLObject, _host: str | None, _context: ssl.SSLContext) -> None:
        connection.context = pair.get().context

    first = pair.get().context
    first.sni_callback = take_newest
    return first


def newest_credentials(
    content: Renewed[T],
    configuration: Callable[[T], grpc.ServerCertificateConfiguration],
    *,
    require_client_auth: bool,
) -> grpc.ServerCredentials:
    """Of a server that shows each new connection the newest of what is renewed."""
    shown = content.get()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        """None: the same as before."""
        nonlocal shown
        if (newest := content.get()) is shown:
            return None
        shown = newest
        return configuration(newest)

    # The stubs do not know of None.
    return grpc.dynamic_ssl_server_credentials(configuration(shown), fetch, require_client_auth)  # type: ignore[arg-type]


def front_names(cert: Path, key: Path) -> Sequence[str]:
    """The names and addresses that a public certificate is for. Raises ConfigError.

    It is tried by a caller that trusts it as it is.
    """
    server = loaded(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), cert, key)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    trust(client, cert)
    shown = shake_hands(server, client, cert).getpeercert() or {}
    names = _names_in(shown)
    if not names:
        raise ConfigError(f"{cert} is for no name: clients want one among its subject alternative names")
    return names


def _names_in(shown: Mapping[str, Any]) -> list[str]:
    """Of a certificate; a name that stands for others is given as one of those."""
    names = shown.get("subjectAltName", ())
    return [value.replace("*", "any", 1) for kind, value in names if kind in ("DNS", "IP Address")]


def front_cert_at(address: str, path: Path, timeout_s: float) -> FrontCert:
    """The certificate of the front that answers at `host:port`. Raises OSError if it shows another, or nothing."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    trust(client, path)
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host.strip("[]"), int(port)), timeout_s) as connection,
        client.wrap_socket(connection) as connected,
    ):
        return FrontCert(str(path), _names_in(connected.getpeercert() or {})[0])


def loaded(context: ssl.SSLContext, cert: Path, key: Path) -> ssl.SSLContext:
    """The context, showing the certificate. Raises ConfigError."""

    def no_passphrase() -> str:
        raise ConfigError(f"{key} needs a passphrase, and there is nobody to ask")

    for path in (cert, key):
        read_file(path)
    trust(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), cert)
    try:
        context.load_cert_chain(cert, key, no_passphrase)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"{key} is not the key of {cert}") from None
        raise ConfigError(f"{key} holds no private key in PEM form that can be used with {cert}") from None
    return context


def trust(context: ssl.SSLContext, certificates: Path) -> None:
    """Has the context take what one of these certificates signed. Raises ConfigError."""
    read_file(certificates)
    try:
        context.load_verify_locations(certificates)
    except ssl.SSLError:
        raise ConfigError(f"{certificates} holds no certificate in PEM form") from None
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # as gRPC does: what is in the file is trusted as it is


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext, cert: Path, name: str | None = None) -> ssl.SSLObject:
    """The client's side after a handshake in memory. Raises ConfigError with what either side has against it."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    accepting = server.wrap_bio(to_server, to_client, server_side=True)
    calling = client.wrap_bio(to_client, to_server, server_hostname=name)
    try:
        for side in (calling, accepting, calling, accepting):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(f"{cert} cannot be used: {error.verify_message.rstrip('.')}") from None
    except ssl.SSLError as error:
        raise ConfigError(f"{cert} cannot be used: {error.reason}") from None
    return calling


def read_file(path: Path) -> bytes:
    """Raises ConfigError, which names the file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
