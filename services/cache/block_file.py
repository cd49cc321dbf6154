"""Blocks as files: one file each, self-describing, whole or not at all. Blocking calls, to be made off the event loop.

A file is written under a temporary name and renamed. It is not synced: after a crash of the machine it may be torn,
which its length or its digest shows. Knows no bounds and no order; the disk tier does.

Layout, little-endian: magic (8 bytes), version (u16), length of the KV format's name (u16), chain hash (16), digest of
the data (16), length of the data (u64), the KV format's name (UTF-8), XXH3 (64 bits) of all of that, the data.
"""

import contextlib
import hashlib
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import xxhash

from services.cache.block_key import BlockKey
from services.common.block_digest import digest
from services.common.kv_blocks import BlockBytes

MAGIC = b"HRKVBLK\n"
VERSION = 1
SUFFIX = ".kvblock"
UNFINISHED_SUFFIX = SUFFIX + ".tmp"

_FIXED = struct.Struct("<8sHH16s16sQ")
_HEADER_CHECK_BYTES = 8
_ALLOCATION_BYTES = 4096


class BadFile(Exception):
    """A file is not a block that can be given out.

    `reason`: `unfinished`, `header`, `version`, `length`, `digest`, or `unreadable` for what the system refused.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of its block."""

    key: BlockKey
    digest: bytes
    data_bytes: int


@dataclass(frozen=True, slots=True)
class Found:
    """A file whose header and length are right."""

    header: Header
    used_ns: int  # its mtime


def path_of(folder: Path, key: BlockKey) -> Path:
    kv_format = hashlib.sha256(key.kv_format.encode()).hexdigest()[:16]  # formats hold any character
    return folder / f"{kv_format}-{key.name.hex()}{SUFFIX}"


def size_on_disk(key: BlockKey, data_bytes: int) -> int:
    """Bytes that a block's file takes up, in whole units of a file system's allocation."""
    size = _FIXED.size + len(key.kv_format.encode()) + _HEADER_CHECK_BYTES + data_bytes
    return -(-size // _ALLOCATION_BYTES) * _ALLOCATION_BYTES


def write(folder: Path, key: BlockKey, block: BlockBytes) -> None:
    """Raises OSError, and then leaves nothing behind."""
    path = path_of(folder, key)
    unfinished = path.with_suffix(UNFINISHED_SUFFIX)
    try:
        with open(unfinished, "wb") as file:
            file.write(_pack_header(key, block))
            file.write(block.data)
        os.replace(unfinished, path)
    except OSError:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def read(folder: Path, key: BlockKey) -> BlockBytes:
    """Raises BadFile, and OSError."""
    path = path_of(folder, key)
    with open(path, "rb") as file:
        header = _read_header(file)
        data = file.read(header.data_bytes + 1)
    if header.key != key:
        raise BadFile("header")
    if len(data) != header.data_bytes:
        raise BadFile("length")
    if digest(data) != header.digest:
        raise BadFile("digest")
    return BlockBytes(key.name, data, header.digest)


def remove(folder: Path, keys: Iterable[BlockKey]) -> int:
    """How many of the files could not be removed. That one is not there is all right."""
    failed = 0
    for key in keys:
        try:
            path_of(folder, key).unlink(missing_ok=True)
        except OSError:
            failed += 1
    return failed


def mark_used(folder: Path, keys: Iterable[BlockKey], now_ns: int) -> None:
    """Gives the files their recency, each a nanosecond later than the one before."""
    for step, key in enumerate(keys):
        with contextlib.suppress(OSError):  # gone, or read-only: only the order after a restart suffers
            os.utime(path_of(folder, key), ns=(now_ns + step, now_ns + step))


def scan(folder: Path) -> Iterator[Found | BadFile]:
    """Every block in the folder, from its header and its length. What is no block by these is removed.

    Files of other names are left alone. Raises OSError if the folder itself cannot be made or read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in list(folder.iterdir()):
        if not path.name.endswith((SUFFIX, UNFINISHED_SUFFIX)):
            continue
        try:
            yield _inspect(folder, path)
        except (BadFile, OSError) as error:
            with contextlib.suppress(OSError):
                path.unlink()
            yield error if isinstance(error, BadFile) else BadFile("unreadable")


def _inspect(folder: Path, path: Path) -> Found:
    if path.name.endswith(UNFINISHED_SUFFIX):
        raise BadFile("unfinished")
    with open(path, "rb") as file:
        header = _read_header(file)
        status = os.fstat(file.fileno())
        if status.st_size != file.tell() + header.data_bytes:
            raise BadFile("length")
    if path_of(folder, header.key) != path:
        raise BadFile("header")
    return Found(header, status.st_mtime_ns)


def _pack_header(key: BlockKey, block: BlockBytes) -> bytes:
    kv_format = key.kv_format.encode()
    fixed = _FIXED.pack(MAGIC, VERSION, len(kv_format), key.name, block.digest, len(block.data))
    return fixed + kv_format + xxhash.xxh3_64_digest(fixed + kv_format)


def _read_header(file: BinaryIO) -> Header:
    fixed = file.read(_FIXED.size)
    if len(fixed) < _FIXED.size:
        raise BadFile("length")
    magic, version, kv_format_bytes, name, data_digest, data_bytes = _FIXED.unpack(fixed)
    if magic != MAGIC:
        raise BadFile("header")
    if version != VERSION:
        raise BadFile("version")
    kv_format = file.read(kv_format_bytes)
    if file.read(_HEADER_CHECK_BYTES) != xxhash.xxh3_64_digest(fixed + kv_format):
        raise BadFile("header")
    return Header(BlockKey(kv_format.decode(errors="replace"), name), data_digest, data_bytes)
