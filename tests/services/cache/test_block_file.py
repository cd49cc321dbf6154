"""Files hold what was written into them, and whatever else lies in the folder is found out."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cache import block_file
from services.cache.block_file import BadFile, Found
from services.cache.block_key import BlockKey
from services.common.block_digest import digest
from services.common.kv_blocks import BlockBytes

NAME = b"n" * 16
KEY = BlockKey("f32", NAME)
BLOCK = BlockBytes(NAME, b"kv" * 5000, digest(b"kv" * 5000))


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def outcome(folder: Path) -> list[str]:
    """What a scan says of each file."""
    return ["found" if isinstance(item, Found) else item.reason for item in block_file.scan(folder)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    block_file.write(tmp_path, KEY, BLOCK)
    (path,) = tmp_path.iterdir()
    return path


@given(kv_format=st.text(st.characters(codec="utf-8"), min_size=1), name=st.binary(min_size=16, max_size=16))
def test_a_file_says_what_it_holds(tmp_path_factory: pytest.TempPathFactory, kv_format: str, name: bytes) -> None:
    folder = tmp_path_factory.mktemp("blocks")
    key, block = BlockKey(kv_format, name), BlockBytes(name, BLOCK.data, BLOCK.digest)
    block_file.write(folder, key, block)
    assert block_file.read(folder, key) == block
    (found,) = block_file.scan(folder)
    assert isinstance(found, Found)
    assert (found.header.key, found.header.digest, found.header.data_bytes) == (key, block.digest, len(block.data))
    (path,) = folder.iterdir()
    assert path.stat().st_size <= block_file.size_on_disk(key, len(block.data)) < path.stat().st_size + 4096


def test_a_flipped_byte_of_the_data_is_found_when_it_is_read(tmp_path: Path, path: Path) -> None:
    flip(path, -1)
    assert outcome(tmp_path) == ["found"], "the scan reads no data"
    with pytest.raises(BadFile, match="digest"):
        block_file.read(tmp_path, KEY)


@pytest.mark.parametrize(
    ("position", "reason"),
    [(0, "header"), (8, "version"), (10, "header"), (12, "header"), (28, "header"), (44, "header"), (52, "header")],
    ids=["magic", "version", "format length", "hash", "digest", "data length", "format"],
)
def test_a_flipped_byte_of_the_header_is_found_by_the_scan(
    tmp_path: Path, path: Path, position: int, reason: str
) -> None:
    flip(path, position)
    with pytest.raises(BadFile, match=reason):
        block_file.read(tmp_path, KEY)
    assert outcome(tmp_path) == [reason]
    assert not path.exists()


@pytest.mark.parametrize(("length", "reason"), [(0, "length"), (30, "length"), (55, "header"), (500, "length")])
def test_a_truncated_file_is_found_by_the_scan(tmp_path: Path, path: Path, length: int, reason: str) -> None:
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(BadFile, match=reason):
        block_file.read(tmp_path, KEY)
    assert outcome(tmp_path) == [reason]
    assert not path.exists()


def test_an_unfinished_file_is_removed_and_files_of_others_are_not(tmp_path: Path, path: Path) -> None:
    unfinished = tmp_path / f"{path.name}.tmp"
    unfinished.write_bytes(path.read_bytes()[:700])
    (tmp_path / "notes.txt").write_text("not a block")
    assert sorted(outcome(tmp_path)) == ["found", "unfinished"]
    assert {item.name for item in tmp_path.iterdir()} == {path.name, "notes.txt"}


def test_a_file_under_the_name_of_another_block_is_not_taken_for_it(tmp_path: Path, path: Path) -> None:
    other = BlockKey("f32", b"m" * 16)
    path.rename(block_file.path_of(tmp_path, other))
    with pytest.raises(BadFile, match="header"):
        block_file.read(tmp_path, other)
    assert outcome(tmp_path) == ["header"]


def test_what_cannot_be_read_is_said_so(tmp_path: Path) -> None:
    block_file.path_of(tmp_path, KEY).mkdir()
    assert outcome(tmp_path) == ["unreadable"]


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    block_file.path_of(tmp_path, KEY).mkdir()  # the rename fails
    with pytest.raises(OSError):
        block_file.write(tmp_path, KEY, BLOCK)
    assert [item.is_dir() for item in tmp_path.iterdir()] == [True]
