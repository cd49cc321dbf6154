"""The options of `headrace up`, as the command line takes them."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from toolkit.command_line import REDIS_VARIABLE, checked_redis_url


class WeightType(StrEnum):
    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Quantization(StrEnum):
    NONE = "none"
    INT8 = "int8"
    INT4 = "int4"


class Batching(StrEnum):
    CONTINUOUS = "continuous"
    STATIC = "static"


class Placement(StrEnum):
    KV_AWARE = "kv_aware"
    LEAST_LOADED = "least_loaded"
    ROUND_ROBIN = "round_robin"


class EngineKind(StrEnum):
    MODEL = "model"
    ECHO = "echo"


Model = Annotated[
    str | None, typer.Option(help="Local folder, hub id or store name. Default: a small model that comes along.")
]
Workers = Annotated[
    int | None,
    typer.Option(min=0, help="Worker processes, which share the cores. Default: 1, or 0 beside those with a role."),
]
Schedulers = Annotated[int, typer.Option(min=1, help="Schedulers, which share the queue.")]
Gateways = Annotated[
    int, typer.Option(min=1, max=100, help="Gateways, on the two public ports and those that follow them.")
]
PrefillWorkers = Annotated[int, typer.Option(min=0, help="Workers that compute long prompts for others.")]
DecodeWorkers = Annotated[int, typer.Option(min=0, help="Workers that leave long prompts to those.")]
Dtype = Annotated[WeightType | None, typer.Option(help="Of weights and KV.")]
Quantize = Annotated[Quantization | None, typer.Option(help="Weights on a CPU in fewer bits.")]
KvBlocks = Annotated[int | None, typer.Option(min=1, help="KV blocks per worker. Default: by free memory.")]
MaxSequences = Annotated[int | None, typer.Option(min=1, help="Sequences that run together in a worker.")]
MaxBatchTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens computed in one step, which bounds how long others wait for a prompt."),
]
BatchingPolicy = Annotated[
    Batching | None, typer.Option(help="Whether sequences join a running batch (continuous) or wait for its end.")
]
PlacementPolicy = Annotated[
    Placement | None, typer.Option(help="How workers are chosen. kv_aware, the default, minds where KV is.")
]
CacheDisk = Annotated[
    Path | None, typer.Option(help="Folder for KV worth keeping, found again after a restart. Default: RAM alone.")
]
Deterministic = Annotated[
    bool, typer.Option(help="The same tokens for the same request, whatever else runs. Refused where impossible.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads per worker. Default: its share.")]
PricePerHour = Annotated[
    float | None, typer.Option(min=0, help="What an hour of one worker costs: see docs/costs.md. Default: not said.")
]
Engine = Annotated[
    EngineKind, typer.Option(help="echo: no model, answers repeat what was said; to try clients, or all but a model.")
]
Host = Annotated[str, typer.Option(help="Interface of the two public ports; 0.0.0.0 opens them to others.")]
HttpPort = Annotated[int, typer.Option(min=0, max=65535, help="OpenAI-compatible HTTP. 0: a free one.")]
GrpcPort = Annotated[int, typer.Option(min=0, max=65535, help="Public gRPC. 0: a free one.")]
RedisUrl = Annotated[
    str | None,
    typer.Option(
        envvar=REDIS_VARIABLE,
        callback=checked_redis_url,
        help="A Redis of yours, with AOF and without eviction, which keeps keys, budgets and costs. "
        "Default: a private one of this run.",
    ),
]
Tls = Annotated[
    Path | None, typer.Option("--tls", help="TLS on the public ports, with what `headrace certs create FOLDER` made.")
]
TlsCert = Annotated[
    Path | None,
    typer.Option(envvar="HEADRACE_GATEWAY_TLS_CERT", help="In place of --tls: a certificate of any CA, PEM."),
]
TlsKey = Annotated[Path | None, typer.Option(envvar="HEADRACE_GATEWAY_TLS_KEY", help="Its key.")]
Mtls = Annotated[bool, typer.Option("--mtls", help="Mutual TLS between the services, with a private CA of this run.")]
