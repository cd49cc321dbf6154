"""Settings of the scheduler."""

import secrets

from pydantic import Field

from services.common.config import CommonSettings, Port
from services.scheduler.placement import Policy


class SchedulerSettings(CommonSettings):
    """`HEADRACE_SCHEDULER_*`."""

    # Interface that the gRPC server listens on. Loopback, since without mutual TLS nothing here asks for credentials.
    host: str = "127.0.0.1"
    port: Port = 50061
    # Where Prometheus scrapes /metrics. 0 takes a free port.
    metrics_port: Port = 9101
    # Names this replica's grants towards workers and its entries in Redis.
    id: str = Field(default_factory=lambda: f"scheduler-{secrets.token_hex(3)}")
    # How jobs are given to workers. kv_aware weighs prefix hits, moving KV and load; least_loaded and round_robin know
    # no KV and are for comparison.
    policy: Policy = "kv_aware"
    # Seconds without a report after which a worker gets no work. Workers report every second: two may be lost.
    worker_silence_s: float = Field(default=3.0, gt=0)
    # Seconds a gateway has to answer an offer, and those an owner of a queue entry may stay silent before the entry is
    # reclaimed. Above a pause of a busy Python process, below what a caller calls an outage. Gateways renew every
    # 1.7 s and their heartbeats last for 5 s, whatever is set here.
    lease_s: float = Field(default=5.0, gt=0)
    # Seconds between looks for entries that owners left behind. Each costs a few scripts per model.
    reclaim_interval_s: float = Field(default=1.0, gt=0)
    # Seconds after which a placement that no worker has reported stops counting against its worker's credits: its
    # gateway is gone, or never reached the worker. Long enough for a connection to be set up.
    placement_timeout_s: float = Field(default=10.0, gt=0)
    # Seconds a running request waits for a worker to serve its model again before it is refused. A restarted worker
    # has loaded its model within it, so that a fleet of one survives the death of its worker.
    replacement_patience_s: float = Field(default=120.0, ge=0)
    # Failures of a worker in a row that open its circuit breaker, after which it gets no work for a while. What fails
    # within a second is one failure.
    breaker_failures: int = Field(default=3, ge=1)
    # Seconds for which an opened breaker keeps work from its worker; each further opening doubles them, up to the
    # longest. That bounds what requests wait if every worker has failed.
    breaker_backoff_s: float = Field(default=1.0, gt=0)
    breaker_longest_backoff_s: float = Field(default=30.0, gt=0)
    # Seconds that probes have for a first token before they count as failed: the worker hangs, or the probe's gateway
    # is gone. A late first token counts all the same.
    breaker_probe_timeout_s: float = Field(default=30.0, gt=0)
    # Seconds that outstanding offers are given to be answered after SIGTERM.
    drain_grace_s: float = Field(default=2.0, ge=0)
    # Start on a Redis without an append-only file, which forgets queued requests when it restarts.
    allow_volatile_redis: bool = False
