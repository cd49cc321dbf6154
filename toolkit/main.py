"""The `headrace` command: its subcommands, their options, and how their errors are told."""

import asyncio
import os
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from services.common.config import CommonSettings, ConfigError, load
from services.common.mutual_tls import files_of, showing
from services.common.tls import FrontCert, TlsFiles, front_names
from toolkit import up_options
from toolkit.bench_commands import bench, bench_gateway, bench_kv
from toolkit.bench_observing_command import bench_observing
from toolkit.certs_commands import TOOLKIT, certificates_of_run, certs_app
from toolkit.command_line import fail, runs
from toolkit.costs_command import costs
from toolkit.directives import NotTold, set_role
from toolkit.directives import drain as drain_worker
from toolkit.keys_commands import keys_app
from toolkit.log_levels import NotChanged, change_level
from toolkit.log_tail import last_lines
from toolkit.models import PullFailed, pull_model
from toolkit.ports import PortTaken, choose_public_port, free_ports
from toolkit.process import ProcessFailed
from toolkit.profile_commands import profile
from toolkit.ps import show_stacks
from toolkit.queue_commands import queue_app
from toolkit.run_directory import RunDirectory, running_stacks
from toolkit.stack import INTERNAL_HOST, StackOptions, plan_stack, reachable_host
from toolkit.stats_command import stats
from toolkit.up import run_stack

app = typer.Typer(
    name="headrace",
    help="Serves large language models as a suite of small services.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(help="Models in the local store.", no_args_is_help=True)
app.add_typer(models_app, name="models")
app.add_typer(queue_app, name="queue")
app.add_typer(keys_app, name="keys")
app.add_typer(certs_app, name="certs")

_SHOWN_LOG_LINES = 20


class Role(StrEnum):
    BOTH = "both"
    PREFILL = "prefill"
    DECODE = "decode"


class LogLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@app.command()
def up(
    model: up_options.Model = None,
    workers: up_options.Workers = None,
    schedulers: up_options.Schedulers = 1,
    gateways: up_options.Gateways = 1,
    prefill_workers: up_options.PrefillWorkers = 0,
    decode_workers: up_options.DecodeWorkers = 0,
    dtype: up_options.Dtype = None,
    quantize: up_options.Quantize = None,
    kv_blocks: up_options.KvBlocks = None,
    max_sequences: up_options.MaxSequences = None,
    max_batch_tokens: up_options.MaxBatchTokens = None,
    batching: up_options.BatchingPolicy = None,
    placement: up_options.PlacementPolicy = None,
    cache_disk: up_options.CacheDisk = None,
    deterministic: up_options.Deterministic = False,
    threads: up_options.Threads = None,
    price_per_hour: up_options.PricePerHour = None,
    engine: up_options.Engine = up_options.EngineKind.MODEL,
    host: up_options.Host = "127.0.0.1",
    http_port: up_options.HttpPort = 8000,
    grpc_port: up_options.GrpcPort = 50051,
    redis_url: up_options.RedisUrl = None,
    tls: up_options.Tls = None,
    tls_cert: up_options.TlsCert = None,
    tls_key: up_options.TlsKey = None,
    mtls: up_options.Mtls = False,
) -> None:
    """Starts the whole stack on this machine and keeps it running until Ctrl-C.

    Every other setting of a service can be given as a HEADRACE_SERVICE_SETTING variable.
    """
    chosen: dict[str, object] = {
        "model": model,
        "dtype": dtype,
        "quantize": quantize,
        "kv_blocks": kv_blocks,
        "batching": batching,
    }
    chosen |= {"deterministic": deterministic or None}
    chosen |= {"implementation": "echo" if engine is up_options.EngineKind.ECHO else None}
    chosen |= {"max_sequences": max_sequences, "max_batch_tokens": max_batch_tokens, "threads": threads}
    chosen |= {"price_per_hour": price_per_hour}
    front_cert, front_key = _front_files(tls, tls_cert, tls_key)
    wanted = StackOptions(
        host=host,
        http_ports=_counted(http_port, gateways),
        grpc_ports=_counted(grpc_port, gateways),
        schedulers=schedulers,
        workers=_without_role(workers, prefill_workers + decode_workers),
        prefill_workers=prefill_workers,
        decode_workers=decode_workers,
        cache_disk=str(cache_disk.absolute()) if cache_disk else None,
        placement=placement,
        redis_url=redis_url,
        front_cert=_front_cert(front_cert, front_key, host),
        front_key=str(front_key.absolute()) if front_key else None,
        worker_settings={setting: value for setting, value in chosen.items() if value is not None},
    )
    _run_stack(wanted, mtls=mtls)


def _without_role(workers: int | None, with_role: int) -> int:
    """How many workers to start that do everything, if so many were asked for, or if that was left open."""
    if workers is None:
        return 0 if with_role else 1
    if not workers + with_role:
        raise typer.BadParameter("0 leaves nobody to run the model.", param_hint="--workers")
    return workers


def _front_files(folder: Path | None, cert: Path | None, key: Path | None) -> tuple[Path | None, Path | None]:
    """Certificate and key of the public ports, or neither."""
    if folder is not None and (cert or key):
        fail("--tls takes the files of its folder: leave out --tls-cert and --tls-key (or their variables).")
    if folder is not None:
        return folder / "gateway.crt", folder / "gateway.key"
    if (cert is None) != (key is None):
        fail(f"--tls-cert and --tls-key belong together: give {'--tls-cert' if cert is None else '--tls-key'}, too.")
    return cert, key


def _front_cert(cert: Path | None, key: Path | None, host: str) -> FrontCert | None:
    """Tries the certificate before anything starts. The name of this machine is preferred among its names."""
    if cert is None or key is None:
        return None
    try:
        names = front_names(cert, key)
    except ConfigError as error:
        fail(f"{error}.")
    here = reachable_host(host)
    return FrontCert(str(cert.absolute()), here if here in names else names[0])


def _counted(port: int, count: int) -> tuple[int, ...]:
    """The port and those that follow it; 0, for a free one, stays."""
    return tuple(port + number if port else 0 for number in range(count))


def _run_stack(wanted: StackOptions, *, mtls: bool) -> None:
    """Settles the public ports, where 0 means a free one, and runs the stack to its end."""
    try:
        public: list[int] = []
        for flag, ports in (("--http-port", wanted.http_ports), ("--grpc-port", wanted.grpc_ports)):
            for port in ports:
                public.append(choose_public_port(wanted.host, port, flag, avoid=public))
        http_ports, grpc_ports = public[: len(wanted.http_ports)], public[len(wanted.http_ports) :]
        options = replace(wanted, http_ports=tuple(http_ports), grpc_ports=tuple(grpc_ports))
        internal = free_ports(INTERNAL_HOST, public)
        directory = _run_directory(runs())
        options = replace(options, mtls=certificates_of_run(directory) if mtls else None)
        tls = TlsFiles.of(options.mtls, TOOLKIT) if options.mtls else files_of(load(CommonSettings, "up"))
        stack = plan_stack(options, internal, cores=len(os.sched_getaffinity(0)))
        with showing(tls):
            asyncio.run(run_stack(stack, tls, directory, Console(highlight=False)))
    except (PortTaken, ConfigError) as error:
        fail(str(error))
    except ProcessFailed as error:
        log = error.process.spec.log_path
        fail("\n".join([str(error), *last_lines(log, _SHOWN_LOG_LINES), f"The whole log: {log}"]))


def _run_directory(runs: Path) -> RunDirectory:
    try:
        return RunDirectory(runs)
    except OSError as error:
        fail(f"Logs and state of a run cannot be written to {runs} ({error.strerror}): set XDG_STATE_HOME to another.")


@app.command()
def ps() -> None:
    """Shows the stacks that run on this machine: each process with its health, uptime, memory and load."""
    stacks = running_stacks(runs())
    if not stacks:
        typer.echo("No stack runs here. Start one with: headrace up")
        return
    try:
        asyncio.run(show_stacks(stacks, Console(highlight=False)))
    except ConfigError as error:
        fail(f"The stack's certificates cannot be used: {error}.")


@app.command()
def role(
    worker: Annotated[str, typer.Argument(help="Id of a worker, as `headrace ps` shows it.")],
    role: Annotated[Role, typer.Argument(help="What it is preferred for from now on.")],
) -> None:
    """Changes what a running worker is preferred for."""
    try:
        asyncio.run(set_role(running_stacks(runs()), worker, role.value))
    except NotTold as error:
        fail(str(error))


@app.command()
def drain(
    worker: Annotated[str, typer.Argument(help="Id of a worker, as `headrace ps` shows it.")],
    undo: Annotated[bool, typer.Option("--undo", help="Takes it back into service.")] = False,
) -> None:
    """Takes a running worker out of service: what it runs finishes, there or elsewhere. Its process stays up."""
    try:
        typer.echo(asyncio.run(drain_worker(running_stacks(runs()), worker, undo=undo)))
    except NotTold as error:
        fail(str(error))


@app.command()
def log_level(
    service: Annotated[str, typer.Argument(help="A service, the id of one process, or `all`.")],
    level: Annotated[LogLevel, typer.Argument(help="The least that is logged from now on.")],
) -> None:
    """Changes what running services log. A process that restarts logs as it was set."""
    try:
        changed = change_level(running_stacks(runs()), service, level.value)
    except NotChanged as error:
        fail(str(error))
    typer.echo(f"{', '.join(changed)}: log level {level.value}")


@models_app.command()
def pull(name: Annotated[str, typer.Argument(help="Local folder, hub id, or `default`.")]) -> None:
    """Fetches a model into the local store, so that a later start finds it there."""
    try:
        path = asyncio.run(pull_model(name, Console(stderr=True, highlight=False)))
    except PullFailed as error:
        fail(str(error))
    typer.echo(path)


for command in (stats, costs, profile, bench, bench_kv, bench_gateway, bench_observing):
    app.command()(command)


def main() -> None:
    """Entry point of the `headrace` command."""
    app()


if __name__ == "__main__":
    main()
