from hypothesis import given
from hypothesis import strategies as st

from services.worker.engine.speculative import PromptLookup


def draft(tokens: list[int], room: int = 9) -> list[int]:
    lookup = PromptLookup(9)
    for _ in range(3):
        lookup.learn(1, 1)
    return lookup.draft(tokens, room)


def test_it_goes_on_as_where_its_last_tokens_stood_before() -> None:
    assert draft([1, 2, 3, 4, 5, 2], 2) == [3, 4]
    assert draft([1, 2, 3, 4, 5, 6]) == []
    assert draft([1]) == draft([]) == []


def test_the_longest_match_counts_and_of_these_the_last() -> None:
    assert draft([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 1) == [9]
    assert draft([2, 3, 9, 2, 3, 8, 2, 3], 1) == [8]


def test_a_loop_goes_round() -> None:
    assert draft([5, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]
    assert draft([4, 4], 3) == [4, 4, 4]


def test_a_long_prompt_is_indexed_in_a_few_turns() -> None:
    lookup, tokens = PromptLookup(9), [*range(10_000), 5]
    assert lookup.draft([*range(10_000), 9_000], 2) == []
    drafts = [lookup.draft(tokens, 2) for _ in range(10)]
    assert drafts[0] == [6, 7], "that of the beginning is known"
    assert lookup.draft([*range(10_000), 9_000], 2) == [9_001, 9_002]


def test_drafts_grow_while_all_is_right_and_else_shrink_to_what_was() -> None:
    lookup, lengths = PromptLookup(7), []
    for right in (2, 4, 7, 3, 4, 0, 0, 0, 1):
        lengths.append(len(lookup.draft([4, 4], 100)))
        lookup.learn(lengths[-1], right)
    assert lengths == [2, 4, 7, 7, 4, 7, 3, 1, 1]
    assert len(lookup.draft([4, 4], 100)) == 2


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 9))
def test_tokens_that_come_one_by_one_give_what_all_at_once_give(tokens: list[int], room: int) -> None:
    lookup = PromptLookup(9)
    grown = [lookup.draft(tokens[:length], room) for length in range(len(tokens) + 1)]
    assert grown == [PromptLookup(9).draft(tokens[:length], room) for length in range(len(tokens) + 1)]
    assert all(len(each) <= room for each in grown)
