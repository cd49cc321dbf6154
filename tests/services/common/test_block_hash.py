from hypothesis import given
from hypothesis import strategies as st

from services.common.block_hash import HASH_BYTES, chain_hashes, chain_root

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=80)


@given(tokens, tokens, st.integers(1, 20))
def test_equal_prefixes_have_equal_hashes_and_nothing_else_does(a: list[int], b: list[int], block_size: int) -> None:
    root = chain_root("model", block_size, "")
    hashes_a, hashes_b = chain_hashes(root, a, block_size), chain_hashes(root, b, block_size)
    assert len(hashes_a) == len(a) // block_size
    for index, (x, y) in enumerate(zip(hashes_a, hashes_b, strict=False)):
        end = (index + 1) * block_size
        assert len(x) == HASH_BYTES
        assert (x == y) == (a[:end] == b[:end])


def test_model_block_size_and_salt_enter_the_root() -> None:
    roots = {
        chain_root(*parts)
        for parts in [("a", 16, ""), ("b", 16, ""), ("a", 32, ""), ("a", 16, "tenant"), ("a1", 6, "")]
    }
    assert len(roots) == 5


def test_hashes_stay_what_they_are() -> None:
    """A change here makes every stored block unreachable and splits a fleet of mixed versions."""
    root = chain_root("SmolLM2-135M-Instruct", 16, "")
    assert root.hex() == "74d7868ad175b0561932560fc44047c0"
    assert chain_hashes(root, range(16), 16)[0].hex() == "56f6c7a019d56c2a62aa7023d7613eb9"
