"""The name of a tokenizer bundle: workers announce it, gateways check what they got against it."""

import struct
from collections.abc import Mapping
from hashlib import sha256


def bundle_hash(bundle: Mapping[str, bytes]) -> str:
    """SHA-256, hex, over names and contents, whatever their order."""
    digest = sha256()
    for name, content in sorted(bundle.items()):
        for part in (name.encode(), content):
            digest.update(struct.pack("<Q", len(part)))
            digest.update(part)
    return digest.hexdigest()
