"""The models that can be asked for: the union of what the schedulers announce, each with its tokenizer.

A model is usable once its tokenizer is here; tokenizers come from a worker by content hash and stay in memory. A model
whose last worker left is remembered for a while, so that its requests wait in the queue for the worker's restart; what
it said before can be read for as long as this process runs.
"""

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import grpc.aio

from headrace.v1.scheduler_pb2 import Catalog as CatalogMessage
from headrace.v1.scheduler_pb2 import ModelInfo
from headrace.v1.worker_pb2 import GetTokenizerRequest
from headrace.v1.worker_pb2_grpc import WorkerStub
from services.common.channel import cancel_and_wait, dial
from services.common.errors import Unavailable
from services.common.serve import give_back_memory
from services.common.tokenizer_hash import bundle_hash
from services.gateway.errors import ModelNotFound
from services.gateway.text.tokenization import ModelTokenizer

log = logging.getLogger(__name__)

_FETCH_TIMEOUT_S = 60.0
_RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class Model:
    """A usable model."""

    name: str
    max_context_tokens: int
    vocabulary_size: int
    block_size: int
    tokenizer: ModelTokenizer
    created_unix_s: int
    # Names the model and the KV formats of its workers, and so what tokens depend on beside the request.
    system_fingerprint: str


@dataclass(slots=True)
class _Known:
    info: ModelInfo
    worker_addresses: frozenset[str]
    kv_formats: frozenset[str]
    created_unix_s: int
    # Monotonic time at which the last worker left; None while there is one.
    left_at: float | None = None


class Catalog:
    """Models by name. `on_workers` is told all addresses of workers whenever they change."""

    def __init__(self, *, memory_s: float, on_workers: Callable[[frozenset[str]], None]) -> None:
        self._memory_s = memory_s
        self._on_workers = on_workers
        self._announced: dict[str, CatalogMessage] = {}  # by scheduler
        self._connected: set[str] = set()
        self._known: dict[str, _Known] = {}
        self._models: dict[str, Model] = {}
        # All that were usable once.
        self._met: dict[str, Model] = {}
        self._tokenizers: dict[str, ModelTokenizer] = {}
        self._fetching: dict[str, asyncio.Task[None]] = {}  # by tokenizer hash
        self._complained: set[tuple[str, str]] = set()
        self._changed = asyncio.Event()

    def announce(self, scheduler: str, catalog: CatalogMessage) -> None:
        """Takes the whole catalog of one connected scheduler."""
        self._connected.add(scheduler)
        self._announced[scheduler] = catalog
        self._merge()

    def disconnected(self, scheduler: str) -> None:
        """What a scheduler said counts on while no other is connected: its models are most likely still there."""
        self._connected.discard(scheduler)
        self._merge()

    def get(self, name: str) -> Model:
        """The model of that name. Raises ModelNotFound, or Unavailable while it is not usable yet."""
        if model := self._models.get(name):
            return model
        if name in self._known:
            raise Unavailable(f"The model {name!r} is being prepared; try again in a moment.")
        if not self._models:
            raise Unavailable("No model is known yet: no worker has registered.")
        shown = name if len(name) <= 100 else name[:100] + "..."
        raise ModelNotFound(f"The model {shown!r} does not exist. Known are: {', '.join(sorted(self._models))}.")

    def recall(self, name: str) -> Model | None:
        """The model of that name as it is, or as it last was: for what it said, not for what it is to say."""
        return self._met.get(name)

    def usable(self) -> list[Model]:
        """All usable models, by name."""
        return [self._models[name] for name in sorted(self._models)]

    async def run(self) -> None:
        """Fetches missing tokenizers and forgets models that have long been without a worker, until cancelled."""
        try:
            while True:
                self._changed.clear()
                incomplete = self._fetch_missing()
                self._forget()
                waiting = incomplete or any(known.left_at is not None for known in self._known.values())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_RETRY_S if waiting else None):
                        await self._changed.wait()
        finally:
            await cancel_and_wait(list(self._fetching.values()))

    def _merge(self) -> None:
        if self._connected:
            self._announced = {name: said for name, said in self._announced.items() if name in self._connected}
        workers: dict[str, set[str]] = {}
        formats: dict[str, set[str]] = {}
        infos: dict[str, ModelInfo] = {}
        for catalog in self._announced.values():
            for entry in catalog.entries:
                infos[entry.model.name] = entry.model
                workers.setdefault(entry.model.name, set()).update(entry.worker_addresses)
                formats.setdefault(entry.model.name, set()).update(entry.kv_formats)
        for name, info in infos.items():
            before = self._known.get(name)
            created = before.created_unix_s if before else int(time.time())
            self._known[name] = _Known(info, frozenset(workers[name]), frozenset(formats[name]), created)
        for name in self._known.keys() - infos.keys():
            self._known[name].left_at = self._known[name].left_at or time.monotonic()
        self._refresh_models()
        self._on_workers(frozenset().union(*workers.values()))
        self._changed.set()

    def _refresh_models(self) -> None:
        self._models = {
            name: Model(
                name=name,
                max_context_tokens=known.info.max_context_tokens,
                vocabulary_size=known.info.vocabulary_size,
                block_size=known.info.block_size,
                tokenizer=self._tokenizers[known.info.tokenizer_hash],
                created_unix_s=known.created_unix_s,
                system_fingerprint=_fingerprint(name, known.kv_formats),
            )
            for name, known in self._known.items()
            if known.info.tokenizer_hash in self._tokenizers
        }
        self._met |= self._models

    def _forget(self) -> None:
        oldest = time.monotonic() - self._memory_s
        gone = [name for name, known in self._known.items() if known.left_at is not None and known.left_at <= oldest]
        for name in gone:
            log.info("model %s: no worker for %.0f s, forgotten", name, self._memory_s)
            del self._known[name]
        if gone:
            self._refresh_models()

    def _fetch_missing(self) -> bool:
        """Begins to fetch every tokenizer that is not here and not on its way. Returns whether any is not here."""
        missing = [known for known in self._known.values() if known.info.tokenizer_hash not in self._tokenizers]
        for known in missing:
            wanted = known.info.tokenizer_hash
            if wanted not in self._fetching:
                self._fetching[wanted] = asyncio.create_task(self._fetch(known), name=f"tokenizer {wanted:.12}")
        return bool(missing)

    async def _fetch(self, known: _Known) -> None:
        wanted = known.info.tokenizer_hash
        try:
            tokenizer = await self._fetch_from(known.worker_addresses, wanted)
        finally:
            del self._fetching[wanted]
        if tokenizer is not None:
            self._tokenizers[wanted] = tokenizer
            self._refresh_models()
            log.info("model %s: usable", known.info.name)

    async def _fetch_from(self, addresses: Iterable[str], wanted: str) -> ModelTokenizer | None:
        for address in addresses:
            try:
                files = await _download(address, wanted)
                if await asyncio.to_thread(bundle_hash, files) == wanted:
                    return await asyncio.to_thread(_load, files)
                self._complain(address, wanted, "what it sent has another hash")
            except grpc.aio.AioRpcError as error:
                self._complain(address, wanted, error.details() or error.code().name)
            except Exception:
                log.exception("worker %s: tokenizer %.12s cannot be used", address, wanted)
        return None

    def _complain(self, address: str, wanted: str, reason: str) -> None:
        """Says once per address and tokenizer that it cannot be had: it is asked for again every second."""
        if (address, wanted) not in self._complained:
            self._complained.add((address, wanted))
            log.warning("worker %s: no tokenizer %.12s yet: %s", address, wanted, reason)


def _load(files: Mapping[str, bytes]) -> ModelTokenizer:
    """Raises ValueError."""
    tokenizer = ModelTokenizer(files)
    give_back_memory()
    return tokenizer


def _fingerprint(model: str, kv_formats: frozenset[str]) -> str:
    named = "\0".join([model, *sorted(kv_formats)])
    return f"fp_{hashlib.sha256(named.encode()).hexdigest()[:12]}"


async def _download(address: str, wanted: str) -> dict[str, bytes]:
    files: dict[str, bytearray] = {}
    async with dial(address) as channel:
        request = GetTokenizerRequest(hash=wanted)
        async for chunk in WorkerStub(channel).GetTokenizer(request, timeout=_FETCH_TIMEOUT_S):
            files.setdefault(chunk.name, bytearray()).extend(chunk.data)
    return {name: bytes(data) for name, data in files.items()}
