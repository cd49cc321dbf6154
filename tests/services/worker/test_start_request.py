"""What a Start may hold, and the sequences that come of it."""

import math
import struct

import pytest

from headrace.v1 import sampling_pb2, worker_pb2
from services.common.block_hash import chain_root
from services.common.errors import InvalidRequest
from services.worker.capacity import Room
from services.worker.engine.sequence import Sequence
from services.worker.start_request import ModelLimits, build_sequences, demand_of

LIMITS = ModelLimits(
    name="tiny",
    vocabulary_size=31,
    max_context_tokens=40,
    block_size=4,
    eos_token_ids=frozenset({2}),
    max_sequences=4,
)


def pack(ids: list[int]) -> bytes:
    return struct.pack(f"<{len(ids)}I", *ids)


def start(
    prompt: list[int],
    *,
    delivered: list[list[int]] | None = None,
    sampling: sampling_pb2.Sampling | None = None,
    stopping: sampling_pb2.Stopping | None = None,
) -> worker_pb2.Start:
    choices = [
        worker_pb2.StartChoice(handle=10 + index, choice=index, delivered_ids=pack(ids))
        for index, ids in enumerate([[]] if delivered is None else delivered)
    ]
    return worker_pb2.Start(
        request_id="r", prompt_ids=pack(prompt), choices=choices, sampling=sampling, stopping=stopping, cache_salt="s"
    )


def build(request: worker_pb2.Start) -> list[Sequence]:
    return build_sequences(request, [choice.handle for choice in request.choices], LIMITS)


def test_unset_knobs_mean_the_models_own_distribution_up_to_the_context() -> None:
    [sequence] = build(start([1, 2, 3]))
    assert sequence.key == 10 and sequence.tokens == [1, 2, 3] and sequence.prompt_length == 3
    assert (sequence.sampling.temperature, sequence.sampling.top_p, sequence.sampling.top_k) == (1.0, 1.0, 0)
    assert not sequence.sampling.penalized and sequence.sampling.logprobs is None
    assert sequence.stop.max_tokens == 37
    assert sequence.stop.stop_token_ids == {2}
    assert sequence.cache_root == chain_root("tiny", 4, "s")


def test_set_knobs_arrive() -> None:
    sampling = sampling_pb2.Sampling(temperature=0.0, top_k=5, seed=7, repetition_penalty=1.5, logit_bias={9: 1, 3: -2})
    stopping = sampling_pb2.Stopping(max_tokens=9, min_tokens=3, ignore_eos=True, stop_token_ids=[4, 5])
    [sequence] = build(start([1], sampling=sampling, stopping=stopping))
    assert sequence.sampling.greedy and sequence.sampling.top_k == 5 and sequence.sampling.seed == 7
    assert sequence.sampling.repetition_penalty == 1.5
    assert sequence.sampling.logit_bias == ((3, -2.0), (9, 1.0))
    assert (sequence.stop.max_tokens, sequence.stop.min_tokens) == (9, 3)
    assert sequence.stop.stop_token_ids == {4, 5}


def test_choices_follow_the_first_and_go_on_after_what_was_delivered() -> None:
    first, second = build(start([1, 2, 3, 4, 5], delivered=[[6], [7, 8]]))
    assert first.leader is None and second.leader is first
    assert (first.tokens, first.output_length) == ([1, 2, 3, 4, 5, 6], 1)
    assert (second.tokens, second.output_length, second.choice) == ([1, 2, 3, 4, 5, 7, 8], 2, 1)
    assert demand_of([first, second], 4) == Room(sequences=2, blocks=3, prefill_tokens=6)


def _sampling(**knobs: float) -> sampling_pb2.Sampling:
    return sampling_pb2.Sampling(**knobs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (start([]), "prompt is empty"),
        (start([1, 31]), "token id 31, and the vocabulary has 31"),
        (worker_pb2.Start(prompt_ids=b"abc", choices=[worker_pb2.StartChoice()]), "3 bytes"),
        (start([1] * 40), "prompt has 40 tokens.*context of 40"),
        (start([1] * 30, stopping=sampling_pb2.Stopping(max_tokens=11)), "between 1 and 10.*got 11"),
        (start([1], stopping=sampling_pb2.Stopping(max_tokens=0)), "got 0"),
        (start([1], stopping=sampling_pb2.Stopping(max_tokens=-1)), "got -1"),
        (start([1], stopping=sampling_pb2.Stopping(max_tokens=2, min_tokens=3)), "min_tokens.*got 3"),
        (start([1], stopping=sampling_pb2.Stopping(stop_token_ids=[99])), "Stop token id 99"),
        (start([1], delivered=[[1, 2]], stopping=sampling_pb2.Stopping(max_tokens=2)), "leave nothing of max_tokens 2"),
        (start([1], delivered=[[99]]), "delivered output has token id 99"),
        (start([1], delivered=[[]] * 5), "5 choices are more than the 4"),
        (start([1], sampling=_sampling(temperature=math.nan)), "temperature.*nan"),
        (start([1], sampling=_sampling(temperature=2.5)), "temperature.*2.5"),
        (start([1], sampling=_sampling(top_p=0.0)), "top_p"),
        (start([1], sampling=_sampling(top_k=-2)), "top_k"),
        (start([1], sampling=_sampling(min_p=1.5)), "min_p"),
        (start([1], sampling=_sampling(presence_penalty=3.0)), "presence_penalty"),
        (start([1], sampling=_sampling(frequency_penalty=-3.0)), "frequency_penalty"),
        (start([1], sampling=_sampling(repetition_penalty=0.0)), "repetition_penalty"),
        (start([1], sampling=sampling_pb2.Sampling(logprobs=21)), "logprobs must be between 0 and 20, got 21"),
        (start([1], sampling=sampling_pb2.Sampling(logprobs=-1)), "logprobs.*-1"),
        (start([1], sampling=sampling_pb2.Sampling(logit_bias={31: 1})), "logit_bias has token id 31"),
        (start([1], sampling=sampling_pb2.Sampling(logit_bias={3: math.nan})), "logit_bias.*nan"),
        (start([1], sampling=_sampling(repetition_penalty=math.inf)), "repetition_penalty"),
    ],
)
def test_what_can_never_run_is_refused_with_the_limit_named(request_: worker_pb2.Start, sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        build(request_)
