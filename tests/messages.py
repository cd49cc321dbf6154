"""Protobuf messages that nobody would send: made up from their descriptors, cut off, or no messages at all."""

import random
from collections.abc import Callable, Mapping

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

_DEPTH = 4
_TEXTS = ("", "x", "default", "日本語", "\0", "a" * 300, "../..", "127.0.0.1:1")


def _whole(bits: int, signed: bool) -> Callable[[random.Random], int]:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return lambda draw: draw.choice((0, 1, 2, 16, low, high, draw.randint(low, high)))


def _real(draw: random.Random) -> float:
    return draw.choice((0.0, -1.0, 0.5, 1e30, float("nan"), float("inf")))


_VALUES: Mapping[int, Callable[[random.Random], object]] = {
    FieldDescriptor.TYPE_INT32: _whole(32, True),
    FieldDescriptor.TYPE_INT64: _whole(64, True),
    FieldDescriptor.TYPE_UINT32: _whole(32, False),
    FieldDescriptor.TYPE_UINT64: _whole(64, False),
    FieldDescriptor.TYPE_FIXED32: _whole(32, False),
    FieldDescriptor.TYPE_FIXED64: _whole(64, False),
    FieldDescriptor.TYPE_BOOL: lambda draw: draw.random() < 0.5,
    FieldDescriptor.TYPE_FLOAT: _real,
    FieldDescriptor.TYPE_DOUBLE: _real,
    FieldDescriptor.TYPE_STRING: lambda draw: draw.choice(_TEXTS),
    FieldDescriptor.TYPE_BYTES: lambda draw: draw.randbytes(draw.choice((0, 1, 15, 16, 17, 4096))),
    # proto3's enums are open: any number may come.
    FieldDescriptor.TYPE_ENUM: lambda draw: draw.choice((0, 1, 2, 3, 99, -1)),
}


def made_up(kind: Descriptor, draw: random.Random, depth: int = _DEPTH) -> Message:
    """A message whose fields, about two thirds of them, hold anything their types allow."""
    message = GetMessageClass(kind)()
    for field in kind.fields:
        if draw.random() < 0.66 and (field.message_type is None or depth):
            _fill(message, field, draw, depth)
    return message


def hostile_bytes(kind: Descriptor, draw: random.Random) -> bytes:
    """A made-up message, whole, cut off or with a byte changed; or no message."""
    content = bytearray(made_up(kind, draw).SerializeToString())
    match draw.randrange(4):
        case 0:
            return bytes(content)
        case 1:
            return bytes(content[: draw.randint(0, len(content))])
        case 2 if content:
            content[draw.randrange(len(content))] ^= draw.randint(1, 255)
            return bytes(content)
        case _:
            return draw.randbytes(draw.choice((1, 7, 100, 10_000)))


def _fill(message: Message, field: FieldDescriptor, draw: random.Random, depth: int) -> None:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = field.message_type.fields_by_name["key"], field.message_type.fields_by_name["value"]
        getattr(message, field.name)[_VALUES[key.type](draw)] = _VALUES[value.type](draw)
    elif field.is_repeated:
        getattr(message, field.name).extend(_value(field, draw, depth) for _ in range(draw.randint(0, 3)))
    elif field.message_type is not None:
        getattr(message, field.name).CopyFrom(_value(field, draw, depth))
    else:
        setattr(message, field.name, _value(field, draw, depth))


def _value(field: FieldDescriptor, draw: random.Random, depth: int) -> object:
    return made_up(field.message_type, draw, depth - 1) if field.message_type else _VALUES[field.type](draw)
