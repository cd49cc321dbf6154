"""The digest of a KV block's bytes, by which whatever holds them is checked.

XXH3 (128 bits): it finds every accident (on the way, in memory, on a disk, a bug in a holder) at a cost below that of a
copy. It is no shield against a holder that means harm; holders are processes of the operator's own.
"""

import xxhash

DIGEST_BYTES = 16


def digest(data: bytes | memoryview) -> bytes:
    """16 bytes."""
    return xxhash.xxh3_128_digest(data)
