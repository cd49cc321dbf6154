"""What a block whose bytes are kept is called."""

from typing import NamedTuple


class BlockKey(NamedTuple):
    """The same chain hash names other bytes in another KV format."""

    kv_format: str
    name: bytes  # the chain hash
