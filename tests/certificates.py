"""Real certificates for tests: of a private CA, and those that no caller accepts."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

from toolkit.certificates import make_certificates


@dataclass(frozen=True)
class Pair:
    """Paths of a certificate, its key, and its CA."""

    ca: Path
    cert: Path
    key: Path


def certificate(folder: Path, name: str = "gateway", *sans: str, days: int = 365) -> Pair:
    """Of the CA in the folder, which is made with the first one."""
    make_certificates(folder, [name], sans, days=days)
    return Pair(folder / "ca.crt", folder / f"{name}.crt", folder / f"{name}.key")


def encrypted(key: Path) -> Path:
    """The key under a passphrase."""
    path = key.with_suffix(".encrypted")
    command = ("openssl", "pkey", "-in", str(key), "-aes256", "-passout", "pass:secret", "-out", str(path))
    subprocess.run(command, check=True)
    return path
