"""`headrace stats`: its options and what it prints."""

import asyncio
from typing import Annotated

import typer
from google.protobuf.json_format import MessageToJson
from rich.console import Console

from headrace.v1.inference_pb2 import Distribution, InferenceMetrics
from services.common.tls import FrontCert
from toolkit.command_line import fail, runs
from toolkit.run_directory import running_stacks
from toolkit.stats import NoStats, gather_stats
from toolkit.tables import new_table, print_whole

_LATENCIES = (("TTFT", "time_to_first_token_s"), ("between", "inter_token_latency_s"), ("whole", "end_to_end_s"))


def stats(
    gateway: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST:PORT", help="gRPC of a gateway without TLS; may be repeated. Default: those here."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Shows how requests went: counts, tokens/s and latencies (mean, p50, p95, p99 in ms), of all gateways together."""
    try:
        addresses, cert = (gateway, None) if gateway else _gateways_here()
        report = asyncio.run(gather_stats(addresses, cert))
    except NoStats as error:
        fail(str(error))
    if as_json:
        typer.echo(MessageToJson(report, preserving_proto_field_name=True, always_print_fields_with_no_presence=True))
    elif not report.windows:
        typer.echo("No request has come yet.")
    else:
        _show(report)


def _gateways_here() -> tuple[list[str], FrontCert | None]:
    stacks = running_stacks(runs())
    if len(stacks) != 1:
        raise NoStats(f"{len(stacks) or 'No'} stacks run here: name the gateways of one with --gateway.")
    [stack] = stacks
    return [process.address for process in stack.processes if process.service == "gateway"], stack.front_cert


def _show(report: InferenceMetrics) -> None:
    latencies = (f"{name}, ms" for name, _ in _LATENCIES)
    table = new_table("model", "window", "requests", "failed", "tokens", "tokens/s", *latencies, words=2)
    for window in report.windows:
        counts = (f"{count:,}" for count in (window.requests, window.failed, window.tokens))
        told = (_told(getattr(window, field)) for _, field in _LATENCIES)
        table.add_row(window.model, window.window, *counts, f"{window.tokens_per_s:,.1f}", *told)
    console = Console(highlight=False)
    print_whole(table, console)
    console.print("Latencies are mean, p50, p95 and p99: to the first token, between tokens, and of the whole request.")


def _told(one: Distribution) -> str:
    return " ".join(f"{1000 * value:.1f}" for value in (one.mean, one.p50, one.p95, one.p99)) if one.count else "-"
