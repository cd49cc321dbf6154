"""JSON bodies into structs: mistakes are told by field and value, and fields that nobody reads are logged."""

import logging
import re
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec

from services.common.errors import InvalidRequest
from services.gateway import validation

log = logging.getLogger(__name__)

B = TypeVar("B", bound=msgspec.Struct)

# What decoding a whole body may raise though its known fields were read: msgspec looks no closer at what it skips.
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def parse(body: bytes, decoder: "msgspec.json.Decoder[B]") -> B:
    """Decodes a body. Raises InvalidRequest that names the field at fault."""
    try:
        read = decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _shape_error(body, str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        if not body.strip():
            raise InvalidRequest("The body is empty.") from error
        raise InvalidRequest(f"The body is not valid JSON in UTF-8: {error}.") from error
    except RecursionError as error:
        raise InvalidRequest("The body's JSON is nested too deeply.") from error
    if log.isEnabledFor(logging.DEBUG):
        _log_unknown(body, read)
    return read


def _log_unknown(body: bytes, read: msgspec.Struct) -> None:
    """Each field once: one that every item of a list has, by the first of them."""
    try:
        document = msgspec.json.decode(body)
    except _UNREADABLE as error:
        log.debug("fields of a body that are not known cannot be read: %s", error)
        return
    by_field: dict[str, str] = {}
    for path in _unknown(document, read):
        by_field.setdefault(re.sub(r"\[\d+\]", "[]", path), path)
    if by_field:
        names = sorted(by_field.values())
        log.debug("fields of a body that are not known and change nothing: %s", validation.shorten(names))


def _unknown(document: Any, read: Any, path: str = "") -> Iterator[str]:
    """Where a document has fields that the structs which were read from it do not have."""
    if isinstance(read, msgspec.Struct):
        for name, value in document.items():
            place = f"{path}.{name}" if path else name
            if name in read.__struct_fields__:
                yield from _unknown(value, getattr(read, name), place)
            else:
                yield place
    elif isinstance(read, list):
        for position, (item, item_read) in enumerate(zip(document, read, strict=True)):
            yield from _unknown(item, item_read, f"{path}[{position}]")


def _shape_error(body: bytes, message: str) -> InvalidRequest:
    """msgspec's message, with the field as callers write it and the value that it has."""
    problem, _, place = message.partition(" - at `")
    field = place.removeprefix("key` in `").strip("`$.").removesuffix("[...]")  # "[...]": any value of a mapping
    if not field:
        missing = re.search(r"missing required field `(\w+)`", problem)
        return InvalidRequest(f"{problem}.", field=missing.group(1) if missing else None)
    problem = f"{field}: {problem.replace('`', '')}"
    try:
        value = validation.shorten(_value_at(msgspec.json.decode(body), field))
    except _UNREADABLE:
        return InvalidRequest(f"{problem}.", field=field)
    return InvalidRequest(f"{problem}, with the value {value}.", field=field)


def _value_at(document: Any, path: str) -> Any:
    for name, index in re.findall(r"(\w+)|\[(\d+)\]", path):
        try:
            document = document[name] if name else document[int(index)]
        except (KeyError, IndexError, TypeError):
            return None
    return document
