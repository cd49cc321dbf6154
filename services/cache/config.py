"""Settings of the cache service."""

import secrets

from pydantic import Field

from services.common.config import CommonSettings, OptionalPath, Port

_MIB = 1024 * 1024


class CacheSettings(CommonSettings):
    """`HEADRACE_CACHE_*`."""

    # Interface that the gRPC server listens on. Loopback, since without mutual TLS nothing here asks for credentials.
    host: str = "127.0.0.1"
    port: Port = 50071
    # host:port at which workers reach this service to fetch blocks. Empty: the address it listens on, and on all
    # interfaces the one that this machine's own name stands for.
    advertise_address: str = ""
    # Where Prometheus scrapes /metrics. 0 takes a free port.
    metrics_port: Port = 9103
    # Name in logs, and of this service among the holders of blocks; unique. The index itself is told apart by an epoch
    # that is drawn anew at every start.
    id: str = Field(default_factory=lambda: f"cache-{secrets.token_hex(3)}")
    # Index changes that wait for a slow watcher, in bytes. One that falls further behind is cut and watches again,
    # which costs it a snapshot: 32 MiB is a snapshot of a million blocks, hashes and digests.
    watch_backlog_bytes: int = Field(default=32 * _MIB, ge=64 * 1024)

    # Blocks kept in RAM, in bytes, with 1 KiB for each block's entries. 512 MiB is some 700 blocks, or 11,000 tokens,
    # of a 135M model in float32, and leaves a small machine its memory for workers.
    ram_bytes: int = Field(default=512 * _MIB, ge=0)
    # Folder of the blocks kept on disk, of this process's own. It is made if it is not there, and what it holds is
    # offered again after a restart. Unset: nothing is kept on disk.
    disk_path: OptionalPath = None
    # Blocks kept on disk, in bytes of files: eight times the RAM, which a laptop has to spare.
    disk_bytes: int = Field(default=4096 * _MIB, ge=0)
    # Blocks that wait to be written to disk, in bytes; more are kept in RAM alone. 64 MiB is what an SSD writes in a
    # fraction of a second: a longer queue would only hide that the disk does not keep up.
    disk_queue_bytes: int = Field(default=64 * _MIB, ge=0)
    # The largest block taken in, in bytes; each stream that stores may have one in memory. 64 MiB holds 16 tokens of
    # any model whose KV takes up to 4 MiB a token, which is more than a 70B model's in float32.
    max_block_bytes: int = Field(default=64 * _MIB, ge=1)
