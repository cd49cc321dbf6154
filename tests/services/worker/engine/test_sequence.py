import pytest

from services.common.block_hash import chain_hashes
from services.worker.engine.sequence import Finish, SamplingParams, Sequence, StopParams

GREEDY = SamplingParams(temperature=0.0)


def make(tokens: list[int], prompt_length: int, stop: StopParams, sampling: SamplingParams = GREEDY) -> Sequence:
    return Sequence(key="a", tokens=tokens, prompt_length=prompt_length, sampling=sampling, stop=stop)


@pytest.mark.parametrize("prompt_length", [0, -1, 3])
def test_prompt_length_lies_within_the_tokens(prompt_length: int) -> None:
    with pytest.raises(ValueError, match="prompt_length"):
        make([1, 2], prompt_length, StopParams(max_tokens=1))


def test_delivered_tokens_must_leave_something_to_do() -> None:
    with pytest.raises(ValueError, match="leave nothing"):
        make([1, 2, 3], 1, StopParams(max_tokens=2))


def test_ends_at_max_tokens() -> None:
    sequence = make([1], 1, StopParams(max_tokens=2))
    sequence.append(5)
    assert sequence.finish is None
    sequence.append(5)
    assert sequence.finish is Finish.LENGTH
    with pytest.raises(AssertionError):
        sequence.append(5)


def test_ends_at_a_stop_token_even_as_the_last_one_allowed() -> None:
    sequence = make([1], 1, StopParams(max_tokens=1, stop_token_ids=frozenset({7})))
    sequence.append(7)
    assert sequence.finish is Finish.STOP


def test_a_stop_token_within_min_tokens_does_not_end_it() -> None:
    sequence = make([1], 1, StopParams(max_tokens=9, min_tokens=1, stop_token_ids=frozenset({7})))
    sequence.append(7)
    assert sequence.finish is None
    sequence.append(7)
    assert sequence.finish is Finish.STOP


def test_delivered_tokens_count_as_output() -> None:
    sequence = make([1, 2, 8, 9], 2, StopParams(max_tokens=3))
    assert (sequence.output_length, sequence.delivered, sequence.max_length) == (2, 2, 5)
    sequence.append(1)
    assert sequence.finish is Finish.LENGTH


def test_occurrences_tell_output_from_prompt() -> None:
    sampling = SamplingParams(presence_penalty=1.0)
    sequence = make([1, 1, 2, 8, 1], 3, StopParams(max_tokens=9), sampling)
    sequence.append(8)
    assert sequence.occurrences == {1: 1, 2: 0, 8: 2}


def test_occurrences_are_not_kept_without_penalties() -> None:
    sequence = make([1, 1, 2], 3, StopParams(max_tokens=9))
    sequence.append(8)
    assert sequence.occurrences == {}


def test_hashes_are_the_chain_from_its_root() -> None:
    sequence = make(list(range(10)), 10, StopParams(max_tokens=9))
    sequence.cache_root = b"root"
    sequence.hash_blocks(1, block_size=4)
    assert len(sequence.hashes) == 1
    sequence.hash_blocks(2, block_size=4)
    assert sequence.hashes == chain_hashes(b"root", list(range(10)), 4)
    with pytest.raises(AssertionError):
        sequence.hash_blocks(3, block_size=4)
