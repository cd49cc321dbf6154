"""What a cache service is told, against the set of blocks that are held."""

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from headrace.v1 import cache_pb2
from services.worker.cache_link import CHUNK_BLOCKS, Publication
from services.worker.engine.block_exchange import PublishedBlocks

BLOCKS = [bytes([number]) * 16 for number in range(6)]


def split(packed: bytes) -> set[bytes]:
    return {packed[start : start + 16] for start in range(0, len(packed), 16)}


def blocks(stored: Iterable[bytes], removed: Iterable[bytes] = ()) -> PublishedBlocks:
    """Events of these blocks; the digest of each is its name inverted."""
    stored = list(stored)
    return PublishedBlocks(stored, [bytes(255 - byte for byte in name) for name in stored], list(removed))


async def next_message(publication: Publication) -> cache_pb2.BlockEvents:
    return await anext(publication.messages())


# An operation: a change toward holding exactly this set, a snapshot, or a message taken by the stream.
OPERATIONS = st.lists(st.one_of(st.sets(st.sampled_from(BLOCKS)), st.sampled_from(["snapshot", "send"])), max_size=30)


@given(OPERATIONS)
async def test_the_cache_ends_up_with_what_is_held(operations: list[set[bytes] | str]) -> None:
    publication = Publication()
    held: set[bytes] = set()
    known: set[bytes] = set()
    sequence = 0
    pending = synchronized = False

    async def send() -> None:
        nonlocal sequence
        message = await next_message(publication)
        sequence += 1
        assert message.sequence == sequence
        if message.snapshot:
            known.clear()
        known.difference_update(split(message.removed))
        known.update(split(message.stored))
        assert message.stored_digests == bytes(255 - byte for byte in message.stored)
        assert known == held

    for operation in [*operations, "snapshot", "send"]:
        if isinstance(operation, set):
            publication.change(blocks(operation - held, removed=held - operation))
            pending = pending or (synchronized and held != operation)
            held = operation
        elif operation == "snapshot":
            publication.snapshot(blocks(held))
            pending = synchronized = True
        elif pending:
            await send()
            pending = False


async def test_a_large_snapshot_comes_in_chunks() -> None:
    publication = Publication()
    publication.snapshot(blocks(number.to_bytes(16, "big") for number in range(CHUNK_BLOCKS + 1)))
    messages = publication.messages()
    first, second = await anext(messages), await anext(messages)
    assert (first.sequence, first.snapshot, len(first.stored)) == (1, True, CHUNK_BLOCKS * 16)
    assert (second.sequence, second.snapshot, len(second.stored)) == (2, False, 16)


async def test_an_empty_snapshot_is_told_too() -> None:
    publication = Publication()
    publication.snapshot(blocks([]))
    message = await next_message(publication)
    assert message.snapshot and not message.stored
