"""The `headrace` command: its subcommands, their options, and how their errors are told."""

import asyncio
import os
import tempfile
import time
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer
import uvloop
from rich.console import Console

from services.common.config import CommonSettings, ConfigError, home_directory, load
from services.common.mutual_tls import files_of, showing
from services.common.tls import FrontCert, TlsFiles, front_names
from toolkit import up_options
from toolkit.bench import BenchOptions, run_bench
from toolkit.bench_chats import run_chats_bench
from toolkit.bench_gateway import (
    GatewayBenchFailed,
    GatewayBenchOptions,
    parse_control_planes,
    run_cost_bench,
    run_memory_bench,
    run_slow_bench,
)
from toolkit.bench_gateway_report import show_cost, show_memory, show_slow
from toolkit.bench_kv import KvBenchFailed, KvBenchOptions, run_kv_bench
from toolkit.bench_kv_report import show_chats, show_kv, show_split
from toolkit.bench_observing_command import bench_observing
from toolkit.bench_peers import BadPeer, is_base_url, parse_peers
from toolkit.bench_plot import plot
from toolkit.bench_report import invalid_figures, show
from toolkit.bench_servers import NotAnswering
from toolkit.bench_split import run_split_bench
from toolkit.bench_stack import StackEnded
from toolkit.certs_commands import TOOLKIT, certificates_of_run, certs_app
from toolkit.costs_command import costs
from toolkit.directives import NotTold, set_role
from toolkit.directives import drain as drain_worker
from toolkit.keys_commands import keys_app
from toolkit.loadtest import ROWS, LoadFailed, Row
from toolkit.log_levels import NotChanged, change_level
from toolkit.log_tail import last_lines
from toolkit.models import PullFailed, pull_model
from toolkit.ports import PortTaken, choose_public_port, free_ports
from toolkit.process import ProcessFailed
from toolkit.process_tree import NotStopped
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
app.command()(profile)
app.command()(costs)
app.command()(stats)
app.command()(bench_observing)

_SHOWN_LOG_LINES = 20
_ALL_ROWS = ",".join(row.name for row in ROWS)


class KvPart(StrEnum):
    WAYS = "ways"
    SPLIT = "split"
    CHATS = "chats"


class GatewayPart(StrEnum):
    COST = "cost"
    SLOW = "slow"
    MEMORY = "memory"


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
    if workers is None:
        workers = 0 if prefill_workers or decode_workers else 1
    if not workers + prefill_workers + decode_workers:
        raise typer.BadParameter("0 leaves nobody to run the model.", param_hint="--workers")
    wanted = StackOptions(
        host=host,
        http_ports=_counted(http_port, gateways),
        grpc_ports=_counted(grpc_port, gateways),
        schedulers=schedulers,
        workers=workers,
        prefill_workers=prefill_workers,
        decode_workers=decode_workers,
        cache_disk=str(cache_disk.absolute()) if cache_disk else None,
        placement=placement,
        redis_url=redis_url,
        front_cert=_front_cert(tls_cert, tls_key, host),
        front_key=str(tls_key.absolute()) if tls_key else None,
        worker_settings={setting: value for setting, value in chosen.items() if value is not None},
    )
    _run_stack(wanted, mtls=mtls)


def _front_cert(cert: Path | None, key: Path | None, host: str) -> FrontCert | None:
    """Tries the certificate before anything starts. The name of this machine is preferred among its names."""
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        _fail(f"--tls-cert and --tls-key belong together: give {'--tls-cert' if cert is None else '--tls-key'}, too.")
    try:
        names = front_names(cert, key)
    except ConfigError as error:
        _fail(f"--tls-cert: {error}.")
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
        directory = RunDirectory(_runs())
        options = replace(options, mtls=certificates_of_run(directory) if mtls else None)
        tls = TlsFiles.of(options.mtls, TOOLKIT) if options.mtls else files_of(load(CommonSettings, "up"))
        stack = plan_stack(options, internal, cores=len(os.sched_getaffinity(0)))
        with showing(tls):
            asyncio.run(run_stack(stack, tls, directory, Console(highlight=False)))
    except (PortTaken, ConfigError) as error:
        _fail(str(error))
    except ProcessFailed as error:
        log = error.process.spec.log_path
        _fail("\n".join([str(error), *last_lines(log, _SHOWN_LOG_LINES), f"The whole log: {log}"]))


@app.command()
def ps() -> None:
    """Shows the stacks that run on this machine: each process with its health, uptime, memory and load."""
    stacks = running_stacks(_runs())
    if not stacks:
        typer.echo("No stack runs here. Start one with: headrace up")
        return
    try:
        asyncio.run(show_stacks(stacks, Console(highlight=False)))
    except ConfigError as error:
        _fail(f"The stack's certificates cannot be used: {error}.")


@app.command()
def role(
    worker: Annotated[str, typer.Argument(help="Id of a worker, as `headrace ps` shows it.")],
    role: Annotated[Role, typer.Argument(help="What it is preferred for from now on.")],
) -> None:
    """Changes what a running worker is preferred for."""
    try:
        asyncio.run(set_role(running_stacks(_runs()), worker, role.value))
    except NotTold as error:
        _fail(str(error))


@app.command()
def drain(
    worker: Annotated[str, typer.Argument(help="Id of a worker, as `headrace ps` shows it.")],
    undo: Annotated[bool, typer.Option("--undo", help="Takes it back into service.")] = False,
) -> None:
    """Takes a running worker out of service: what it runs finishes, there or elsewhere. Its process stays up."""
    try:
        typer.echo(asyncio.run(drain_worker(running_stacks(_runs()), worker, undo=undo)))
    except NotTold as error:
        _fail(str(error))


@app.command()
def log_level(
    service: Annotated[str, typer.Argument(help="A service, the id of one process, or `all`.")],
    level: Annotated[LogLevel, typer.Argument(help="The least that is logged from now on.")],
) -> None:
    """Changes what running services log. A process that restarts logs as it was set."""
    try:
        changed = change_level(running_stacks(_runs()), service, level.value)
    except NotChanged as error:
        _fail(str(error))
    typer.echo(f"{', '.join(changed)}: log level {level.value}")


@app.command()
def bench(
    url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible server that runs already. Default: a stack of its own.")
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=URL[,PID]",
            help="Another OpenAI-compatible server to compare with; may be repeated. With PID, that process and its "
            "children are stopped while another server is measured.",
        ),
    ] = None,
    rows: Annotated[str, typer.Option(help="Which rows, comma-separated.")] = _ALL_ROWS,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each row is run, each with new prompts.")] = 1,
    static: Annotated[
        bool | None,
        typer.Option(
            help="Also do mixed lengths with continuous and with static batching, on a stack of its own each. "
            "Default: when every row is run on a stack of its own.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="JSON file; a picture (.png) and a log go beside it. Default: bench-results/DATE.json."),
    ] = None,
    up_arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[-- UP_OPTIONS]", help="Options of `headrace up` for the own stack.")
    ] = None,
) -> None:
    """Runs fixed work through servers, one at a time, and prints what their clients saw: rates and latencies.

    The stack of its own takes the options of `headrace up` after `--`, and every HEADRACE_SERVICE_SETTING variable,
    as in: HEADRACE_WORKER_DTYPE=bfloat16 headrace bench --rows single -- --threads 2
    """
    try:
        options = BenchOptions(
            url=url,
            rows=_chosen_rows(rows),
            rounds=rounds,
            peers=parse_peers(peer or []),
            compare_batching=_compares_batching(static, url, rows, up_arguments or []),
            up_arguments=tuple(up_arguments or []),
            out=out or Path("bench-results") / f"{time.strftime('%Y%m%d-%H%M%S')}.json",
        )
        if url is not None and not is_base_url(url.rstrip("/")):
            _fail(f"--url: {url!r} is not a URL without a path, such as http://127.0.0.1:8000.")
        record = asyncio.run(run_bench(options, Console(stderr=True, highlight=False)))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None  # asked to end
    except (BadPeer, LoadFailed, NotAnswering, NotStopped, StackEnded) as error:
        _fail(str(error))
    show(record, Console(highlight=False))
    plot(record, options.out.with_suffix(".png"))
    typer.echo(f"Every round's figures: {options.out}    picture: {options.out.with_suffix('.png')}")
    if invalid := invalid_figures(record):
        _fail("\n".join(invalid))


@app.command()
def bench_kv(
    prompt_tokens: Annotated[int, typer.Option(min=64, help="Length of each prompt.")] = 1536,
    repeats: Annotated[int, typer.Option(min=1, help="Prompts per row; medians are shown.")] = 5,
    part: Annotated[
        list[KvPart] | None,
        typer.Option(help="Ways to a prompt's KV, decodes beside prompts (split), or chats. May be given twice."),
    ] = None,
    up_arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[-- UP_OPTIONS]", help="Options of `headrace up` for the stacks.")
    ] = None,
) -> None:
    """Measures what KV from other processes of a stack is good for."""
    chosen = part or list(KvPart)
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="headrace-bench-kv-") as folder:
        options = KvBenchOptions(prompt_tokens, repeats, tuple(up_arguments or []), Path(folder))
        try:
            if KvPart.WAYS in chosen:
                show_kv(uvloop.run(run_kv_bench(options, _runs())), console)
            if KvPart.SPLIT in chosen:
                show_split(uvloop.run(run_split_bench(prompt_tokens, options.up_arguments, options.folder)), console)
            if KvPart.CHATS in chosen:
                show_chats(uvloop.run(run_chats_bench(options.up_arguments, options.folder, _runs())), console)
        except (KvBenchFailed, LoadFailed, StackEnded) as error:
            _fail(str(error))


@app.command()
def bench_gateway(
    peer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=URL,PID[,PID...]",
            help="Another OpenAI-compatible server with a model of its own pace, and the processes, with their "
            "children, whose CPU is counted; may be repeated.",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each load is run; medians are shown.")] = 3,
    seconds: Annotated[float, typer.Option(min=1.0, help="Seconds that each load is measured.")] = 8.0,
    part: Annotated[
        list[GatewayPart] | None,
        typer.Option(help="CPU and TTFT (cost), slow clients (slow), memory. Default: cost and slow."),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests of the part `memory`.")] = 100_000,
    up_arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[-- UP_OPTIONS]", help="Options of `headrace up` for the stacks.")
    ] = None,
) -> None:
    """Measures what everything but the model costs, with a worker that answers without one (`--engine echo`)."""
    chosen = part or [GatewayPart.COST, GatewayPart.SLOW]
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="headrace-bench-gateway-") as folder:
        try:
            options = GatewayBenchOptions(
                rounds, seconds, parse_control_planes(peer or []), tuple(up_arguments or []), Path(folder) / "stack.log"
            )
            if GatewayPart.COST in chosen:
                show_cost(uvloop.run(run_cost_bench(options, _runs())), console)
            if GatewayPart.SLOW in chosen:
                show_slow(uvloop.run(run_slow_bench(options, _runs())), console)
            if GatewayPart.MEMORY in chosen:
                show_memory(uvloop.run(run_memory_bench(options, _runs(), requests)), console)
        except (BadPeer, GatewayBenchFailed, NotAnswering, StackEnded) as error:
            _fail(str(error))


def _chosen_rows(names: str) -> tuple[Row, ...]:
    known = {row.name: row for row in ROWS}
    wanted = [name.strip() for name in names.split(",")]
    if unknown := [name for name in wanted if name not in known]:
        _fail(f"--rows: there is no row {unknown[0]!r}; the rows are {', '.join(known)}.")
    return tuple(known[name] for name in dict.fromkeys(wanted))


def _compares_batching(asked: bool | None, url: str | None, rows: str, up_arguments: list[str]) -> bool:
    """Whether the batching policies are compared, which fits only a stack that starts with each of them in turn."""
    chosen = any(argument.split("=")[0] == "--batching" for argument in up_arguments)
    if asked is None:
        return url is None and not chosen and rows == _ALL_ROWS
    if asked and (url is not None or chosen):
        _fail(f"--static starts stacks with either batching policy: leave out {'--batching' if chosen else '--url'}.")
    return asked


@models_app.command()
def pull(name: Annotated[str, typer.Argument(help="Local folder, hub id, or `default`.")]) -> None:
    """Fetches a model into the local store, so that a later start finds it there."""
    try:
        path = asyncio.run(pull_model(name, Console(stderr=True, highlight=False)))
    except PullFailed as error:
        _fail(str(error))
    typer.echo(path)


def main() -> None:
    """Entry point of the `headrace` command."""
    app()


def _runs() -> Path:
    return home_directory("state") / "run"


def _fail(message: str) -> NoReturn:
    typer.echo(f"headrace: {message}", err=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    main()
