"""Settings of the gateway: `HEADRACE_GATEWAY_FIELD`."""

import re
import secrets
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from services.common.config import CommonSettings, OptionalPath, Port, split_commas

_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s,?#@]+")


def _check_origin(origin: str) -> str:
    if not _ORIGIN.fullmatch(origin):
        raise ValueError(f"{origin!r} is not an origin such as https://chat.example.com, without a path, or *")
    return origin


Origins = Annotated[tuple[Annotated[str, AfterValidator(_check_origin)], ...], BeforeValidator(split_commas)]


class GatewaySettings(CommonSettings):
    """Fields that the gateway alone has."""

    # Address that both fronts listen on. On a loopback address callers without an API key may come in as long as there
    # is no key (`require_key`); on any other they may not, unless `allow_anonymous` says so.
    host: str = "127.0.0.1"
    # OpenAI-compatible HTTP. 0 takes a free port.
    http_port: Port = 8000
    # The public gRPC Inference service. 0 takes a free port.
    grpc_port: Port = 50051
    # Certificate (with the rest of its chain) and key of both fronts, PEM. Both or none: without them the fronts are
    # plain, for a loopback address, or behind a proxy that ends TLS.
    tls_cert: OptionalPath = None
    tls_key: OptionalPath = None
    # Origins whose pages may call from a browser, comma-separated, such as https://chat.example.com; * is any. None by
    # default, but for the gateway's own page: one that a person happens to visit has no business here.
    cors_origins: Origins = ()
    # Names this instance in jobs and leases.
    id: str = Field(default_factory=lambda: f"gateway-{secrets.token_hex(3)}", min_length=1)

    # Treat callers without a key as on a loopback address, wherever the fronts listen: for a gateway in a container or
    # behind a proxy that lets nobody else in.
    allow_anonymous: bool = False
    # Whether a key is needed where callers without one could come in: true, false, or by default as soon as there is a
    # key in Redis or in the file, revoked or not. Who makes keys means them to be used.
    require_key: bool | None = None
    # File of keys beside those in Redis (services/gateway/keys/key_file.py says what is in it).
    keys_file: Path | None = None
    # File of prices per 1,000 tokens (services/gateway/keys/prices.py), for budgets of money.
    prices: Path | None = None
    # Days that Redis keeps what machines spent on requests, per key and model (docs/costs.md): some 500 bytes for each
    # key and model that was used on a day.
    cost_days: int = Field(default=90, ge=1, le=3660)
    # Output tokens of a chat or gRPC request that names no number and whose key has a limit on tokens or money: all it
    # may take is reserved, and the rest of a context would often be the whole limit.
    default_max_tokens: int = Field(default=1024, ge=1)

    # Connections of each front at once; one takes some 10 KB and an open file. A further HTTP one takes the place of
    # the one that has been idle for longest, so that idle ones keep nobody out; a further gRPC one is closed.
    max_connections: int = Field(default=4096, ge=1)
    # Seconds that a connection may stay without a request under way: longer than the 60 after which common load
    # balancers close theirs, which they must do first.
    keep_alive_s: float = Field(default=75.0, ge=1)
    # Calls under way on one gRPC connection; a client holds further ones back. Proxies put many callers on one, and a
    # single client must not take all of `max_requests`.
    max_streams_per_connection: int = Field(default=512, ge=1)
    # Bytes of a request line and headers, or of gRPC metadata: what nginx takes, far above what clients send.
    max_head_bytes: int = Field(default=32 * 1024, ge=1024)
    # HTTP headers of a request; clients send some twenty, proxies add a few.
    max_headers: int = Field(default=100, ge=1)
    # Seconds that those, or a gRPC handshake, may take to arrive: some round trips of a slow phone.
    head_timeout_s: float = Field(default=15.0, gt=0)
    # Largest HTTP body, and gRPC message, in bytes: twice what a 128k-token prompt of ids takes in JSON.
    max_body_bytes: int = Field(default=4 * 1024 * 1024, ge=1024)
    # Seconds that an HTTP body may take to arrive: the largest one over 0.6 Mbit/s.
    read_timeout_s: float = Field(default=60.0, gt=0)
    # Seconds that a client may leave a full connection unread before it counts as gone.
    write_timeout_s: float = Field(default=60.0, gt=0)
    # Requests (prompts) being read or accepted and unfinished at once, queued ones included; more are answered 429. It
    # bounds the memory of this process: a request costs some tens of kilobytes, and its body while that is read.
    max_requests: int = Field(default=2048, ge=1)
    # Seconds that a new request may have to wait for its first token, by how fast requests have ended lately. From 0.7
    # of it on some are refused with 429, beyond it all; low priority sooner, high priority later.
    max_wait_s: float = Field(default=60.0, gt=0)
    # Prompts that one HTTP completion may carry, each a request of its own.
    max_prompts: int = Field(default=128, ge=1)
    # The largest `n`.
    max_choices: int = Field(default=16, ge=1)

    # Seconds that a request may wait for its first token when its caller names no timeout: what OpenAI's clients wait.
    default_timeout_s: float = Field(default=600.0, gt=0)
    # Runs of a request that may fail (worker lost or engine error) before the request does. A request that kills its
    # worker must not walk through the fleet.
    max_attempts: int = Field(default=3, ge=1)
    # Seconds that a running request waits for another worker after it lost its own: a restart with a model load.
    resume_patience_s: float = Field(default=120.0, gt=0)
    # Seconds that a model stays known after its last worker left, its new requests queued: a restart again.
    model_memory_s: float = Field(default=300.0, ge=0)

    # Seconds that a resumable answer, or one under an idempotency key, is kept in Redis after its last event.
    answer_ttl_s: float = Field(default=600.0, ge=30)
    # Tokens that such an answer may have, all choices together: it takes about 30 bytes of Redis for each, and about
    # 200 where each has 20 logprobs.
    max_recorded_tokens: int = Field(default=32_768, ge=1)
    # Callers that read such answers of other gateways at once: each takes a connection to Redis, which has 10,000.
    max_readers: int = Field(default=512, ge=1)

    # A worker's stream without a sign of life (due every second) for this many seconds counts as broken.
    worker_silence_s: float = Field(default=10.0, ge=2)
    # A worker that has our sequences and whose step counter stands still for this many seconds counts as hung. Far
    # above the longest step, which is a first one that compiles kernels.
    worker_stall_s: float = Field(default=180.0, ge=10)

    # Seconds between two SSE comments on a stream with nothing else to send; proxies cut idle streams after 30 to 60.
    sse_comment_every_s: float = Field(default=10.0, gt=0)
    # On SIGTERM: seconds that new requests are still taken while readiness is off already, until load balancers know.
    drain_settle_s: float = Field(default=0.0, ge=0)
    # On SIGTERM: seconds that running requests may take to finish before they are ended with an error.
    drain_grace_s: float = Field(default=30.0, ge=0)
    # Write the prompt and the answers of each request into its line of the log. WARNING: what callers said then lies
    # wherever logs go, for everybody who reads those, for as long as they are kept. To look into a problem; never set
    # where callers have not been told.
    log_texts: bool = False
    # Accept a Redis without AOF: queued requests then do not outlive it. For private and test instances.
    allow_volatile_redis: bool = False
