"""Builds what a worker runs: finds and loads the model, sizes the KV pool, puts the engine together, warms it up.

Blocking, and for a large model long: to be run off the event loop. Logs one line per stage.
"""

import asyncio
import concurrent.futures
import json
import logging
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from services.common.tokenizer_hash import bundle_hash
from services.worker import model_store
from services.worker.config import WorkerSettings
from services.worker.device_prices import price_of
from services.worker.engine.batcher import Batcher
from services.worker.engine.batching_policy import BatchingPolicy, ContinuousBatching, StaticBatching
from services.worker.engine.block_pool import BlockPool
from services.worker.engine.engine import Engine
from services.worker.engine.model.interface import ModelError, ModelFacts
from services.worker.engine.model.loading import load_model
from services.worker.engine.model_runner import ModelRunner, build_model_runner
from services.worker.kv_format import kv_format
from services.worker.start_request import ModelLimits
from services.worker.tokenizer_bundle import FACTS_FILE, tokenizer_bundle

log = logging.getLogger(__name__)

T = TypeVar("T")

# Shares of the free memory for weights and KV, by device. A GPU is the worker's alone, main memory is not.
_GPU_MEMORY_FRACTION = 0.9
_CPU_MEMORY_FRACTION = 0.3


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A warm engine and what others must know of it."""

    engine: Engine
    limits: ModelLimits
    num_blocks: int
    block_bytes: int
    device: torch.device
    kv_format: str
    tokenizer_hash: str
    tokenizer_files: dict[str, bytes]
    summary: str  # for the log
    price_per_hour: float | None = None  # of this worker, if somebody has said it


async def run_in_daemon_thread(work: Callable[[], T]) -> T:
    """Awaits blocking work that must not keep the process alive: a signal can end a start that is under way."""
    outcome: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except Exception as error:  # noqa: BLE001 - it is raised where the work is awaited
            outcome.set_exception(error)

    outcome.set_running_or_notify_cancel()  # from now on, giving up the wait leaves the work alone
    threading.Thread(target=run, name="loader", daemon=True).start()
    return await asyncio.wrap_future(outcome)


def load(settings: WorkerSettings) -> LoadedModel:
    """Everything up to a warm engine. Raises ModelError with one sentence when the model cannot be run as asked."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    log.info("loading %s", settings.model)
    folder = model_store.resolve(
        settings.model,
        root=settings.store,
        remote_code=settings.trust_remote_code,
        progress=_ProgressLog(settings.model),
    )
    runner = build_runner(settings, folder)
    log.info("warming up")
    runner.warm_up()
    bundle = tokenizer_bundle(folder)
    dtype = str(runner.dtype).removeprefix("torch.")
    facts = runner.facts
    if settings.deterministic and not facts.numerics:
        raise ModelError(
            f"deterministic needs the compiled implementation (Llama-shaped models on a CPU), and {settings.model} is "
            f"run by the {facts.implementation} one."
        )
    kind = ", ".join(
        part
        for part in (facts.implementation, facts.instruction_set, dtype, facts.quantization, str(facts.device))
        if part not in ("", "none")
    )
    limits = ModelLimits(
        name=settings.model_name or default_name(settings.model),
        vocabulary_size=runner.vocabulary_size,
        max_context_tokens=runner.max_model_len,
        block_size=runner.block_size,
        eos_token_ids=frozenset(json.loads(bundle[FACTS_FILE])["eos_token_ids"]),
        max_sequences=settings.max_sequences,
    )
    return LoadedModel(
        engine=_build_engine(settings, runner),
        limits=limits,
        num_blocks=runner.num_blocks,
        block_bytes=runner.block_bytes,
        device=runner.device,
        kv_format=kv_format(
            folder,
            dtype=dtype,
            quantization=facts.quantization,
            block_size=runner.block_size,
            implementation=facts.implementation,
            numerics=facts.numerics if settings.deterministic else "",
        ),
        tokenizer_hash=bundle_hash(bundle),
        tokenizer_files=bundle,
        summary=f"{limits.name} ({kind}), {runner.weight_bytes >> 20} MiB of weights, context "
        f"{runner.max_model_len}, {runner.num_blocks} KV blocks of {runner.block_size} tokens",
        price_per_hour=price_of(settings, facts.device),
    )


def build_runner(settings: WorkerSettings, folder: Path) -> ModelRunner:
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(
        folder,
        dtype=settings.dtype,
        device=device,
        implementation=settings.implementation,
        instruction_set=settings.instruction_set,
        quantize=settings.quantize,
        block_size=settings.block_size,
        kernels=model_store.kernels_folder(settings.store),
        trust_remote_code=settings.trust_remote_code,
        echo_step_s=settings.echo_step_ms / 1000,
    )
    on_cpu = model.facts.device.type == "cpu"  # wherever it was wanted: an echo needs no GPU
    default_fraction = _CPU_MEMORY_FRACTION if on_cpu else _GPU_MEMORY_FRACTION
    return build_model_runner(
        model,
        block_size=settings.block_size,
        kv_blocks=settings.kv_blocks,
        memory_fraction=settings.kv_memory_fraction or default_fraction,
        max_model_len=settings.max_model_len,
    )


def _build_engine(settings: WorkerSettings, runner: ModelRunner) -> Engine:
    pool = BlockPool(runner.num_blocks, runner.block_size)
    batcher = Batcher(
        pool,
        max_sequences=settings.max_sequences,
        max_batch_tokens=settings.max_batch_tokens,
        policy=_batching_policy(settings),
        speculative_rows=speculative_rows(settings, runner.facts),
    )
    return Engine(runner, pool, batcher, max_context=runner.max_model_len)


def speculative_rows(settings: WorkerSettings, facts: ModelFacts) -> int:
    """None where a row's result depends on how many rows there are, and so a token might on what was drafted; nor for
    an echo, which has a pace to keep.
    """
    return settings.speculative_rows if facts.implementation == "compiled" else 0


def _batching_policy(settings: WorkerSettings) -> BatchingPolicy:
    if settings.batching == "static":
        return StaticBatching(settings.static_batch_size, settings.static_timeout_ms / 1000, time.monotonic)
    return ContinuousBatching()


def default_name(model: str) -> str:
    """A hub id without its revision, or the last part of a path without what marks a file."""
    if model == "default":
        return model_store.DEFAULT_MODEL
    path = Path(model).expanduser()
    if not path.exists() and (hub_id := re.fullmatch(model_store.HUB_ID, model)):
        return hub_id["repo"]
    return path.resolve().name.removesuffix(".gguf") if path.exists() else model


class _ProgressLog:
    """Logs each stage of bringing a model into the store, and each further tenth of it."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._last: tuple[str, int] | None = None

    def __call__(self, stage: str, fraction: float) -> None:
        point = (stage, int(fraction * 10))
        if point != self._last:
            self._last = point
            log.info("loading %s: %s, %.0f %%", self._model, stage, fraction * 100)
