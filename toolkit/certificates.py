"""A private CA in a folder, and the certificates that it signs for services. Knows no stack and no command line.

The folder holds `ca.crt` and `ca.key`, and for each name `NAME.crt` and `NAME.key`. Keys are of the curve P-256, which
every TLS library takes and which signs faster than RSA.
"""

import contextlib
import ipaddress
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from services.common.tls import SERVICE_NAME

# The clocks of two machines may differ: a certificate is good a little before it was made.
_BACKDATED = timedelta(minutes=5)
_CA_LIFETIME = timedelta(days=3650)
# How every service is reached on its own machine.
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
_DNS_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
_LONGEST_DNS_NAME = 253
_PURPOSES = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)


class BadFolder(Exception):
    """The folder's CA cannot be used; one sentence for the person."""


class BadName(Exception):
    """No certificate can be for this name; one sentence for the person."""


def make_certificates(folder: Path, names: Sequence[str], sans: Sequence[str] = (), *, days: int = 365) -> None:
    """Writes a certificate and a key for each name, good for so many days, and a CA if there is none.

    Each is for its name, for this machine, and for `sans`, which are DNS names and IP addresses; without any, for those
    that the name's certificate had before. That one is replaced. Raises BadFolder, and BadName before anything is made.
    """
    for known_as in (*names, *sans):
        _general_name(known_as)
    folder.mkdir(parents=True, exist_ok=True)
    ca, ca_key = _authority(folder)
    for name in names:
        key = ec.generate_private_key(ec.SECP256R1())
        kept = sans or _sans_of(folder / f"{name}.crt")
        certificate = _signed_for(name, kept, timedelta(days=days), key.public_key(), ca, ca_key)
        _write(folder, name, certificate, key)


def issuer_beside(certificate: Path) -> Path | None:
    """`ca.crt` in the certificate's folder, if it signed the certificate."""
    beside = certificate.with_name("ca.crt")
    with contextlib.suppress(OSError, ValueError, TypeError, InvalidSignature):
        authority = x509.load_pem_x509_certificate(beside.read_bytes())
        x509.load_pem_x509_certificate(certificate.read_bytes()).verify_directly_issued_by(authority)
        return beside
    return None


def _sans_of(path: Path) -> Sequence[str]:
    """What a certificate is for; nothing, if there is none that can be read."""
    with contextlib.suppress(OSError, ValueError, x509.ExtensionNotFound):
        extensions = x509.load_pem_x509_certificate(path.read_bytes()).extensions
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        addresses = map(str, names.get_values_for_type(x509.IPAddress))
        return (*names.get_values_for_type(x509.DNSName), *addresses)
    return ()


def _authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    if not (folder / "ca.crt").exists():
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _self_signed(key)
        _write(folder, "ca", certificate, key)
        return certificate, key
    try:
        certificate = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
        loaded = load_pem_private_key((folder / "ca.key").read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise BadFolder(f"The CA in {folder} cannot be used: {error}") from None
    if not isinstance(loaded, ec.EllipticCurvePrivateKey):
        raise BadFolder(f"The CA in {folder} was not made by this command: its key is no elliptic curve's.")
    return certificate, loaded


def _self_signed(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    name = _subject("Headrace private CA")
    builder = _builder(name, name, key.public_key(), datetime.now(UTC) + _CA_LIFETIME)
    return (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _signed_for(
    name: str,
    sans: Sequence[str],
    lifetime: timedelta,
    key: ec.EllipticCurvePublicKey,
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
) -> x509.Certificate:
    end = min(datetime.now(UTC) + lifetime, ca.not_valid_after_utc)
    known_as = [_general_name(san) for san in dict.fromkeys((name, SERVICE_NAME, *_LOCAL_NAMES, *sans))]
    return (
        _builder(_subject(name), ca.subject, key, end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(_PURPOSES), critical=False)
        .add_extension(x509.SubjectAlternativeName(known_as), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(datetime.now(UTC), end) - _BACKDATED)
        .not_valid_after(end)
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _general_name(name: str) -> x509.GeneralName:
    """Raises BadName."""
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(name))
    labels = name.removeprefix("*.").split(".")
    # What ends in a number is an address of a wrong form.
    if len(name) > _LONGEST_DNS_NAME or not all(map(_DNS_LABEL.fullmatch, labels)) or labels[-1].isdigit():
        raise BadName(f"{name!r} is neither a DNS name (of ASCII: letters, digits, - and _) nor an IP address.")
    return x509.DNSName(name)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write(folder: Path, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    content = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    _replace(folder / f"{name}.key", content, mode=0o600)
    _replace(folder / f"{name}.crt", certificate.public_bytes(Encoding.PEM), mode=0o644)


def _replace(path: Path, content: bytes, *, mode: int) -> None:
    """A reader sees the file whole or not at all, and nobody else ever reads a key."""
    draft = path.with_name(f"{path.name}.new")
    draft.unlink(missing_ok=True)
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
    draft.replace(path)
