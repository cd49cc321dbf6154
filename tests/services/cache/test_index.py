"""The index against a plain model of it: a dictionary from holder to its blocks and their digests."""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.cache.index import (
    CHUNK_BLOCKS,
    UNKNOWN_DIGEST,
    Applied,
    BlockIndex,
    BlocksChanged,
    Change,
    Holder,
    HolderJoined,
    Holding,
    unpack_digests,
    unpack_hashes,
)
from services.common.errors import InvalidRequest

BLOCKS = [bytes([number]) * 16 for number in range(12)]
IDS = st.sampled_from(["w1", "w2", "w3"])
FORMATS = st.sampled_from(["f32", "bf16"])
HASHES = st.lists(st.sampled_from(BLOCKS), max_size=6).map(b"".join)
DIGESTS = st.sampled_from([b"", b"d" * 16, b"e" * 16])  # of each block stored in a message


def rebuild(changes: list[Change]) -> dict[str, tuple[Holder, dict[bytes, bytes]]]:
    """The copy that a watcher of these changes holds."""
    copy: dict[str, tuple[Holder, dict[bytes, bytes]]] = {}
    for change in changes:
        if isinstance(change, HolderJoined):
            copy[change.holder.id] = (change.holder, {})
        elif isinstance(change, BlocksChanged):
            blocks = copy[change.holder_id][1]
            if change.replace:
                blocks.clear()
            for block in unpack_hashes(change.removed):
                blocks.pop(block, None)
            blocks.update(unpack_digests(change.stored, change.stored_digests))
        else:
            del copy[change.holder_id]
    return copy


@dataclass
class Report:
    """What the model knows of one holder's current report."""

    holding: Holding
    next_sequence: int = 1
    synchronized: bool = False
    blocks: dict[bytes, bytes] = field(default_factory=dict)


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = BlockIndex()
        self.reports: dict[str, Report] = {}
        self.incarnations = 0

    @rule(holder_id=IDS, kv_format=FORMATS)
    def join(self, holder_id: str, kv_format: str) -> None:
        self.incarnations += 1
        holding = self.index.join(Holder(holder_id, str(self.incarnations), "host:1", kv_format))
        previous = self.reports.get(holder_id)
        self.reports[holder_id] = Report(holding)
        if previous is not None:
            assert not self.index.is_current(previous.holding)
            assert not self.index.leave(previous.holding), "a replaced report takes nothing with it"

    @rule(holder_id=IDS)
    def leave(self, holder_id: str) -> None:
        if report := self.reports.pop(holder_id, None):
            assert self.index.leave(report.holding)

    @rule(
        holder_id=IDS,
        removed=HASHES,
        stored=HASHES,
        digest=DIGESTS,
        snapshot=st.booleans(),
        lost=st.sampled_from([0, 0, 0, 1]),
    )
    def events(self, holder_id: str, removed: bytes, stored: bytes, digest: bytes, snapshot: bool, lost: int) -> None:
        if (report := self.reports.get(holder_id)) is None:
            return
        sequence = report.next_sequence + lost
        digests = digest * len(unpack_hashes(stored))
        applied = self.index.apply(
            report.holding, sequence, snapshot=snapshot, removed=removed, stored=stored, stored_digests=digests
        )
        report.next_sequence = sequence + 1
        if snapshot:
            report.blocks.clear()
            report.synchronized = True
        elif lost:
            report.synchronized = False
        assert (applied is Applied.TAKEN) == report.synchronized
        if report.synchronized:
            for block in unpack_hashes(removed):
                report.blocks.pop(block, None)
            report.blocks.update(dict.fromkeys(unpack_hashes(stored), digest or UNKNOWN_DIGEST))

    @rule(chain=HASHES, kv_format=FORMATS)
    def lookup(self, chain: bytes, kv_format: str) -> None:
        expected = {}
        for holder_id, report in self.reports.items():
            run = 0
            for block in unpack_hashes(chain):
                if block not in report.blocks:
                    break
                run += 1
            if run and report.holding.holder.kv_format == kv_format:
                expected[holder_id] = run
        found = self.index.lookup(kv_format, chain)
        assert {holder.id: run for holder, run in found} == expected
        assert [run for _, run in found] == sorted(expected.values(), reverse=True)

    @invariant()
    def snapshot_and_counts_equal_the_model(self) -> None:
        copy = rebuild(list(self.index.snapshot()))
        assert copy == {id_: (report.holding.holder, report.blocks) for id_, report in self.reports.items()}
        distinct: dict[str, set[bytes]] = {}
        for report in self.reports.values():
            distinct.setdefault(report.holding.holder.kv_format, set()).update(report.blocks)
        assert self.index.block_counts() == {name: len(blocks) for name, blocks in distinct.items()}
        assert self.index.holder_count == len(self.reports)


IndexMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestIndex = IndexMachine.TestCase


def test_a_gap_is_reported_once_and_events_are_ignored_until_a_snapshot() -> None:
    index = BlockIndex()
    holding = index.join(Holder("w", "a", "host:1", "f32"))

    def apply(sequence: int, stored: bytes, *, snapshot: bool = False) -> Applied:
        return index.apply(holding, sequence, snapshot=snapshot, removed=b"", stored=stored)

    assert apply(1, BLOCKS[0], snapshot=True) is Applied.TAKEN
    assert apply(3, BLOCKS[1]) is Applied.GAP
    assert apply(4, BLOCKS[2]) is Applied.AWAITING_SNAPSHOT
    assert index.block_counts() == {"f32": 1}, "what was known stays until the snapshot replaces it"
    assert apply(9, BLOCKS[3], snapshot=True) is Applied.TAKEN
    assert apply(10, BLOCKS[4]) is Applied.TAKEN
    assert index.lookup("f32", BLOCKS[3] + BLOCKS[4] + BLOCKS[0]) == [(holding.holder, 2)]
    assert apply(12, b"") is Applied.GAP


def test_in_one_message_removals_happen_before_additions() -> None:
    index = BlockIndex()
    holding = index.join(Holder("w", "a", "host:1", "f32"))
    index.apply(holding, 1, snapshot=True, removed=BLOCKS[0], stored=BLOCKS[0])
    assert index.lookup("f32", BLOCKS[0]) == [(holding.holder, 1)]


def test_cut_off_hashes_change_nothing() -> None:
    index = BlockIndex()
    holding = index.join(Holder("w", "a", "host:1", "f32"))
    index.apply(holding, 1, snapshot=True, removed=b"", stored=BLOCKS[0])
    with pytest.raises(InvalidRequest, match="17 bytes"):
        index.apply(holding, 2, snapshot=False, removed=BLOCKS[0], stored=BLOCKS[1] + b"x")
    assert index.lookup("f32", BLOCKS[0]) == [(holding.holder, 1)]


def test_a_long_snapshot_comes_in_chunks() -> None:
    index = BlockIndex()
    holding = index.join(Holder("w", "a", "host:1", "f32"))
    stored = b"".join(number.to_bytes(16, "big") for number in range(CHUNK_BLOCKS + 1))
    index.apply(holding, 1, snapshot=True, removed=b"", stored=stored)
    index.apply(holding, 2, snapshot=False, removed=b"", stored=stored[-32:-16], stored_digests=b"d" * 16)
    long, short = (change for change in index.snapshot() if isinstance(change, BlocksChanged))
    assert long.stored + short.stored == stored and len(short.stored) == 16
    assert long.stored_digests == UNKNOWN_DIGEST * (CHUNK_BLOCKS - 1) + b"d" * 16
    assert short.stored_digests == b"", "no digest of this chunk is known"


@pytest.mark.parametrize("digests", [b"d" * 15, b"d" * 17, b"d" * 48])
def test_digests_come_for_all_blocks_or_for_none(digests: bytes) -> None:
    index = BlockIndex()
    holding = index.join(Holder("w", "a", "host:1", "f32"))
    with pytest.raises(InvalidRequest, match="all of them or for none"):
        index.apply(holding, 1, snapshot=True, removed=b"", stored=BLOCKS[0] + BLOCKS[1], stored_digests=digests)
    assert index.lookup("f32", BLOCKS[0]) == []
