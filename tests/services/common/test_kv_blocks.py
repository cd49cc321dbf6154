"""Blocks survive the way through chunks, and nothing else does."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.block_digest import digest
from services.common.kv_blocks import CHUNK_BYTES, BadBlock, BlockAssembler, BlockBytes, Chunk, chunks

NAME = b"n" * 16


def block(data: bytes, name: bytes = NAME) -> BlockBytes:
    return BlockBytes(name, data, digest(data))


def assemble(messages: list[Chunk], assembler: BlockAssembler) -> list[BlockBytes]:
    return [whole for message in messages if (whole := assembler.take(message)) is not None]


@given(st.lists(st.integers(1, 3 * CHUNK_BYTES), min_size=1, max_size=3))
def test_blocks_come_out_as_they_went_in(sizes: list[int]) -> None:
    blocks = [block(bytes([index]) * size, bytes([index]) * 16) for index, size in enumerate(sizes)]
    messages = [message for one in blocks for message in chunks("f", one)]
    assert all(len(message.data) <= CHUNK_BYTES for message in messages)
    assert assemble(messages, BlockAssembler(3 * CHUNK_BYTES, "f")) == blocks


def corrupt(messages: list[Chunk]) -> None:
    messages[1].data = b"x" + bytes(messages[1].data[1:])


def cut_out(messages: list[Chunk]) -> None:
    del messages[1]


def swap(messages: list[Chunk]) -> None:
    messages[0], messages[1] = messages[1], messages[0]


def another_format(messages: list[Chunk]) -> None:
    messages[1].kv_format = "g"


def another_block(messages: list[Chunk]) -> None:
    messages[1].block_hash = b"m" * 16


def empty(messages: list[Chunk]) -> None:
    messages[1].data = b""


def endless(messages: list[Chunk]) -> None:
    messages[2].last = False
    messages.append(Chunk("f", NAME, b"x", 3 * CHUNK_BYTES, last=True, digest=b""))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (corrupt, "digest"),
        (cut_out, "order"),
        (swap, "order"),
        (another_format, "format"),
        (another_block, "order"),
        (empty, "size"),
        (endless, "size"),
    ],
)
def test_what_was_spoilt_on_the_way_is_refused(spoil: object, reason: str) -> None:
    messages = list(chunks("f", block(b"y" * 3 * CHUNK_BYTES)))
    spoil(messages)  # type: ignore[operator]
    with pytest.raises(BadBlock) as error:
        assemble(messages, BlockAssembler(3 * CHUNK_BYTES, "f"))
    assert error.value.reason == reason


def test_without_a_format_any_is_taken() -> None:
    messages = [*chunks("f", block(b"1")), *chunks("g", block(b"2"))]
    assert [whole.data for whole in assemble(messages, BlockAssembler(10))] == [b"1", b"2"]
