"""What a block whose bytes are kept is called."""

from typing import NamedTuple

MAX_KV_FORMAT_BYTES = 1024
"""The longest name of a KV format, in UTF-8, that blocks are kept of."""


class BlockKey(NamedTuple):
    """The same chain hash names other bytes in another KV format."""

    kv_format: str
    name: bytes  # the chain hash
