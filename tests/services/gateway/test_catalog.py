import asyncio
import contextlib
import socket
from collections.abc import Sequence

import pytest

from headrace.v1.scheduler_pb2 import Catalog as CatalogMessage
from headrace.v1.scheduler_pb2 import CatalogEntry, ModelInfo
from services.common.errors import Unavailable
from services.common.tokenizer_hash import bundle_hash
from services.gateway.catalog import Catalog
from services.gateway.errors import ModelNotFound
from tests.services.gateway.fakes import FakeWorker, running_worker, says
from tests.services.gateway.stack import eventually
from tests.services.gateway.tokenizers_for_tests import bundle

HASH = bundle_hash(bundle())


def announcing(tokenizer_hash: str = HASH, kv_formats: Sequence[str] = ("format",), **workers: str) -> CatalogMessage:
    """A catalog that gives each model one worker."""
    infos = {
        name: ModelInfo(name=name, max_context_tokens=8, vocabulary_size=9, tokenizer_hash=tokenizer_hash)
        for name in workers
    }
    return CatalogMessage(
        entries=[
            CatalogEntry(model=infos[name], worker_addresses=[address], kv_formats=kv_formats)
            for name, address in workers.items()
        ]
    )


async def usable(catalog: Catalog, *names: str) -> None:
    async def all_there() -> bool:
        return [model.name for model in catalog.usable()] == sorted(names)

    await eventually(all_there)


async def test_a_model_is_usable_once_its_tokenizer_is_there() -> None:
    told: list[frozenset[str]] = []
    catalog = Catalog(memory_s=60, on_workers=told.append)
    async with running_worker(FakeWorker("w", says("x"))) as worker:
        with pytest.raises(Unavailable):
            catalog.get("m")
        catalog.announce("s1", announcing(m=worker.address))
        assert told[-1] == {worker.address}
        with pytest.raises(Unavailable):
            catalog.get("m")
        running = asyncio.create_task(catalog.run())
        await usable(catalog, "m")
        assert catalog.get("m").max_context_tokens == 8
        with pytest.raises(ModelNotFound):
            catalog.get("other")
        running.cancel()


async def test_a_fingerprint_names_the_model_and_its_kv_formats() -> None:
    catalog = Catalog(memory_s=60, on_workers=lambda _: None)

    def fingerprint(model: str = "m", **announced: CatalogMessage) -> str:
        for scheduler, message in announced.items():
            catalog.announce(scheduler, message)
        return catalog.get(model).system_fingerprint

    async with running_worker(FakeWorker("w", says("x"))) as worker:
        both = {"m": worker.address, "other": worker.address}
        catalog.announce("s1", announcing(**both))
        running = asyncio.create_task(catalog.run())
        await usable(catalog, *both)
        first = fingerprint()
        assert first.startswith("fp_") and first != fingerprint("other")
        assert fingerprint(s1=announcing(kv_formats=["b", "a"], **both)) != first
        assert fingerprint(s1=announcing(kv_formats=["b"], **both), s2=announcing(kv_formats=["a"], **both)) == (
            fingerprint(s2=announcing(kv_formats=["a", "b"], **both))
        )
        last = fingerprint()
        catalog.announce("s1", CatalogMessage())
        catalog.announce("s2", CatalogMessage())
        assert fingerprint() == last, "workers that left are remembered"
        running.cancel()


async def test_a_worker_that_cannot_be_reached_is_asked_again() -> None:
    catalog = Catalog(memory_s=60, on_workers=lambda _: None)
    catalog.announce("s1", announcing(m="127.0.0.1:1"))
    running = asyncio.create_task(catalog.run())
    async with running_worker(FakeWorker("w", says("x"))) as worker:
        catalog.announce("s2", announcing(m=worker.address))
        await usable(catalog, "m")
    running.cancel()


async def test_a_bundle_that_is_not_what_its_hash_names_is_not_used() -> None:
    catalog = Catalog(memory_s=60, on_workers=lambda _: None)
    async with running_worker(FakeWorker("bad", says("x"), files=bundle(chat_template="wrong"))) as bad:
        catalog.announce("s1", announcing(m=bad.address))
        running = asyncio.create_task(catalog.run())
        await bad.asked.wait()
        async with running_worker(FakeWorker("good", says("x"))) as good:
            catalog.announce("s2", announcing(m=good.address))
            await usable(catalog, "m")
    tokenizer = catalog.get("m").tokenizer
    assert tokenizer.decode(await tokenizer.encode_chat([{"role": "user", "content": "x"}])) != "wrong"
    running.cancel()


async def test_a_worker_that_does_not_answer_delays_no_other_model() -> None:
    catalog = Catalog(memory_s=60, on_workers=lambda _: None)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as mute:
        catalog.announce("s1", announcing("another hash", dead=f"127.0.0.1:{mute.getsockname()[1]}"))
        running = asyncio.create_task(catalog.run())
        await asyncio.to_thread(mute.accept)
        async with running_worker(FakeWorker("w", says("x"))) as worker:
            catalog.announce("s2", announcing(m=worker.address))
            await usable(catalog, "m")
        running.cancel()


async def test_schedulers_add_up_and_the_last_ones_word_counts_on() -> None:
    told: list[frozenset[str]] = []
    catalog = Catalog(memory_s=60, on_workers=told.append)
    catalog.announce("s1", announcing(a="w1"))
    catalog.announce("s2", announcing(b="w2"))
    assert told[-1] == {"w1", "w2"}
    catalog.disconnected("s1")
    assert told[-1] == {"w2"}
    catalog.disconnected("s2")
    assert told[-1] == {"w2"}
    catalog.announce("s1", announcing(a="w1"))
    assert told[-1] == {"w1"}


async def test_a_model_without_workers_is_forgotten_after_a_while() -> None:
    catalog = Catalog(memory_s=0, on_workers=lambda _: None)
    async with running_worker(FakeWorker("w", says("x"))) as worker:
        catalog.announce("s1", announcing(m=worker.address))
        running = asyncio.create_task(catalog.run())
        await usable(catalog, "m")
        catalog.announce("s1", announcing())
        await usable(catalog)
        with pytest.raises(Unavailable):
            catalog.get("m")
        recalled = catalog.recall("m")
        assert recalled is not None and recalled.name == "m", "what it said can still be read"
        assert catalog.recall("other") is None
        running.cancel()
