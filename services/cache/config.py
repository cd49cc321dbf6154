"""Settings of the cache service."""

import secrets

from pydantic import Field

from services.common.config import CommonSettings, Port


class CacheSettings(CommonSettings):
    """`HEADRACE_CACHE_*`."""

    # Interface that the gRPC server listens on. Loopback, since nothing on this port asks for credentials.
    host: str = "127.0.0.1"
    port: Port = 50071
    # Where Prometheus scrapes /metrics. 0 takes a free port.
    metrics_port: Port = 9103
    # Name in logs. The index itself is told apart by an epoch that is drawn anew at every start.
    id: str = Field(default_factory=lambda: f"cache-{secrets.token_hex(3)}")
    # Index changes that wait for a slow watcher, in bytes. One that falls further behind is cut and watches again,
    # which costs it a snapshot: 32 MiB is a snapshot of a million blocks, hashes and digests.
    watch_backlog_bytes: int = Field(default=32 * 1024 * 1024, ge=64 * 1024)
