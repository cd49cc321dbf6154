"""Our encoding of KvChunk is protobuf's: each side reads what the other writes."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from headrace.v1.cache_pb2 import KvChunk
from services.common.kv_blocks import BadBlock, Chunk
from services.common.kv_wire import SIGN_OF_LIFE, decode, encode

CHUNKS = st.builds(
    Chunk,
    kv_format=st.text(),
    block_hash=st.binary(),
    data=st.one_of(st.binary(), st.integers(120, 20_000).map(bytes)),
    offset_bytes=st.integers(0, 2**62),
    last=st.booleans(),
    digest=st.binary(),
)


def as_message(chunk: Chunk) -> KvChunk:
    return KvChunk(
        kv_format=chunk.kv_format,
        block_hash=chunk.block_hash,
        data=bytes(chunk.data),
        offset_bytes=chunk.offset_bytes,
        last=chunk.last,
        digest=chunk.digest,
    )


@given(CHUNKS)
def test_protobuf_reads_what_we_write(chunk: Chunk) -> None:
    assert KvChunk.FromString(encode(chunk)) == as_message(chunk)


@given(CHUNKS)
def test_we_read_what_we_and_protobuf_write(chunk: Chunk) -> None:
    assert decode(encode(chunk)) == chunk
    assert decode(as_message(chunk).SerializeToString()) == chunk


def test_a_sign_of_life_is_empty() -> None:
    assert decode(SIGN_OF_LIFE) == Chunk("", b"", b"", 0, last=False, digest=b"")


@given(st.binary(max_size=40))
@example(b"\x1a")
@example(b"\x1a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff")
@example(b"\x1a\x05abc")
@example(b"\x1a\x01a\xff")
def test_anything_else_is_read_as_protobuf_reads_it_or_refused(message: bytes) -> None:
    try:
        expected = KvChunk.FromString(message)
    except DecodeError:
        with pytest.raises(BadBlock, match=r"KvChunk.*arrived|no KvChunk"):
            decode(message)
    else:
        expected.DiscardUnknownFields()
        assert as_message(decode(message)) == expected
