"""KvChunk on the wire, with as few copies of its data as gRPC in Python allows.

A generated message copies the data in, out to be sent, in again, and out to be used. So servers and clients of the
methods that move blocks exchange their own encoding of the same message: `encode` writes what any protobuf library
reads, `decode` reads what any of them writes, and both touch the data once or not at all.
"""

from collections.abc import Callable, Mapping
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from headrace.v1.cache_pb2 import KvChunk
from headrace.v1.machine_time_pb2 import PricedTime
from services.common.kv_blocks import BadBlock, Chunk

_DATA_TAG = (KvChunk.DATA_FIELD_NUMBER << 3 | 2).to_bytes(1, "little")  # 2: length-delimited

SIGN_OF_LIFE = KvChunk().SerializeToString()
"""An empty chunk: whoever computes the blocks is getting on."""


def encode(chunk: Chunk) -> bytes:
    """A copy of the chunk as a serialized KvChunk. The data comes first, so that `decode` finds it at once."""
    rest = KvChunk(
        kv_format=chunk.kv_format,
        block_hash=chunk.block_hash,
        offset_bytes=chunk.offset_bytes,
        last=chunk.last,
        digest=chunk.digest,
    )
    return b"".join((_DATA_TAG, _varint(len(chunk.data)), chunk.data, rest.SerializeToString()))


def encode_spent(spent: PricedTime) -> bytes:
    """The message that ends a prefill: what it took."""
    return KvChunk(spent=spent).SerializeToString()


def decode(message: bytes) -> Chunk:
    """The chunk in a serialized KvChunk; its data is a view into the message where that begins with it.

    Raises BadBlock if this is no KvChunk.
    """
    data, rest = memoryview(b""), message
    if message.startswith(_DATA_TAG):
        size, start = _read_varint(message, len(_DATA_TAG))
        data, rest = memoryview(message)[start : start + size], message[start + size :]
        if len(data) != size:
            raise BadBlock("encoding", f"A KvChunk of {len(message)} bytes arrived whose data is {size} bytes.")
    try:
        parsed = KvChunk.FromString(rest)
    except DecodeError as error:
        raise BadBlock("encoding", f"A message of {len(message)} bytes arrived that is no KvChunk.") from error
    return Chunk(
        parsed.kv_format,
        parsed.block_hash,
        memoryview(parsed.data) if parsed.data else data,
        parsed.offset_bytes,
        parsed.last,
        parsed.digest,
        parsed.spent if parsed.HasField("spent") else None,
    )


def with_chunks(add: Callable[[Any, Any], None]) -> Callable[[Any, grpc.aio.Server], None]:
    """A generated `add_..._to_server` for a servicer that gives every KvChunk encoded and receives Chunk."""
    return lambda servicer, server: add(servicer, _ChunkServer(server))


class _ChunkServer:
    """A gRPC server as `add_..._to_server` sees it."""

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """What is added here comes again, with names, to `add_registered_method_handlers`."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        ours = {name: _with_chunks(handler) for name, handler in handlers.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, ours),))
        self._server.add_registered_method_handlers(service, ours)


class ChunkChannel:
    """A channel for a generated stub, whose methods take KvChunk encoded and give Chunk."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._channel.unary_unary(*args, **kwargs)

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._channel.stream_stream(*args, **kwargs)

    def unary_stream(self, method: str, *, response_deserializer: Any, **kwargs: Any) -> Any:
        return self._channel.unary_stream(method, response_deserializer=_receiving(response_deserializer), **kwargs)

    def stream_unary(self, method: str, *, request_serializer: Any, **kwargs: Any) -> Any:
        return self._channel.stream_unary(method, request_serializer=_sending(request_serializer), **kwargs)


def _with_chunks(handler: Any) -> Any:
    return handler._replace(
        request_deserializer=_receiving(handler.request_deserializer),
        response_serializer=_sending(handler.response_serializer),
    )


def _sending(serializer: Any) -> Callable[[Any], bytes]:
    # By the message: the generated serializers of all types are one and the same.
    return lambda message: message if isinstance(message, bytes) else serializer(message)


def _receiving(deserializer: Any) -> Any:
    return decode if deserializer == KvChunk.FromString else deserializer


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    """The number, and where it ends."""
    number = 0
    for shift, byte in enumerate(message[at : at + 10]):
        number |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return number, at + shift + 1
    raise BadBlock("encoding", "A KvChunk arrived whose data has no length.")
