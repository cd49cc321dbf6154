from headrace.v1 import sampling_pb2
from services.common.redis.keys import Owner, known_priority, queue_stream, queue_streams


def test_streams_of_a_model_share_one_hash_tag() -> None:
    for model in ("smol", "org/model:8b", "odd}{name", "}", "{"):
        tags = {stream[stream.index("{") + 1 : stream.index("}")] for stream in queue_streams(model)}
        assert len(tags) == 1
        assert tags != {""}


def test_streams_of_different_models_differ() -> None:
    assert not set(queue_streams("a{b")) & set(queue_streams("a}b"))


def test_unspecified_and_unknown_priorities_are_normal() -> None:
    assert known_priority(sampling_pb2.PRIORITY_UNSPECIFIED) == sampling_pb2.PRIORITY_NORMAL
    assert queue_stream("m", 0) == queue_stream("m", 99) == queue_stream("m", sampling_pb2.PRIORITY_NORMAL)
    assert queue_stream("m", sampling_pb2.PRIORITY_LOW) == queue_streams("m")[-1]


def test_owners_of_both_kinds_have_different_consumers() -> None:
    assert Owner("gateway", "x", "1").consumer == "g:x:1"
    assert Owner("scheduler", "x", "1").consumer == "s:x:1"
