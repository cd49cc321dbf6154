from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.v1.cache_pb2 import Holder, HolderBlocks, IndexUpdate, SnapshotEnd
from services.scheduler.index import BlockIndex, IndexGap, IndexUnion


def block(number: int) -> bytes:
    return bytes([number]) * 16


def blocks(*numbers: int) -> bytes:
    return b"".join(block(number) for number in numbers)


class Feed:
    """An index fed with updates that are numbered as the cache service numbers them."""

    def __init__(self) -> None:
        self.index = BlockIndex()
        self._sequence = 0

    def __call__(self, update: IndexUpdate) -> None:
        self._sequence += 1
        update.epoch, update.sequence = "e", self._sequence
        self.index.apply(update)

    def join(self, id: str, kv_format: str = "f", incarnation: str = "1") -> None:
        self(IndexUpdate(holder_joined=Holder(id=id, incarnation=incarnation, kv_format=kv_format)))

    def change(
        self,
        id: str,
        stored: bytes = b"",
        removed: bytes = b"",
        replace: bool = False,
        stored_digests: bytes = b"",
    ) -> None:
        change = HolderBlocks(
            holder_id=id, stored=stored, removed=removed, replace=replace, stored_digests=stored_digests
        )
        self(IndexUpdate(blocks=change))


@pytest.fixture
def feed() -> Feed:
    return Feed()


def chain(*numbers: int) -> list[bytes]:
    return [block(number) for number in numbers]


def test_matches_are_the_leading_blocks_of_each_holder(feed: Feed) -> None:
    for id in "abcd":
        feed.join(id)
    feed.change("a", stored=blocks(1, 2, 3))
    feed.change("b", stored=blocks(1, 3))
    feed.change("c", stored=blocks(2, 3))
    assert dict(feed.index.match("f", chain(1, 2, 3, 4)).best(9)) == {("a", "1"): 3, ("b", "1"): 1}
    assert dict(feed.index.match("f", chain(1, 2)).best(9)) == {("a", "1"): 2, ("b", "1"): 1}
    assert dict(feed.index.match("f", []).best(9)) == {}
    assert dict(feed.index.match("f", chain(9)).best(9)) == {}
    assert dict(feed.index.match("other", chain(1)).best(9)) == {}


def test_the_best_holders_come_first(feed: Feed) -> None:
    for id, held in {"a": (1,), "b": (1, 2, 3), "c": (1, 2), "d": (2,)}.items():
        feed.join(id)
        feed.change(id, stored=blocks(*held))
    match = feed.index.match("f", chain(1, 2, 3))
    assert match.best(2) == [(("b", "1"), 3), (("c", "1"), 2)]
    assert [match.blocks((id, "1")) for id in "abcde"] == [1, 3, 2, 0, 0]
    assert match.blocks(("b", "2")) == 0, "another incarnation"


def test_formats_are_apart(feed: Feed) -> None:
    feed.join("a", "f")
    feed.join("b", "g")
    feed.change("a", stored=blocks(1))
    feed.change("b", stored=blocks(1))
    assert dict(feed.index.match("f", chain(1)).best(9)) == {("a", "1"): 1}
    assert dict(feed.index.match("g", chain(1)).best(9)) == {("b", "1"): 1}
    assert feed.index.blocks == 2


def test_digests_are_those_that_the_holder_published(feed: Feed) -> None:
    feed.join("a")
    feed.join("b")
    feed.change("a", stored=blocks(1, 2), stored_digests=blocks(101, 102))
    feed.change("b", stored=blocks(1, 2), stored_digests=block(201) + bytes(16))
    assert feed.index.digests(("a", "1"), chain(1, 2)) == blocks(101, 102)
    assert feed.index.digests(("b", "1"), chain(1)) == block(201)
    assert feed.index.digests(("b", "1"), chain(1, 2)) == b"", "one of them is not known"
    assert feed.index.digests(("a", "0"), chain(1)) == feed.index.digests(("c", "1"), chain(1)) == b""
    feed.change("a", stored=block(1), stored_digests=block(111))
    assert feed.index.digests(("a", "1"), chain(1)) == block(111), "its bytes are others now"


def test_holders_are_known_while_they_are_there(feed: Feed) -> None:
    feed.join("a", incarnation="2")
    holder = feed.index.holder(("a", "2"))
    assert holder is not None and holder.kv_format == "f"
    assert feed.index.holder(("a", "1")) is None
    feed(IndexUpdate(holder_left_id="a"))
    assert feed.index.holder(("a", "2")) is None


def test_removals_come_before_additions(feed: Feed) -> None:
    feed.join("a")
    feed.change("a", stored=blocks(1))
    feed.change("a", removed=blocks(1, 7), stored=blocks(1, 2))
    assert dict(feed.index.match("f", chain(1, 2)).best(9)) == {("a", "1"): 2}


def test_a_new_incarnation_holds_nothing(feed: Feed) -> None:
    feed.join("a")
    feed.change("a", stored=blocks(1))
    feed.join("a", incarnation="2")
    assert dict(feed.index.match("f", chain(1)).best(9)) == {}
    feed.change("a", stored=blocks(1))
    assert dict(feed.index.match("f", chain(1)).best(9)) == {("a", "2"): 1}


def test_who_leaves_takes_its_blocks_along(feed: Feed) -> None:
    feed.join("a")
    feed.join("b")
    feed.change("a", stored=blocks(1, 2))
    feed.change("b", stored=blocks(1))
    feed(IndexUpdate(holder_left_id="a"))
    assert dict(feed.index.match("f", chain(1, 2)).best(9)) == {("b", "1"): 1}
    assert feed.index.blocks == 1
    feed(IndexUpdate(holder_left_id="unknown"))


def test_a_gap_or_another_epoch_is_noticed(feed: Feed) -> None:
    feed.join("a")
    with pytest.raises(IndexGap):
        feed.index.apply(IndexUpdate(epoch="e", sequence=3, snapshot_end=SnapshotEnd()))
    with pytest.raises(IndexGap):
        feed.index.apply(IndexUpdate(epoch="x", sequence=2, snapshot_end=SnapshotEnd()))
    with pytest.raises(IndexGap):
        feed.change("nobody", stored=blocks(1))


operations = st.lists(
    st.one_of(
        st.tuples(st.just("join"), st.sampled_from("abc"), st.sampled_from("fg")),
        st.tuples(st.just("leave"), st.sampled_from("abc")),
        st.tuples(
            st.just("change"),
            st.sampled_from("abc"),
            st.lists(st.integers(0, 5), max_size=4),
            st.lists(st.integers(0, 5), max_size=4),
            st.booleans(),
        ),
    ),
    max_size=30,
)


@settings(max_examples=200)
@given(operations, st.lists(st.integers(0, 5), unique=True, max_size=6))
def test_it_agrees_with_a_plain_model(steps: list[tuple[str, ...]], wanted: list[int]) -> None:
    feed = Feed()
    formats: dict[str, str] = {}
    held: dict[str, set[int]] = defaultdict(set)
    for kind, id, *rest in steps:
        if kind == "join":
            feed.join(id, rest[0])
            formats[id], held[id] = rest[0], set()
        elif kind == "leave":
            feed(IndexUpdate(holder_left_id=id))
            formats.pop(id, None)
        elif id in formats:
            stored, removed, replace = rest
            feed.change(id, blocks(*map(int, stored)), blocks(*map(int, removed)), bool(replace))
            held[id] = (set() if replace else held[id] - set(map(int, removed))) | set(map(int, stored))
    for kv_format in "fg":
        expected = {}
        for id in (id for id, format in formats.items() if format == kv_format):
            leading = next((i for i, number in enumerate(wanted) if number not in held[id]), len(wanted))
            if leading:
                expected[id, "1"] = leading
        assert dict(feed.index.match(kv_format, chain(*wanted)).best(9)) == expected
    assert feed.index.blocks == len({(formats[id], number) for id in formats for number in held[id]})


def test_replicas_know_the_same_workers_and_each_what_it_keeps() -> None:
    first, second = Feed(), Feed()
    for feed in (first, second):
        feed.join("w")
        feed.change("w", stored=blocks(1))
    first.join("c1")
    first.change("c1", stored=blocks(1, 2), stored_digests=blocks(7, 8))
    second.join("c2")
    second.change("c2", stored=blocks(1, 2, 3), stored_digests=blocks(7, 8, 9))
    union = IndexUnion([first.index, second.index])
    match = union.match("f", [block(1), block(2), block(3), block(4)])
    assert match.best(9) == [(("c2", "1"), 3), (("c1", "1"), 2), (("w", "1"), 1)]
    assert match.best(1) == [(("c2", "1"), 3)]
    assert [match.blocks((id, "1")) for id in ("w", "c1", "c2", "x")] == [1, 2, 3, 0]
    assert union.digests(("c2", "1"), [block(3)]) == block(9)
    assert union.holder(("c1", "1")) == Holder(id="c1", incarnation="1", kv_format="f")
    assert union.holder(("c1", "2")) is None
    assert union.blocks == 3


def test_nothing_is_known_where_no_replica_is() -> None:
    union = IndexUnion([])
    assert not union.match("f", [block(1)]).best(9)
    assert (union.blocks, union.holder(("w", "1")), union.digests(("w", "1"), [block(1)])) == (0, None, b"")
