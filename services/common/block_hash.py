"""Names of KV blocks: a hash chain over token ids, computed alike by gateways and workers.

A block's chain hash is SHA-256 cut to 128 bits over (parent, the block's token ids), so that it names everything that
the block's KV depends on within one KV format. The root holds model name, block size and the tenant's cache salt: only
requests of the same salt can share a block.
"""

import struct
from collections.abc import Sequence
from hashlib import sha256

HASH_BYTES = 16


def chain_root(model: str, block_size: int, cache_salt: str) -> bytes:
    """Parent of a chain's first block."""
    digest = sha256()
    for part in (model.encode(), str(block_size).encode(), cache_salt.encode()):
        digest.update(struct.pack("<I", len(part)))  # lengths keep ("ab", "c") apart from ("a", "bc")
        digest.update(part)
    return digest.digest()[:HASH_BYTES]


def split_hashes(packed: bytes) -> list[bytes]:
    """Chain hashes, or other names of as many bytes, out of their packed form."""
    return [packed[start : start + HASH_BYTES] for start in range(0, len(packed), HASH_BYTES)]


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Chain hash of one full block, 16 bytes."""
    return sha256(parent + struct.pack(f"<{len(token_ids)}I", *token_ids)).digest()[:HASH_BYTES]


def chain_hashes(root: bytes, token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """Chain hashes of the full blocks of `token_ids`, in order; a last partial block has none."""
    hashes: list[bytes] = []
    parent = root
    for end in range(block_size, len(token_ids) + 1, block_size):
        parent = block_hash(parent, token_ids[end - block_size : end])
        hashes.append(parent)
    return hashes
