"""Which processes make up a stack, with which settings and addresses. Pure: starts nothing."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from services.common.tls import FrontCert, TlsFiles

Service = Literal["redis", "cache", "scheduler", "worker", "gateway"]

INTERNAL_HOST = "127.0.0.1"

# What all workers of a machine together take of its free memory for KV. Each worker sees nearly all of it as free,
# since the pools of the others take theirs only as it is used.
_KV_MEMORY_FRACTION = 0.6


@dataclass(frozen=True, slots=True)
class StackOptions:
    """What the person asked for. Public ports are final here."""

    host: str
    # One of each per gateway.
    http_ports: tuple[int, ...]
    grpc_ports: tuple[int, ...]
    schedulers: int = 1
    workers: int = 1
    # Workers that are preferred for prompts, and for output, beside those that do both alike.
    prefill_workers: int = 0
    decode_workers: int = 0
    # Folder in which the cache service keeps blocks over a restart; None: it keeps them in RAM alone.
    cache_disk: str | None = None
    # By which the scheduler chooses workers; None: its default.
    placement: str | None = None
    # An existing Redis; None: a private one.
    redis_url: str | None = None
    # Certificate and key of the public fronts; None: they are plain.
    front_cert: FrontCert | None = None
    front_key: str | None = None
    # Folder with a certificate for each service, which they show one another; None: as the caller's environment says.
    mtls: Path | None = None
    # Settings of every worker that were given; the others keep the worker's own defaults.
    worker_settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def all_workers(self) -> int:
        return self.workers + self.prefill_workers + self.decode_workers


@dataclass(frozen=True, slots=True)
class Member:
    """One process of a stack. Its name is unique in the stack and is the service's `id`."""

    name: str
    service: Service
    # host:port of its gRPC server (Redis: of Redis).
    address: str
    # Where /metrics can be read; None for Redis.
    metrics_url: str | None
    # Answers 200 when the service is ready to its callers, beside what gRPC health says; None: nothing beside.
    ready_url: str | None
    # Fields of the service's settings schema.
    settings: Mapping[str, object]
    # Variables beside the settings, for where the caller's environment has none of that name.
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stack:
    """Members in tiers: a tier is started before the next one, and stopped after it."""

    tiers: tuple[tuple[Member, ...], ...]
    # Of each gateway.
    http_urls: tuple[str, ...]
    # Of the first gateway and of the first scheduler.
    grpc_address: str
    scheduler_address: str
    redis_url: str
    # What the gateways show; None: their fronts are plain.
    front_cert: FrontCert | None = None

    @property
    def members(self) -> tuple[Member, ...]:
        return tuple(member for tier in self.tiers for member in tier)


def plan_stack(options: StackOptions, free_ports: Iterator[int], cores: int) -> Stack:
    """Lays out a stack; internal ports are drawn from `free_ports`, `cores` are shared by the workers."""
    redis_address = f"{INTERNAL_HOST}:{next(free_ports)}"
    redis_url = options.redis_url or f"redis://{redis_address}/0"
    keeping = {"disk_path": options.cache_disk} if options.cache_disk else {}
    # Its URL may hold a password: only those that use it get it.
    queueing = {"redis_url": redis_url}
    cache = _internal_member("cache", "cache", free_ports, keeping)
    finding = {"caches": cache.address}
    placing = {"policy": options.placement} if options.placement else {}
    schedulers = tuple(
        _internal_member("scheduler", name, free_ports, {**queueing, **finding, **placing})
        for name in _names("scheduler", options.schedulers)
    )
    finding = {**finding, "schedulers": ",".join(scheduler.address for scheduler in schedulers)}
    workers = tuple(
        _internal_member(
            "worker",
            name,
            free_ports,
            {**finding, "role": role, **_worker_settings(options, cores)},
            _worker_environment(options.all_workers),
        )
        for role, name in _workers(options)
    )
    gateways = tuple(_gateways(options, {**queueing, **finding}))
    redis = Member("redis", "redis", redis_address, metrics_url=None, ready_url=None, settings={})
    return Stack(
        tiers=(
            *(() if options.redis_url else ((redis,),)),
            *(
                tuple(_with_certificate(member, options.mtls) for member in tier)
                for tier in ((cache,), schedulers, workers, gateways)
            ),
        ),
        http_urls=tuple(_http_url(options, port) for port in options.http_ports),
        grpc_address=gateways[0].address,
        scheduler_address=schedulers[0].address,
        redis_url=redis_url,
        front_cert=options.front_cert,
    )


def _with_certificate(member: Member, folder: Path | None) -> Member:
    if folder is None:
        return member
    files = TlsFiles.of(folder, member.service)
    own = {"mtls_ca": files.ca, "mtls_cert": files.cert, "mtls_key": files.key}
    return replace(member, settings={**member.settings, **own})


def _workers(options: StackOptions) -> Iterator[tuple[str, str]]:
    """Role and name of each worker."""
    counts = {"both": options.workers, "prefill": options.prefill_workers, "decode": options.decode_workers}
    for role, count in counts.items():
        yield from ((role, name) for name in _names("worker" if role == "both" else role, count))


def _names(stem: str, count: int) -> tuple[str, ...]:
    return (stem,) if count == 1 else tuple(f"{stem}-{number}" for number in range(1, count + 1))


def _worker_settings(options: StackOptions, cores: int) -> dict[str, object]:
    # Workers that each use every core would slow one another down far more than by their share.
    workers = options.all_workers
    shared = {"threads": max(1, cores // workers)} if workers > 1 else {}
    return {**shared, **options.worker_settings}


def _worker_environment(workers: int) -> dict[str, str]:
    """Variables for where the caller has set none.

    Threads of the tensor library that wait for one another sleep instead of spinning: the other processes of the stack
    need the same cores, and beside a busy neighbor spinning threads lose most of their time.
    """
    shared = {"HEADRACE_WORKER_KV_MEMORY_FRACTION": f"{_KV_MEMORY_FRACTION / workers:.3f}"} if workers > 1 else {}
    return {"OMP_WAIT_POLICY": "PASSIVE", **shared}


def _internal_member(
    service: Service,
    name: str,
    free_ports: Iterator[int],
    settings: Mapping[str, object],
    environment: Mapping[str, str] | None = None,
) -> Member:
    port, metrics_port = next(free_ports), next(free_ports)
    return Member(
        name=name,
        service=service,
        address=f"{INTERNAL_HOST}:{port}",
        metrics_url=f"http://{INTERNAL_HOST}:{metrics_port}/metrics",
        ready_url=None,
        settings={"id": name, "host": INTERNAL_HOST, "port": port, "metrics_port": metrics_port, **settings},
        environment=environment or {},
    )


def _gateways(options: StackOptions, finding: Mapping[str, object]) -> Iterator[Member]:
    names = _names("gateway", len(options.http_ports))
    tls = {"tls_cert": options.front_cert.path, "tls_key": options.front_key} if options.front_cert else {}
    for name, http_port, grpc_port in zip(names, options.http_ports, options.grpc_ports, strict=True):
        url = _http_url(options, http_port)
        yield Member(
            name=name,
            service="gateway",
            address=f"{reachable_host(options.host)}:{grpc_port}",
            metrics_url=f"{url}/metrics",
            ready_url=f"{url}/health/ready",
            settings={
                "id": name,
                "host": options.host,
                "http_port": http_port,
                "grpc_port": grpc_port,
                **finding,
                **tls,
            },
        )


def _http_url(options: StackOptions, port: int) -> str:
    return f"{'https' if options.front_cert else 'http'}://{reachable_host(options.host)}:{port}"


def reachable_host(host: str) -> str:
    """How this machine reaches a server that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
